"""The state of a study as ``make status`` shows it, at any moment and of whatever is there."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import compose_train
from synthetic_runs import compose_evaluate, write_runs

from drs.cells import plan_cells
from drs.claiming import claim
from drs.config import PROJECT_ROOT, TrainConfig
from drs.errors import UserError
from drs.jobs import CLAIM_FILE
from drs.run_failures import record_failure
from drs.runs import run_folder
from drs.study_state import count_cells, read_states, seconds_left

sys.path.insert(0, str(PROJECT_ROOT / "scripts"))
from status import status_text


def configs(folder: Path, count: int) -> list[TrainConfig]:
    base = compose_train("data=digits", "model=mlp", "loss=ce", "epochs=4", f"results_dir={folder}", "study=s")
    return [replace(base, seed=seed) for seed in range(count)]


def test_every_state_is_counted_and_told(tmp_path: Path) -> None:
    grid = configs(tmp_path, 9)
    done, running, dead, interrupted, failed, diverged, damaged, empty, _ = grid
    write_runs([done, running, dead])
    for config in (running, dead):
        run_folder(config).write_status(state="running", started=1.0, epochs=4)
        rows = [{"epoch": epoch, "train_loss": 1.0} for epoch in (1, 2, 3)]
        run_folder(config).write_metrics(rows)
    run_folder(interrupted).write_status(state="interrupted", epoch=1, epochs=4)
    run_folder(failed).write_status(state="failed", reason="error", error="OSError: no such file", traceback="long")
    why = "the loss became nan in epoch 1, step 2"
    run_folder(diverged).write_status(state="failed", reason="diverged", detail=why)
    run_folder(damaged).write_status(state="done")
    path = run_folder(damaged).path / "status.json"
    path.write_text(path.read_text().replace("done", "dine"))
    run_folder(empty).path.mkdir()
    with claim(run_folder(running).path / CLAIM_FILE, "x"):
        states = read_states(tmp_path / "s", grid)
        text = status_text(tmp_path / "s", states, grid, None, width=120)
    lines = text.splitlines()
    assert lines[0] == "s: 9 trainings: 1 done, 1 running, 2 interrupted, 1 failed, 1 diverged, 1 damaged, 2 waiting"
    found = {tuple(line.split()[:2]): line for line in lines[1:-1]}
    names = ("done", "running", "dead", "interrupted", "failed", "diverged", "damaged")
    ids = {name: run_folder(config).run_id for name, config in zip(names, grid, strict=False)}
    assert f"epoch 3 of 4; process {os.getpid()} on " in found["running", ids["running"]]
    assert found["interrupted", ids["dead"]].endswith("epoch 3 of 4; its process has ended")
    assert found["failed", ids["failed"]].endswith("OSError: no such file")
    assert found["diverged", ids["diverged"]].endswith(why)
    assert "status.json: its content has changed" in found["damaged", ids["damaged"]]
    assert "digits mlp ce seed 1" in found["running", ids["running"]]
    # Of the one that is done an epoch took 1.5 s; left are 1 + 1 + 4 + 4 * 4 epochs.
    assert seconds_left(states, grid) == pytest.approx(22 * 1.5)
    assert lines[-1] == "trainings left: about 33 s (1 at a time, as now)"


def test_lines_fit_the_terminal_and_long_lists_are_cut(tmp_path: Path) -> None:
    grid = configs(tmp_path, 30)
    for config in grid:
        run_folder(config).write_status(state="failed", reason="error", error="ValueError: " + "some words " * 20)
    states = read_states(tmp_path / "s", grid)
    for width in (80, 120):
        lines = status_text(tmp_path / "s", states, grid, None, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert sum(line.startswith("  failed ") for line in lines) == 21
        assert "  failed       and 10 more" in lines
    assert lines[-1] == "trainings left: the time is unknown until one has finished"
    nothing = count_cells(states, compose_evaluate("study=s", f"results_dir={tmp_path}").suite)
    assert "paper suite: nothing to evaluate yet" in status_text(tmp_path / "s", states, grid, nothing, width=120)


def test_cells_of_an_evaluation_are_counted(tmp_path: Path) -> None:
    grid = configs(tmp_path, 3)
    evaluation = compose_evaluate("study=s", "suite=paper", f"results_dir={tmp_path}")
    runs = write_runs(grid, evaluation)
    planned = plan_cells(runs[0], evaluation.suite, dict(zip(runs, grid, strict=True)))
    planned[1].path.unlink()
    record_failure(runs[1], grid[1], "pgd@0.1", UserError("model: gave nan"))
    states = read_states(tmp_path / "s")
    with claim(runs[2].path / "eval" / ".claim", "x"):
        cells = count_cells(states, evaluation.suite)
    assert (cells.done, cells.total) == (3 * len(planned) - 1, 3 * len(planned))
    assert (cells.working, cells.failures) == (1, [(runs[1], "pgd@0.1: model: gave nan")])
    last = status_text(tmp_path / "s", states, [], cells, width=120).splitlines()[1]
    assert last.endswith(f"{cells.done} of {cells.total} cells done (96 %), 1 missing, 1 run being evaluated")


def test_script_imports_no_torch_and_an_unknown_study_is_one_line(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(PROJECT_ROOT / 'scripts')!r}); import status\n"
        "sys.argv[1:] = ['smoke']\nstatus.main(); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "DRS_RESULTS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0] == "smoke: 8 trainings: 8 waiting"
    assert done.stdout.splitlines()[-1] == "False"
    unknown = subprocess.run(
        [sys.executable, str(PROJECT_ROOT / "scripts" / "status.py"), "nope"], env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("error: study=nope: no runs under ") and unknown.stderr.count("\n") == 1
