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
    """Make SIGTERM and SIGINT raise ``Interrupted`` in the main thread; a SIGINT that is ignored stays so."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt_always)


def _interrupt(number: int, _: FrameType | None) -> None:
    if is_first_request():
        interrupt(number)


def _interrupt_always(number: int, _: FrameType | None) -> None:
    is_first_request()
    interrupt(number)


_requested = False
_pending = 0
"""The last signal that asked this process to end and may not have been heard; 0 for none."""


def is_first_request() -> bool:
    """Return whether this process had not been asked to end before; from now on it has.

    A batch system that ends a job asks each of its processes, and a sweep its workers once more. The second request
    must not disturb what the first one has set off.
    """
    global _requested
    first, _requested = not _requested, True
    return first


def interrupt(number: int) -> NoReturn:
    """Raise ``Interrupted`` from a signal's handler. If it is dropped on its way, the next ``Deferred`` knows of it.

    Python drops an exception in a finalizer and in the callback of a weak reference, and compiled code may take it for
    something else.
    """
    global _pending
    _pending = number
    raise Interrupted(number)


class Deferred:
    """Whether the program was asked to end, now or before: a request is pending until ``check`` has raised it."""

    def __init__(self) -> None:
        self.number = _pending

    def check(self) -> None:
        """Raise ``Interrupted`` if it was."""
        if self.number:
            self._raise(self.number)

    def _receive(self, number: int, _: FrameType | None) -> None:
        global _pending
        is_first_request()
        if self.number and number == signal.SIGINT:
            self._raise(number)  # somebody presses the keys again: the step takes too long
        self.number = _pending = self.number or number

    def _raise(self, number: int) -> NoReturn:
        global _pending
        _pending = 0
        raise Interrupted(number)


def raise_unheard() -> None:
    """Raise ``Interrupted`` if this process was asked to end and the request was dropped on its way."""
    Deferred().check()


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
        try:
            yield
        finally:
            deferred.check()
