"""Models per minute: one worker, several, and several models trained at once in one process."""

import copy
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from drs.benchmarks.graphs import fit_graphed
from drs.benchmarks.harness import Row, ratio_of_medians, time_in_turn
from drs.benchmarks.packing import Fit, fit_packed, warm_up
from drs.config import PROJECT_ROOT, TrainConfig
from drs.data import load_split
from drs.training import fit

REPEATS = 3
SEEDS = 6
SIZES = (4, 8)
"""Models that are trained at once; on a card the last number alone: to compile for each takes up to a minute."""
PACKED = "packed through torch.func"
COMPILED = f"{PACKED}, compiled, as a CUDA graph"
GRAPHED = "side by side in one CUDA graph"
WAYS = {"cpu": (PACKED,), "cuda": (GRAPHED, COMPILED, PACKED)}
"""How several models are trained in one process on a device; what should be the fastest comes first."""
_GROUPED = (
    "in one process, without validation; a convolution with weights of its own for every model is computed in groups, "
    "one a model"
)
_NOTES = {
    GRAPHED: "in one process, without validation; the kernels of each model are those of training it alone; to capture "
    "the graph is among the seconds",
    COMPILED: _GROUPED,
    PACKED: _GROUPED,
}


def worker_rows(
    overrides: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    workers: int,
    device: str = "cpu",
    repeats: int | None = None,
) -> Iterator[Row]:
    """Yield the models per minute of a sweep as a whole process, with joblib's workers beside one process.

    Args:
        overrides: Of each training; a sweep over ``SEEDS`` seeds is made of them.
        folder: Where the runs go; each sweep starts without any.
        environment: Of the process.
        workers: Of joblib; they share the cores, and the card where the device is one.
        device: ``cpu`` or ``cuda``, of every training.
        repeats: Of each sweep; ``REPEATS`` by default.

    Raises:
        RuntimeError: If a sweep fails.
    """
    launchers = {
        "one worker": [],
        f"{workers} joblib workers": ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}"],
    }
    command = [
        sys.executable, str(PROJECT_ROOT / "scripts" / "train.py"), "-m", *overrides, f"seed=range({SEEDS})",
        "study=sweep", "progress=false", f"device={device}", f"results_dir={folder}",
    ]  # fmt: skip
    repeats = repeats or REPEATS
    seconds = np.empty((repeats, len(launchers)))
    for repeat in range(repeats):
        for which, launcher in list(enumerate(launchers.values()))[:: 1 if repeat % 2 else -1]:
            shutil.rmtree(folder / "sweep", ignore_errors=True)
            began = time.perf_counter()
            done = subprocess.run([*command, *launcher], env=environment, capture_output=True, text=True)
            seconds[repeat, which] = time.perf_counter() - began
            if done.returncode:
                raise RuntimeError(f"the sweep ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    medians = np.median(seconds, axis=0)
    one, several = launchers
    shared = "one worker uses every core where it can" if device == "cpu" else "the workers share one card"
    yield Row(
        "sweeps", f"{SEEDS} trainings as one command: {' '.join(overrides)}", several, one, "models/min",
        60 * SEEDS / float(medians[1]), 60 * SEEDS / float(medians[0]),
        *ratio_of_medians(seconds[:, 0], seconds[:, 1]), repeats, "", device, torch.get_num_threads(),
        note=f"whole processes, start-up and validation among it: {medians[1]:.1f} s and {medians[0]:.1f} s; {shared}",
    )  # fmt: skip


def packing_rows(config: TrainConfig, device: torch.device) -> Iterator[Row]:
    """Yield the models per minute of models trained at once beside the same models trained in turn.

    Both are in this process, with the data in memory, and leave out validation. On a card everything is done once
    before it is timed, so that compiling, and choosing and loading kernels, are not among the seconds. A way that
    cannot be compiled or captured gets a row that says so.

    Args:
        config: Of each model but for its seed, in a form that ``fit_packed`` takes.
        device: Of the data and of both.
    """
    training, validation = load_split(config.data, device)
    nothing = validation.first(0)
    steps = config.epochs * (len(training) // config.batch_size)
    for size in SIZES if device.type == "cpu" else SIZES[-1:]:
        configs = [copy.deepcopy(config) for _ in range(size)]
        for seed, each in enumerate(configs):
            each.seed = seed
        empty = Row(
            "sweeps", f"{size} trainings of {steps} steps of {config.batch_size} images, {config.model.name}", "",
            "one after another", "models/min", None, None, None, None, None, 0, "", device.type,
            torch.get_num_threads(), tried=True,
        )  # fmt: skip

        def in_turn(configs: list[TrainConfig] = configs) -> None:
            for each in configs:
                fit(each, training, nothing, device)

        ways: dict[str, Callable[[], object]] = {}
        notes: dict[str, str] = {}
        for way in WAYS[device.type]:
            train, notes[way] = fit_of(way), _NOTES[way]
            if way != PACKED:
                try:
                    seconds = warm_up(train, configs, training, device)
                except RuntimeError as error:
                    failed = "not compiled" if way == COMPILED else "not captured"
                    yield replace(empty, ours=way, note=f"{failed}: {' '.join(str(error).split())[:300]}")
                    continue
                if way == COMPILED:
                    notes[way] += f"; {seconds:.1f} s to compile are not among the seconds"
            ways[way] = functools.partial(train, configs, training, device)
        yield from _measured(empty, size, ways, in_turn, notes)


def fit_of(way: str) -> Fit:
    """Return what trains several models in one of ``WAYS``."""
    return fit_graphed if way == GRAPHED else functools.partial(fit_packed, compiled=way == COMPILED)


def _measured(
    empty: Row, size: int, ways: dict[str, Callable[[], object]], in_turn: Callable[[], object], notes: dict[str, str]
) -> Iterator[Row]:
    """Yield ``empty`` filled for each way to train ``size`` models, beside training them in turn."""
    warmup = 1 if empty.device == "cuda" else 0
    seconds = time_in_turn([in_turn, *ways.values()], REPEATS, warmup=warmup, device=empty.device)
    rates = 60 * size / np.median(seconds, axis=0)
    for which, way in enumerate(ways, start=1):
        ratio, low, high = ratio_of_medians(seconds[:, 0], seconds[:, which])
        yield replace(
            empty, ours=way, ours_median=float(rates[which]), theirs_median=float(rates[0]), ratio=ratio, low=low,
            high=high, repeats=REPEATS, note=notes[way],
        )  # fmt: skip


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
