"""What the penalty costs: training steps of two losses, interleaved on the same model and batch."""

import time
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch

from drs.config import TrainConfig, loss_weight
from drs.losses import build_loss
from drs.runs import build_model_of
from drs.training import build_optimizer, load_split

COLUMNS = [
    "data", "model", "loss", "loss_weight", "baseline", "batch_size", "n_pairs", "baseline_ms", "loss_ms", "ratio",
    "ci_low", "ci_high", "device",
]  # fmt: skip


def time_steps(config: TrainConfig, device: torch.device, *, n_pairs: int = 200, warmup: int = 5) -> dict[str, object]:
    """Time training steps of a config's loss against cross-entropy, one of each in turn, the order alternating.

    A step is forward, backward and the optimiser's update on one fixed batch of the training data. Returns a row of
    ``COLUMNS``: medians in milliseconds, the median of the pairwise ratios and its 95 % bootstrap interval.
    """
    training, _ = load_split(config.data, device)
    index = torch.arange(config.batch_size)
    images = training.pixels(index).contiguous(memory_format=torch.channels_last)
    labels = training.labels[: config.batch_size]
    torch.manual_seed(0)
    model = build_model_of(config).to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the weights stay put, so that both losses see the same work throughout
    options = {key: value for key, value in asdict(config.loss).items() if key != "name"}
    losses = [build_loss("ce"), build_loss(config.loss.name, **options)]
    for loss in losses:
        loss.validate = False  # as in training

    def step(which: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        losses[which](model(images), labels).backward()
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
        config.data.name, config.model.name, config.loss.name, loss_weight(config.loss), "ce", config.batch_size,
        n_pairs, baseline_ms, loss_ms, float(np.median(ratios)), low, high, device.type,
    ]  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def update_timing(
    configs: list[TrainConfig], known: pd.DataFrame, device: torch.device, *, measure: bool
) -> pd.DataFrame:
    """Return ``known`` with a row for every setting of a dr_softmax run that it lacks.

    A setting is a data set, architecture, weight, batch size and device type. With ``measure`` off only known rows
    return.
    """
    rows = known.to_dict("records")
    seen = {(row["data"], row["model"], row["loss_weight"], row["batch_size"], row["device"]) for row in rows}
    for config in configs:
        if config.loss.name != "dr_softmax" or not measure:
            continue
        key = (config.data.name, config.model.name, loss_weight(config.loss), config.batch_size, device.type)
        if key not in seen:
            seen.add(key)
            rows.append(time_steps(config, device))  # type: ignore[arg-type]
    return pd.DataFrame(rows, columns=COLUMNS)
