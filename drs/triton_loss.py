"""The distribution-restrained softmax loss on a card: value and gradient from one kernel, in Triton.

The derivation is that of ``drs.fused_loss``. With c the largest of the non-label logits and S the sum of exp(z_j - c)
over them, the deviations are those of z - c from its mean, and a probability is exp(z_j - c) times a number per row: a
label's logit far above the others, which is what training leads to, takes no digits from them.

Imported where a card is first asked for this loss; the rest of the package does without Triton.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from drs.fused_loss import EagerLoss, kept_gradient

triton: Any = importlib.import_module("triton")  # comes with a torch for CUDA, and with no other
tl: Any = importlib.import_module("triton.language")

ELEMENTS = 2048
"""Elements of a program that has several whole rows."""
LONGEST = 4096
"""Classes up to which a program holds a row in its registers; a power of two."""
BLOCK = 4096
"""Elements of a longer row that a program holds at a time; a power of two."""
WARPS, WARPS_LONG = 4, 32
"""Warps of a program for whole rows, twice as many where one has more than ``ELEMENTS``; and of one for longer rows."""


@triton.jit
def _label_terms(of_label: tl.tensor, top: tl.tensor, total: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the cross-entropy, what makes a probability of exp(z_j - c), and the sum of the non-label probabilities.

    Args:
        of_label: The label's logit.
        top: c, the largest of the others.
        total: S, their sum of exp(z_j - c).
    """
    high = tl.maximum(of_label, top)
    others = total * tl.exp(top - high)
    whole = others + tl.exp(of_label - high)
    return tl.log(whole) - (of_label - high), tl.exp(top - high) / whole, others / whole


@triton.jit(do_not_specialize=["batch"])
def _whole_rows(
    logits: tl.tensor,
    labels: tl.tensor,
    derivative: tl.tensor,
    losses: tl.tensor,
    batch: tl.tensor,
    ce_scale: tl.tensor,
    weight: tl.tensor,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
) -> None:
    """Take ``ROWS`` rows, each held in registers as ``BLOCK`` >= ``CLASSES`` columns; see ``value_and_derivative``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < batch
    label = tl.load(labels + row, mask=exists, other=0)
    column = tl.arange(0, BLOCK)[None, :]
    place = row.to(tl.int64)[:, None] * CLASSES + column
    held = exists[:, None] & (column < CLASSES)
    values = tl.load(logits + place, mask=held, other=0.0)
    is_label = column == label[:, None]
    is_other = (column != label[:, None]) & (column < CLASSES)
    of_label = tl.sum(tl.where(is_label, values, 0.0), axis=1)
    top = tl.max(tl.where(is_other, values, float("-inf")), axis=1)
    shifted = values - top[:, None]
    mean = tl.sum(tl.where(is_other, shifted, 0.0), axis=1) / (CLASSES - 1)
    # The deviations themselves are squared: from sums of squares, what the loss has made small would be rounding.
    deviations = tl.where(is_other, shifted - mean[:, None], 0.0)
    powers = tl.exp(tl.where(is_other, shifted, float("-inf")))
    cross_entropy, share, others = _label_terms(of_label, top, tl.sum(powers, axis=1))
    loss = ce_scale * cross_entropy + weight * tl.sum(deviations * deviations, axis=1)
    loss = tl.where((label >= 0) & (label < CLASSES), loss, float("nan"))
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(exists, loss, 0.0), axis=0))
    if GRADIENT:
        slope = powers * (ce_scale * share)[:, None] + 2 * weight * deviations
        slope = tl.where(is_label, -(ce_scale * others)[:, None], slope)
        tl.store(derivative + place, slope, mask=held)


@triton.jit(do_not_specialize=["batch"])
def _long_row(
    logits: tl.tensor,
    labels: tl.tensor,
    derivative: tl.tensor,
    losses: tl.tensor,
    batch: tl.tensor,
    ce_scale: tl.tensor,
    weight: tl.tensor,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
) -> None:
    """Take one row, ``BLOCK`` columns at a time and all of them twice; see ``value_and_derivative``.

    The first pass keeps a largest value, a sum of exponentials and a sum for each of ``BLOCK`` places, so that the
    program's threads wait for one another only at its end. ``batch`` and ``ROWS`` are there for a launch as above.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    exists = (label >= 0) & (label < CLASSES)
    start = row * CLASSES
    of_label = tl.load(logits + start + label, mask=exists, other=0.0)
    # The mean is taken of what is left beside some non-label logit, so that a shift of all logits does not round it.
    origin = tl.load(logits + start + tl.where(label == 0, 1, 0))
    blocks: tl.constexpr = (CLASSES + BLOCK - 1) // BLOCK
    tops = tl.full([BLOCK], -3.0e38, tl.float32)  # finite: the difference of two infinities is not a number
    totals = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        column = block * BLOCK + tl.arange(0, BLOCK)
        is_other = (column < CLASSES) & (column != label)
        values = tl.load(logits + start + column, mask=column < CLASSES, other=0.0)
        sums += tl.where(is_other, values - origin, 0.0)
        values = tl.where(is_other, values, -3.0e38)
        power = tl.exp(-tl.abs(values - tops))
        totals = tl.where(values > tops, totals * power + 1.0, totals + power)
        tops = tl.maximum(tops, values)
    top = tl.max(tops, axis=0)
    total = tl.sum(totals * tl.exp(tops - top), axis=0)
    mean = tl.sum(sums, axis=0) / (CLASSES - 1)
    cross_entropy, share, others = _label_terms(of_label, top, total)
    squares = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        # From the end: what was read last is the likeliest to be in the cache still.
        column = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        is_other = (column < CLASSES) & (column != label)
        values = tl.load(logits + start + column, mask=column < CLASSES, other=0.0)
        deviations = tl.where(is_other, (values - origin) - mean, 0.0)
        squares += deviations * deviations
        if GRADIENT:
            powers = tl.exp(tl.where(is_other, values - top, float("-inf")))
            slope = powers * (ce_scale * share) + 2 * weight * deviations
            slope = tl.where(column == label, -ce_scale * others, slope)
            tl.store(derivative + start + column, slope, mask=column < CLASSES)
    loss = ce_scale * cross_entropy + weight * tl.sum(squares, axis=0)
    tl.store(losses + tl.program_id(0), tl.where(exists, loss, float("nan")))


@functools.cache
def _plan(classes: int) -> tuple[Any, int, int, int]:
    """Return for K classes the kernel, the rows of a program, the columns that it holds, and its warps."""
    if classes > LONGEST:
        return _long_row, 1, BLOCK, WARPS_LONG
    columns = 1 << (classes - 1).bit_length()
    return _whole_rows, max(1, ELEMENTS // columns), columns, WARPS if columns <= ELEMENTS else 2 * WARPS


def value_and_derivative(
    logits: Tensor, labels: Tensor, ce_weight: float, weight: float, *, gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the loss, a scalar, and its derivative ``[B, K]`` with respect to the logits; one kernel, or two.

    Each program writes the loss of its rows, and where there are several programs a sum in a fixed order adds them up:
    the same logits give the same bits. A label outside 0..K-1 makes the loss NaN.

    Args:
        logits: ``[B, K]`` float32, contiguous, on the current device; B >= 1, K >= 2.
        labels: ``[B]`` int64, contiguous, on the same device.
        ce_weight: Weight of the mean cross-entropy.
        weight: Weight of the sum over the batch of the penalty.
        gradient: Whether the derivative is wanted; without it, the logits are returned in its place.
    """
    batch, classes = logits.shape
    kernel, rows, columns, warps = _plan(classes)
    programs = -(-batch // rows)
    derivative = torch.empty_like(logits) if gradient else logits
    losses = logits.new_empty(() if programs == 1 else programs)
    # Floats always: Triton compiles a kernel anew for an integer.
    kernel[(programs,)](
        logits, labels, derivative, losses, batch, float(ce_weight / batch), float(weight),
        CLASSES=classes, ROWS=rows, BLOCK=columns, GRADIENT=gradient, num_warps=warps,
    )  # fmt: skip
    return losses if programs == 1 else losses.sum(), derivative


def probe(classes: int) -> None:
    """Run the kernel for so many classes on the current card; raises what Triton raises, as without a C compiler."""
    logits = torch.zeros(1, classes, device="cuda")
    value_and_derivative(logits, torch.zeros(1, dtype=torch.int64, device="cuda"), 1.0, 1.0)


class LossInTriton(Function):
    """For a card. One tensor of the logits' size is kept, the gradient; cross-entropy keeps one too, log-softmax."""

    value_and_derivative = staticmethod(value_and_derivative)

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ce_weight: float, weight: float, eager: EagerLoss) -> Tensor:
        """Return the scalar loss; arguments as in ``drs.fused_loss.fused_loss`` and ``value_and_derivative``."""
        needed = ctx.needs_input_grad[0]
        value, derivative = value_and_derivative(logits, labels, ce_weight, weight, gradient=needed)
        if needed:
            ctx.save_for_backward(logits, derivative)
            ctx.eager = eager
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient with respect to the logits."""
        return kept_gradient(ctx, gradient), None, None, None, None
