"""Bias, shortcut and ReLU in one kernel, in Triton.

Imported where a card is first asked for it; the rest of the package does without Triton.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

triton: Any = importlib.import_module("triton")  # comes with a torch for CUDA, and with no other
tl: Any = importlib.import_module("triton.language")

BLOCK = 2048
"""Elements of a program."""
WARPS = 8


@triton.jit(do_not_specialize=["count"])
def _biased_relu(
    values: tl.tensor,
    bias: tl.tensor,
    shortcut: tl.tensor,
    result: tl.tensor,
    count: tl.tensor,
    CHANNELS: tl.constexpr,
    SHORTCUT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Take ``BLOCK`` elements, of which the channels come first in memory; see ``biased_relu``."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = place < count
    found = tl.load(values + place, mask=exists, other=0.0).to(tl.float32)
    found += tl.load(bias + place % CHANNELS)
    if SHORTCUT:
        found += tl.load(shortcut + place, mask=exists, other=0.0).to(tl.float32)
    # What is not a number stays that.
    found = tl.where(found <= 0, 0.0, found)
    tl.store(result + place, found.to(result.dtype.element_ty), mask=exists)


def biased_relu(values: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
    """Return ``relu(values + bias + shortcut)`` in float16, computed in float32.

    Args:
        values: ``[B, C, H, W]`` in channels last, fewer than 2^31 elements.
        bias: ``[C]`` in float32.
        shortcut: Like ``values``, in channels last too.
    """
    result = torch.empty_like(values, dtype=torch.float16)
    count = values.numel()
    if count:
        _biased_relu[(triton.cdiv(count, BLOCK),)](
            values, bias, values if shortcut is None else shortcut, result, count,
            CHANNELS=len(bias), SHORTCUT=shortcut is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return result
