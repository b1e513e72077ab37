"""What is measured on a GPU, by section; where there is none, a row for each target that says so."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from drs.benchmarks.cards import (
    Recipe,
    Timing,
    airbench_recipe,
    lenet_rows,
    our_recipe,
    seconds_graphed,
    seconds_packed,
    sharing_row,
    speedrun_rows,
    train_in_turn,
)
from drs.benchmarks.commands import fast_search_row, seconds_of, strong_row, studies_row, sweep_command
from drs.benchmarks.composing import attacks_on, composed
from drs.benchmarks.harness import Machine, Row
from drs.benchmarks.losses import loss_rows, step_rows
from drs.benchmarks.sweeps import packing_rows, worker_rows

NO_GPU = "no GPU at hand"
TARGETS = {
    "gpu_loss": (
        ("loss, forward and backward", "DR-softmax", "cross-entropy", "<= 2"),
        ("memory of the loss beyond cross-entropy's", "DR-softmax", "one [B, K] tensor", "<= 1"),
    ),
    "gpu_attacks": (
        ("PGD on an undefended model", "our PGD", "the fastest library", ">= 3"),
        ("PGD on an undefended model", "our margin PGD", "the fastest library", ">= 3"),
        ("PGD on an adversarially trained model", "our PGD", "the fastest library", ">= 1"),
        ("PGD on an adversarially trained model", "our margin PGD", "the fastest library", ">= 1"),
        ("paper suite", "the suite", "torchattacks by hand", ">= 2"),
    ),
    "gpu_step": (("training step, resnet18 on cifar10", "DR-softmax", "cross-entropy", "<= 1.02"),),
    "gpu_packing": (("trainings of MNIST lenets, models a minute", "the best packing", "one worker", ""),),
    "gpu_lenets": (("64 MNIST lenets of 5 epochs", "the best packing", "60 s", "<= 1"),),
    "gpu_strong": (("strong suite, one resnet18 on cifar10, 10000 images", "ours", "120 s", "<= 1"),),
    "gpu_speedrun": (("CIFAR-10 to 94 % mean test accuracy", "ours", "airbench", "<= 1.2"),),
    "gpu_sharing": (("CIFAR-10, several models on one card, models a minute", "ours", "airbench", ">= 1.5"),),
    "gpu_studies": (("the mnist and the cifar10 study", "ours", "10 minutes", "<= 1"),),
}
"""What is asked of a GPU, by section: the case, ours, theirs, and the target of their ratio.

The first sections need MNIST only, and minutes; the last ones need CIFAR-10 and up to ten minutes each.
"""
CUDA = torch.device("cuda")
N_IMAGES, N_STRONG = 5000, 10000
"""Test images that are attacked, by the strong suite those of the target: a few hundred would leave a card idle."""
SPEEDRUNS, PEER_RUNS, SHARED, LENETS = 2, 3, 8, 64
"""Trainings: of each recipe for 94 %, of airbench beside several at a time, of those, and of MNIST lenets."""
LENETS_WITHIN = 90.0
"""Seconds after which, or after which by its pace, a way to train the lenets is given up."""
STEP = ("data=cifar10", "model=resnet18", "loss=dr_softmax", "optim=sgd")
LENET = ("data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam")
RECIPE = ("data=cifar10", "model=resnet9", "loss=ce", "optim=sgd", "epochs=20", "batch_size=512", "precision=bfloat16")
STRONG = ("data=cifar10", "model=resnet18", "loss=ce", "optim=sgd", "epochs=15", "batch_size=512", "precision=bfloat16")
"""As the cifar10 study trains it. How many images stand, and so what attacks take, depends on the training."""
STUDIES = ("mnist", "cifar10")
SIDE_BY_SIDE = ("workers=4", "suite.batch_size=10000")
"""Of an evaluation of one model on a card: large batches, and the long searches on few images meanwhile. Processes take
turns on a card, and an attack that reads from it at every step waits for a turn each time, so they are few."""


def missing_rows(section: str, why: str) -> Iterator[Row]:
    """Yield a row without figures for each target of a section, with the reason."""
    for case, ours, theirs, target in TARGETS[section]:
        yield Row(section, case, ours, theirs, "", None, None, None, None, None, 0, target, "cuda", 0, note=why)


def moved(rows: Iterator[Row], section: str) -> Iterator[Row]:
    """Yield rows of another section as rows of this one."""
    return (replace(row, section=section) for row in rows)


def loss_section(machine: Machine) -> Iterator[Row]:
    """The loss alone."""
    return moved(loss_rows(CUDA.type), "gpu_loss")


def attacks_section(machine: Machine) -> Iterator[Row]:
    """Gradient steps and the paper suite."""
    return moved(attacks_on(CUDA, machine, N_IMAGES), "gpu_attacks")


def step_section(machine: Machine) -> Iterator[Row]:
    """A training step of a ResNet-18."""
    return moved(step_rows(composed(*STEP, f"device={CUDA.type}")), "gpu_step")


def packing_section(machine: Machine) -> Iterator[Row]:
    """A few trainings of MNIST lenets: one after another, several at once, and as a sweep of several processes."""
    overrides = [*LENET, "epochs=1"]
    yield from moved(packing_rows(composed(*overrides), CUDA), "gpu_packing")
    with tempfile.TemporaryDirectory() as folder:
        rows = worker_rows(overrides, Path(folder), dict(os.environ), 4, device=CUDA.type, repeats=1)
        yield from moved(rows, "gpu_packing")


def lenets_section(machine: Machine) -> Iterator[Row]:
    """Many trainings of MNIST lenets; a way that would take too long is stopped.

    Ways that the packing section shows to be slower are left to it: several processes, and the packed ones compiled.
    """
    config = composed(*LENET, "epochs=5")
    # What should be the fastest comes first.
    ways: dict[str, Callable[[], Timing | float]] = {
        "side by side in CUDA graphs": lambda: seconds_graphed(config, LENETS, CUDA, LENETS_WITHIN),
        "packed through torch.func": lambda: seconds_packed(config, LENETS, CUDA, LENETS_WITHIN),
    }
    yield from lenet_rows(config, LENETS, 60, CUDA.type, ways)


def strong_section(machine: Machine) -> Iterator[Row]:
    """The strong suite on a ResNet-18, and what a fast search is worth."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row = strong_row(
            "gpu_strong", STRONG, os.environ, folder, samples=N_STRONG, bound=120, device=CUDA.type,
            settings=[*SIDE_BY_SIDE, "suite.fast_search=true"], within=240,
        )  # fmt: skip
        yield row
        yield fast_search_row(row, os.environ, folder, data="cifar10", samples=300, settings=SIDE_BY_SIDE)


def speedrun_section(machine: Machine) -> Iterator[Row]:
    """CIFAR-10 to 94 %, beside airbench."""
    config = composed(*RECIPE, "data.validation=0")  # all the training images, as airbench has them
    with tempfile.TemporaryDirectory() as folder:
        recipes = [our_recipe(config, CUDA), *airbench(Path(folder))]
        ours, *theirs = train_in_turn(recipes, CUDA, SPEEDRUNS)
    recipe = f"{config.model.name}, {config.epochs} epochs"
    yield from speedrun_rows(ours, theirs[0] if theirs else None, recipe, CUDA.type)


def sharing_section(machine: Machine) -> Iterator[Row]:
    """Several trainings on one card, beside airbench one after another."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = train_in_turn(airbench(folder), CUDA, PEER_RUNS)
        command = sweep_command([*RECIPE, f"device={CUDA.type}"], SHARED, 4, folder / "sharing")
        seconds = seconds_of([command], os.environ)
        yield sharing_row(seconds, SHARED, 4, theirs[0] if theirs else None, CUDA.type)


def airbench(folder: Path) -> list[Recipe]:
    """Return airbench's recipe, or nothing where it is not installed."""
    try:
        return [airbench_recipe(folder / "airbench", composed(*RECIPE))]
    except ImportError:
        return []


def studies_section(machine: Machine, within: float | None = None) -> Iterator[Row]:
    """The studies for a GPU under the paper suite."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "DRS_RESULTS": folder}
        yield studies_row(STUDIES, environment, Path(folder), 600, CUDA.type, within=within)
