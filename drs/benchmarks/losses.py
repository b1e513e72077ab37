"""DR-softmax beside cross-entropy: the loss alone, its memory, and a whole training step."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drs import fused_loss
from drs.benchmarks.harness import Machine, Row, count_flops, peak_tensor_bytes, ratio_of_medians, time_in_turn
from drs.checkpoints import build_model_of
from drs.config import TrainConfig
from drs.device import choose_device
from drs.losses import DRSoftmaxLoss
from drs.timing import time_steps

Value = Callable[[Tensor, Tensor], Tensor]
"""A loss of logits ``[B, K]`` and labels ``[B]``."""

SHAPES = ((128, 10, 300), (8192, 10, 60), (1024, 1000, 20), (256, 50257, 6))
"""Batch, classes and repeats."""
COMPILED_ON_CPU = ((8192, 10), (256, 50257))
"""Batch and classes that are compiled on a CPU, where it takes a C++ compiler seconds; on a GPU all are."""
STEP_PAIRS = 150
STEP_TARGET = 1.02
PLAIN = "DR-softmax in plain operations"
COMPILED = f"{PLAIN}, compiled"
IN_CALLS = {
    "DR-softmax in few calls": fused_loss._LossInFewCalls,
    "DR-softmax in few passes": fused_loss._LossInFewPasses,
}
"""The forms of the loss in calls of PyTorch, by name."""


def loss_rows(device: str = "cpu") -> Iterator[Row]:
    """Yield time and memory of forward and backward for each of ``SHAPES``, on a device: ``cpu`` or ``cuda``."""
    for batch, classes, repeats in SHAPES:
        yield from _shape_rows(batch, classes, repeats, device)


def _shape_rows(batch: int, classes: int, repeats: int, device: str) -> Iterator[Row]:
    """Yield the loss beside cross-entropy, its memory, and what was tried; all are timed in turn with a copy."""
    torch.manual_seed(0)
    logits = torch.randn(batch, classes).to(device).requires_grad_()
    labels = torch.randint(classes, (batch,)).to(device)
    loss = DRSoftmaxLoss()
    loss.validate = False  # as in training
    others = _other_forms(loss, logits, labels)
    triton = len(others) == len(IN_CALLS)
    values: dict[str, Value] = {"DR-softmax": loss, "cross-entropy": F.cross_entropy, **others, PLAIN: loss.eager}
    failure = ""
    if device == "cuda" or (batch, classes) in COMPILED_ON_CPU:
        compiled, failure = _compiled(loss, logits, labels, device)
        values |= {COMPILED: compiled} if compiled else {}
    runs = {name: partial(_forward_and_backward, value, logits, labels) for name, value in values.items()}
    # The copies come first: what is first or last in turn runs twice on end, and has its data in the caches then.
    both = [_copy_of(logits[:1, :1]), _copy_of(logits)]
    seconds = time_in_turn([*both, *runs.values()], repeats, warmup=5, device=device)
    call, copy = map(float, np.median(seconds[:, :2], axis=0))
    taken = dict(zip(runs, seconds[:, 2:].T, strict=True))
    row = Row(
        "loss", f"forward and backward, {batch} x {classes}", "DR-softmax", "cross-entropy", "ms",
        1e3 * float(np.median(taken["DR-softmax"])), 1e3 * float(np.median(taken["cross-entropy"])),
        *ratio_of_medians(taken["DR-softmax"], taken["cross-entropy"]), repeats, "<= 2", device,
        torch.get_num_threads() if device == "cpu" else 1, least=1e3 * copy, reason=_why_missed(call, copy, triton),
        note="" if device == "cpu" else _form_on_card(triton),
        floor="a copy of the logits into memory at hand, timed in turn: it too reads [B, K] once and writes it once",
    )  # fmt: skip
    yield row
    yield _memory_row(row, runs["DR-softmax"], runs["cross-entropy"], batch, classes)
    tried = replace(row, target="", tried=True, floor="", reason="")
    notes = {
        **dict.fromkeys(
            others,
            f"up to {fused_loss.FEW_ELEMENTS} logits the loss takes{', without Triton,' if triton else ''} its form of "
            "few calls, which makes one [B, K] tensor more on the way forward; beyond that the one of few passes",
        ),
        PLAIN: "the loss before it was fused, its gradient left to autograd",
        COMPILED: "through torch.compile for this shape; the time to compile is not counted",
    }
    for name in list(taken)[2:]:
        ratio, low, high = ratio_of_medians(taken[name], taken["cross-entropy"])
        median = 1e3 * float(np.median(taken[name]))
        yield replace(tried, ours=name, ours_median=median, ratio=ratio, low=low, high=high, note=notes[name])
    if failure:
        yield replace(tried, ours=COMPILED, ours_median=None, ratio=None, low=None, high=None, repeats=0, note=failure)


def _forward_and_backward(value: Value, logits: Tensor, labels: Tensor) -> None:
    """Run a loss and its gradient, and leave no tensor behind."""
    value(logits, labels).backward()
    logits.grad = None


def _copy_of(source: Tensor) -> Callable[[], object]:
    """Return what copies a tensor into another one that is there already."""
    source = source.detach()
    return partial(torch.empty_like(source).copy_, source)


def _other_forms(loss: DRSoftmaxLoss, logits: Tensor, labels: Tensor) -> dict[str, Value]:
    """Return by name those forms of the loss in calls of PyTorch that it does not take; both, where it takes Triton's.

    Which one it takes depends on the device and the number of the logits.
    """
    taken = fused_loss.chosen_form(logits, labels)
    limits = dict(zip(IN_CALLS, (logits.numel(), 0), strict=True))
    return {name: _in_calls(loss, limits[name]) for name, form in IN_CALLS.items() if form is not taken}


def _in_calls(loss: DRSoftmaxLoss, limit: int) -> Value:
    """Return the loss without Triton, in few calls for at most so many logits and in few passes for more."""

    def value(logits: Tensor, labels: Tensor) -> Tensor:
        before = fused_loss.FEW_ELEMENTS, fused_loss.TRITON
        fused_loss.FEW_ELEMENTS, fused_loss.TRITON = limit, False
        try:
            return loss(logits, labels)
        finally:
            fused_loss.FEW_ELEMENTS, fused_loss.TRITON = before

    return value


def _form_on_card(triton: bool) -> str:
    """Return in words what the loss is on a card."""
    if not triton:
        return "a form in calls of PyTorch: Triton is missing, or its kernel does not run here"
    return (
        "one kernel in Triton for the value and its gradient; a sum over the kernel's programs follows where there are "
        "several, and on the way back a product with the incoming gradient"
    )


def _compiled(loss: DRSoftmaxLoss, logits: Tensor, labels: Tensor, device: str) -> tuple[Value | None, str]:
    """Return the loss in plain operations, compiled for a shape, and nothing; or None, and why it is not measured."""
    compiler = os.environ.get("CXX") or "g++"
    if device == "cpu" and not shutil.which(compiler):
        return None, f"not compiled: there is no C++ compiler, {compiler}"
    torch.compiler.reset()  # it compiles a function for a few shapes only and then no longer
    try:
        value = torch.compile(loss.eager, dynamic=False, fullgraph=True)
        _forward_and_backward(value, logits, labels)
    except Exception as error:  # each of the compilers involved has its own
        logits.grad = None
        lines = str(error).strip().splitlines() or ["it does not say why"]
        return None, f"not compiled: {type(error).__name__}: {lines[0]}"
    return value, ""


def _why_missed(call: float, copy: float, triton: bool = False) -> str:
    """Return why a loss alone would miss its target.

    Args:
        call: Seconds that it takes to copy a single number, which is those of a call.
        copy: Seconds that it takes to copy the logits.
        triton: Whether the loss is Triton's kernel, and not calls of PyTorch.
    """
    measured = f"To copy the logits takes {1e6 * copy:.3g} µs, to copy a single number {1e6 * call:.3g} µs: "
    if triton:
        return measured + _why_kernel_missed(calls=copy < 2 * call)
    if copy < 2 * call:
        return measured + (
            "at this size it is calls of PyTorch that take the time. Cross-entropy is two of them in each direction, "
            "with a gradient in C++. The mean without the label, the deviations and their length are further calls in "
            "either form of the loss, and a gradient in Python is dearer than one in C++."
        )
    return measured + (
        "at this size it is passes over [B, K] that take the time. Beside the log-softmax, which both losses have, "
        "DR-softmax makes passes for the mean, for the deviations and for their length, and on the way back for the "
        "exponential and for the sum of two gradients; each is an operation of PyTorch on its own."
    )


def _why_kernel_missed(calls: bool) -> str:
    """Return why Triton's kernel would miss its target, where it is calls that take the time and where it is memory."""
    if calls:
        return (
            "at this size it is calls that take the time. Cross-entropy is two calls of PyTorch in each direction, "
            "with a gradient in C++. DR-softmax is one kernel, which Triton launches from Python, a sum where several "
            "programs share the rows, and on the way back a product that is called from Python as well."
        )
    return (
        "at this size it is memory that takes the time. The kernel reads the logits, twice where a row is longer than "
        "a program holds, and writes their gradient; the way back reads that and writes its product with the incoming "
        "gradient."
    )


def _memory_row(timed: Row, ours: Callable[[], None], theirs: Callable[[], None], batch: int, classes: int) -> Row:
    """Return the row of memory beside a timed one."""
    extra = (peak_bytes(ours, timed.device) - peak_bytes(theirs, timed.device)) / (4 * batch * classes)
    counted = "bytes of tensors alive" if timed.device == "cpu" else "bytes that the card's allocator has given out"
    return Row(
        "loss", f"tensors beyond cross-entropy's, {batch} x {classes}", "DR-softmax", "one [B, K] tensor", "[B, K]",
        extra, 1.0, extra, extra, extra, 1, "<= 1", timed.device, timed.threads,
        note=f"the most {counted} at a time, less those of cross-entropy",
        reason="At so few logits the [B] tensors and single numbers of the loss weigh as much as [B, K]; a card gives "
        "out no less than 512 bytes for each." if batch * classes <= fused_loss.FEW_ELEMENTS else "",
    )  # fmt: skip


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Return the most bytes that a call held at a time beyond those held before; it must leave none behind.

    On ``cuda`` they are those that the caching allocator gave out, which includes what operations use inside. On
    ``cpu`` they are those of the tensors that operations returned.
    """
    if device != "cuda":
        return peak_tensor_bytes(function)
    function()  # what libraries set up once and keep is not the call's
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def step_rows(config: TrainConfig, machine: Machine | None = None) -> Iterator[Row]:
    """Yield what a training step with DR-softmax takes beside one with cross-entropy.

    Args:
        config: Of the training; its device is where the steps run.
        machine: The CPU with the threads that torch has; for the floor, which there is on a CPU only. On a card
            convolutions may compute in TF32, and the rate in float32 would be no bound.
    """
    device = choose_device(config.device)
    result = time_steps(config, device, n_pairs=STEP_PAIRS)
    ours, theirs, ratio, low, high = (
        float(result[key])  # type: ignore[arg-type]
        for key in ("loss_ms", "baseline_ms", "ratio", "ci_low", "ci_high")
    )
    row = Row(
        "loss", f"training step, {config.model.name} on {config.data.name}, batch {config.batch_size}", "DR-softmax",
        "cross-entropy", "ms", ours, theirs, ratio, low, high, STEP_PAIRS, f"<= {STEP_TARGET}", device.type,
        torch.get_num_threads() if device.type == "cpu" else 1, note="ratio: median over pairs of steps; as in "
        "training, DR-softmax hands its own derivative to the way back through the network",
        reason=f"A step of {config.model.name} with cross-entropy takes {theirs:.3g} ms, so that the target leaves the "
        f"loss {(STEP_TARGET - 1) * theirs:.2g} ms beyond it; on {config.batch_size} x {config.data.num_classes} "
        f"logits it takes {ours - theirs:.2g} ms. For what, see the loss alone.",
    )  # fmt: skip
    if machine is not None and device.type == "cpu":
        row = replace(
            row, least=1e3 * _flops_of_step(config) / machine.gigaflops / 1e9,
            floor="the operations of the model's convolutions and matrix products, forward and backward, at the rate "
            "at which large matrices are multiplied",
        )  # fmt: skip
    yield row


def _flops_of_step(config: TrainConfig) -> int:
    """Return the operations of a model's step on a batch, forward and backward; nothing is computed."""
    model = build_model_of(config).to("meta").train()
    images = torch.empty(config.batch_size, config.data.channels, config.data.size, config.data.size, device="meta")
    return count_flops(lambda: model(images).sum().backward())
