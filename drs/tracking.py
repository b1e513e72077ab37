"""Weights & Biases, off by default; the only file that imports wandb.

CSV stays the record: whatever goes wrong here is one line of warning, and training goes on. Everything that wandb
writes lies in ``results/<study>/wandb``, and nothing of it reaches the terminal.
"""

import errno
import os
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from drs.config import TrackingConfig
from drs.interrupts import whole_imports

if TYPE_CHECKING:
    import wandb

INIT_SECONDS = 5.0
"""How long the server may take to accept a run before the training starts without W&B."""
FINISH_SECONDS = 10.0
"""How long the end of a run may wait for its last uploads; what is not up by then can be sent with ``wandb sync``."""
SPARE_BYTES = 2**24
"""Free space without which nothing is recorded: wandb itself loses what it cannot write without a word."""
EVALUATION_TABLES = ("models", "claims")


class Tracker:
    """Where a run's metrics go besides ``metrics.csv``; this one sends them nowhere.

    A context manager: leaving the block closes the run, as failed if an exception does.
    """

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of one epoch."""

    def finish(self, failed: bool = False) -> None:
        """Close the run."""

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(failed=kind is not None)


class WandbTracker(Tracker):
    """One W&B run in the group of its study; a failure after its start is told once and ends the recording."""

    def __init__(self, run: "wandb.Run") -> None:
        self.run: wandb.Run | None = run

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Record the metrics of one epoch; a failure is a warning."""
        if self.run is not None:
            try:
                self.run.log(metrics, step=step)
            except _failures() as error:
                self._give_up("did not take the metrics", error)

    def finish(self, failed: bool = False) -> None:
        """Close the run; a failure is a warning. A second call does nothing."""
        if self.run is not None:
            run, self.run = self.run, None
            try:
                run.finish(exit_code=int(failed))
            except _failures() as error:
                self._give_up("did not close the run", error)

    def _give_up(self, what: str, error: Exception) -> None:
        _warn(f"W&B {what}", error)
        self.run = None
        _stop_service()


def open_tracker(config: TrackingConfig, name: str, content: dict[str, Any], study_dir: Path) -> Tracker:
    """Return the tracker that a config asks for; where W&B cannot start, one that tracks nothing, and a warning.

    Args:
        config: ``tracking`` of the config.
        name: The run's id, by which W&B shows it. An interrupted training that goes on goes on in the same W&B run.
        content: What W&B shows as the run's config.
        study_dir: ``results/<study>``; the study's name is the group.
    """
    return _open(config, name, content, study_dir, "training")


def log_evaluation(config: TrackingConfig, study_dir: Path) -> None:
    """Record a study's tables of models and claims and its figures as the W&B run ``evaluation`` of its group."""
    if config.name == "none":
        return
    with _open(config, "evaluation", {"study": study_dir.name}, study_dir, "evaluation") as tracker:
        if isinstance(tracker, WandbTracker) and tracker.run is not None:
            import wandb

            content: dict[str, Any] = {}
            try:
                for table in EVALUATION_TABLES:
                    rows = pd.read_csv(study_dir / "tables" / f"{table}.csv")
                    content[f"tables/{table}"] = wandb.Table(dataframe=rows)
                for figure in sorted((study_dir / "figures").glob("*.png")):
                    content[f"figures/{figure.stem}"] = wandb.Image(str(figure))
            except _failures() as error:
                tracker._give_up("did not take the evaluation", error)
            # The server decides on the next step: an evaluation that is repeated comes after the one before.
            tracker.log(content, step=tracker.run.step if tracker.run is not None else 0)


def _open(config: TrackingConfig, name: str, content: dict[str, Any], study_dir: Path, job_type: str) -> Tracker:
    if config.name == "none":
        return Tracker()
    folder = study_dir / "wandb"
    # Read by wandb and its service process whenever they need a place for a file of their own; by default that is the
    # user's home. The last one keeps wandb from reporting its own errors to its makers.
    os.environ |= {"WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_DATA_DIR": str(folder / "data")}
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        with whole_imports():
            import wandb
    except ImportError as error:
        _warn("W&B is off for this run", error)
        return Tracker()
    mode: Literal["online", "offline"] = "online" if config.mode == "online" else "offline"
    try:
        _check_folder(folder)
        settings = wandb.Settings(
            silent=True, console="off", symlink=False, disable_code=True, save_code=False, x_save_requirements=False,
            init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True, mode=mode,
        )  # fmt: skip
        wandb.setup(settings=settings)  # before it looks for a login, which is told on the terminal otherwise
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise wandb.errors.UsageError("no login; `wandb login`, WANDB_API_KEY or tracking.mode=offline")
        run = wandb.init(
            project=config.project, group=study_dir.name, job_type=job_type, name=name, config=content,
            id=f"{study_dir.name}-{name}", resume="allow", dir=study_dir, settings=settings,
        )  # fmt: skip
    except _failures() as error:
        _warn("W&B is off for this run", error)
        _stop_service()
        return Tracker()
    return WandbTracker(run)


def _check_folder(folder: Path) -> None:
    """Raise ``OSError`` unless ``folder`` can be written; wandb would take a temporary folder without asking."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    if shutil.disk_usage(folder).free < SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _failures() -> tuple[type[Exception], ...]:
    """Return what wandb raises when its server, its files or its service process fail it."""
    import wandb
    from wandb.sdk.lib.asyncio_manager import AlreadyJoinedError, RunCancelledError
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

    return (
        wandb.errors.Error, OSError, AlreadyJoinedError, RunCancelledError, WandbApiFailedError,
        WandbServiceConnectionError, HandleAbandonedError, MailboxClosedError, ServerResponseError,
    )  # fmt: skip


def _stop_service() -> None:
    """End wandb's service process, so that the next run gets a new one and no hook at exit meets a broken one."""
    import wandb

    try:
        wandb.teardown()
    except _failures():
        pass  # it was dead already, which has been told


def _warn(what: str, error: Exception) -> None:
    print(f"warning: {what}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr, flush=True)
