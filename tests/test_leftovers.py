"""What a killed process leaves half written is deleted by the next one, and nothing else is."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from drs.files import atomic_write, remove_leftovers


def write_and_wait(path: Path) -> int:
    """Start a process that is in the middle of writing a file; return its number."""
    pid = os.fork()
    if pid == 0:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            time.sleep(60)
        os._exit(0)
    until = time.monotonic() + 20
    while not any(item.stat().st_size for item in path.parent.glob(".*.tmp")):
        assert time.monotonic() < until
        time.sleep(0.01)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_only_what_a_dead_process_was_writing_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("whole")
    pid = write_and_wait(tmp_path / "a.json")
    try:
        assert remove_leftovers(tmp_path) == [], "its writer is alive"
    finally:
        end(pid)
    (leftover,) = tmp_path.glob(".*.tmp")
    assert leftover.name.startswith(".a.json.")
    others = [".a.json.tmp", ".something.tmp", ".a.json.rest.0123abcd-1-2.tmp", "b.tmp"]
    for name in others:
        (tmp_path / name).write_text("")
    assert remove_leftovers(tmp_path) == [leftover]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.json", *others])
    assert (tmp_path / "a.json").read_text() == "whole"
    assert remove_leftovers(tmp_path / "missing") == []


def renamed(name: str, change: Callable[[str, str, str], str]) -> str:
    head, _, rest = name.removesuffix(".tmp").rpartition(".")
    place, pid, started = rest.split("-")
    return f"{head}.{change(place, pid, started)}.tmp"


@pytest.mark.parametrize(
    ("change", "is_deleted"),
    [
        (lambda place, pid, started: f"{place}-{pid}-{started}", True),
        (lambda place, pid, started: f"{'0' * len(place)}-{pid}-{started}", False),
        # The number of a process is used again: this one is alive, but it is not the one that wrote the file.
        (lambda place, pid, started: f"{place}-{os.getpid()}-{started}", True),
    ],
)
def test_whose_a_leftover_is_is_told_by_machine_number_and_start(
    tmp_path: Path, change: Callable[[str, str, str], str], is_deleted: bool
) -> None:
    end(write_and_wait(tmp_path / "a.json"))
    (leftover,) = tmp_path.glob(".*.tmp")
    path = leftover.rename(tmp_path / renamed(leftover.name, change))
    assert bool(remove_leftovers(tmp_path)) == is_deleted
    assert path.exists() != is_deleted
