"""How time and memory grow: of an evaluation with images, of the loss with classes, of the tables with models."""

import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from drs.benchmarks.harness import Row, time_in_turn
from drs.benchmarks.startup import measured_process
from drs.config import PROJECT_ROOT
from drs.correlation import correlation_table
from drs.granulated import granulated_table
from drs.losses import DRSoftmaxLoss
from drs.partial import partial_correlation_table
from drs.statistics import STATISTICS

IMAGES = (100, 300, 1000)
CLASSES = (10, 100, 1000, 10000)
MODELS = (25, 50, 100, 200)
BATCH = 256


def _curve(
    case: str, sizes: Sequence[int], what: str, unit: str, values: Sequence[float], **more: Any
) -> Iterator[Row]:
    """Yield a row for each size beside the size before it."""
    points = list(zip(sizes, values, strict=True))
    for (before, low), (size, high) in pairwise(points):
        ratio = high / low
        yield Row(
            "growth", case, f"{size} {what}", f"{before} {what}", unit, high, low, ratio, ratio, ratio, device="cpu",
            target="", threads=torch.get_num_threads(), **more,
        )  # fmt: skip


def evaluation_rows(folder: Path, environment: dict[str, str], images: Sequence[int] = IMAGES) -> Iterator[Row]:
    """Yield seconds and peak memory of evaluating one MNIST LeNet under the paper suite, as a whole process."""
    train, evaluate = (str(PROJECT_ROOT / "scripts" / name) for name in ("train.py", "evaluate.py"))
    common = [f"results_dir={folder}", "progress=false"]
    # What is trained plays no part in what its evaluation costs, but that an attack on it has work to do.
    measured_process([train, "data=mnist", "model=lenet", "loss=ce", "epochs=1", "study=new", *common], environment)
    found = []
    for count in images:
        shutil.copytree(folder / "new", folder / f"of-{count}")  # an evaluation goes on where another stopped
        suite = ["suite=paper", f"suite.n_samples.default={count}", "suite.n_clean=1000"]
        command = [evaluate, *suite, f"study=of-{count}", "workers=1", "timing=false", *common]
        found.append(measured_process(command, environment))
    peaks, seconds = ([pair[i] for pair in found] for i in (0, 1))
    case = "evaluation, paper suite, MNIST lenet"
    yield from _curve(
        f"{case}: time", images, "images", "s", seconds, repeats=1,
        note="a whole process, its start, its tables and its report included, which do not grow",
    )  # fmt: skip
    yield from _curve(f"{case}: peak memory", images, "images", "GiB", peaks, repeats=1)


def class_rows(classes: Sequence[int] = CLASSES, repeats: int = 20) -> Iterator[Row]:
    """Yield the time of the loss, forward and backward, and of cross-entropy, by the number of classes."""
    calls = []
    for count in classes:
        logits = torch.randn(BATCH, count, requires_grad=True)
        labels = torch.randint(count, (BATCH,))
        loss = DRSoftmaxLoss()
        loss.validate = False  # as in training
        for function in (loss, F.cross_entropy):

            def call(function: Any = function, logits: torch.Tensor = logits, labels: torch.Tensor = labels) -> None:
                logits.grad = None
                function(logits, labels).backward()

            calls.append(call)
    medians = 1e3 * np.median(time_in_turn(calls, repeats, warmup=3), axis=0)
    for which, name in ((0, "DR-softmax"), (1, "cross-entropy")):
        case = f"{name}, forward and backward, batch {BATCH}"
        yield from _curve(case, classes, "classes", "ms", list(medians[which::2]), repeats=repeats)


def table_rows(models: Sequence[int] = MODELS, repeats: int = 1) -> Iterator[Row]:
    """Yield the time of each table over models, with the draws of a study, by the number of models."""
    tables = {
        "correlations": correlation_table,
        "partial correlations": partial_correlation_table,
        "granulated Kendall coefficients": granulated_table,
    }
    frames = [made_up_models(count) for count in models]
    for name, table in tables.items():
        calls = [lambda frame=frame, table=table: table(frame) for frame in frames]
        seconds = np.median(time_in_turn(calls, repeats, warmup=0), axis=0)
        yield from _curve(f"table of {name}", models, "models", "s", list(seconds), repeats=repeats)


def made_up_models(count: int, attacks: int = 4, seed: int = 0) -> pd.DataFrame:
    """Return a models table of ``count`` runs, five seeds of each weight, whose numbers go with the weight."""
    rng = np.random.default_rng(seed)
    weight = np.arange(count) // 5 * 0.001
    strength = np.log1p(1000 * weight)
    frame = {
        "run_id": [f"{i:04d}" for i in range(count)], "data": "mnist", "model": "lenet",
        "loss": np.where(weight > 0, "dr_softmax", "ce"), "loss_weight": weight, "seed": np.arange(count) % 5,
        "clean_accuracy": 0.98 - 0.002 * strength + rng.normal(0, 0.002, count), "excluded": None,
    }  # fmt: skip
    for name in STATISTICS:
        frame[f"stat.{name}"] = 1 / (1 + strength) + rng.normal(0, 0.05, count)
    for attack in range(attacks):
        for label in ("0.1", "0.2", "mean"):
            frame[f"acc.attack{attack}@{label}"] = 0.3 + 0.05 * strength + rng.normal(0, 0.02, count)
    return pd.DataFrame(frame)
