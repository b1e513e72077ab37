"""The configs, models and attacks that sections of the benchmark share."""

from collections.abc import Iterator

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from drs.attack_config import AttackConfig
from drs.benchmarks.attacks import attack_rows, look_rows
from drs.benchmarks.harness import Machine, Row
from drs.benchmarks.suites import suite_rows
from drs.config import PROJECT_ROOT, EvaluateConfig, TrainConfig, evaluate_config, train_config
from drs.data import load_split
from drs.filling import load_test
from drs.suite_config import suite_epsilons
from drs.sweeper import register_plugins
from drs.training import fit

USUAL_EPSILON = 0.3  # on MNIST (Madry et al. 2018)
EPSILON = 0.1  # the decisive one of the studies here, where an undefended model keeps much of its accuracy


def composed(*overrides: str) -> TrainConfig:
    """Compose a training config as the entrypoint does."""
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return train_config(compose("train", list(overrides)))


def paper_suite() -> EvaluateConfig:
    """Compose the evaluation under the paper suite."""
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return evaluate_config(compose("evaluate", ["study=paper", "suite=paper"]))


def trained(config: TrainConfig, device: torch.device) -> nn.Module:
    """Train a model for the attacks; nothing is written."""
    model, _ = fit(config, *load_split(config.data, device), device)
    return model


def attacks_on(device: torch.device, machine: Machine, n_images: int) -> Iterator[Row]:
    """Yield the rows of the attacks on a device.

    Args:
        device: Of the models, the images and everybody's attacks.
        machine: What the device can do at best.
        n_images: Test images of MNIST, attacked in one batch.
    """
    plain = composed("data=mnist", "model=lenet", "loss=ce", "optim=adam", "epochs=2")
    adversarial = composed(
        "data=mnist", "model=lenet", "loss=ce", "optim=adam", "epochs=3", "data.train_samples=20000",
        "procedure=adversarial", f"procedure.epsilon={EPSILON}", "procedure.steps=3",
        "procedure.relative_step_size=0.5",
    )  # fmt: skip
    test, _ = load_test(plain.data, n_images, device)
    undefended = trained(plain, device)
    for model, epsilon, described, target in (
        (undefended, USUAL_EPSILON, "undefended lenet", ">= 3"),
        (undefended, EPSILON, "undefended lenet", ">= 3"),
        (trained(adversarial, device), EPSILON, "adversarially trained lenet", ">= 1"),
    ):
        yield from attack_rows(model, test.pixels(), test.labels, epsilon, machine, described=described, target=target)
    yield from look_rows(undefended, test.pixels(), test.labels, described="undefended lenet")
    suite = paper_suite().suite
    attacks: dict[str, AttackConfig] = suite.attacks
    epsilons = [epsilon.value for epsilon in suite_epsilons(suite, "mnist", "linf")]
    yield from suite_rows(
        undefended, test.pixels(), test.labels, attacks, epsilons, n_images, machine, described="undefended lenet",
        target=">= 2",
    )  # fmt: skip
