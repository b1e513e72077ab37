"""Every finished run of a study x every attack of a suite -> per-sample arrays, one file a cell."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drs.allocator import keep_freed_memory
from drs.cell_states import RunWatch, watch_in_worker
from drs.cells import Cell, plan_study, read_cells
from drs.claiming import ClaimedElsewhere, ClaimLost, claim
from drs.config import EvaluateConfig, TrainConfig, run_id
from drs.device import choose_device
from drs.errors import DamagedFileError, UnwritableError, UserError
from drs.evaluation_progress import Progress
from drs.evaluation_workers import as_they_come, count_workers, worker_pool
from drs.files import remove_leftovers
from drs.filling import CLEAN, fill_cell
from drs.integrity import CONFIG, METRICS, check_files
from drs.interrupts import raise_unheard
from drs.pooling import check_settings
from drs.reduction import reduce_run
from drs.run_failures import RunFailure, forget_failure, record_failure
from drs.runs import RunFolder, finished_runs, iterate_runs, study_folder
from drs.spreading import fill_queue
from drs.suite_config import SuiteConfig

POLL_SECONDS = 1.0
"""How often an evaluation looks whether a run that another one is at work on has become free."""


@dataclass(frozen=True)
class StudyEvaluation:
    """What ``evaluate_study`` did.

    Attributes:
        folder: The study's.
        cells: All cells of the runs that are evaluated in full.
        computed: How many cells were computed now.
        failures: The finished runs that could not be evaluated.
    """

    folder: Path
    cells: list[Cell]
    computed: int
    failures: list[RunFailure]


WholeRun = tuple[list[Cell], SuiteConfig]
"""All cells of a run, and their suite."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run: evaluated, failed, or left to another evaluation that is at work on it."""

    run: RunFolder
    computed: int = 0
    seconds: float = 0.0
    failure: RunFailure | None = None
    elsewhere: bool = False


def evaluate_study(config: EvaluateConfig) -> StudyEvaluation:
    """Attack every finished run of a study with every attack of the suite; only missing cells are computed.

    Several evaluations of one study share its runs: one that another is at work on is put off, and what is still
    missing of it when that is over is computed here. A run that fails is recorded in its folder and in the result, and
    the others go on; with ``fail_fast`` it ends the evaluation.

    Raises:
        UserError: For a study without finished runs, or with some that ``check_settings`` refuses, files that cannot be
            written, and where no run can be evaluated for one and the same reason. What was finished before it stays.
    """
    keep_freed_memory()
    study = study_folder(config.results_dir, config.study)
    known, failures = read_runs(study)
    check_settings(known)
    device = choose_device(config.device)
    damaged = {failure.run for failure in failures}
    # A damaged run may still be the source of another's transfer attack: what is planned must not depend on damage.
    cells = {run: planned for run, planned in plan_study(config.suite, known).items() if run not in damaged}
    # The longest first, so that no process waits long for the last.
    heavy = sorted(cells, key=lambda run: -known[run].data.channels * known[run].data.size ** 2)
    todo = {run: missing for run in heavy if (missing := _missing(cells[run]))}
    total = sum(map(len, todo.values()))
    workers, per_run = count_workers(config, device, len(todo))
    share = f", {workers} runs at a time" if workers > 1 else ""
    runs = f"{len(cells)} finished run{'s' * (len(cells) != 1)}"
    print(f"{config.study}: {runs}, {sum(map(len, cells.values()))} cells, {total} to compute{share}", flush=True)
    computed = 0
    absent = {cell.path for planned in todo.values() for cell in planned}
    there = (cell for planned in cells.values() for cell in planned if cell.path not in absent)
    with Progress(todo, there, device.type, workers, config.progress) as progress:
        whole_runs = {run: (cells[run], config.suite) for run in todo}
        for outcome in _evaluate(todo, whole_runs, device, workers, per_run, progress):
            computed += outcome.computed
            if outcome.failure is not None:
                failures.append(outcome.failure)
                if config.fail_fast:
                    raise UserError(f"{outcome.failure.error} (fail_fast=true ends the evaluation)")
    failed = {failure.run for failure in failures}
    whole = [cell for run, planned in cells.items() if run not in failed for cell in planned]
    if not whole and failures[0].is_mistake and len({failure.error for failure in failures}) == 1:
        raise UserError(failures[0].error)
    return StudyEvaluation(study, whole, computed, failures)


def read_runs(study: Path) -> tuple[dict[RunFolder, TrainConfig], list[RunFailure]]:
    """Return the finished runs of a study with their configs, and those of them whose files are damaged.

    A damaged run whose config is whole is in both.

    Raises:
        UserError: If the study does not exist or has no finished run.
    """
    configs: dict[RunFolder, TrainConfig] = {}
    failures = []
    for run in iterate_runs(study):
        config = None
        try:
            status = run.status()
            if status.get("state") != "done":
                continue
            recorded = status.get("files", {})
            check_files(run.path, recorded, (CONFIG,))
            config = configs[run] = run.config()
            check_files(run.path, recorded, (METRICS,))
            if run.run_id != run_id(config):
                # A copy under another name would count as a model of its own.
                raise UserError(f"{run.path}: the id of its config is {run_id(config)}; a run's folder is named by it")
        except UserError as error:
            failures.append(RunFailure(run, config, "its files", str(error)))
    if not configs and not failures:
        finished_runs(study)  # says what there is instead
    return configs, failures


def redo_damaged(evaluation: StudyEvaluation, config: EvaluateConfig) -> StudyEvaluation:
    """Delete the cells of a study that are not what was written, say so, and compute them again."""
    by_run: dict[RunFolder, list[Cell]] = {}
    for cell in evaluation.cells:
        by_run.setdefault(cell.run, []).append(cell)
    for run, planned in by_run.items():
        for cell in planned:
            try:
                read_cells(run, [cell])
            except DamagedFileError as error:
                print(error, flush=True)
                cell.path.unlink(missing_ok=True)
    return evaluate_study(config)


def _missing(cells: list[Cell]) -> list[Cell]:
    return [cell for cell in cells if not cell.path.exists()]


def _evaluate(
    todo: dict[RunFolder, list[Cell]],
    whole_runs: dict[RunFolder, WholeRun],
    device: torch.device,
    workers: int,
    per_run: int,
    progress: Progress,
) -> Iterator[Outcome]:
    """Yield the outcome of every run, first of those that are free, then of those that another evaluation had."""
    said = False
    with _caller(workers, per_run, progress) as call:
        while todo:
            put_off = []
            for outcome in call([(run, cells, device, whole_runs[run]) for run, cells in todo.items()]):
                if outcome.elsewhere:
                    put_off.append(outcome.run)
                    continue
                verb = "could not evaluate" if outcome.failure else "evaluated"
                progress.finished(outcome.run, verb, outcome.seconds)
                yield outcome
            if put_off and not said:
                print(f"waiting for {len(put_off)} runs that another evaluation is at work on", flush=True)
                said = True
            if put_off:
                time.sleep(POLL_SECONDS)
            todo = {run: todo[run] for run in put_off}


Call = Callable[[list[tuple[Any, ...]]], Iterator[Outcome]]


@contextmanager
def _caller(workers: int, per_run: int, progress: Progress) -> Iterator[Call]:
    """Yield what calls ``evaluate_run``: in worker processes, or here if there is to be one at a time."""

    def in_turn(tasks: list[tuple[Any, ...]]) -> Iterator[Outcome]:
        for run, cells, device, whole in tasks:
            yield evaluate_run(run, cells, device, whole, progress.states.watch(run), per_run)

    def side_by_side(tasks: list[tuple[Any, ...]]) -> Iterator[Outcome]:
        assert pool is not None
        return as_they_come(pool, _evaluate_in_worker, [(progress.states.first[task[0]], *task) for task in tasks])

    with worker_pool(workers, progress.states.shared) if workers > 1 else nullcontext() as pool:
        yield in_turn if pool is None else side_by_side


def _evaluate_in_worker(
    first: int, run: RunFolder, cells: list[Cell], device: torch.device, whole: WholeRun
) -> Outcome:
    return evaluate_run(run, cells, device, whole, watch_in_worker(first, cells))


def evaluate_run(
    run: RunFolder,
    cells: list[Cell],
    device: torch.device,
    whole: WholeRun | None = None,
    watch: RunWatch | None = None,
    processes: int = 1,
) -> Outcome:
    """Compute those of a run's cells that are missing, up to the first that fails, under the run's claim.

    If there may be several processes, what is left once they are ready is spread over them. With all cells of the run
    and the suite as ``whole``, what they say together is kept for the tables. How far the cells are is noted with
    ``watch``.

    Raises:
        UnwritableError: If results cannot be written, which no other run will fare better with.
    """
    began = time.perf_counter()
    computed, where = 0, "its checkpoint"
    watch = watch or RunWatch(None, 0, ())

    def begun(cell: Cell) -> None:
        nonlocal where
        raise_unheard()
        where = cell.title
        watch.begun(cell)

    def done(cell: Cell, count: int) -> None:
        nonlocal computed
        computed += count
        watch.done(cell)

    try:
        with claim(run.path / "eval" / ".claim", f"the evaluation of run {run.run_id}") as held:
            try:
                remove_leftovers(run.path / "eval")
                queue = _missing(cells)
                watch.keep(queue)
                if queue:
                    model = run.load_model(device)
                    fill_queue(
                        queue, device, processes, before_writing=held.check, when_begun=begun, when_done=done,
                        on_images=watch.images, fill_here=lambda cell: _fill(cell, model, device, held.check, watch),
                    )  # fmt: skip
            except (UnwritableError, ClaimLost):
                raise
            except Exception as error:  # whatever it is, it is this run's: recorded, told, and the others go on
                failure = record_failure(run, cells[0].train, where, error)
                return Outcome(run, computed, time.perf_counter() - began, failure)
            finally:
                CLEAN.forget()
            forget_failure(run)
            if whole is not None:
                with suppress(DamagedFileError):  # who makes the tables finds it, and has it computed again
                    reduce_run(run, *whole)
    except (ClaimedElsewhere, ClaimLost):
        return Outcome(run, computed, elsewhere=True)
    return Outcome(run, computed, time.perf_counter() - began)


def _fill(
    cell: Cell, model: torch.nn.Module, device: torch.device, before_writing: Callable[[], None], watch: RunWatch
) -> int:
    """Compute a cell, and first again what is damaged of those that it builds on; return how many were computed."""
    redone: list[Path] = []
    while True:
        try:
            fill_cell(cell, model, device, before_writing, watch.images)
        except DamagedFileError as error:
            earlier = next((other for other in cell.after if other.path == error.path), None)
            if earlier is None or earlier.path in redone:
                raise
            print(error, flush=True)
            earlier.path.unlink(missing_ok=True)
            redone.append(earlier.path)
            _fill(earlier, model, device, before_writing, watch)
        else:
            return 1 + len(redone)
