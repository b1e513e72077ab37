"""A sweep beyond its launcher: it waits for the runs that others are at work on, and ends with a table.

Two sweeps over one grid, on one machine or on several, share the work in this way: each takes the runs that nobody
else has claimed, and in the end waits for, or takes over, what the other still holds.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus

from drs.claiming import ClaimedElsewhere, claim, owner_of
from drs.config import TrainConfig
from drs.errors import SweepError, UserError
from drs.jobs import CLAIM_FILE, TrainingResult, last_line, settled, short_title
from drs.runs import run_folder
from drs.sweeper import job_error

LISTED = 24
"""A sweep of at most so many runs lists them all at its end; a larger one only those that are not simply done."""
POLL_SECONDS = 1.0
GOOD = ("done", "elsewhere", "skipped")

Launch = Callable[[list[list[str]]], Sequence[JobReturn]]


@dataclass(frozen=True)
class Job:
    """One training of a sweep: what Hydra's launcher is told, and the config that comes of it."""

    overrides: list[str]
    config: TrainConfig


def run_sweep(jobs: Mapping[str, Job], launch: Launch, *, fail_fast: bool) -> list[TrainingResult]:
    """Run all jobs to their end, print the table, and return their results.

    Those that have a result from before are counted and never launched, so that thousands of them take no time.

    Args:
        jobs: By run id.
        launch: Runs jobs, given their overrides; returns a result for each, in order, whose status is UNKNOWN where
            the job was not run.
        fail_fast: Stop at the first error.

    Raises:
        SweepError: If a job failed; a defect that is not the training's own is raised as it is.
    """
    results = {name: result for name, job in jobs.items() if (result := settled(job.config)) is not None}
    defects: list[Exception] = []
    left = [name for name in jobs if name not in results]
    print(f"{len(jobs)} trainings" + (f", {len(results)} of them finished before" if results else ""), flush=True)
    while left:
        returns = launch([jobs[name].overrides for name in left])
        for name, job in zip(left, returns, strict=True):
            results[name] = _result(name, jobs[name].config, job)
            if job.status == JobStatus.FAILED:
                defects.append(job_error(job))
        if fail_fast and any(result.state == "failed" for result in results.values()):
            break
        elsewhere = [name for name in left if results[name].state == "elsewhere"]
        finished, left = wait_for_others({name: jobs[name].config for name in elsewhere})
        results |= finished
    ended = [results[name] for name in jobs]
    print(sweep_text(ended), flush=True)
    for defect in defects:
        if not isinstance(defect, UserError):
            raise defect
    failed = [result for result in ended if result.state == "failed"]
    if failed:
        raise SweepError(f"{len(failed)} of {len(ended)} trainings failed, the first with: {failed[0].detail}")
    return ended


def _result(name: str, config: TrainConfig, job: JobReturn) -> TrainingResult:
    if job.status == JobStatus.COMPLETED:
        result: TrainingResult = job.return_value
        return result
    failed = job.status == JobStatus.FAILED
    state, detail = ("failed", last_line(job_error(job))) if failed else ("not started", "")
    return TrainingResult(name, state, detail, str(run_folder(config).path), short_title(config))


def wait_for_others(configs: Mapping[str, TrainConfig]) -> tuple[dict[str, TrainingResult], list[str]]:
    """Wait for runs that other processes are at work on.

    Returns:
        The results of all of them, and an empty list; or those so far and the runs that are free to be trained here,
        because their owner died or gave up.
    """
    results: dict[str, TrainingResult] = {}
    told: set[str] = set()
    while True:
        began = time.monotonic()
        free = []
        for name, config in configs.items():
            if name in results:
                continue
            path = run_folder(config).path / CLAIM_FILE
            if (result := settled(config)) is not None:
                results[name] = _of_others(result)
            elif _is_free(path):
                # The owner may have finished it since, and given up the claim after that.
                result = settled(config)
                if result is not None:
                    results[name] = _of_others(result)
                else:
                    free.append(name)
            elif (owner := owner_of(path)) is not None and str(owner) not in told:
                told.add(str(owner))
                print(f"waiting for {owner}, which is at work on run {name}", flush=True)
        if free or len(results) == len(configs):
            return results, free
        # Looking at thousands of runs on a slow file system takes a while; it is not to take most of the time.
        time.sleep(max(POLL_SECONDS, 5 * (time.monotonic() - began)))


def _is_free(path: Path) -> bool:
    try:
        # A claim of another machine that is dead by what this process has seen of it is so taken out of the way of
        # workers, who have not watched it.
        with claim(path, "run"):
            return True
    except ClaimedElsewhere:
        return False


def _of_others(result: TrainingResult) -> TrainingResult:
    return result if result.state == "diverged" else replace(result, state="elsewhere", detail="done elsewhere")


def sweep_text(results: Sequence[TrainingResult]) -> str:
    """Return the table at the end of a sweep: who did not end well, in full, and counts of all."""
    rows = [result for result in results if len(results) <= LISTED or result.state not in GOOD]
    lines = []
    if rows:
        titles = max(len("what it is"), *(len(row.title) for row in rows))
        lines.append(f"{'run':<12}  {'what it is':<{titles}}  {'state':<11}  {'seconds':>7}")
        for row in rows:
            seconds = f"{row.seconds:.1f}" if row.seconds else ""
            said = row.detail if row.state not in GOOD else ""
            lines.append(f"{row.run_id:<12}  {row.title:<{titles}}  {row.state:<11}  {seconds:>7}  {said}".rstrip())
    return "\n".join([*lines, _counts(row.state for row in results)])


def _counts(states: Iterable[str]) -> str:
    found = Counter(states)
    parts = [f"{found['done']} done"]
    parts += [f"{found['elsewhere']} done elsewhere"] if found["elsewhere"] else []
    parts += [
        f"{found['skipped']} skipped (finished before)", f"{found['diverged']} diverged",
        f"{found['failed']} stopped by an error",
    ]  # fmt: skip
    parts += [f"{found['not started']} not started"] if found["not started"] else []
    return ", ".join(parts)
