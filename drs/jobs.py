"""One training as a job: skipped, put off, trained or failed, and what is said of it. Imports torch only to train."""

import time
import traceback
from dataclasses import dataclass
from typing import Any

from drs.claiming import Claim, ClaimedElsewhere, ClaimLost
from drs.config import TrainConfig, loss_label, loss_weight
from drs.errors import DamagedFileError, UserError
from drs.files import atomic_write
from drs.integrity import SMALL_BYTES, check_files
from drs.interrupts import whole_imports
from drs.runs import RunFolder, run_folder

CLAIM_FILE = "claim"
ERROR_LOG = "error.log"


@dataclass(frozen=True)
class TrainingResult:
    """What became of one training.

    Attributes:
        run_id: The run.
        state: done (trained now), skipped (finished before), elsewhere (another process is at work on it, or has
            finished it), diverged or failed.
        detail: Why, in one line.
        folder: The run's folder.
        title: What the training is, in short.
        seconds: What it took now.
    """

    run_id: str
    state: str
    detail: str
    folder: str
    title: str = ""
    seconds: float = 0.0


def short_title(config: TrainConfig) -> str:
    """Return what a training is, in a few words."""
    weight = f" b={loss_weight(config.loss):g}" if loss_weight(config.loss) else ""
    return f"{config.data.name} {config.model.name} {loss_label(config)}{weight} seed {config.seed}"


def settled(config: TrainConfig) -> TrainingResult | None:
    """Return the result of a training that needs no work any more, None for any other.

    A diverged run is a result: the same seed would diverge again. A finished one whose files are not what its status
    vouches for is trained again; a large checkpoint is told by its size here, and by its digest when it is loaded.
    """
    folder = run_folder(config)
    try:
        status = _checked_status(folder)
    except DamagedFileError:
        return None
    if status.get("state") == "done":
        state, detail = "skipped", "already done"
    elif status.get("reason") == "diverged":
        state, detail = "diverged", f"diverged before: {status.get('detail')}; the same seed would again"
    else:
        return None
    return TrainingResult(folder.run_id, state, detail, str(folder.path), short_title(config))


def run_job(config: TrainConfig, *, in_sweep: bool) -> TrainingResult:
    """Train what a config describes, unless that is settled; in a sweep, errors are the job's own.

    Args:
        config: The training.
        in_sweep: Whether other jobs wait: then a run that another process is at work on is put off, and an error
            becomes the result, with its traceback in the run's folder.

    Raises:
        UserError: Outside a sweep, for what ``drs.training.train`` raises it for.
    """
    began = time.monotonic()
    try:
        result = settled(config)
        if result is not None:
            return result
        with whole_imports():
            from drs.training import train
        return train(config, in_sweep=in_sweep)
    except ClaimedElsewhere as error:
        if not in_sweep:
            raise
        return result_of(config, "elsewhere", str(error), began)
    except Exception as error:
        if not in_sweep:
            raise
        return result_of(config, "failed", last_line(error), began)


def result_of(config: TrainConfig, state: str, detail: str, began: float) -> TrainingResult:
    """Return the result of a training that began at ``began``, in ``time.monotonic`` seconds."""
    folder = run_folder(config)
    seconds = time.monotonic() - began
    return TrainingResult(folder.run_id, state, detail, str(folder.path), short_title(config), seconds)


def last_line(error: BaseException) -> str:
    """Return an error as the last line of its traceback has it; of a user's mistake, the message alone."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    return traceback.format_exception_only(error)[0].strip().splitlines()[-1]


def record_failure(folder: RunFolder, held: Claim, error: Exception) -> None:
    """Keep an error and its traceback in a run's status and log.

    Where they cannot be written, because the disk is full or the claim is lost, ``error`` is all there is.
    """
    text = "".join(traceback.format_exception(error))
    try:
        held.check()
        with atomic_write(folder.path / ERROR_LOG) as temporary:
            temporary.write_text(text)
        folder.write_status(state="failed", reason="error", error=last_line(error), traceback=text)
    except (UserError, ClaimLost):
        return


def _checked_status(folder: RunFolder) -> dict[str, Any]:
    """Return a run's status; ``DamagedFileError`` if it, or a file that it vouches for, is not what was written."""
    status = folder.status()
    if status.get("state") == "done":
        check_files(folder.path, status.get("files", {}), hash_up_to=SMALL_BYTES)
    return status


def said_before(folder: RunFolder) -> str | None:
    """Return what is to be said of a run that has been started before, None of a new one."""
    try:
        status = _checked_status(folder)
    except DamagedFileError as error:
        return f"trains again: {error.path.name} is damaged ({error.reason.partition(';')[0]})"
    state = status.get("state")
    if state == "failed":
        return f"retrying: failed before with {status.get('error') or status.get('reason')}"
    if state in ("running", "interrupted"):
        return "was interrupted"
    return None
