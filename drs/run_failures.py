"""Runs that could not be evaluated: recorded in their folders, told at the end, and listed in the report."""

import sys
import time
import traceback
from dataclasses import dataclass

from drs.config import TrainConfig, loss_label, loss_weight
from drs.errors import UserError
from drs.runs import RunFolder, write_json

FAILURE = "failure.json"
"""In a run's folder ``eval``: where its evaluation failed, and why."""


@dataclass(frozen=True)
class RunFailure:
    """A finished run that could not be evaluated, and so is no model of any table.

    Attributes:
        run: Its folder.
        config: Its config, or None where that cannot be read.
        where: The cell that failed, or what is damaged.
        error: What went wrong, in one line.
        is_mistake: Whether it is a ``UserError``, which says what would be right; anything else is a defect.
    """

    run: RunFolder
    config: TrainConfig | None
    where: str
    error: str
    is_mistake: bool = True


def record_failure(run: RunFolder, config: TrainConfig, where: str, error: Exception) -> RunFailure:
    """Write to a run's folder where its evaluation failed and why; a defect with its traceback."""
    lines = str(error).strip().splitlines() or [""]
    is_mistake = isinstance(error, UserError)
    text = " ".join(lines) if is_mistake else f"{type(error).__name__}: {lines[-1]}".removesuffix(": ")
    content = {"where": where, "error": text, "time": time.time()}
    if not is_mistake:
        content["traceback"] = "".join(traceback.format_exception(error))
    write_json(run.path / "eval" / FAILURE, content)
    return RunFailure(run, config, where, text, is_mistake)


def forget_failure(run: RunFolder) -> None:
    """Remove what ``record_failure`` wrote: the run has been evaluated since."""
    (run.path / "eval" / FAILURE).unlink(missing_ok=True)


def failure_lines(failures: list[RunFailure]) -> list[str]:
    """Return a line per run: id, what was trained, where it failed and the error."""
    rows = [
        [failure.run.run_id, _setting(failure.config), failure.where, failure.error]
        for failure in sorted(failures, key=lambda failure: failure.run.run_id)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    return ["  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]) for row in rows]


def _setting(config: TrainConfig | None) -> str:
    if config is None:
        return "unknown"
    weight = loss_weight(config.loss)
    loss = f"{loss_label(config)} {weight:g}" if weight else loss_label(config)
    return f"{config.data.name}/{config.model.name} {loss} seed {config.seed}"


def end_with_failures(failures: list[RunFailure]) -> None:
    """Where there are failures, print them as a table and exit with status 1."""
    if failures:
        print(f"{len(failures)} finished runs could not be evaluated and are in no table:", file=sys.stderr)
        for line in failure_lines(failures):
            print(f"  {line}", file=sys.stderr)
        sys.exit(1)
