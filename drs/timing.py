"""What a loss or a training procedure costs: training steps in turn with cross-entropy, on the same model and batch."""

import math
import time
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch

from drs.checkpoints import build_model_of
from drs.config import TrainConfig, loss_label, loss_weight, procedure_name
from drs.data import load_split
from drs.losses import build_loss
from drs.optimisation import build_optimizer
from drs.paired import BASELINE
from drs.procedures import Procedure, build_procedure
from drs.verdicts import PRIMARY_WEIGHT

COLUMNS = [
    "data", "model", "loss", "loss_weight", "baseline", "batch_size", "n_pairs", "baseline_ms", "loss_ms", "ratio",
    "ci_low", "ci_high", "device",
]  # fmt: skip
N_PAIRS = 400
"""So many that the interval of a step of two milliseconds is within about a hundredth of its ratio."""
N_PAIRS_PROCEDURE = 40
"""Fewer: an inner attack makes a step several times as long, and its ratio far from 1."""


def time_steps(
    config: TrainConfig, device: torch.device, *, n_pairs: int = N_PAIRS, warmup: int = 5
) -> dict[str, object]:
    """Time training steps of a config's loss against cross-entropy, one of each in turn, the order alternating.

    A step is the loss's input noise and the inner attack of the config's procedure, where there are such, and forward,
    backward and the optimiser's update for each phase of the loss, on one fixed batch of the training data. Returns a
    row of ``COLUMNS``: medians in milliseconds, the median of the pairwise ratios and its 95 % bootstrap interval.
    """
    training, _ = load_split(config.data, device)
    index = torch.arange(config.batch_size)
    images = training.pixels(index).contiguous(memory_format=torch.channels_last)
    labels = training.labels[: config.batch_size]
    torch.manual_seed(0)
    model = build_model_of(config).to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    options = {key: value for key, value in asdict(config.loss).items() if key != "name"}
    losses = [build_loss(BASELINE), build_loss(config.loss.name, **options)]
    for loss in losses:
        loss.validate = False  # as in training
    optimizers = [[build_optimizer(model, config.optim) for _ in range(loss.phases)] for loss in losses]
    for group in (group for each in optimizers for optimizer in each for group in optimizer.param_groups):
        group["lr"] = 0.0  # the weights stay put, so that both losses see the same work throughout
    procedures = [Procedure(), build_procedure(config.procedure, 0, device)]

    def step(which: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        loss, chosen = losses[which], images
        if loss.noise_std:
            chosen = chosen + loss.noise_std * torch.randn(images.shape, device=device)
        chosen = procedures[which].images(model, chosen, labels)
        for phase, optimizer in enumerate(optimizers[which]):
            optimizer.zero_grad(set_to_none=True)
            logits = model(chosen)
            extra = procedures[which].regulariser(model, logits) if phase == 0 else None
            if extra is None:
                loss.backpropagate(logits, labels, phase)
            else:
                (loss(logits, labels, phase) + extra).backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds = np.empty((n_pairs, 2))
    for pair in range(-warmup, n_pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            taken = step(which)
            if pair >= 0:
                seconds[pair, which] = taken
    ratios = seconds[:, 1] / seconds[:, 0]
    draws = np.random.default_rng(0).integers(n_pairs, size=(2000, n_pairs))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    baseline_ms, loss_ms = 1e3 * np.median(seconds, axis=0)
    values = [
        config.data.name, config.model.name, loss_label(config), loss_weight(config.loss), BASELINE, config.batch_size,
        n_pairs, baseline_ms, loss_ms, float(np.median(ratios)), low, high, device.type,
    ]  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def update_timing(
    configs: list[TrainConfig], known: pd.DataFrame, device: torch.device, *, measure: bool
) -> pd.DataFrame:
    """Return ``known`` with a row for each group and batch size that it lacks.

    A group is a data set and an architecture. Timed are every loss but cross-entropy and every procedure, each at one
    weight, dr_softmax's primary one or the nearest to it: the weight is a factor and does not change the work. With
    ``measure`` off only known rows return.
    """
    rows = known.to_dict("records")
    seen = {tuple(row[key] for key in _KEY) for row in rows}
    for config in _one_weight(configs) if measure else []:
        values = config.data.name, config.model.name, loss_label(config), config.batch_size, device.type
        if values not in seen:
            seen.add(values)
            n_pairs = N_PAIRS if procedure_name(config) == "standard" else N_PAIRS_PROCEDURE
            rows.append(time_steps(config, device, n_pairs=n_pairs))  # type: ignore[arg-type]
    return pd.DataFrame(rows, columns=COLUMNS)


_KEY = ("data", "model", "loss", "batch_size", "device")


def _one_weight(configs: list[TrainConfig]) -> list[TrainConfig]:
    """Return what is worth timing, the weight nearest to the primary one first."""

    def distance(config: TrainConfig) -> float:
        weight = loss_weight(config.loss)
        return abs(math.log(weight / PRIMARY_WEIGHT)) if weight > 0 else math.inf

    timed = [config for config in configs if loss_label(config) != BASELINE]
    return sorted(timed, key=distance)
