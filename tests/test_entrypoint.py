"""What an entrypoint sets before torch is there."""

import os
import subprocess
import sys

import pytest

from drs.config import PROJECT_ROOT
from drs.entrypoint import forget_empty_folders

PROGRAM = "from drs.entrypoint import let_threads_doze\nprint(let_threads_doze())\nimport torch\ntorch.rand(9).sum()"


def _libgomp(**chosen: str) -> tuple[str, str]:
    """Return what the function says, and how many turns GNU's OpenMP says that a thread waits."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=PROJECT_ROOT,
        env=environment | {"OMP_DISPLAY_ENV": "verbose"} | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    turns = [line.partition("=")[2].strip(" '") for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not turns:
        pytest.skip("torch has another OpenMP than GNU's")
    return done.stdout.strip(), turns[0]


def test_waiting_threads_fall_asleep_soon_unless_the_user_chose() -> None:
    assert _libgomp() == ("True", "3000")
    assert _libgomp(GOMP_SPINCOUNT="77") == ("False", "77")
    assert _libgomp(OMP_WAIT_POLICY="PASSIVE") == ("False", "0")


def test_a_folder_that_is_set_to_nothing_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRS_RESULTS", "")
    monkeypatch.setenv("DRS_CACHE", "here")
    monkeypatch.delenv("DRS_DATA", raising=False)
    forget_empty_folders()
    assert [os.environ.get(name) for name in ("DRS_RESULTS", "DRS_CACHE", "DRS_DATA")] == [None, "here", None]
