"""The launcher behind ``hydra/launcher=joblib``: jobs of a sweep in several processes, a line for each finished job.

hydra-joblib-launcher runs the jobs, in joblib's process pool. Its own loop shows nothing before the last job is done,
lets the workers write over each other, and hands several short jobs to one worker while another waits; so the loop is
here.
"""

import importlib
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from tqdm import tqdm

from drs.errors import Interrupted, UserError
from drs.processes import GRACE_SECONDS, Work, end_with_parent
from drs.sweeper import (
    has_failed,
    job_error,
    launch_in_turn,
    register_plugins,
    threads_each,
    threads_text,
    worker_count,
)


@dataclass
class ParallelLauncherConfig:
    """``hydra.launcher``: ``n_jobs`` is how many jobs run at a time, -1 meaning one for each core."""

    _target_: str = "hydra_plugins.drs_joblib_launcher.ParallelLauncher"
    n_jobs: int = -1


# The library registers the same name, so that it must have done so before. Hydra searches its path in order and imports
# each plugin once more; this folder is at the end of the path (drs.sweeper.register_plugins).
importlib.import_module("hydra_plugins.hydra_joblib_launcher.config")
ConfigStore.instance().store(group="hydra/launcher", name="joblib", node=ParallelLauncherConfig)


@dataclass(frozen=True)
class Finished:
    """A job that has ended: what it returned, what it printed, and how long it took in seconds."""

    result: JobReturn
    output: str
    errors: str
    seconds: float


class ParallelLauncher(JoblibLauncher):
    """Runs ``n_jobs`` jobs at a time, each with its share of the cores as threads, and prints as each one ends.

    Attributes:
        fail_fast: Whether the first job that fails ends the others.
    """

    fail_fast = False

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs and return their results in the order of ``job_overrides``.

        A failed job stops no other, unless ``fail_fast`` is set: then those that it stopped have the status UNKNOWN.

        Raises:
            UserError: For an ``n_jobs`` that is no number of workers, or if the system ended a worker.
        """
        workers = worker_count(self.joblib["n_jobs"], len(job_overrides))
        if workers == 1:
            return self._launch_serially(job_overrides, initial_job_idx)
        from hydra_plugins.hydra_joblib_launcher._core import execute_job
        from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor, as_completed

        threads = threads_each(workers)
        print(f"{workers} at a time, {threads_text(threads)}", flush=True)
        # A worker that has grown is replaced; that is no news for the user.
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs", category=UserWarning)
        executor = ProcessPoolExecutor(
            workers, initializer=_start_worker, initargs=(os.getpid(),), env={"OMP_NUM_THREADS": str(threads)}
        )
        results: dict[int, JobReturn] = {}
        places: dict[Any, int] = {}
        progress = _Progress(len(job_overrides), workers)
        state = Singleton.get_state()
        try:
            with _interrupts_for_this_process_alone():
                places = {
                    executor.submit(
                        _run_job, execute_job, initial_job_idx + place, overrides,
                        self.hydra_context, self.config, self.task_function, state,
                    ): place
                    for place, overrides in enumerate(job_overrides)
                }  # fmt: skip
            for future in as_completed(places):
                finished = future.result()
                if finished is None:
                    raise Interrupted(signal.SIGTERM)  # of which this process need not have heard yet
                results[places[future]] = finished.result
                progress.show(finished)
                if self.fail_fast and has_failed(finished.result):
                    break
        except BrokenProcessPool as error:
            raise UserError(
                f"hydra.launcher.n_jobs={self.joblib['n_jobs']}: the system ended one of {workers} workers, most "
                "likely for want of memory; take fewer. Finished trainings are kept"
            ) from error
        finally:
            # Nothing is left to wait for here, unless something went wrong.
            stopped = len(results) < len(job_overrides)
            try:
                if stopped:
                    _end_workers(executor, places)
            finally:
                executor.shutdown(kill_workers=stopped)
        return [results.get(place, JobReturn()) for place in range(len(job_overrides))]

    def _launch_serially(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self.hydra_context is not None and self.config is not None and self.task_function is not None
        basic = BasicLauncher()
        basic.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        return launch_in_turn(basic, job_overrides, initial_job_idx, fail_fast=self.fail_fast)


def _end_workers(executor: Any, jobs: Collection[Any]) -> None:
    """Ask the workers to end, and give their trainings the time to finish a step and to be kept."""
    from joblib.externals.loky import wait

    for job in jobs:
        job.cancel()
    for worker in list((executor._processes or {}).values()):
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGTERM)
    # Workers that have ended their job stay until the pool is shut down: it kills all others when one goes by itself.
    wait([job for job in jobs if not job.cancelled()], timeout=GRACE_SECONDS)


class _Progress:
    """Prints what each job printed, with its count and the time left."""

    def __init__(self, count: int, workers: int) -> None:
        self.count = count
        self.workers = workers
        self.finished = 0
        self.seconds: list[float] = []

    def show(self, job: Finished) -> None:
        """Print a finished job's output after ``job i of n``."""
        self.finished += 1
        failed = job.result.status == JobStatus.FAILED
        # A job that was done before or put off takes no time and says nothing about the others.
        if not failed and job.result.return_value.state in ("done", "diverged"):
            self.seconds.append(job.seconds)
        lines = job.output.splitlines() + (["stopped by an error"] if failed else [])
        print(f"job {self.finished} of {self.count}{self.time_left()}: " + "\n  ".join(lines), flush=True)
        if job.errors:
            print(job.errors, end="", file=sys.stderr, flush=True)

    def time_left(self) -> str:
        """Return ``, about 5 min left``, from the mean time of the jobs so far; nothing where none has run."""
        left = self.count - self.finished
        if not self.seconds or not left:
            return ""
        seconds = sum(self.seconds) / len(self.seconds) * left / min(self.workers, left)
        return f", about {round(seconds / 60)} min left" if seconds >= 60 else ", less than 1 min left"


@contextmanager
def _interrupts_for_this_process_alone() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: this one ends them, and they print nothing about it.

    A process inherits which signals are blocked. An interrupt in the meantime is delivered at the end of the block.
    """
    # Python 3.11 unblocks the signal after it has started this helper, so that the helper must be there before.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent: int) -> None:
    """Prepare a worker: Hydra's plugins and resolvers, tqdm's lock, and an end for it where the parent is killed."""
    register_plugins()
    # tqdm shares its lock with other processes by default; the system keeps such a one when a worker is killed.
    tqdm.set_lock(threading.RLock())
    signal.signal(signal.SIGTERM, Work.end)
    end_with_parent(parent, lambda: Work.running)


def _run_job(execute_job: Callable[..., JobReturn], *arguments: Any) -> Finished | None:
    """Run one job inside a worker; None once the worker was asked to end."""
    Work.running = True
    try:
        return None if Work.ending else _finish_job(execute_job, *arguments)
    except Interrupted:
        Work.ending = True
        return None
    finally:
        Work.running = False


def _finish_job(execute_job: Callable[..., JobReturn], *arguments: Any) -> Finished:
    """Run one job; keep its output, and the traceback of a defect, for the parent to print."""
    output, errors, started = StringIO(), StringIO(), time.monotonic()
    with redirect_stdout(output), redirect_stderr(errors):
        result = execute_job(*arguments)
        if result.status == JobStatus.FAILED and not isinstance(error := job_error(result), UserError):
            error.add_note("In the worker:\n" + "".join(traceback.format_exception(error)))
    return Finished(result, output.getvalue(), errors.getvalue(), time.monotonic() - started)
