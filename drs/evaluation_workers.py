"""How an evaluation's runs are spread over worker processes."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits

from drs.allocator import keep_freed_memory
from drs.cell_states import lend
from drs.config import EvaluateConfig
from drs.errors import UserError
from drs.processes import end_with_parent

MAX_WORKERS = 4
"""Processes that evaluate at once unless a config asks for more: each holds torch and the test images, some 0.5 GB."""

Result = TypeVar("Result")


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_workers(config: EvaluateConfig, device: torch.device, n_runs: int) -> tuple[int, int]:
    """Return how many runs are evaluated at a time, and over how many processes the batches of a run are spread.

    As many processes as asked, or on a CPU one for each core, at most ``MAX_WORKERS``. Small networks lose more to
    threads that wait for each other than a second core gives them, so one thread for each of several runs beats
    several threads for one; where there is but one run, its batches are spread.
    """
    wanted = config.workers
    if wanted is None:
        wanted = min(available_cores(), MAX_WORKERS) if device.type == "cpu" else 1
    return max(1, min(wanted, n_runs)), wanted if n_runs == 1 else 1


@contextmanager
def worker_pool(workers: int, states: Any = None) -> Iterator[ProcessPoolExecutor]:
    """Yield worker processes. After an error or an interrupt they are ended at once; what they write is whole or not
    there. ``states`` is the memory that ``drs.cell_states.watch_in_worker`` is to use in them.

    Raises:
        UserError: If a worker process is ended from outside.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, available_cores() // workers)
    arguments = (os.getpid(), threads, states)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments)
    try:
        yield pool
    except BaseException as error:
        _end(pool)
        if isinstance(error, BrokenExecutor):
            raise UserError(
                "a worker process of the evaluation was ended from outside, perhaps for want of memory; what is "
                "finished is kept: start it again, with workers=1 if need be"
            ) from None
        raise
    pool.shutdown()


def _end(pool: ProcessPoolExecutor) -> None:
    for process in (getattr(pool, "_processes", None) or {}).values():
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class StartingPool:
    """Worker processes that may not have started yet.

    Attributes:
        pool: Takes tasks from the first.
        workers: Its processes.
        prepare: What each is to do once it is up; does little where it is called again.
        starts: Calls of ``prepare``, each with the id of the process that took it.
    """

    pool: ProcessPoolExecutor
    workers: int
    prepare: Callable[[], object]
    starts: list[Future[int]] = field(default_factory=list)

    def is_ready(self) -> bool:
        """Say whether nobody has to wait for the processes any more; one that failed tells of it in its next task."""
        if not all(start.done() for start in self.starts):
            return False
        if any(start.exception() for start in self.starts):
            return True
        # One that is up early may have taken the calls that were meant for others.
        missing = self.workers - len({start.result() for start in self.starts})
        self.starts += [self.pool.submit(_prepared, self.prepare) for _ in range(missing)]
        return missing <= 0


def _prepared(prepare: Callable[[], object]) -> int:
    prepare()
    return os.getpid()


@contextmanager
def starting_pool(workers: int, prepare: Callable[[], object]) -> Iterator[StartingPool]:
    """Yield worker processes at once, while they start and call ``prepare``; see ``worker_pool``.

    Those that are still starting in the end, so that nobody has used them, are not waited for.
    """
    with worker_pool(workers) as pool:
        starting = StartingPool(pool, workers, prepare)
        starting.is_ready()
        yield starting
        if not starting.is_ready():
            _end(pool)


def as_they_come(
    pool: ProcessPoolExecutor, function: Callable[..., Result], tasks: list[tuple[Any, ...]]
) -> Iterator[Result]:
    """Call a function with each of some tuples of arguments, in worker processes; yield the results as they come."""
    for future in as_completed([pool.submit(function, *task) for task in tasks]):
        yield future.result()


def _start_worker(parent: int, threads: int, states: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends its workers
    end_with_parent(parent)
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # numpy's, which torch's number is not for
    keep_freed_memory()
    lend(states)
