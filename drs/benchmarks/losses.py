"""DR-softmax beside cross-entropy: the loss alone, its memory, and a whole training step."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drs.benchmarks.harness import Machine, Row, peak_tensor_bytes, ratio_of_medians, time_in_turn
from drs.config import TrainConfig
from drs.losses import DRSoftmaxLoss
from drs.timing import time_steps

SHAPES = ((128, 10, 300), (8192, 10, 60), (1024, 1000, 20), (256, 50257, 6))
"""Batch, classes and repeats."""


def _forward_and_backward(loss: DRSoftmaxLoss | None, logits: Tensor, labels: Tensor) -> None:
    logits.grad = None
    value = F.cross_entropy(logits, labels) if loss is None else loss(logits, labels)
    value.backward()


def loss_rows(machine: Machine) -> Iterator[Row]:
    """Yield time and memory of forward and backward for each of ``SHAPES``, on the CPU."""
    for batch, classes, repeats in SHAPES:
        torch.manual_seed(0)
        logits = torch.randn(batch, classes, requires_grad=True)
        labels = torch.randint(classes, (batch,))
        loss = DRSoftmaxLoss()
        loss.validate = False  # as in training

        def ours(loss: DRSoftmaxLoss = loss, logits: Tensor = logits, labels: Tensor = labels) -> None:
            _forward_and_backward(loss, logits, labels)

        def theirs(logits: Tensor = logits, labels: Tensor = labels) -> None:
            _forward_and_backward(None, logits, labels)

        seconds = time_in_turn([ours, theirs], repeats, warmup=5)
        medians = np.median(seconds, axis=0)
        buffer = 4 * batch * classes
        floor = 4 * buffer / machine.gigabytes / 1e9
        case = f"forward and backward, {batch} x {classes}"
        yield Row(
            "loss", case, "DR-softmax", "cross-entropy", "ms", 1e3 * medians[0], 1e3 * medians[1],
            *ratio_of_medians(seconds[:, 0], seconds[:, 1]), repeats, "<= 2", "cpu", torch.get_num_threads(),
            floor=f"either reads and writes the logits' size twice: {1e3 * floor:.3g} ms at the copying rate",
        )  # fmt: skip
        extra = (peak_tensor_bytes(ours) - peak_tensor_bytes(theirs)) / buffer
        yield Row(
            "loss", f"tensors beyond cross-entropy's, {batch} x {classes}", "DR-softmax", "one [B, K] tensor", "[B, K]",
            extra, 1.0, extra, extra, extra, 1, "<= 1", "cpu", torch.get_num_threads(),
            note="the most bytes of tensors alive at a time, less those of cross-entropy",
        )  # fmt: skip


def step_rows(config: TrainConfig) -> Iterator[Row]:
    """Yield what a training step with DR-softmax takes beside one with cross-entropy."""
    result = time_steps(config, torch.device("cpu"), n_pairs=150)
    yield Row(
        "loss", f"training step, {config.model.name} on {config.data.name}, batch {config.batch_size}", "DR-softmax",
        "cross-entropy", "ms", float(result["loss_ms"]), float(result["baseline_ms"]),  # type: ignore[arg-type]
        float(result["ratio"]), float(result["ci_low"]), float(result["ci_high"]),  # type: ignore[arg-type]
        150, "<= 1.02", "cpu", torch.get_num_threads(), note="ratio: median over pairs of steps",
    )  # fmt: skip
