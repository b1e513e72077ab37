"""Whole commands of this project, timed as their user runs them: sweeps, studies, the strong suite."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from drs.benchmarks.harness import Row
from drs.config import PROJECT_ROOT
from drs.sweeper import grid_jobs

GRACE = 20.0
"""Seconds that a command has to end in when its time is up."""
Command = Sequence[str]
"""A script's name and its arguments."""


def seconds_of(commands: Sequence[Command], environment: Mapping[str, str], within: float | None = None) -> float:
    """Return the wall time of scripts run one after the other.

    Args:
        commands: What is run.
        environment: Of the processes.
        within: Seconds for all of them; what is still running then is asked to end.

    Raises:
        TimeoutError: If the time is up before the last one ends.
        RuntimeError: If one fails.
    """
    began = time.perf_counter()
    for script, *arguments in commands:
        command = [sys.executable, str(PROJECT_ROOT / "scripts" / script), *arguments]
        left = None if within is None else max(0.0, within - (time.perf_counter() - began))
        with subprocess.Popen(
            command, env=dict(environment), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                _, errors = process.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                _end(process)
                raise TimeoutError(f"{script} {' '.join(arguments)} had not ended after {within:g} s") from None
            except BaseException:
                _end(process)
                raise
        if process.returncode:
            raise RuntimeError(f"{script} {' '.join(arguments)} ended with {process.returncode}: {errors[-500:]}")
    return time.perf_counter() - began


def _end(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def sweep_command(overrides: Sequence[str], models: int, workers: int, folder: Path) -> Command:
    """Return the command of a sweep over seeds, so many trainings at a time."""
    return [
        "train.py", "-m", *overrides, f"seed=range({models})", "study=cards", "progress=false",
        f"results_dir={folder}", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}",
    ]  # fmt: skip


def study_commands(experiments: Sequence[str], workers: int) -> list[Command]:
    """Return the commands of whole studies under the paper suite, so many trainings at a time."""
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}"]
    return [
        command
        for name in experiments
        for command in (
            ["train.py", f"experiment={name}", *launcher],
            ["evaluate.py", f"experiment={name}", "suite=paper"],
        )
    ]


def count_models(experiments: Sequence[str]) -> int:
    """Return how many trainings some experiments have."""
    return sum(len(grid_jobs(name)) for name in experiments)


def studies_row(
    experiments: Sequence[str],
    environment: Mapping[str, str],
    results: Path,
    bound: float,
    device: str,
    *,
    workers: int = 4,
    within: float | None = None,
) -> Row:
    """Run whole studies under the paper suite and return their time beside what is asked for, both in seconds.

    Args:
        experiments: Their names.
        environment: Of the processes.
        results: The folder that they write to, which the environment names.
        bound: What is asked for.
        device: For the row.
        workers: Trainings at a time.
        within: When to stop them, at the most; the row then says how far they came.
    """
    total = count_models(experiments)
    case = f"experiment {' and '.join(experiments)} under the paper suite, {total} models"
    within = bound if within is None else within
    try:
        seconds = seconds_of(study_commands(experiments, workers), environment, within)
        cut = ""
    except TimeoutError:
        seconds = within
        states = [json.loads(path.read_text()).get("state") for path in results.glob("*/runs/*/status.json")]
        cut = f"stopped after {within:g} s, when {states.count('done')} of {total} models were trained"
    ratio = seconds / bound
    return Row(
        "gpu_studies", case, "ours", f"{bound:g} s", "s", seconds, bound, ratio, ratio, ratio, 1, "<= 1", device,
        torch.get_num_threads(), held=not cut, note=cut or "tables, figures and report included",
        reason=f"They were {cut}." if cut else "The report of the studies says how much is training, how much attacks.",
    )  # fmt: skip


def strong_row(
    section: str, training: Sequence[str], environment: Mapping[str, str], results: Path, *,
    samples: int, bound: float, device: str,
) -> Row:  # fmt: skip
    """Train a model, attack it under the strong suite and return the time of the latter beside a bound in seconds.

    Args:
        section: Of the row.
        training: Overrides of the training, which is not timed; they begin with ``data=`` and ``model=``.
        environment: Of the processes.
        results: A folder for the study.
        samples: Test images that are attacked.
        bound: What is asked for.
        device: Of both, ``cpu`` or ``cuda``.
    """
    data, model = (item.partition("=")[2] for item in training[:2])
    common = [f"results_dir={results}", "study=strong", "progress=false", f"device={device}"]
    seconds_of([["train.py", *training, *common]], environment)
    suite = ["suite=strong", f"++suite.n_samples.{data}={samples}", "timing=false"]
    seconds = seconds_of([["evaluate.py", *suite, *common]], environment)
    ratio = seconds / bound
    return Row(
        section, f"strong suite, one {model} on {data}, {samples} images", "ours", f"{bound:g} s", "s", seconds, bound,
        ratio, ratio, ratio, 1, "<= 1", device, torch.get_num_threads(),
        note="a whole process, its tables, figures and report included",
        reason="The study's cells say what each attack took.",
    )  # fmt: skip
