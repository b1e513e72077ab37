"""Bias, shortcut and ReLU in one kernel, in Triton.

Imported where a card is first asked for it; the rest of the package does without Triton.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

triton: Any = importlib.import_module("triton")  # comes with a torch for a card
tl: Any = importlib.import_module("triton.language")

ELEMENTS = 4096
"""Elements of a program, about; a power of two."""
WARPS = 8


@triton.jit(do_not_specialize=["count"])
def _biased_relu(
    values: tl.tensor,
    bias: tl.tensor,
    shortcut: tl.tensor,
    result: tl.tensor,
    count: tl.tensor,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SHORTCUT: tl.constexpr,
) -> None:
    """Take ``ROWS`` of ``count`` pixels, each with its channels in ``WIDTH`` columns; see ``biased_relu``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    # The bias is read once for all rows of a program.
    added = tl.load(bias + column, mask=column < CHANNELS, other=0.0)
    place = row[:, None] * CHANNELS + column[None, :]
    exists = (row < count)[:, None] & (column < CHANNELS)[None, :]
    found = tl.load(values + place, mask=exists, other=0.0).to(tl.float32) + added[None, :]
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
    channels = len(bias)
    pixels = values.numel() // channels
    if pixels:
        width = triton.next_power_of_2(channels)
        rows = max(1, ELEMENTS // width)
        with torch.cuda.device_of(values):  # Triton takes the current card
            _biased_relu[(triton.cdiv(pixels, rows),)](
                values, bias, values if shortcut is None else shortcut, result, pixels,
                CHANNELS=channels, WIDTH=width, ROWS=rows, SHORTCUT=shortcut is not None, num_warps=WARPS,
            )  # fmt: skip
    return result
