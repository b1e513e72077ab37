"""Processes: workers that end with their parent, and whether a process of this machine is still there."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from drs.interrupts import interrupt, is_first_request

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
            interrupt(number)


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


def has_ended(pid: int, started: str | None) -> bool | None:
    """Return whether a process of this machine is gone; None where the system does not let that be seen.

    Args:
        pid: Its number.
        started: When it started, as ``read_process`` tells it; process numbers are used again.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    found = read_process(pid)
    if found is None:
        return None
    state, began = found
    return state in "ZX" or began != started


def read_process(pid: int) -> tuple[str, str] | None:
    """Return a process's state, a letter, and when it started, in ticks; None where /proc does not have it."""
    try:
        # The name, in brackets, may hold anything; what comes after it does not.
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return values[0], values[19]


def process_place() -> str | None:
    """Return the running kernel and the process namespace: where a process number means one process; or None."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
