"""What has become of every training of a study, and of its evaluation, at any moment. Imports no torch.

Only files are read, and each of them is whole or absent: a study can be looked at while sweeps are at work on it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drs.cells import plan_study
from drs.claiming import owner_of
from drs.config import TrainConfig, procedure_name, run_id
from drs.errors import DamagedFileError, UserError
from drs.jobs import CLAIM_FILE, short_title
from drs.run_failures import FAILURE
from drs.runs import RunFolder
from drs.suite_config import SuiteConfig

STATES = ("done", "running", "interrupted", "failed", "diverged", "damaged", "waiting")


@dataclass(frozen=True)
class RunState:
    """What has become of one training.

    Attributes:
        run: Its folder, which need not exist.
        state: One of ``STATES``; waiting means that it is of the grid and was not started yet.
        detail: Who is at work on it, what stopped it or what is damaged, in one line.
        epoch: The epochs that are finished and kept.
        epochs: The epochs that it is to have; None where that is not known.
        seconds: What a finished training took.
    """

    run: RunFolder
    state: str
    detail: str = ""
    epoch: int = 0
    epochs: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class CellCount:
    """How far the evaluation of the finished runs is.

    Attributes:
        suite: The suite's name.
        done: Cells whose file is there.
        total: Cells of all finished runs.
        working: Runs that an evaluation is at work on.
        failures: Run and error of each evaluation that failed.
    """

    suite: str
    done: int
    total: int
    working: int
    failures: list[tuple[RunFolder, str]]


def read_states(study: Path, grid: Sequence[TrainConfig] = ()) -> list[RunState]:
    """Return the state of each run of a study, by id, and after them those of the grid that have none yet.

    Args:
        study: The study's folder.
        grid: The trainings of its experiment, where that is known.

    Raises:
        UserError: If the study does not exist and there is no grid.
    """
    runs = study / "runs"
    if not runs.is_dir() and not grid:
        others = sorted(path.parent.name for path in study.parent.glob("*/runs")) if study.parent.is_dir() else []
        known = f"studies there: {', '.join(others)}" if others else "there is no study there yet"
        raise UserError(f"study={study.name}: no runs under {study}; {known}")
    found = sorted(path for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    states = [_run_state(RunFolder(path)) for path in found]
    started = {state.run.run_id for state in states}
    ids = {run_id(config): config for config in grid}
    states += [
        RunState(RunFolder(runs / name), "waiting", epochs=config.epochs)
        for name, config in ids.items()
        if name not in started
    ]
    return states


def _run_state(run: RunFolder) -> RunState:
    try:
        status = run.status()
    except DamagedFileError as error:
        return RunState(run, "damaged", f"{error.path.name}: {error.reason.partition(';')[0]}")
    state, epochs = str(status.get("state", "")), status.get("epochs")
    if state == "done":
        return RunState(run, "done", epoch=epochs or 0, epochs=epochs, seconds=status.get("train_seconds"))
    owner = owner_of(run.path / CLAIM_FILE)
    if owner is not None:
        return RunState(run, "running", str(owner), _finished_epochs(run), epochs)
    if status.get("reason") == "diverged":
        return RunState(run, "diverged", str(status.get("detail", "")), epochs=epochs)
    if state == "failed":
        lines = (
            str(status.get("error") or status.get("reason") or "for a reason that was not kept").strip().splitlines()
        )
        return RunState(run, "failed", lines[-1])
    if state in ("running", "interrupted"):
        detail = "its process has ended" if state == "running" else ""
        return RunState(run, "interrupted", detail, _finished_epochs(run), epochs)
    return RunState(run, "waiting" if not state else "damaged", f"state {state!r} is unknown" if state else "")


def _finished_epochs(run: RunFolder) -> int:
    """Return the epochs in ``metrics.csv``, which is written every few seconds of a training."""
    try:
        return max(0, len((run.path / "metrics.csv").read_bytes().splitlines()) - 1)
    except OSError:
        return 0


def count_cells(states: Sequence[RunState], suite: SuiteConfig) -> CellCount:
    """Return how many of a suite's cells are there for the finished runs; runs that cannot be read are left out."""
    configs: dict[RunFolder, TrainConfig] = {}
    for state in states:
        if state.state == "done":
            try:
                configs[state.run] = state.run.config()
            except UserError:
                continue
    done = total = working = 0
    failures = []
    for run, planned in plan_study(suite, configs).items():
        folder = run.path / "eval"
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        total += len(planned)
        done += sum(cell.path.name in present for cell in planned)
        if ".claim" in present and owner_of(folder / ".claim") is not None:
            working += 1
        if FAILURE in present:
            failures.append((run, _failure(folder / FAILURE)))
    return CellCount(suite.name, done, total, working, failures)


def _failure(path: Path) -> str:
    try:
        content = json.loads(path.read_text())
        return " ".join(f"{content['where']}: {content['error']}".split())
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} cannot be read"


def seconds_left(states: Sequence[RunState], grid: Sequence[TrainConfig] = ()) -> float | None:
    """Return an estimate of how long the trainings that are left take with as many at a time as run now.

    The mean of the finished trainings of the same data, architecture and procedure, epoch by epoch, stands for each;
    of all finished ones where there is none, or no grid tells what a run is. None where nothing has finished yet.
    """
    kinds = {run_id(config): (config.data.name, config.model.name, procedure_name(config)) for config in grid}
    paces: dict[Any, list[float]] = {}
    for state in states:
        if state.seconds and state.epochs:
            for kind in (None, kinds.get(state.run.run_id)):
                paces.setdefault(kind, []).append(state.seconds / state.epochs)
    if None not in paces:
        return None
    means = {kind: sum(values) / len(values) for kind, values in paces.items()}
    left = [
        means.get(kinds.get(state.run.run_id), means[None]) * max(0, (state.epochs or _usual(states)) - state.epoch)
        for state in states
        if state.state in ("running", "interrupted", "failed", "damaged", "waiting")
    ]
    running = sum(state.state == "running" for state in states)
    return max(sum(left) / max(1, running), max(left, default=0.0))


def _usual(states: Sequence[RunState]) -> int:
    known = [state.epochs for state in states if state.epochs]
    return max(known, key=known.count) if known else 0


def titles(states: Sequence[RunState], grid: Mapping[str, TrainConfig]) -> dict[str, str]:
    """Return what some runs are, in a few words, by id; nothing for a run whose config cannot be read."""
    result = {}
    for state in states:
        name = state.run.run_id
        try:
            result[name] = short_title(grid[name] if name in grid else state.run.config())
        except UserError:
            result[name] = ""
    return result


def share(done: int, total: int) -> str:
    """Write how much of something is done, in whole per cent; never 100 before it is all."""
    return f"{math.floor(100 * done / total)} %"
