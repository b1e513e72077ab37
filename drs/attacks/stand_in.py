"""A copy of a model for attacks to search on: the same function but for rounding, in less time.

A batch normalisation in eval mode is a scale and a shift of each channel, and both fit into the convolution before it
(``torch.fx`` folds them), which saves a pass over the feature maps forward and one back. On a card the copy is in
float16 besides (``drs.attacks.half_precision``).
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from drs.attacks.half_precision import HalfPrecision, in_half_precision
from drs.attacks.isolation import full_precision
from drs.attacks.objectives import margin
from drs.attacks.replay import original, replayed

NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HALF_PRECISION_ON = ("cuda",)
"""The types of device whose copies are in float16; a CPU's take no less time in it."""
TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2
"""How far the copy's logits may be from the model's, as a share of the range of an image's: in float32, in float16."""
NEAR = 2e-3
"""A margin below 0 by this share of the range of an image's logits may be rounding, even where a copy is closer to the
model: it rounds otherwise in another batch."""
FLAT = 1e-2
"""The range of an image's logits counts as at least this share of the usual one."""
PROBED = 7
"""Images that a copy is compared with the model on."""

_known: "weakref.WeakKeyDictionary[nn.Module, nn.Module | None]" = weakref.WeakKeyDictionary()
"""The copy of a model; None where the model stands in for itself."""


def stand_in(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a model with its batch normalisations folded into the convolutions before them.

    On a card it is in float16, with them folded or without any, where its logits and gradients are like the model's.
    It is the model itself where there is nothing to fold, where it cannot be traced, and where the trace of one call
    does not hold for another. A copy is kept, and made anew where the model's weights have changed. On a card its
    passes over small batches are recorded and replayed (``drs.attacks.replay``).

    Args:
        model: In eval mode.
        images: ``[B, C, H, W]``, B >= 1, of its input. On the first of them the copy must answer as the model does.
    """
    if model in _known:
        known = _known[model]
        if known is None or _agree(model, original(known), images, PROBED):
            return model if known is None else known
    copy = next((each for each in _copies(model, images) if _agree(model, each, images, 1, PROBED)), None)
    _known[model] = None if copy is None else replayed(copy, images)
    return _known[model] or model


def is_nearly_fooled(searched: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return whether a search may have taken images for misclassified, ``[B]``; also where it saw no finite number.

    It may have where the copy says so, or nearly: by twice as much as the copy's margins are from the model's anywhere
    in the batch, as a share of the range of an image's logits, and by ``NEAR`` at least.

    Args:
        searched: ``[B, K]``, of the adversarial images by the copy.
        logits: ``[B, K]``, by the model, finite.
        labels: ``[B]``.
    """
    low, high = torch.aminmax(logits, dim=1)
    # An image of hardly any range must not make rounding look large on all the others.
    size = torch.maximum(high - low, FLAT * (high - low).median()).clamp_min(torch.finfo(logits.dtype).tiny)
    reached = margin(searched, labels)
    apart = ((reached - margin(logits, labels)).abs() / size).nan_to_num(0.0, posinf=0.0)
    near = 2 * apart.max().clamp_min(NEAR / 2) * size
    stands = (searched.argmax(dim=1) == labels) & (reached <= -near)
    return ~(stands & torch.isfinite(searched).all(dim=1))


def _copies(model: nn.Module, images: Tensor) -> Iterator[nn.Module]:
    """Yield copies of a model, the fastest first."""
    folded = _folded(model)
    if images.device.type in HALF_PRECISION_ON:
        for fused in (True, False):
            half = _halved(folded or model, images[:PROBED], fused)
            if half is not None:
                yield half
    if folded is not None:
        yield folded


def _folded(model: nn.Module) -> nn.Module | None:
    if not any(isinstance(module, NORMALISATIONS) for module in model.modules()):
        return None
    try:
        copy: nn.Module = fuse(model)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model's code does that cannot be followed
        return None
    return copy.eval()


def _halved(model: nn.Module, images: Tensor, fused: bool = False) -> HalfPrecision | None:
    try:
        return in_half_precision(model, images, fused)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model's code does that cannot be copied, or not in float16
        return None


@torch.no_grad()
def _agree(model: nn.Module, copy: nn.Module, images: Tensor, *counts: int) -> bool:
    tolerance = HALF_TOLERANCE if isinstance(copy, HalfPrecision) else TOLERANCE
    with full_precision():
        for count in counts:
            expected = _centred(model(images[:count]).float())
            try:
                found = _centred(copy(images[:count]).float())
            except torch.OutOfMemoryError:
                raise
            except Exception:
                return False
            close = (found - expected).abs() <= tolerance * expected.abs().max()
            if not bool(close.all()):
                return False
    return True


def _centred(logits: Tensor) -> Tensor:
    """Return logits ``[B, K]`` less what those of an image have in common, which no prediction depends on."""
    return logits - logits.mean(dim=1, keepdim=True)
