"""Models per minute: one worker, several, and several models trained as one batch."""

import copy
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from drs.benchmarks.harness import Row, ratio_of_medians, time_in_turn
from drs.benchmarks.packing import fit_packed
from drs.config import PROJECT_ROOT, TrainConfig
from drs.data import load_split
from drs.training import fit

REPEATS = 3
SEEDS = 6
SIZES = (4, 8)
"""Models that are packed into one batch."""


def worker_rows(overrides: Sequence[str], folder: Path, environment: dict[str, str], workers: int) -> Iterator[Row]:
    """Yield the models per minute of a sweep as a whole process, with joblib's workers beside one process.

    Args:
        overrides: Of each training; a sweep over ``SEEDS`` seeds is made of them.
        folder: Where the runs go; each sweep starts without any.
        environment: Of the process.
        workers: Of joblib, with as many cores shared among them.
    """
    launchers = {
        "one worker": [],
        f"{workers} joblib workers": ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}"],
    }
    command = [
        sys.executable, str(PROJECT_ROOT / "scripts" / "train.py"), "-m", *overrides, f"seed=range({SEEDS})",
        "study=sweep", "progress=false", f"results_dir={folder}",
    ]  # fmt: skip
    seconds = np.empty((REPEATS, len(launchers)))
    for repeat in range(REPEATS):
        for which, launcher in list(enumerate(launchers.values()))[:: 1 if repeat % 2 else -1]:
            shutil.rmtree(folder / "sweep", ignore_errors=True)
            began = time.perf_counter()
            done = subprocess.run([*command, *launcher], env=environment, capture_output=True, text=True)
            seconds[repeat, which] = time.perf_counter() - began
            if done.returncode:
                raise RuntimeError(f"the sweep ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    medians = np.median(seconds, axis=0)
    one, several = launchers
    yield Row(
        "sweeps", f"{SEEDS} trainings as one command: {' '.join(overrides)}", several, one, "models/min",
        60 * SEEDS / float(medians[1]), 60 * SEEDS / float(medians[0]),
        *ratio_of_medians(seconds[:, 0], seconds[:, 1]), REPEATS, "", "cpu", torch.get_num_threads(),
        least=workers * 60 * SEEDS / float(medians[0]),
        floor=f"{workers} cores do at most {workers} times the work of one; one worker uses them all where it can",
        note=f"whole processes, start-up and validation among it: {medians[0]:.1f} s and {medians[1]:.1f} s",
    )  # fmt: skip


def packing_rows(config: TrainConfig, device: torch.device) -> Iterator[Row]:
    """Yield the models per minute of models packed into one batch beside the same models trained in turn.

    Both are in this process, with the data in memory, and leave out validation.

    Args:
        config: Of each model but for its seed.
        device: Of the data and of both.
    """
    training, validation = load_split(config.data, device)
    nothing = validation.first(0)
    steps = config.epochs * (len(training) // config.batch_size)
    for size in SIZES:
        configs = [copy.deepcopy(config) for _ in range(size)]
        for seed, each in enumerate(configs):
            each.seed = seed

        def in_turn(configs: list[TrainConfig] = configs) -> None:
            for each in configs:
                fit(each, training, nothing, device)

        def packed(configs: list[TrainConfig] = configs) -> None:
            fit_packed(configs, training, device)

        seconds = time_in_turn([packed, in_turn], REPEATS, warmup=0, device=device.type)
        medians = np.median(seconds, axis=0)
        yield Row(
            "sweeps", f"{size} trainings of {steps} steps of {config.batch_size} images, {config.model.name}",
            "packed through torch.func", "one after another", "models/min", 60 * size / float(medians[0]),
            60 * size / float(medians[1]), *ratio_of_medians(seconds[:, 1], seconds[:, 0]), REPEATS, "", device.type,
            torch.get_num_threads(), tried=True,
            note="in one process, without validation; a convolution with weights of its own for every model is "
            "computed in groups, one a model",
        )  # fmt: skip


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
