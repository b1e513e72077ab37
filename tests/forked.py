"""Run a script of this project as a process of its own, without the seconds that importing torch takes.

The process is forked from that of the tests, which has imported it all. What only a fresh interpreter shows, such as
what is imported when, is not for it.
"""

import ctypes
import multiprocessing.util
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

# What the scripts import late is imported here, so that no process has to.
import drs.evaluation
import drs.report
import drs.study
import drs.training  # noqa: F401
from drs.config import PROJECT_ROOT

END_WITH_PARENT = 1
"""Of prctl(2), on Linux."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, negative for a signal, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Forked:
    """A process that runs a script.

    Attributes:
        pid: Its number, which is that of its session and process group too.
        out: Where it prints to; errors go beside it.
    """

    pid: int
    out: Path
    status: int | None = field(default=None)

    @property
    def err(self) -> Path:
        """Return where it prints errors to."""
        return self.out.with_suffix(".err")

    def poll(self) -> int | None:
        """Return the exit status, None while the process is alive."""
        if self.status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if found else None
        return self.status

    def wait(self, seconds: float) -> Ended:
        """Wait for its end; kill it and raise ``TimeoutError`` if that does not come."""
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"{self.out.read_text()}{self.err.read_text()}")
            time.sleep(0.005)
        assert self.status is not None
        return Ended(self.status, self.out.read_text(), self.err.read_text())


def start(
    script: str | Path,
    *arguments: str,
    out: Path,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    before: Callable[[], object] | None = None,
    after: Callable[[], object] | None = None,
) -> Forked:
    """Start a script in a session of its own.

    Args:
        script: The name of one in scripts/, or a path.
        arguments: Its arguments.
        out: The file to print to.
        environment: Variables besides those that the tests have.
        cwd: Its working directory.
        before: What the process does first; an exception there ends it with status 70.
        after: What it does last.
    """
    path = PROJECT_ROOT / "scripts" / script
    out.parent.mkdir(parents=True, exist_ok=True)
    process = Forked(0, out)
    process.out.touch()
    process.err.touch()
    process.pid = os.fork()
    if process.pid:
        return process
    code = 70
    try:
        os.setsid()
        # Those of the tests' process, which this one cannot end or join.
        multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
        multiprocessing.process._children.clear()  # type: ignore[attr-defined]
        # A test that fails, or that someone ends, leaves no training behind that would take hours.
        ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
        for number, file in ((1, process.out), (2, process.err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        # What runs in the background of a shell is started with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        os.environ.update(environment or {})
        os.chdir(cwd or os.getcwd())
        if before is not None:
            before()
        code = run_here(path, arguments)
        if after is not None:
            after()
    except BaseException:
        traceback.print_exc()
    finally:
        _finish()
        os._exit(code)


def _finish() -> None:
    """Do what an interpreter does at its end, which ``os._exit`` skips: a pool gives its semaphores back then."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        multiprocessing.util._exit_function()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()


def run(script: str | Path, *arguments: str, out: Path, seconds: float = 300, **more: object) -> Ended:
    """Run a script to its end; see ``start``."""
    return start(script, *arguments, out=out, **more).wait(seconds)  # type: ignore[arg-type]


def run_here(path: Path, arguments: tuple[str, ...]) -> int:
    """Run a script in this very process; return its exit status."""
    sys.argv = [str(path), *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
