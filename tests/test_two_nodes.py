"""Two nodes of a cluster that share a folder, as far as one machine can be two: names and processes of their own.

Neither sees the other's processes, so that all they know of each other is in the folder, as on a shared file system.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_sweeps import SWEEP

from drs.jobs import CLAIM_FILE
from drs.keeping import STATE_FILE

NODE = ["unshare", "--map-root-user", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
EPOCHS = 40


def node(name: str, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "DRS_RESULTS": str(folder), "OMP_NUM_THREADS": "1", "DRS_CLAIM_PATIENCE": "2"}
    return subprocess.Popen(
        [*NODE, "sh", "-c", 'hostname "$0" && exec "$@"', name, *SWEEP, *arguments], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def claims(folder: Path) -> dict[str, Path]:
    """Return the runs that are claimed, by the name of the node."""
    found = {}
    for path in folder.glob(f"s/runs/*/{CLAIM_FILE}"):
        line = path.read_text().partition("\n")[0]
        if line:
            found[json.loads(line)["host"]] = path.parent
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_node_that_dies_is_succeeded_by_another_that_shares_its_sweep(tmp_path: Path) -> None:
    if subprocess.run([*NODE, "hostname", "node"], capture_output=True).returncode:
        pytest.skip("this machine lets no process have a name and process numbers of its own")
    arguments = ("seed=0,1", f"epochs={EPOCHS}", "save_seconds=0.05")
    first = node("node-a", tmp_path, *arguments)
    second = node("node-b", tmp_path, *arguments)
    try:
        wait_until(lambda: {"node-a", "node-b"} <= claims(tmp_path).keys())
        held = claims(tmp_path)
        assert held["node-a"] != held["node-b"]
        wait_until((held["node-a"] / STATE_FILE).exists)
        first.send_signal(signal.SIGKILL)
        first.wait(10)
        assert json.loads((held["node-a"] / "status.json").read_text())["state"] == "running"
        out, errors = second.communicate(timeout=120)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert (second.returncode, errors) == (0, ""), out
    dead = held["node-a"].name
    assert f"run {dead}: was interrupted" in out
    assert f"run {dead}: goes on after epoch" in out
    assert out.splitlines()[-1] == "2 done, 0 skipped (finished before), 0 diverged, 0 stopped by an error"
    for folder in held.values():
        assert json.loads((folder / "status.json").read_text())["state"] == "done"
        assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + EPOCHS
    assert not list(tmp_path.glob(f"s/runs/*/{CLAIM_FILE}*"))
