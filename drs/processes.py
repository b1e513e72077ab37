"""What worker processes of a sweep and of an evaluation share."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from drs.errors import Interrupted
from drs.interrupts import is_first_request

PARENT_CHECK_SECONDS = 0.5
GRACE_SECONDS = 20.0
"""How long a worker that is asked to end may take to finish a step of its training and to keep it."""


class Work:
    """What this worker is doing. Kept here, because Hydra imports a plugin again and so gives it new variables."""

    running = False
    ending = False

    @classmethod
    def end(cls, number: int, _: FrameType | None) -> None:
        """Handle a signal: interrupt the job that is running, and run no other."""
        cls.ending = True
        if is_first_request() and cls.running:
            raise Interrupted(number)


def end_with_parent(parent: int, is_busy: Callable[[], bool] = lambda: False) -> None:
    """End this process soon after the process ``parent`` has ended, however that came about; returns at once.

    Args:
        parent: The process.
        is_busy: Whether this process is at something that SIGTERM makes it keep; it gets the time to.
    """
    threading.Thread(target=_wait_for, args=(parent, is_busy), daemon=True).start()


def _wait_for(parent: int, is_busy: Callable[[], bool]) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    if is_busy():
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        while is_busy() and time.monotonic() < end:
            time.sleep(0.05)
    os._exit(1)
