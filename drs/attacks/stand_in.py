"""A copy of a model for attacks to search on: the same function but for rounding, in less time.

A batch normalisation in eval mode is a scale and a shift of each channel, and both fit into the convolution before it
(``torch.fx`` folds them). On a small network its pass over the feature maps takes as long as the convolution does.
"""

import weakref

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from drs.attacks.isolation import full_precision

NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOLERANCE = 1e-3
"""How far the copy's logits may be from the model's, as a share of the largest."""

_Versions = list[tuple[int, int]]
_known: "weakref.WeakKeyDictionary[nn.Module, tuple[_Versions, nn.Module]]" = weakref.WeakKeyDictionary()


def stand_in(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a model with its batch normalisations folded into the convolutions before them.

    It is the model itself where there are none, or where it cannot be traced. A copy is made once and anew when the
    model's weights have changed.

    Args:
        model: In eval mode.
        images: ``[B, C, H, W]``, B >= 1, of its input. A copy that answers otherwise on them, because the trace of one
            call does not hold for another, is not used.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # Tensors made in inference mode count no versions; nothing changes them.
    versions = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    found = _known.get(model)
    if found is None or found[0] != versions:
        found = versions, _folded(model, images)
        if found[1] is not model:  # the key would live as long as its value
            _known[model] = found
    return found[1]


def _folded(model: nn.Module, images: Tensor) -> nn.Module:
    if not any(isinstance(module, NORMALISATIONS) for module in model.modules()):
        return model
    try:
        copy: nn.Module = fuse(model).eval()
    except Exception:  # whatever a model's code does that cannot be followed
        return model
    return copy if all(_agree(model, copy, images[:count]) for count in (1, 7)) else model


@torch.no_grad()
def _agree(model: nn.Module, copy: nn.Module, images: Tensor) -> bool:
    with full_precision():
        expected = model(images).float()
        try:
            found = copy(images).float()
        except Exception:
            return False
    close = (found - expected).abs() <= TOLERANCE * (1 + expected.abs().max())
    return found.shape == expected.shape and bool(close.all())
