"""Two sweeps that share a grid, and sweeps with failures and interrupts: real processes from the command line."""

import json
import os
import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import forked
import pandas as pd
import pytest
from conftest import compose_train
from forked import Forked
from test_launchers import members, wait_for

from drs import sweep_outcome
from drs.claiming import claim
from drs.config import run_id
from drs.jobs import CLAIM_FILE, TrainingResult
from drs.keeping import STATE_FILE
from drs.runs import run_folder
from drs.sweep_outcome import sweep_text, wait_for_others

SWEEP = ["-m", "data=digits", "model=mlp", "loss=ce", "study=s"]
PARALLEL = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


def start(folder: Path, *arguments: str, name: str = "out") -> Forked:
    environment = {"DRS_RESULTS": str(folder), "DRS_CACHE": str(folder / "data"), "OMP_NUM_THREADS": "1"}
    return forked.start("train.py", *SWEEP, *arguments, out=folder / name, environment=environment)


def statuses(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("s/runs/*/status.json"))]


def wait_until(condition: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_sweeps_share_a_grid_and_train_nothing_twice(tmp_path: Path) -> None:
    sweeps = [start(tmp_path, "seed=0,1,2,3,4,5", "epochs=40", name=name) for name in ("first", "second")]
    ends = [sweep.wait(120) for sweep in sweeps]
    assert [(end.returncode, end.stderr) for end in ends] == [(0, "")] * 2, ends
    trained = [re.findall(r"epoch 40/40.*\(([0-9a-f]{12})\)", end.stdout) for end in ends]
    assert len(trained[0] + trained[1]) == len(set(trained[0] + trained[1])) == 6, "each run once"
    assert all(trained), "both took part"
    for end, own in zip(ends, trained, strict=True):
        last = end.stdout.splitlines()[-1]
        counts = {name: int(number) for number, name in re.findall(r"(\d+) (done elsewhere|done|skipped)", last)}
        assert counts["done"] == len(own)
        assert sum(counts.values()) == 6, last
    assert [status["state"] for status in statuses(tmp_path)] == ["done"] * 6
    assert not list(tmp_path.glob("s/runs/*/claim*"))


def test_sweep_waits_for_others_and_takes_over_what_they_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_outcome, "POLL_SECONDS", 0.01)
    configs = {}
    for seed in range(3):
        config = compose_train("data=digits", f"seed={seed}", f"results_dir={tmp_path}", "study=s")
        configs[run_id(config)] = config
    finished, diverged, freed = configs
    folders = {name: run_folder(config) for name, config in configs.items()}
    looks = 0

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            folders[finished].write_status(state="done")
            folders[diverged].write_status(state="failed", reason="diverged", detail="the loss became nan")
        if looks == 4:
            held.close()

    monkeypatch.setattr(sweep_outcome.time, "sleep", sleep)
    with ExitStack() as held:
        for folder in folders.values():
            held.enter_context(claim(folder.path / CLAIM_FILE, "x"))
        results, free = wait_for_others(configs)
    assert looks == 4
    assert {name: result.state for name, result in results.items()} == {finished: "elsewhere", diverged: "diverged"}
    assert free == [freed]
    assert wait_for_others({}) == ({}, [])


def test_fail_fast_ends_the_trainings_of_other_workers(tmp_path: Path) -> None:
    # The first job, whose batch is too large, fails at once.
    sweep = start(tmp_path, "batch_size=5000,64", "seed=0", "epochs=100000", "fail_fast=true", *PARALLEL).wait(120)
    out, errors = sweep.stdout, sweep.stderr
    assert sweep.returncode == 1
    assert errors.startswith("error: 1 of 2 trainings failed, the first with: batch_size=5000: must be at most")
    assert errors.count("\n") == 1
    assert out.splitlines()[-1].endswith("1 stopped by an error, 1 not started")
    assert sorted(status["state"] for status in statuses(tmp_path)) in (["failed"], ["failed", "interrupted"])


@pytest.mark.parametrize(
    ("launcher", "number"), [([], signal.SIGINT), (PARALLEL, signal.SIGTERM)], ids=["serial", "joblib"]
)
def test_interrupted_sweep_keeps_its_trainings(tmp_path: Path, launcher: list[str], number: signal.Signals) -> None:
    running = 2 if launcher else 1
    sweep = start(tmp_path, "seed=0,1,2", "epochs=100000", "save_seconds=0.2", *launcher)
    wait_until(lambda: len(list(tmp_path.glob(f"s/runs/*/{STATE_FILE}"))) == running)
    processes = members(sweep.pid)
    assert len(processes) >= (3 if launcher else 1)
    os.killpg(sweep.pid, number)  # as a terminal does, and a batch system
    ended = sweep.wait(30)
    assert (ended.returncode, ended.stderr) == (128 + number, "interrupted\n")
    assert wait_for(lambda: not members(sweep.pid), 10), "a worker outlives the sweep"
    found = statuses(tmp_path)
    assert [status["state"] for status in found] == ["interrupted"] * running
    for path in tmp_path.glob("s/runs/*/metrics.csv"):
        epochs = json.loads((path.parent / "status.json").read_text())["epoch"]
        assert len(pd.read_csv(path)) == epochs > 0
    assert not list(tmp_path.glob("s/runs/*/claim*"))
    assert not list(tmp_path.glob("s/runs/*/.*.tmp"))


def test_error_of_a_job_is_kept_stops_a_sweep_that_is_to_fail_fast_and_is_retried(tmp_path: Path) -> None:
    # A folder in the place of a file is an error that no check foresees.
    config = compose_train(
        "data=digits", "model=mlp", "loss=ce", "epochs=1", "seed=1", f"results_dir={tmp_path}", "study=s"
    )
    broken = run_folder(config)
    (broken.path / "checkpoint.safetensors" / "x").mkdir(parents=True)
    sweep = start(tmp_path, "seed=0,1,2", "epochs=1", "fail_fast=true").wait(120)
    out, errors = sweep.stdout, sweep.stderr
    assert sweep.returncode == 1
    assert errors.startswith("error: 1 of 3 trainings failed, the first with: ") and errors.count("\n") == 1
    assert "Is a directory" in errors
    row = re.search(rf"^{broken.run_id}  digits mlp ce seed 1  failed .*Is a directory", out, re.MULTILINE)
    assert row is not None, out
    last = "1 done, 0 skipped (finished before), 0 diverged, 1 stopped by an error, 1 not started"
    assert out.splitlines()[-1] == last
    status = broken.status()
    assert (status["state"], status["reason"]) == ("failed", "error")
    assert status["traceback"].startswith("Traceback")
    assert (broken.path / "error.log").read_text() == status["traceback"]
    (broken.path / "checkpoint.safetensors" / "x").rmdir()
    (broken.path / "checkpoint.safetensors").rmdir()
    sweep = start(tmp_path, "seed=0,1,2", "epochs=1", name="again").wait(120)
    out, errors = sweep.stdout, sweep.stderr
    assert (sweep.returncode, errors) == (0, "")
    assert f"run {broken.run_id}: retrying: failed before with {status['error']}" in out
    assert out.splitlines()[-1] == "2 done, 1 skipped (finished before), 0 diverged, 0 stopped by an error"


def results(states: dict[str, int]) -> list[TrainingResult]:
    names = [state for state, count in states.items() for _ in range(count)]
    return [
        TrainingResult(f"{place:012x}", state, f"detail {place}", "", f"mnist lenet ce seed {place}", 1.5)
        for place, state in enumerate(names)
    ]


def test_table_lists_a_small_sweep_and_of_a_large_one_what_needs_attention() -> None:
    lines = sweep_text(results({"done": 2, "failed": 1})).splitlines()
    assert lines == [
        "run           what it is             state        seconds",
        "000000000000  mnist lenet ce seed 0  done             1.5",
        "000000000001  mnist lenet ce seed 1  done             1.5",
        "000000000002  mnist lenet ce seed 2  failed           1.5  detail 2",
        "2 done, 0 skipped (finished before), 0 diverged, 1 stopped by an error",
    ]
    lines = sweep_text(results({"done": 1000, "skipped": 995, "failed": 3, "diverged": 1, "elsewhere": 1})).splitlines()
    assert len(lines) == 1 + 4 + 1
    assert all(line.endswith(f"detail {place}") for place, line in enumerate(lines[1:-1], 1995))
    assert lines[-1] == "1000 done, 1 done elsewhere, 995 skipped (finished before), 1 diverged, 3 stopped by an error"
    assert sweep_text(results({"skipped": 2000})).count("\n") == 0
