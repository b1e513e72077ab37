"""The one exception that a user is meant to read."""

from pathlib import Path


class UserError(Exception):
    """A mistake in a config, a file or a request, told in one line.

    The message names what was wrong, where it came from and what would be right. Entrypoints print it as
    ``error: <message>`` and exit with its ``exit_status``, without a traceback.
    """

    exit_status = 2


class SweepError(UserError):
    """Jobs of a sweep failed, which have been told of."""

    exit_status = 1


class DamagedFileError(UserError):
    """A file is not what was written: cut short, changed, or gone.

    Args:
        path: The file.
        reason: What tells, and what to do; the message is ``<path>: <reason>``.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.reason)  # a worker process hands it to its parent


class UnwritableError(UserError):
    """The system does not let a file be written; whatever is written next to it will fare no better."""


class DivergedError(Exception):
    """Training met a loss that is not finite.

    Args:
        epoch: The epoch, counted from 1, in which it happened.
        step: The optimisation step within that epoch, counted from 1.
        value: The loss, ``nan`` or ``inf``.
    """

    def __init__(self, epoch: int, step: int, value: float) -> None:
        super().__init__(f"the loss became {value} in epoch {epoch}, step {step}")
        self.epoch = epoch
        self.step = step
        self.value = value


class Interrupted(KeyboardInterrupt):
    """The program was asked to end by a signal; a ``KeyboardInterrupt``, so that nothing takes it for an error.

    Args:
        number: The signal's; the exit status is 128 plus it, as shells have it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number
