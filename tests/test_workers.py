"""Evaluation in several processes: the same arrays as in one, and a mistake in a worker is the user's one line."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from brief_study import CELLS, configuration

from drs import evaluation_progress
from drs.array_files import load_arrays_file
from drs.evaluation import evaluate_study
from drs.evaluation_workers import available_cores, count_workers


def test_several_processes_find_what_one_finds_and_tell_of_a_damaged_run_in_one_line(
    brief_results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several):
        shutil.copytree(brief_results, folder)
    damaged = sorted((several / "s" / "runs").iterdir())[1] / "checkpoint.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    alone = evaluate_study(configuration(one))
    assert alone.computed == 3 * CELLS
    for name in ("TICK", "FIRST", "LINE", "LEAST"):
        monkeypatch.setattr(evaluation_progress, f"{name}_SECONDS", 0.005)
    capsys.readouterr()
    evaluation = evaluate_study(configuration(several, "workers=2", "progress=true"))
    lines = capsys.readouterr().out
    told = re.findall(r"run (\d)/3 digits mlp ce seed \d \S+ \(cell (\d)/5, \d+/\d+ images\)", lines)
    assert {run for run, _ in told} >= {"1", "3"}, "what the processes compute is told while they do"
    assert len({cell for _, cell in told}) > 1
    assert lines.count("evaluated run ") == 2 and lines.count("could not evaluate run ") == 1
    (failure,) = evaluation.failures
    assert failure.error.startswith(f"{damaged}: has 100 bytes") and "\n" not in failure.error
    assert evaluation.computed == len(evaluation.cells) == 2 * CELLS
    assert {cell.path for cell in evaluation.cells} == set(several.rglob("*.npz"))
    for cell in evaluation.cells:
        expected = load_arrays_file(one / cell.path.relative_to(several))
        # The number of threads decides the order of sums, and with it the last bits.
        assert np.allclose(load_arrays_file(cell.path)["logits"], expected["logits"], atol=1e-3), cell.path


def test_workers_are_as_many_as_asked_but_no_more_than_runs(tmp_path: Path) -> None:
    import torch

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    config = configuration(tmp_path, "workers=null")
    assert count_workers(config, cpu, 100) == (min(4, available_cores()), 1)
    assert count_workers(config, gpu, 100) == (1, 1), "models share a GPU one after the other"
    assert count_workers(config, cpu, 1) == (1, min(4, available_cores())), "one run is spread"
    assert count_workers(config, gpu, 1) == (1, 1)
    assert count_workers(configuration(tmp_path, "workers=7"), cpu, 3) == (3, 1)
