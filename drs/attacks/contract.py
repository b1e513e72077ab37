"""What every attack must keep, checked on every batch.

Pixels in [0,1] and a model in eval mode go in; what comes back is finite, inside [0,1] and, for an attack with a
bound, within epsilon. Predictions that score attacks are the model's own, in float32 with TF32 off.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from drs.attack_config import SLACK
from drs.attacks.isolation import full_precision
from drs.batches import in_batches
from drs.errors import UserError

SAME_SUM = 0.01
"""Outputs in [0,1] are probabilities where their row sums differ by less than this share of what they do themselves."""
LEAST_ROWS = 4
"""Of fewer images, logits too may happen to have such sums."""


class Attack(Protocol):
    """An attack on a classifier.

    Attributes:
        name: For messages.
        norm: ``linf`` or ``l2``, the norm it is scored in.
        bounded: Whether it takes an epsilon; without one it looks for a small perturbation of any size.

    An attack whose images end on the decision boundary has a true attribute ``ends_on_boundary``.
    """

    name: str
    norm: str
    bounded: bool

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """Return adversarial images like ``images`` ``[B, C, H, W]``; ``epsilon`` is infinite where not bounded."""


@dataclass(frozen=True)
class AttackOutcome:
    """What an attack made of N samples, all on the CPU.

    Attributes:
        logits: ``[N, K]`` float32, of the adversarial images.
        distance: ``[N]`` float64, the norm of the perturbation in pixel units.
        batch_size: Samples per batch: as asked, or less where a GPU's memory ran out.
    """

    logits: Tensor
    distance: Tensor
    batch_size: int


def perturbation_norm(images: Tensor, adversarial: Tensor, norm: str) -> Tensor:
    """Return the ``linf`` or ``l2`` norm ``[B]`` of the difference of two image batches, float64, pixel units."""
    difference = (adversarial.double() - images.double()).flatten(1)
    return torch.linalg.vector_norm(difference, ord=math.inf if norm == "linf" else 2, dim=1)


def check_pixels(images: Tensor, source: str) -> None:
    """Raise ``UserError`` unless ``images`` is float32 ``[B, C, H, W]``, finite and inside [0,1] (1e-6 slack)."""
    if images.dtype != torch.float32 or images.dim() != 4:
        raise UserError(f"{source}: float32 images [B, C, H, W] are required, not {images.dtype} {list(images.shape)}")
    if not images.numel():
        return
    low, high = (float(value) for value in torch.aminmax(images))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{source}: a pixel is not finite")
    if low < -SLACK or high > 1 + SLACK:
        raise UserError(
            f"{source}: pixels lie in [{low:g}, {high:g}], but must lie in [0, 1]; normalise inside the model"
        )


def check_epsilon(epsilon: float, norm: str, n_pixels: int) -> None:
    """Raise ``UserError`` unless epsilon is above 0 and at most the diameter of [0,1]^n in ``norm``.

    Args:
        epsilon: In pixel units.
        norm: ``linf`` or ``l2``.
        n_pixels: n, the number of values C*H*W of an image.
    """
    if not epsilon > 0:
        raise UserError(f"epsilon={epsilon}: must be above 0")
    if norm == "linf" and epsilon > 1:
        raise UserError(f"epsilon={epsilon}: must be at most 1; pixels lie in [0,1], so write 8/255 rather than 8")
    if norm == "l2" and epsilon > math.sqrt(n_pixels):
        raise UserError(
            f"epsilon={epsilon}: must be at most sqrt({n_pixels}) = {math.sqrt(n_pixels):.4g}; no two images of "
            f"{n_pixels} pixel values in [0,1] are further apart in l2"
        )


def check_eval_mode(model: nn.Module) -> None:
    """Raise ``UserError`` if any module of the model is in training mode."""
    for name, module in model.named_modules():
        if module.training:
            raise UserError(
                f"the model is in training mode (module '{name or 'the model itself'}'); call model.eval() first"
            )


@torch.no_grad()
def check_model(model: nn.Module, images: Tensor) -> None:
    """Raise ``UserError`` for a model that gradient attacks would judge wrongly, on the first 16 images.

    Refused are outputs that are not ``[B, K]`` with K >= 2; probabilities in the place of logits, whose gradients
    vanish where the model is confident, scaled and smoothed ones too; and a forward pass that gives another answer the
    second time. Log-probabilities pass: they are logits up to a shift of each row.
    """
    in_batches(lambda start, stop: _check_answers(model, images[start:stop]), min(16, len(images)), 16, "the model")


def _check_answers(model: nn.Module, few: Tensor) -> None:
    with full_precision():
        raw = model(few)
        if not isinstance(raw, Tensor):
            raise UserError(f"the model returns a {type(raw).__name__}; a tensor of logits [B, K] is needed")
        outputs, again = raw.float(), model(few).float()
    if outputs.dim() != 2 or len(outputs) != len(few) or outputs.shape[1] < 2:
        raise UserError(
            f"the model returns {list(outputs.shape)} for {len(few)} images; logits [B, K], K >= 2, are needed"
        )
    scale = float(outputs.abs().max()) + 1
    if bool((torch.isfinite(outputs) & ((outputs - again).abs() > 1e-4 * scale)).any()):
        raise UserError(
            "the model is stochastic: two forward passes of the same images differ; fix its randomness, or attack the "
            "expectation over it, which these attacks do not do"
        )
    if _are_probabilities(outputs, 1e-4 if raw.dtype in (torch.float32, torch.float64) else 2e-2):
        low, high, sums = float(outputs.min()), float(outputs.max()), outputs.sum(dim=1)
        raise UserError(
            f"the model returns probabilities, or scaled or smoothed ones (values from {low:.3g} to {high:.3g}, and "
            f"each row sums to {float(sums.mean()):.4g}); return logits or log-probabilities"
        )


def _are_probabilities(outputs: Tensor, rounding: float) -> bool:
    """Return whether outputs ``[B, K]`` are probabilities, or nearly: scaled, mixed with a constant, or clamped.

    They lie in [0,1], and their sums hardly differ where they themselves do. Logits that are the same for all images
    pass: a collapsed model has them.
    """
    if bool((outputs < 0).any() | (outputs > 1 + rounding).any()):
        return False
    sums = outputs.sum(dim=1)
    if bool(((sums - 1).abs() < rounding).all()):
        return True
    varied = float((outputs.amax(dim=0) - outputs.amin(dim=0)).max())
    return len(outputs) >= LEAST_ROWS and float(sums.max() - sums.min()) < max(SAME_SUM * varied, rounding) < varied


def check_logits(logits: Tensor, source: str) -> None:
    """Raise ``UserError`` if a logit is not finite: the argmax of NaN is class 0, so a dead model would look robust."""
    bad = ~torch.isfinite(logits).all(dim=1)
    if bool(bad.any()):
        raise UserError(
            f"{source}: {int(bad.sum())} of {len(logits)} samples have logits that are not finite; the model is broken"
        )


def check_adversarial(images: Tensor, adversarial: Tensor, epsilon: float, norm: str, name: str) -> Tensor:
    """Return the ``norm`` of each perturbation ``[B]``, as ``perturbation_norm`` does.

    Raises:
        UserError: Unless the adversarial batch is whole, inside [0,1] and within epsilon (1e-6 slack).
    """
    if adversarial.shape != images.shape:
        raise UserError(f"{name} returned {list(adversarial.shape)} for images {list(images.shape)}")
    check_pixels(adversarial, f"adversarial images of {name}")
    if not images.numel():
        return torch.zeros(len(images), dtype=torch.float64, device=images.device)
    distance = perturbation_norm(images, adversarial, norm)
    largest = float(distance.max())
    if largest > epsilon + SLACK:
        raise UserError(f"{name} left the ball: {norm} distance {largest:.6g} where epsilon is {epsilon:.6g}")
    return distance


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, source: str) -> Tensor:
    """Return finite float32 logits ``[B, K]``; ``UserError`` where one is not finite."""
    with full_precision():
        logits = model(images).float()
    check_logits(logits, source)
    return logits


class CleanLogits:
    """The clean logits of some images, shared by attacks on them; input and model are checked once, when it is made.

    Logits are kept by batch, because their last bits depend on it. Model and images must stay as they are.

    Args:
        model: In eval mode; takes pixels in [0,1] and returns logits.
        images: ``[N, C, H, W]`` float32 in [0,1].

    Raises:
        UserError: For input that breaks the contract.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        check_pixels(images, "the images to attack")
        check_eval_mode(model)
        check_model(model, images)
        self.model, self.images = model, images
        self._batches: dict[tuple[int, int], Tensor] = {}

    def batch(self, start: int, stop: int) -> Tensor:
        """Return logits ``[stop - start, K]``, a copy; ``UserError`` where one is not finite."""
        if (start, stop) not in self._batches:
            self._batches[start, stop] = predict(self.model, self.images[start:stop], "clean images")
        return self._batches[start, stop].clone()
