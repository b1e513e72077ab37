"""A copy of a model for attacks to search on: the same function but for rounding, in less time.

A batch normalisation in eval mode is a scale and a shift of each channel, and both fit into the convolution before it
(``torch.fx`` folds them), which saves a pass over the feature maps forward and one back.
"""

import weakref

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from drs.attacks.isolation import full_precision
from drs.attacks.objectives import margin

NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOLERANCE = 1e-3
"""How far the copy's logits may be from the model's, as a share of the largest."""
NEAR = 1e-2
"""A margin below 0 by this share of the range of an image's logits is rounding: in TF32, or in another batch."""

_known: "weakref.WeakKeyDictionary[nn.Module, nn.Module | None]" = weakref.WeakKeyDictionary()
"""The copy of a model; None where the model stands in for itself."""


def stand_in(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a model with its batch normalisations folded into the convolutions before them.

    It is the model itself where there are none, where it cannot be traced, and where the trace of one call does not
    hold for another. A copy is kept, and made anew where the model's weights have changed.

    Args:
        model: In eval mode.
        images: ``[B, C, H, W]``, B >= 1, of its input. On the first of them the copy must answer as the model does.
    """
    if model in _known:
        copy = _known[model]
        if copy is None or _agree(model, copy, images):
            return model if copy is None else copy
    copy = _folded(model)
    if copy is not None and not _agree(model, copy, images):
        copy = None
    _known[model] = copy
    return model if copy is None else copy


def is_nearly_fooled(logits: Tensor, labels: Tensor) -> Tensor:
    """Return whether a search that sees logits ``[B, K]`` may have taken the images for misclassified, ``[B]``."""
    low, high = torch.aminmax(logits, dim=1)
    return (logits.argmax(dim=1) != labels) | (margin(logits, labels) > -NEAR * (high - low))


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


@torch.no_grad()
def _agree(model: nn.Module, copy: nn.Module, images: Tensor) -> bool:
    with full_precision():
        for count in (1, 7):
            expected = model(images[:count]).float()
            try:
                found = copy(images[:count]).float()
            except torch.OutOfMemoryError:
                raise
            except Exception:
                return False
            close = (found - expected).abs() <= TOLERANCE * (1 + expected.abs().max())
            if not bool(close.all()):
                return False
    return True
