"""Disks that are full or read-only, and clocks that jump, while a model trains."""

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import compose_train
from forked import Ended

from drs.config import PROJECT_ROOT, TrainConfig
from drs.data import load_arrays
from drs.runs import run_folder
from drs.tables import busy_seconds, training_times
from drs.training import train

TRAIN = ["data=digits", "model=mlp", "loss=ce", "study=s"]
# Of unshare(2), mounts of its own, and a user of its own who may mount; of mount(2).
OWN_MOUNTS, OWN_USERS, READ_ONLY = 0x00020000, 0x10000000, 1
NOT_ALLOWED = "no file system can be mounted here: "


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data cache with the digits in it."""
    folder = tmp_path_factory.mktemp("cache")
    load_arrays("digits", "train", cache=folder)
    return folder


def run(folder: Path, cache: Path, *arguments: str, **more: Any) -> Ended:
    environment = {"DRS_RESULTS": str(folder), "DRS_CACHE": str(cache)}
    return forked.run("train.py", *TRAIN, *arguments, out=cache / folder.name, environment=environment, **more)


def mount(folder: Path, size: bytes | None) -> None:
    """Mount a small file system, read-only without a size, that this process alone sees and that ends with it."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(OWN_MOUNTS | OWN_USERS):
        raise OSError(NOT_ALLOWED + os.strerror(ctypes.get_errno()))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    kind, data = b"tmpfs", b"size=" + (size or b"1m")
    if libc.mount(kind, str(folder).encode(), kind, READ_ONLY if size is None else 0, data):
        raise OSError(NOT_ALLOWED + os.strerror(ctypes.get_errno()))


def run_in_mount(
    folder: Path, cache: Path, size: bytes | None, *arguments: str, before: Callable[[], object] = lambda: None
) -> Ended:
    """Train into a file system mounted for the test alone, and list its files; skip where that is not allowed."""
    folder.mkdir()

    def prepare() -> None:
        mount(folder, size)
        before()

    def list_files() -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                print(path)

    ended = run(folder, cache, *arguments, before=prepare, after=list_files)
    if NOT_ALLOWED in ended.stderr:
        pytest.skip(ended.stderr.splitlines()[-1])
    return ended


def test_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, cache: Path) -> None:
    # There is room for config, status and metrics, not for the state after the first epoch.
    ended = run_in_mount(tmp_path / "small", cache, b"200k", "epochs=3", "save_seconds=0", "seed=5")
    out, errors = ended.stdout, ended.stderr
    assert ended.returncode == 2
    assert errors.count("\n") == 1
    assert errors.startswith(f"error: {tmp_path}/small/s/runs/")
    assert (
        "/state.safetensors: cannot be written (No space left on device); free some space on that disk, or " in errors
    )
    assert errors.endswith("results_dir=FOLDER or DRS_RESULTS=FOLDER chooses another place\n")
    left = sorted(Path(line).name for line in out.splitlines() if line.startswith(str(tmp_path)))
    assert left == ["config.yaml", "error.log", "metrics.csv", "status.json"]


def test_disk_without_any_room_is_one_line(tmp_path: Path, cache: Path) -> None:
    filler = tmp_path / "full" / "filler"

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("wb") as file:
            file.write(bytes(1 << 20))

    ended = run_in_mount(tmp_path / "full", cache, b"64k", "epochs=1", before=fill)
    out, errors = ended.stdout, ended.stderr
    assert ended.returncode == 2
    assert errors.count("\n") == 1
    assert "claim: cannot be written (No space left on device); free some space" in errors
    assert out.splitlines()[-1] == str(filler)


def test_file_that_is_too_large_for_the_limit_is_one_line(tmp_path: Path, cache: Path) -> None:
    results = tmp_path / "limited"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200 * 1024, 200 * 1024))

    ended = run(results, cache, "epochs=1", "save_seconds=1000", before=limit)
    errors = ended.stderr
    assert ended.returncode == 2
    assert errors.count("\n") == 1
    assert "checkpoint.safetensors: cannot be written (File too large); raise the limit on the size of a file" in errors
    (folder,) = (results / "s" / "runs").iterdir()
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "error.log", "metrics.csv", "status.json"]


def test_read_only_results_are_one_line(tmp_path: Path, cache: Path) -> None:
    ended = run_in_mount(tmp_path / "readonly", cache, None, "epochs=1")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    said = "cannot be written (Read-only file system); results_dir=FOLDER or DRS_RESULTS=FOLDER chooses"
    assert said in ended.stderr
    assert str(tmp_path) not in ended.stdout


def test_results_that_cannot_be_a_folder_are_one_line(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").touch()
    ended = run(tmp_path / "file" / "results", cache, "epochs=1")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "cannot be written (Not a directory); results_dir=FOLDER or DRS_RESULTS=FOLDER chooses" in ended.stderr


def small(tmp_path: Path) -> TrainConfig:
    return compose_train(
        "data=digits", "model=mlp", "epochs=2", "study=s", f"results_dir={tmp_path}", f"data.cache={tmp_path}/data",
        "progress=false", "save_seconds=0",
    )  # fmt: skip


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_clock_that_jumps_changes_no_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    now = [1.8e9]

    def clock() -> float:
        now[0] += jump
        return now[0]

    monkeypatch.setattr(time, "time", clock)
    began = time.monotonic()
    assert train(small(tmp_path)).state == "done"
    took = time.monotonic() - began
    status = run_folder(small(tmp_path)).status()
    assert 0 < status["train_seconds"] <= status["finished"] - status["started"] <= took + 0.01
    assert 0 < busy_seconds(training_times(tmp_path / "s")) <= took + 0.01


def test_finished_run_is_skipped_in_no_time_and_without_torch(tmp_path: Path) -> None:
    train(small(tmp_path))
    program = f"""
import sys, time
sys.path.insert(0, {str(PROJECT_ROOT / "tests")!r})
from drs.config import train_config
from drs.jobs import run_job
from drs.runs import RunFolder
from pathlib import Path
config = RunFolder(Path(sys.argv[1])).config()
best = 1.0
for _ in range(5):
    began = time.perf_counter()
    result = run_job(config, in_sweep=False)
    best = min(best, time.perf_counter() - began)
print(result.state, best, "torch" in sys.modules)
"""
    folder = run_folder(small(tmp_path)).path
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    state, seconds, torch_is_there = done.stdout.split()
    assert (state, torch_is_there) == ("skipped", "False")
    assert float(seconds) < 0.05
