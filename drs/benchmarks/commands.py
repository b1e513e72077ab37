"""Whole commands of this project, timed as their user runs them: sweeps, studies, the strong suite."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from drs.array_files import load_arrays_file
from drs.benchmarks.harness import Row
from drs.config import PROJECT_ROOT
from drs.suite_config import UNBOUNDED
from drs.sweeper import grid_jobs

GRACE = 20.0
"""Seconds that a command has to end in when its time is up."""
CONVERGENCE_SAMPLES = 1000
"""Of the strong suite's checks on convergence."""
COSTLIEST = 12
"""Cells of a suite whose seconds are told."""
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
    samples: int, bound: float, device: str, settings: Sequence[str] = (), within: float | None = None,
) -> Row:  # fmt: skip
    """Train a model, attack it under the strong suite and return the time of the latter beside a bound in seconds.

    Args:
        section: Of the row.
        training: Overrides of the training, which is not timed; they begin with ``data=`` and ``model=``.
        environment: Of the processes.
        results: A folder for the study, which is called strong.
        samples: Test images that are attacked.
        bound: What is asked for.
        device: Of both, ``cpu`` or ``cuda``.
        settings: Overrides of the evaluation besides.
        within: Seconds after which the evaluation is stopped; the row then says so, and does not meet its target.
    """
    data, model = (item.partition("=")[2] for item in training[:2])
    seconds_of([["train.py", *training, *_strong_study(results, device)]], environment)
    try:
        seconds = seconds_of([strong_command(results, data, samples, device, settings)], environment, within)
        cut = ""
    except TimeoutError:
        seconds = bound if within is None else within
        cut = f"; stopped after {seconds:g} s"
    ratio = seconds / bound
    return Row(
        section, f"strong suite, one {model} on {data}, {samples} images", "ours", f"{bound:g} s", "s", seconds, bound,
        ratio, ratio, ratio, 1, "<= 1", device, torch.get_num_threads(), held=not cut,
        note="a whole process, its tables, figures and report included"
        + ("" if cut else f"; {_standing(results / 'strong')}")
        + (f"; trained with {' '.join(training[2:])}" if training[2:] else "")
        + (f"; with {' '.join(settings)}" if settings else "") + cut,
        reason=("It was" + cut.removeprefix(";") + ". " if cut else "")
        + "An image that stands at the smaller epsilon sees all steps of nearly all attacks, several hundred "
        f"gradients; with what a gradient takes, those set the time. {_costliest(results / 'strong')}",
    )  # fmt: skip


def _standing(study: Path) -> str:
    """Return in words how many images of a study's only model are right, and stand the attack on each class in turn."""
    table = pd.read_csv(study / "tables" / "accuracy.csv").query("not cumulative")
    clean = table.query("attack == 'clean'").robust_accuracy.iloc[0]
    standing = table.query("attack == 'targeted_pgd'").sort_values("epsilon")
    listed = [f"{row.robust_accuracy:.1%} at {row.epsilon_label}" for row in standing.itertuples()]
    return f"{clean:.1%} of the images are right without an attack, and under targeted PGD " + ", ".join(listed)


def _costliest(study: Path) -> str:
    """Return in words what the costliest cells of a study took, of those that are finished."""
    seconds = []
    for path in study.glob("runs/*/eval/*.npz"):
        about = json.loads(str(load_arrays_file(path)["about"]))
        bound = "" if about["epsilon_label"] == UNBOUNDED.label else f"@{about['epsilon_label']}"
        seconds.append((about["seconds"], f"{about['attack']}{bound}"))
    if not seconds:
        return "No cell was finished."
    listed = ", ".join(f"{name} {taken:.0f} s" for taken, name in sorted(seconds, reverse=True)[:COSTLIEST])
    return f"Of {len(seconds)} finished cells, some beside each other, the longest took: {listed}."


def strong_command(results: Path, data: str, samples: int, device: str, settings: Sequence[str]) -> Command:
    """Return the command of the strong suite on what ``strong_row`` has trained."""
    checked = min(samples, CONVERGENCE_SAMPLES)
    suite = ["suite=strong", f"++suite.n_samples.{data}={samples}", f"suite.sanity.n_convergence={checked}"]
    suite += ["timing=false", *settings]
    return ["evaluate.py", *suite, *_strong_study(results, device)]


def _strong_study(results: Path, device: str) -> list[str]:
    return [f"results_dir={results}", "study=strong", "progress=false", f"device={device}"]


def fast_search_row(row: Row, environment: Mapping[str, str], results: Path, *, data: str, samples: int,
                  settings: Sequence[str]) -> Row:  # fmt: skip
    """Return what a fast search brings the strong suite and costs in strength, on what ``strong_row`` has trained.

    Args:
        row: The row of ``strong_row``.
        environment: Of the processes.
        results: As there.
        data: The data set.
        samples: Test images that are attacked in either way.
        settings: Overrides of both evaluations besides.
    """
    seconds, accuracies = [], []
    for fast in ("true", "false"):
        for folder in results.glob("strong/runs/*/eval"):  # what is there from before would not be computed again
            shutil.rmtree(folder)
        command = strong_command(results, data, samples, row.device, [*settings, f"suite.fast_search={fast}"])
        seconds.append(seconds_of([command], environment))
        table = pd.read_csv(results / "strong" / "tables" / "accuracy.csv")
        accuracies.append(table.set_index(["attack", "norm", "epsilon_label", "cumulative"])["robust_accuracy"])
    weaker = (100 * (accuracies[0] - accuracies[1])).dropna()
    ratio = seconds[0] / seconds[1]
    return replace(
        row, case=row.case.replace(row.case.split(", ")[-1], f"{samples} images"), ours="fast search",
        theirs="search on the model", ours_median=seconds[0], theirs_median=seconds[1], ratio=ratio, low=ratio,
        high=ratio, target="", tried=True, reason="", held=True,
        note=f"whole processes; of {len(weaker)} robust accuracies those by a fast search differ by "
        f"{weaker.min():+.1f} to {weaker.max():+.1f} points (above 0: weaker), {weaker.mean():+.2f} in the mean",
    )  # fmt: skip
