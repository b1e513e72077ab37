"""One small trained model and one small finished study, made once by the real entrypoints' own functions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from torch import nn

from drs.config import PROJECT_ROOT, TrainConfig, train_config
from drs.data import LabelledImages, load_test_split, load_training_split
from drs.sweeper import register_plugins
from drs.training import fit


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what tests/test_kills.py is asked for."""
    parser.addoption("--kills", type=int, default=6, help="how often test_kills.py kills a sweep (50: the long form)")
    parser.addoption("--kill-seed", type=int, default=0, help="of the moments at which it does")


def compose_train(*overrides: str) -> TrainConfig:
    """Compose the training config with overrides, as the entrypoint does."""
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return train_config(compose("train", list(overrides)))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Training, validation and test part of the digits."""
    cache = tmp_path_factory.mktemp("cache")
    training, validation = load_training_split("digits", validation=100, cache=cache)
    return training, validation, load_test_split("digits", cache=cache)[0]


@pytest.fixture(scope="session")
def digits_model(digits: tuple[LabelledImages, LabelledImages, LabelledImages]) -> nn.Module:
    """An undefended perceptron trained on the digits, in eval mode."""
    config = compose_train("data=digits", "model=mlp", "loss=ce", "epochs=20", "batch_size=64")
    model, _ = fit(config, digits[0], digits[1], torch.device("cpu"))
    return model


@pytest.fixture(scope="session")
def smoke_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of ``experiment=smoke``, run once from the command line for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    results = shared / "results"
    with FileLock(str(shared / "smoke.lock")):
        if not (results / "smoke" / "REPORT.md").exists():
            environment = {**os.environ, "DRS_RESULTS": str(results), "DRS_CACHE": str(shared / "data")}
            for script in ("train.py", "evaluate.py"):
                command = [sys.executable, str(PROJECT_ROOT / "scripts" / script), "experiment=smoke"]
                subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return results


@pytest.fixture(scope="session")
def brief_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of three brief trainings, to be copied before it is changed."""
    from brief_study import train_three

    folder = tmp_path_factory.mktemp("brief")
    train_three(folder)
    return folder
