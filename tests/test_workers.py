"""Evaluation in several processes: the same arrays as in one, and a mistake in a worker is the user's one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import compose_train
from hydra import compose, initialize_config_dir

from drs.array_files import load_arrays_file
from drs.config import PROJECT_ROOT, EvaluateConfig, evaluate_config
from drs.evaluation import evaluate_study
from drs.evaluation_workers import available_cores, count_workers
from drs.sweeper import register_plugins
from drs.training import train


def configuration(results: Path, *overrides: str) -> EvaluateConfig:
    register_plugins()
    given = ["study=s", f"results_dir={results}", "suite.n_samples.digits=50", "~suite.attacks.cw", "progress=false"]
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return evaluate_config(compose("evaluate", [*given, *overrides]))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three brief trainings."""
    folder = tmp_path_factory.mktemp("results")
    for seed in range(3):
        common = ["data=digits", "model=mlp", "loss=ce", "epochs=3", "batch_size=64", "study=s", "progress=false"]
        train(compose_train(*common, f"seed={seed}", f"results_dir={folder}"))
    return folder


def test_several_processes_find_what_one_finds(results: Path, tmp_path: Path) -> None:
    arrays = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        shutil.copytree(results, folder)
        evaluation = evaluate_study(configuration(folder, f"workers={workers}"))
        assert evaluation.computed == len(evaluation.cells) == 3 * 10
        arrays[workers] = {cell.path.relative_to(folder): load_arrays_file(cell.path) for cell in evaluation.cells}
        assert evaluate_study(configuration(folder, f"workers={workers}")).computed == 0
    assert arrays[1].keys() == arrays[2].keys()
    for path, found in arrays[1].items():
        # The number of threads decides the order of sums, and with it the last bits.
        assert np.allclose(found["logits"], arrays[2][path]["logits"], atol=1e-3), path


def test_a_damaged_run_in_a_worker_is_told_in_one_line_and_leaves_no_half_cell(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(results, folder)
    damaged = sorted((folder / "s" / "runs").iterdir())[1] / "checkpoint.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    evaluation = evaluate_study(configuration(folder, "workers=2"))
    (failure,) = evaluation.failures
    assert failure.error.startswith(f"{damaged}: has 100 bytes") and "\n" not in failure.error
    assert evaluation.computed == len(evaluation.cells) == 2 * 10
    for path in folder.rglob("*.npz"):
        load_arrays_file(path)


def test_workers_are_as_many_as_asked_but_no_more_than_runs(results: Path) -> None:
    import torch

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    config = configuration(results)
    assert count_workers(config, cpu, 100) == (min(4, available_cores()), 1)
    assert count_workers(config, gpu, 100) == (1, 1), "models share a GPU one after the other"
    assert count_workers(config, cpu, 1) == (1, min(4, available_cores())), "one run is spread"
    assert count_workers(config, gpu, 1) == (1, 1)
    assert count_workers(configuration(results, "workers=7"), cpu, 3) == (3, 1)
