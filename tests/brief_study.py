"""A study of three brief trainings, and an evaluation of it with few attacks, for tests of what may go wrong."""

import functools
from dataclasses import replace
from pathlib import Path

from conftest import compose_train
from hydra import compose, initialize_config_dir

from drs.config import PROJECT_ROOT, EvaluateConfig, evaluate_config
from drs.sweeper import register_plugins
from drs.training import train

CELLS = 5
"""Of each run: clean, and FGSM and PGD at two epsilons."""
TRAINING = ["data=digits", "model=mlp", "loss=ce", "epochs=3", "batch_size=64", "study=s", "progress=false"]


def configuration(results: Path, *overrides: str) -> EvaluateConfig:
    return replace(_configuration(*overrides), results_dir=str(results))


@functools.cache
def _configuration(*overrides: str) -> EvaluateConfig:
    register_plugins()
    few = [
        "suite.n_samples.digits=30", "~suite.attacks.cw", "~suite.attacks.cw_torchattacks", "timing=false",
        "suite.epsilons.digits.linf=[0.1,0.2]", "suite.attacks.pgd.steps=3",
    ]  # fmt: skip
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return evaluate_config(compose("evaluate", ["study=s", "progress=false", "workers=1", *few, *overrides]))


def train_three(folder: Path) -> None:
    """Train one after another with three seeds."""
    for seed in range(3):
        train(compose_train(*TRAINING, f"seed={seed}", f"results_dir={folder}"))
