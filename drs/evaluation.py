"""Every finished run of a study x every attack of a suite -> per-sample arrays, one file a cell."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from drs.allocator import keep_freed_memory
from drs.cells import Cell, plan_cells
from drs.config import EvaluateConfig
from drs.device import choose_device
from drs.filling import fill_cell
from drs.processes import end_with_parent
from drs.runs import RunFolder, finished_runs, study_folder

MAX_WORKERS = 4
"""Processes that evaluate at once unless a config asks for more: each holds torch and the test images, some 0.5 GB."""


@dataclass(frozen=True)
class StudyEvaluation:
    """What ``evaluate_study`` did: all cells of the study, and how many of them were computed now."""

    folder: Path
    cells: list[Cell]
    computed: int


def evaluate_study(config: EvaluateConfig) -> StudyEvaluation:
    """Attack every finished run of a study with every attack of the suite; only missing cells are computed.

    Raises:
        UserError: For a study without finished runs, a damaged checkpoint, a broken model or a broken attack. What
            was finished before it stays.
    """
    keep_freed_memory()
    study = study_folder(config.results_dir, config.study)
    runs = finished_runs(study)
    device = choose_device(config.device)
    configs = {run: run.config() for run in runs}
    cells = {run.run_id: plan_cells(run, config.suite, configs) for run in runs}
    missing = {name: [cell for cell in planned if not cell.path.exists()] for name, planned in cells.items()}
    total = sum(len(planned) for planned in missing.values())
    todo = [(run, missing[run.run_id]) for run in runs if missing[run.run_id]]
    workers = count_workers(config, device, len(todo))
    share = f", {workers} runs at a time" if workers > 1 else ""
    print(
        f"{config.study}: {len(runs)} finished runs, {sum(map(len, cells.values()))} cells, {total} to compute{share}",
        flush=True,
    )
    with _bar(total, config.progress) as bar:
        if workers > 1:
            _evaluate_in_processes(todo, device, workers, config.progress, bar)
        else:
            _evaluate_in_turn(todo, device, config.progress, bar)
    return StudyEvaluation(study, [cell for planned in cells.values() for cell in planned], total)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_workers(config: EvaluateConfig, device: torch.device, n_runs: int) -> int:
    """Return how many runs are evaluated at a time: as asked, or on a CPU one for each core, at most ``MAX_WORKERS``.

    Small networks lose more to threads that wait for each other than a second core gives them, so one thread for
    each of several runs beats several threads for one.
    """
    wanted = config.workers
    if wanted is None:
        wanted = min(available_cores(), MAX_WORKERS) if device.type == "cpu" else 1
    return max(1, min(wanted, n_runs))


def _evaluate_in_turn(
    todo: list[tuple[RunFolder, list[Cell]]], device: torch.device, progress: bool, bar: "tqdm[Any]"
) -> None:
    lines = _Lines(len(todo), progress and bool(bar.disable))
    for position, (run, planned) in enumerate(todo, 1):
        model = run.load_model(device)
        began = time.perf_counter()
        for cell in planned:
            bar.set_postfix_str(
                f"run {position}/{len(todo)} {cell.train.data.name} {cell.train.loss.name} {cell.title}"
            )
            fill_cell(cell, model, device)
            bar.update()
        lines.finished(time.perf_counter() - began)


def _evaluate_run(run: RunFolder, cells: list[Cell], device_name: str, threads: int) -> float:
    """Fill the cells of one run in a worker process; return the seconds it took."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    device = torch.device(device_name)
    began = time.perf_counter()
    model = run.load_model(device)
    for cell in cells:
        fill_cell(cell, model, device)
    return time.perf_counter() - began


def _evaluate_in_processes(
    todo: list[tuple[RunFolder, list[Cell]]], device: torch.device, workers: int, progress: bool, bar: "tqdm[Any]"
) -> None:
    lines = _Lines(len(todo), progress and bool(bar.disable))
    threads = max(1, available_cores() // workers)
    with _pool(workers) as pool:
        futures: dict[Future[float], int] = {
            pool.submit(_evaluate_run, run, planned, str(device), threads): len(planned) for run, planned in todo
        }
        for future in as_completed(futures):
            seconds = future.result()
            bar.update(futures[future])
            lines.finished(seconds)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield worker processes; after an error or an interrupt they are stopped at once, and no cell is half written."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        yield pool
    except BaseException:
        for process in (getattr(pool, "_processes", None) or {}).values():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends its workers
    end_with_parent(parent)


class _Lines:
    """A line per finished run, with the time left, where there is no terminal for a bar."""

    def __init__(self, total: int, enabled: bool) -> None:
        self.total = total
        self.enabled = enabled
        self.done = 0
        self.began = time.perf_counter()

    def finished(self, seconds: float) -> None:
        self.done += 1
        if self.enabled:
            left = (time.perf_counter() - self.began) / self.done * (self.total - self.done)
            print(f"evaluated run {self.done}/{self.total} ({seconds:.0f} s), about {left:.0f} s left", flush=True)


def _bar(total: int, enabled: bool) -> "tqdm[Any]":
    terminal = enabled and sys.stderr.isatty()
    layout = "attacks {percentage:3.0f}%|{bar}| {n}/{total} {elapsed}<{remaining}{postfix}"
    return tqdm(total=total, disable=not terminal, dynamic_ncols=True, leave=False, bar_format=layout)
