"""What surrounds an attack: its seed, frozen weights, its precision, and a watch on the gradients it asks for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drs.errors import UserError


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 off; an image on the decision boundary would be judged by its rounding, some 1e-3 of a logit."""
    with tensor_cores(False):
        yield


@contextmanager
def tensor_cores(tf32: bool) -> Iterator[None]:
    """Let a card compute products and convolutions of float32 numbers in TF32, or not; elsewhere it changes nothing."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@contextmanager
def seeded(model: nn.Module, seed: int, tf32: bool = False) -> Iterator[None]:
    """Seed the randomness and freeze the weights, in float32 with TF32 off or on; restore all of it, and the modes."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.enable_grad(),
        torch.autocast(_device_type(model), enabled=False),
        tensor_cores(tf32),
    ):
        torch.manual_seed(seed)
        for parameter in flags:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            for module, training in modes.items():
                module.training = training


@contextmanager
def isolated(model: nn.Module, seed: int, tf32: bool = False) -> Iterator[None]:
    """Do as ``seeded`` does, and watch the gradients.

    Raises:
        UserError: Where the gradient for an image is not finite: on a CPU from inside the attack, else at its end.
    """
    with seeded(model, seed, tf32):
        late = None if _reads_at_once(_device_type(model)) else LateWatch()
        watch = model.register_forward_pre_hook(late or watch_gradient)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if late is not None:  # what breaks a gradient breaks more, and says less
                late.check()
            raise
        else:
            if late is not None:
                late.check()
        finally:
            watch.remove()


def _reads_at_once(device_type: str) -> bool:
    """Return whether the host has a device's values at once; for those of an accelerator it would wait."""
    return device_type == "cpu"


class LateWatch:
    """A watch on gradients that is read once, after the attack, so that no step waits for it."""

    def __init__(self) -> None:
        self._largest: list[Tensor] = []

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Watch, as a forward pre-hook, the gradient for images that ask for one."""
        if torch.is_grad_enabled() and isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
            inputs[0].register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        # One kernel; it is NaN where an entry is, and infinite only where one is.
        if gradient.numel():
            self._largest.append(torch.linalg.vector_norm(gradient, ord=math.inf))

    def check(self) -> None:
        """Raise ``UserError`` if a gradient was not finite."""
        if self._largest and not bool(torch.isfinite(torch.stack(self._largest)).all()):
            raise UserError(_broken_gradient("the model's", "some of the images"))


def _broken_gradient(whose: str, images: str) -> str:
    return (
        f"{whose} gradient is not finite for {images}; gradient attacks would leave them alone, and the model would "
        "look robust"
    )


def watch_gradient(_: nn.Module, inputs: tuple[Any, ...], whose: str = "the model's") -> None:
    """Refuse, as a forward pre-hook, gradients for the images that are not finite: ``UserError`` on the way back."""
    if torch.is_grad_enabled() and isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
        inputs[0].register_hook(partial(_refuse_broken_gradient, whose))


def _refuse_broken_gradient(whose: str, gradient: Tensor) -> None:
    # A value that is not finite makes the sum so too, and a sum is soon made; it may overflow without one.
    if math.isfinite(float(gradient.sum())):
        return
    bad = ~torch.isfinite(gradient).flatten(1).all(dim=1)
    if bool(bad.any()):
        raise UserError(_broken_gradient(whose, f"{int(bad.sum())} of {len(bad)} images"))


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")
