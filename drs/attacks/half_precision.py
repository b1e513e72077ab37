"""A model in float16, for attacks to search on: half the bytes, and tensor cores at their full rate.

What goes wrong with gradients in float16 is their range. An attack needs their signs or directions only, which do not
change where an image's gradient is multiplied by a number: on its way in, at the logits, it is brought to a size that
float16 holds well, and at the image it gets its own size back, in float32. bfloat16 would need none of this, but its 8
bits round an image's pixels by about as much as a small epsilon. float16, and TF32 too, round them by a sixteenth of
1/255, and logits so that small margins come out as ties; so the first and the last layer, a small part of a network,
are in float32 here on the way forward, and on the way back in what the search allows.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx import GraphModule

from drs.attacks.activations import fuse_activations
from drs.attacks.isolation import full_precision

LAYERS = (nn.Conv2d, nn.Linear)
"""What is computed in float16."""
HEADROOM = 16.0
"""How many times as large gradients may grow as on the images that the scale was chosen on."""
LARGEST_SCALE, SMALLEST_SCALE = 2.0**11, 2.0**-13
"""Largest entry of an image's gradient for its logits: with the headroom within float16, whose largest is 65504."""
GRADIENT_TOLERANCE = 0.3
"""How far an image's gradient may be from the model's, as a share of its length."""


class _Sizes:
    """By what the gradients of a batch were divided on the way in."""

    divisor: Tensor


class _Logits(Function):
    """Logits to float32; on the way back, the gradients of all images to one size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, sizes: _Sizes, scale: float) -> Tensor:
        ctx.sizes, ctx.scale, ctx.dtype = sizes, scale, logits.dtype
        return logits.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        largest = gradient.abs().amax(dim=1, keepdim=True)
        # An image without a gradient keeps none, and one whose gradient is not finite keeps that.
        ctx.sizes.divisor = (largest / ctx.scale).clamp_min(torch.finfo(torch.float32).tiny)
        return (gradient / ctx.sizes.divisor).to(ctx.dtype), None, None


class _Images(Function):
    """Images as they are; on the way back, the gradients of all images to their own sizes."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, sizes: _Sizes) -> Tensor:
        ctx.sizes = sizes
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient.contiguous() * ctx.sizes.divisor.view(-1, 1, 1, 1), None


class _EndLayer(nn.Module):
    """A layer in float32, whatever is around it, with its output in float16 or not."""

    def __init__(self, layer: nn.Module, halve: bool) -> None:
        super().__init__()
        self.layer, self.halve = layer, halve
        self.train(layer.training)

    def forward(self, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False), full_precision():
            output: Tensor = self.layer(values.float())
        return output.half() if self.halve else output


class HalfPrecision(nn.Module):
    """A copy of a model in float16 between its first and its last layer, with gradients of the model's size.

    Those two, convolutions or matrix products, are in float32, and so is what normalises the images before them.

    Args:
        model: In eval mode; float32 images ``[B, C, H, W]`` in, logits ``[B, K]`` out.
        images: ``[B, C, H, W]``, B >= 1, of its input, to see which layers are the first and the last.
        scale: Largest entry of an image's gradient for the logits on its way back.
        fused: Whether biases, shortcuts and ReLUs are computed together where the model is traced
            (``drs.attacks.activations``).
    """

    def __init__(self, model: nn.Module, images: Tensor, scale: float = LARGEST_SCALE, fused: bool = False) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        called = _layers_called(self.model, images)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, LAYERS):
                if module in (called[0], called[-1]):
                    self._replace(name, _EndLayer(module, halve=module is not called[-1]))
                else:
                    module.half()  # or autocast would convert its weights in every pass
        if fused and isinstance(self.model, GraphModule):
            fuse_activations(self.model, _take_bias)
        self.scale = scale
        self.train(model.training)

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = f"model.{name}".rstrip(".").rpartition(".")
        setattr(self.get_submodule(parent), child, module)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]``, float32."""
        sizes = _Sizes()
        entered = _Images.apply(images, sizes).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.float16):
            logits = self.model(entered)
        left: Tensor = _Logits.apply(logits, sizes, self.scale)
        return left


def _take_bias(module: nn.Module) -> Tensor | None:
    """Take the bias from a convolution; the first one of a model then returns float32, which the ReLU rounds."""
    layer = module.layer if isinstance(module, _EndLayer) and module.halve else module
    if not isinstance(layer, nn.Conv2d) or layer.bias is None:
        return None
    if isinstance(module, _EndLayer):
        module.halve = False
    bias, layer.bias = layer.bias, None
    return bias


@torch.no_grad()
def _layers_called(model: nn.Module, images: Tensor) -> list[nn.Module]:
    """Return a model's layers in the order in which they are called; at least one, and one more often where it is."""
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda layer, _: called.append(layer))
        for module in model.modules()
        if isinstance(module, LAYERS)
    ]
    try:
        model(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ValueError("a model without a convolution or a matrix product has nothing to compute in float16")
    return called


@torch.no_grad()
def without_gradient(model: nn.Module, images: Tensor) -> Tensor:
    """Return which images ``[B]`` have a gradient of 0, or none that is finite, for the difference of the top logits.

    Where a layer saturates, rounding may end in values that have none though the model's still do.
    """
    nearest = model(images).float().topk(2, dim=1).indices
    largest = _gradients(model, images, nearest).abs().amax(dim=1)
    return ~((largest > 0) & torch.isfinite(largest))


def in_half_precision(model: nn.Module, images: Tensor, fused: bool = False) -> HalfPrecision | None:
    """Return a model in float16, with the scale that suits its gradients; None where they are not like the model's.

    Args:
        model: In eval mode, on the device of the images.
        images: ``[B, C, H, W]``, B >= 1, of its input.
        fused: See ``HalfPrecision``.
    """
    with full_precision():
        with torch.no_grad():
            nearest = model(images).float().topk(2, dim=1).indices
        expected = _gradients(model, images, nearest)
        half = HalfPrecision(model, images, LARGEST_SCALE * HEADROOM, fused)
        while not bool(torch.isfinite(_gradients(half, images, nearest)).all()):
            half.scale /= HEADROOM
            if half.scale < SMALLEST_SCALE * HEADROOM:
                return None
        half.scale /= HEADROOM
        apart = torch.linalg.vector_norm(_gradients(half, images, nearest) - expected, dim=1)
    alike = apart <= GRADIENT_TOLERANCE * torch.linalg.vector_norm(expected, dim=1)
    return half if bool(alike.all()) else None


def _gradients(model: nn.Module, images: Tensor, nearest: Tensor) -> Tensor:
    """Return the gradients ``[B, C*H*W]`` of the difference of two logits, those of the classes ``[B, 2]``."""
    with torch.enable_grad():
        asked = images.detach().requires_grad_()
        first, second = model(asked).float().gather(1, nearest).unbind(dim=1)
        (gradient,) = torch.autograd.grad((second - first).sum(), asked)
    return gradient.flatten(1)
