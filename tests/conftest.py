"""One small trained model and one small finished study, made once by the real entrypoints' own functions."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from drs import interrupts
from drs.composition import Composer
from drs.config import PROJECT_ROOT, TrainConfig
from drs.data import LabelledImages, load_test_split, load_training_split
from drs.sweeper import register_plugins
from drs.training import fit


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what tests/test_kills.py is asked for."""
    parser.addoption("--kills", type=int, default=3, help="how often test_kills.py kills a sweep (50: the long form)")
    parser.addoption("--kill-seed", type=int, default=0, help="of the moments at which it does")


def pytest_configure() -> None:
    """Give torch one thread, as ``make test`` does, here and in the programs under test.

    Two test processes with all cores each are several times slower, and mathematics libraries that choose their number
    of threads by the load do not repeat to the last bit.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def not_asked_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no test hear of a signal that an earlier one has sent to this process."""
    monkeypatch.setattr(interrupts, "_requested", False)
    monkeypatch.setattr(interrupts, "_pending", 0)


@functools.cache
def composer(*environment: str | None) -> Composer:
    """Return what keeps compositions, which Hydra takes long for; one for each state of the variables in them."""
    return Composer(
        lambda overrides: compose("train", overrides),
        lambda key: GlobalHydra.instance().config_loader().repository.group_exists(key),  # type: ignore[attr-defined]
    )


def compose_train(*overrides: str) -> TrainConfig:
    """Compose the training config with overrides, as the entrypoint does."""
    register_plugins()
    variables = [os.environ.get(name) for name in ("DRS_RESULTS", "DRS_CACHE", "DRS_DATA")]
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return composer(*variables).train_config(overrides)


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


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that ``make`` fills once for all test workers, and that is theirs in common."""
    base = factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


SMOKE = [
    "experiment=smoke", "workers=1", "suite.attacks.cw.steps=40", "suite.attacks.cw.binary_search_steps=4",
    "suite.attacks.cw_torchattacks.steps=15",
]  # fmt: skip
"""Evaluates the smoke study with fewer steps of its long attacks."""


@pytest.fixture(scope="session")
def smoke_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a shortened ``experiment=smoke``, run once for all workers; nobody changes it."""

    def run_smoke(folder: Path) -> None:
        environment = {"DRS_RESULTS": str(folder / "results"), "DRS_CACHE": str(folder / "data")}
        for script, arguments in (("train.py", ["experiment=smoke"]), ("evaluate.py", SMOKE)):
            out = folder / f"{script}.out"
            done = forked.run(script, *arguments, out=out, environment=environment, seconds=600)
            assert done.returncode == 0, done

    return made_once(tmp_path_factory, "smoke", run_smoke) / "results"


@pytest.fixture(scope="session")
def brief_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of three brief trainings, to be copied before it is changed."""
    from brief_study import train_three

    return made_once(tmp_path_factory, "brief", lambda folder: train_three(folder / "results")) / "results"
