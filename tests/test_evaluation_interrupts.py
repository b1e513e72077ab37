"""An evaluation that is told to end, and one that cannot write: nothing half written, one line, the right status."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from brief_study import configuration
from forked import start

from drs.array_files import load_arrays_file
from drs.config import PROJECT_ROOT
from drs.errors import UnwritableError
from drs.evaluation import evaluate_study
from drs.files import atomic_write
from drs.report import draw_figures, write_report
from drs.study import only_writer, write_study

LONG = ["study=s", "timing=false", "suite.n_samples.digits=500", "suite.attacks.pgd.steps=200", "progress=false"]


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for_a_cell(results: Path, log: Path, pid: int) -> None:
    until = time.monotonic() + 120
    while not list(results.rglob("*.npz")):
        assert time.monotonic() < until and is_alive(pid), log.read_text()
        time.sleep(0.01)


def check_what_is_left(results: Path, log: Path) -> None:
    said = log.read_text()
    assert "Traceback" not in said and said.strip().splitlines()[-1] == "interrupted"
    assert not list(results.rglob("*.tmp")) and not list(results.rglob("failure.json"))
    for path in results.rglob("*.npz"):
        load_arrays_file(path)


def test_interrupt_ends_an_evaluation_at_once(brief_results: Path, tmp_path: Path) -> None:
    results, log = tmp_path / "results", tmp_path / "log"
    shutil.copytree(brief_results, results)
    process = start("evaluate.py", *LONG, f"results_dir={results}", "workers=1", out=log)
    wait_for_a_cell(results, log, process.pid)
    os.kill(process.pid, signal.SIGINT)
    ended = process.wait(20)
    assert ended.returncode == 130
    check_what_is_left(results, process.err)
    assert not list(results.rglob(".claim*"))


def test_termination_ends_the_workers_too(brief_results: Path, tmp_path: Path) -> None:
    results, log = tmp_path / "results", tmp_path / "log"
    shutil.copytree(brief_results, results)
    command = [sys.executable, str(PROJECT_ROOT / "scripts" / "evaluate.py"), *LONG, f"results_dir={results}"]
    with log.open("w") as output:
        process = subprocess.Popen([*command, "workers=2"], stdout=output, stderr=output)
    wait_for_a_cell(results, log, process.pid)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    until = time.monotonic() + 5
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.05)
    check_what_is_left(results, log)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, but: int) -> Path:
    """Leave so many bytes free."""
    path, space = folder / "filling", os.statvfs(folder)
    path.write_bytes(b"\0" * max(0, space.f_bavail * space.f_frsize - but))
    return path


def all_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "filling"}


def error_of(step: Callable[[], object]) -> str:
    """Take a step in a process of its own, as a user does: a claim that a full disk keeps from being given up ends
    with its process. Return its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            step()
        except UnwritableError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


def test_full_disk_is_one_line_and_leaves_nothing_half_written(brief_results: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "8m"):
        shutil.copytree(brief_results / "s", disk / "s")
        config = configuration(disk)
        filling = fill(disk, 40 * 1024)
        error = error_of(lambda: evaluate_study(config))
        assert re.fullmatch(
            r"\S+: cannot be written \(No space left on device\); free some space on that disk, or .*", error
        )
        assert not list(disk.rglob("*.tmp"))
        for path in disk.rglob("*.npz"):
            load_arrays_file(path)
        filling.unlink()
        evaluation = evaluate_study(config)
        assert len(evaluation.cells) == len(list(disk.rglob("*.npz"))) and not evaluation.failures
        steps: list[Callable[[], object]] = [
            lambda: write_study(evaluation, config), lambda: draw_figures(disk / "s"), lambda: write_report(disk / "s"),
        ]  # fmt: skip
        for step in steps:
            fill(disk, 4 * 1024)
            before = all_files(disk)
            assert "No space left on device" in error_of(step)
            now = all_files(disk)
            assert not list(disk.rglob("*.tmp"))
            assert all(now[path] == content for path, content in before.items() if path in now)
            (disk / "filling").unlink()
            step()


def test_results_that_are_read_only_are_one_line(brief_results: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "8m"):
        shutil.copytree(brief_results / "s", disk / "s")
        config = configuration(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = all_files(disk)
        with pytest.raises(UnwritableError, match=r"cannot be written \(Read-only file system\); results_dir="):
            evaluate_study(config)
        with pytest.raises(UnwritableError, match="Read-only file system"), only_writer(disk / "s"):
            pass
        for path in (disk / "s" / "tables" / "x.csv", disk / "s" / "REPORT.md"):
            with pytest.raises(UnwritableError, match="Read-only file system"), atomic_write(path):
                pass
        assert all_files(disk) == before
