"""Signals that ask a program to end: at once, or at the next moment at which its work can be kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from drs.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def interrupt_on_termination() -> None:
    """Make SIGTERM raise ``Interrupted`` in the main thread, as SIGINT raises ``KeyboardInterrupt``."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, _: FrameType | None) -> None:
    if is_first_request():
        interrupt(number)


_requested = False
_raised = 0


def is_first_request() -> bool:
    """Return whether this process had not been asked to end before; from now on it has.

    A batch system that ends a job asks each of its processes, and a sweep its workers once more. The second request
    must not disturb what the first one has set off.
    """
    global _requested
    first, _requested = not _requested, True
    return first


def interrupt(number: int) -> NoReturn:
    """Raise ``Interrupted`` from a signal's handler. What Python drops of it, the next ``Deferred`` knows.

    An exception is dropped in a finalizer, in the callback of a weak reference and in compiled code that takes it for
    something else.
    """
    global _raised
    _raised = number
    raise Interrupted(number)


class Deferred:
    """Whether the program was asked to end, also before, where what a handler raised was lost."""

    def __init__(self) -> None:
        self.number = _raised

    def check(self) -> None:
        """Raise ``Interrupted`` if it was."""
        if self.number:
            raise Interrupted(self.number)

    def _receive(self, number: int, _: FrameType | None) -> None:
        is_first_request()
        if self.number and number == signal.SIGINT:
            raise Interrupted(number)  # somebody presses the keys again: the step takes too long
        self.number = self.number or number


@contextmanager
def deferred_interrupts() -> Iterator[Deferred]:
    """Within the block SIGINT and SIGTERM wait for ``check``; a second SIGINT does not.

    Outside the main thread, which alone can, no signal is deferred.
    """
    deferred = Deferred()
    if threading.current_thread() is not threading.main_thread():
        yield deferred
        return
    # A signal that is ignored stays ignored, such as SIGINT in a job that a shell runs in the background.
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, deferred._receive)
    try:
        yield deferred
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def whole_imports() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the imports in the block are done; a second SIGINT does not.

    Compiled modules take an interrupt for a failed import of what they need, and go on without it: numpy and torch
    do, so that the program would not end, or end with an error that is none.

    Raises:
        Interrupted: At the end of the block, if the program was asked to end.
    """
    with deferred_interrupts() as deferred:
        yield
    deferred.check()
