"""How time and memory grow: of an evaluation with images, of the loss with classes, of the tables with models."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from drs.benchmarks.harness import Row, peak_tensor_bytes, time_in_turn
from drs.benchmarks.startup import EVALUATE, TRAIN, curve_rows, in_turn, measured_process
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
TABLES = {
    "correlations": correlation_table,
    "partial correlations": partial_correlation_table,
    "granulated Kendall coefficients": granulated_table,
}
MAKE_TABLES = """
import json, sys, time
from importlib import import_module
root, models, seconds, *tables = sys.argv[1:]
sys.path.insert(0, root)
import pandas as pd
models, taken = pd.read_pickle(models), []
for module, name in zip(tables[::2], tables[1::2]):
    table = getattr(import_module(module), name)
    table(models.head(10))  # what the first call loads is not the table's time
    began = time.perf_counter()
    table(models)
    taken.append(time.perf_counter() - began)
with open(seconds, "w") as file:
    json.dump(taken, file)
"""
"""Makes tables in a process without torch, whose memory would hide theirs, and writes the seconds of each."""


def evaluation_rows(folder: Path, environment: dict[str, str], images: Sequence[int] = IMAGES) -> Iterator[Row]:
    """Yield seconds and peak memory of evaluating one MNIST LeNet under the paper suite, as a whole process.

    Args:
        folder: An empty folder for the runs.
        environment: Of the processes.
        images: Attacked by each attack but those that take fewer, in rising order.

    Raises:
        RuntimeError: If a process fails.
    """
    common = [f"results_dir={folder}", "progress=false", "device=cpu"]
    # What is trained plays no part in what its evaluation costs, but that an attack on it has work to do.
    training = ["data=mnist", "model=lenet", "loss=ce", "epochs=1", "data.train_samples=10000", "study=new"]
    measured_process([TRAIN, *training, *common], environment)

    def evaluated_on(count: int) -> tuple[float, float]:
        shutil.copytree(folder / "new", folder / f"of-{count}")  # an evaluation goes on where another stopped
        suite = ["suite=paper", f"suite.n_samples.default={count}", "suite.n_clean=1000"]
        command = [EVALUATE, *suite, f"study=of-{count}", "workers=1", "timing=false", *common]
        return measured_process(command, environment)

    found = in_turn([partial(evaluated_on, count) for count in images], 1)
    once = f"measured once: it takes {found[0, 0, 1]:.0f} to {found[0, -1, 1]:.0f} s"
    case, threads = "evaluation, paper suite, MNIST lenet", torch.get_num_threads()
    yield from curve_rows(
        "growth", f"{case}: time", "{} images", images, "s", found[..., 1], threads=threads,
        note=f"a whole process, its start, its tables and its report included, which do not grow; {once}",
    )  # fmt: skip
    yield from curve_rows(
        "growth", f"{case}: peak memory", "{} images", images, "GiB", found[..., 0], threads=threads, note=once
    )


def class_rows(classes: Sequence[int] = CLASSES, repeats: int = 20) -> Iterator[Row]:
    """Yield time and peak memory of the loss, forward and backward, and of cross-entropy, by the number of classes."""
    calls = [
        _forward_and_backward(function, count) for function in ("DR-softmax", "cross-entropy") for count in classes
    ]
    milliseconds = 1e3 * time_in_turn(calls, repeats, warmup=3)
    mebibytes = in_turn([partial(peak_tensor_bytes, call) for call in calls], 3) / 2**20
    for which, name in enumerate(("DR-softmax", "cross-entropy")):
        case = f"{name}, forward and backward, batch {BATCH}"
        of = slice(which * len(classes), (which + 1) * len(classes))
        for what, unit, values, note in (
            ("time", "ms", milliseconds, ""),
            ("peak memory", "MiB", mebibytes, "of tensors that it makes, counted: the same at every repeat"),
        ):
            yield from curve_rows(
                "growth", f"{case}: {what}", "{} classes", classes, unit, values[:, of],
                threads=torch.get_num_threads(), note=note,
            )  # fmt: skip


def _forward_and_backward(name: str, classes: int) -> Callable[[], None]:
    logits = torch.randn(BATCH, classes, requires_grad=True)
    labels = torch.randint(classes, (BATCH,))
    function: Any = F.cross_entropy
    if name == "DR-softmax":
        function = DRSoftmaxLoss()
        function.validate = False  # as in training

    def call() -> None:
        logits.grad = None
        function(logits, labels).backward()

    return call


def table_rows(
    folder: Path, environment: dict[str, str], models: Sequence[int] = MODELS, repeats: int = 3
) -> Iterator[Row]:
    """Yield the time of each table over models, with the draws of a study, and the peak memory of a process of them.

    Args:
        folder: For files that the processes read and write.
        environment: Of the processes.
        models: How many there are, in rising order, 10 at least.
        repeats: Of each process.

    Raises:
        RuntimeError: If a process fails.
    """

    def made_of(count: int) -> list[float]:
        frame, seconds = folder / f"{count}.pickle", folder / f"{count}.json"
        made_up_models(count).to_pickle(frame)
        tables = [part for table in TABLES.values() for part in (table.__module__, table.__name__)]
        command = ["-c", MAKE_TABLES, str(PROJECT_ROOT), str(frame), str(seconds), *tables]
        peak, _ = measured_process(command, environment)
        return [*json.loads(seconds.read_text()), peak]

    found = in_turn([partial(made_of, count) for count in models], repeats)  # [repeats, models, tables and the peak]
    threads = torch.get_num_threads()
    for which, name in enumerate(TABLES):
        yield from curve_rows(
            "growth", f"table of {name}: time", "{} models", models, "s", found[..., which], threads=threads
        )
    yield from curve_rows(
        "growth", "tables of coefficients: peak memory", "{} models", models, "GiB", found[..., -1], threads=threads,
        note="of a process that makes the three tables and has not imported torch",
    )  # fmt: skip


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
