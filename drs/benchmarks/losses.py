"""DR-softmax beside cross-entropy: the loss alone, its memory, and a whole training step."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drs import fused_loss
from drs.benchmarks.harness import Machine, Row, peak_tensor_bytes, ratio_of_medians, time_in_turn
from drs.config import TrainConfig
from drs.device import choose_device
from drs.fused_loss import FEW_ELEMENTS
from drs.losses import DRSoftmaxLoss
from drs.timing import time_steps

SHAPES = ((128, 10, 300), (8192, 10, 60), (1024, 1000, 20), (256, 50257, 6))
"""Batch, classes and repeats."""
WHY_MISSED = (
    "A batch this small is a few kilobytes: what takes the time is calls of PyTorch, and cross-entropy is two of them "
    "in each direction, with a gradient in C++. The mean without the label, the deviations and their length are "
    "further calls, even in the form that makes the fewest, and a gradient in Python is dearer than one in C++."
)


def _forward_and_backward(loss: DRSoftmaxLoss | None, logits: Tensor, labels: Tensor) -> None:
    logits.grad = None
    value = F.cross_entropy(logits, labels) if loss is None else loss(logits, labels)
    value.backward()


def loss_rows(machine: Machine, device: str = "cpu") -> Iterator[Row]:
    """Yield time and memory of forward and backward for each of ``SHAPES``, on a device.

    Args:
        machine: For the floors, which are the CPU's; on a GPU there are none.
        device: ``cpu`` or ``cuda``.
    """
    threads = torch.get_num_threads() if device == "cpu" else 1
    for batch, classes, repeats in SHAPES:
        torch.manual_seed(0)
        logits = torch.randn(batch, classes).to(device).requires_grad_()
        labels = torch.randint(classes, (batch,)).to(device)
        loss = DRSoftmaxLoss()
        loss.validate = False  # as in training

        def ours(loss: DRSoftmaxLoss = loss, logits: Tensor = logits, labels: Tensor = labels) -> None:
            _forward_and_backward(loss, logits, labels)

        def theirs(logits: Tensor = logits, labels: Tensor = labels) -> None:
            _forward_and_backward(None, logits, labels)

        # Of the two forms of the loss, the one that it does not take at this size.
        form, limit = ("few passes", 0) if batch * classes <= FEW_ELEMENTS else ("few calls", batch * classes)

        def variant(ours: Callable[[], None] = ours, limit: int = limit) -> None:
            with mock.patch.object(fused_loss, "FEW_ELEMENTS", limit):
                ours()

        seconds = time_in_turn([ours, theirs, variant], repeats, warmup=5, device=device)
        medians = np.median(seconds, axis=0)
        buffer = 4 * batch * classes
        floor = 4 * buffer / machine.gigabytes / 1e9
        case = f"forward and backward, {batch} x {classes}"
        on_cpu = device == "cpu"
        row = Row(
            "loss", case, "DR-softmax", "cross-entropy", "ms", 1e3 * medians[0], 1e3 * medians[1],
            *ratio_of_medians(seconds[:, 0], seconds[:, 1]), repeats, "<= 2", device, threads,
            floor="either reads and writes the logits' size twice, at the copying rate" if on_cpu else "",
            least=1e3 * floor if on_cpu else None, reason=WHY_MISSED,
        )  # fmt: skip
        yield row
        ratio, low, high = ratio_of_medians(seconds[:, 2], seconds[:, 1])
        yield replace(
            row, ours=f"DR-softmax in {form}", ours_median=1e3 * medians[2], ratio=ratio,
            low=low, high=high, target="", tried=True, floor="", reason="",
            note=f"up to {FEW_ELEMENTS} logits the loss takes its form of few calls, which makes one [B, K] tensor "
            "more on the way forward; beyond that the one of few passes",
        )  # fmt: skip
        extra = (peak_tensor_bytes(ours) - peak_tensor_bytes(theirs)) / buffer
        yield Row(
            "loss", f"tensors beyond cross-entropy's, {batch} x {classes}", "DR-softmax", "one [B, K] tensor", "[B, K]",
            extra, 1.0, extra, extra, extra, 1, "<= 1", device, threads,
            note="the most bytes of tensors alive at a time, less those of cross-entropy",
        )  # fmt: skip


def step_rows(config: TrainConfig) -> Iterator[Row]:
    """Yield what a training step with DR-softmax takes beside one with cross-entropy."""
    device = choose_device(config.device)
    result = time_steps(config, device, n_pairs=150)
    yield Row(
        "loss", f"training step, {config.model.name} on {config.data.name}, batch {config.batch_size}", "DR-softmax",
        "cross-entropy", "ms", float(result["loss_ms"]), float(result["baseline_ms"]),  # type: ignore[arg-type]
        float(result["ratio"]), float(result["ci_low"]), float(result["ci_high"]),  # type: ignore[arg-type]
        150, "<= 1.02", device.type, torch.get_num_threads(), note="ratio: median over pairs of steps",
        least=float(result["baseline_ms"]), floor="the step with cross-entropy",  # type: ignore[arg-type]
        reason="What the loss alone takes beyond cross-entropy at this batch is its calls, as above; a step of a LeNet "
        "is short enough for them to show.",
    )  # fmt: skip
