"""Disks that are full or read-only, and clocks that jump, while a model trains."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import compose_train

from drs.config import PROJECT_ROOT, TrainConfig
from drs.data import load_arrays
from drs.runs import run_folder
from drs.tables import busy_seconds, training_times
from drs.training import train

TRAIN = [sys.executable, str(PROJECT_ROOT / "scripts" / "train.py"), "data=digits", "model=mlp", "loss=ce", "study=s"]
# Mounts a small file system that ends with the shell, trains into it, and lists what is there in the end.
IN_A_MOUNT = """
mount -t tmpfs -o "$1" tmpfs "$2" || exit 99
shift 2
"$@"
status=$?
find "$DRS_RESULTS" -type f
exit $status
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data cache with the digits in it."""
    folder = tmp_path_factory.mktemp("cache")
    load_arrays("digits", "train", cache=folder)
    return folder


def run(results: Path, cache: Path, *command: str) -> tuple[int, str, str]:
    environment = {**os.environ, "DRS_RESULTS": str(results), "DRS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def run_in_mount(folder: Path, cache: Path, options: str, *arguments: str) -> tuple[int, str, str]:
    """Train into a file system mounted for the test alone; skip where that is not allowed."""
    folder.mkdir()
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare is not installed, which mounts a file system for one process alone")
    command = [unshare, "-rm", "sh", "-c", IN_A_MOUNT, "sh", options, str(folder), *arguments]
    status, out, errors = run(folder, cache, *command)
    if status == 99 or "unshare" in errors:
        pytest.skip(f"no file system can be mounted here: {errors.strip()}")
    return status, out, errors


def test_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, cache: Path) -> None:
    # There is room for config, status and metrics, not for the state after the first epoch.
    status, out, errors = run_in_mount(
        tmp_path / "small", cache, "size=200k", *TRAIN, "epochs=3", "save_seconds=0", "seed=5"
    )
    assert status == 2
    assert errors.count("\n") == 1
    assert errors.startswith(f"error: {tmp_path}/small/s/runs/")
    assert (
        "/state.safetensors: cannot be written (No space left on device); free some space on that disk, or " in errors
    )
    assert errors.endswith("results_dir=FOLDER or DRS_RESULTS=FOLDER chooses another place\n")
    left = sorted(Path(line).name for line in out.splitlines() if line.startswith(str(tmp_path)))
    assert left == ["config.yaml", "error.log", "metrics.csv", "status.json"]


def test_disk_without_any_room_is_one_line(tmp_path: Path, cache: Path) -> None:
    fill = 'head -c 1M /dev/zero >"$DRS_RESULTS/filler" 2>/dev/null; exec "$@"'
    status, out, errors = run_in_mount(tmp_path / "full", cache, "size=64k", "sh", "-c", fill, "sh", *TRAIN, "epochs=1")
    assert status == 2
    assert errors.count("\n") == 1
    assert "claim: cannot be written (No space left on device); free some space" in errors
    assert out.splitlines()[-1] == f"{tmp_path}/full/filler"


def test_file_that_is_too_large_for_the_limit_is_one_line(tmp_path: Path, cache: Path) -> None:
    limited = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh"]
    status, _, errors = run(tmp_path, cache, *limited, *TRAIN, "epochs=1", "save_seconds=1000")
    assert status == 2
    assert errors.count("\n") == 1
    assert "checkpoint.safetensors: cannot be written (File too large); raise the limit on the size of a file" in errors
    (folder,) = (tmp_path / "s" / "runs").iterdir()
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "error.log", "metrics.csv", "status.json"]


def test_read_only_results_are_one_line(tmp_path: Path, cache: Path) -> None:
    status, out, errors = run_in_mount(tmp_path / "readonly", cache, "size=64k,ro", *TRAIN, "epochs=1")
    assert status == 2
    assert errors.count("\n") == 1
    assert "cannot be written (Read-only file system); results_dir=FOLDER or DRS_RESULTS=FOLDER chooses" in errors
    assert str(tmp_path) not in out


def test_results_that_cannot_be_a_folder_are_one_line(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").touch()
    status, _, errors = run(tmp_path / "file" / "results", cache, *TRAIN, "epochs=1")
    assert (status, errors.count("\n")) == (2, 1)
    assert "cannot be written (Not a directory); results_dir=FOLDER or DRS_RESULTS=FOLDER chooses" in errors


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
