"""The sections of the benchmark: what each measures on this machine's processor, and where the card's are."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from drs.benchmarks import gpu
from drs.benchmarks.commands import strong_row
from drs.benchmarks.composing import attacks_on, composed
from drs.benchmarks.growth import class_rows, evaluation_rows, table_rows
from drs.benchmarks.harness import Machine, Row, torch_threads
from drs.benchmarks.losses import loss_rows, step_rows
from drs.benchmarks.startup import peak_memory_rows, startup_rows
from drs.benchmarks.sweeps import cores, packing_rows, worker_rows
from drs.benchmarks.training import training_rows
from drs.benchmarks.waiting import waiting_rows

N_IMAGES = 500
CPU = torch.device("cpu")
Section = Callable[[Machine], Iterator[Row]]


def loss_section(machine: Machine) -> Iterator[Row]:
    """The loss and the training step, on one thread and on all."""
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        with torch_threads(threads):
            yield from loss_rows()
    yield from step_rows(composed("data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam", "device=cpu"), machine)


def training_section(machine: Machine) -> Iterator[Row]:
    """Whole trainings, on part of the data."""
    mnist = composed("data=mnist", "model=lenet", "loss=ce", "optim=adam", "epochs=1")
    yield from training_rows(mnist, machine, ">= 4")
    cifar = composed(
        "data=cifar10", "model=smallcnn", "loss=ce", "optim=sgd", "epochs=1", "data.train_samples=20000"
    )  # fmt: skip
    yield from training_rows(cifar, machine, ">= 2")
    small = ["data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam", "epochs=1", "data.train_samples=20000"]
    yield from waiting_rows(small, os.environ)


def attacks_section(machine: Machine) -> Iterator[Row]:
    """Gradient steps on an undefended and on an adversarially trained model, and the paper suite."""
    return attacks_on(CPU, machine, N_IMAGES)


def strong_section(machine: Machine) -> Iterator[Row]:
    """The strong suite on one model, as a whole process."""
    training = ["data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam", "epochs=2"]
    with tempfile.TemporaryDirectory() as folder:
        yield strong_row("strong", training, os.environ, Path(folder), samples=1000, bound=180, device="cpu")


def sweeps_section(machine: Machine) -> Iterator[Row]:
    """Trainings of one sweep, in turn, side by side and packed."""
    overrides = ["data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam", "epochs=1", "data.train_samples=10000"]
    with tempfile.TemporaryDirectory() as folder:
        yield from worker_rows(overrides, Path(folder), dict(os.environ), max(2, cores()))
    yield from packing_rows(composed(*overrides[:-1], "data.train_samples=4000"), CPU)


def startup_section(machine: Machine) -> Iterator[Row]:
    """Whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        yield from startup_rows(Path(folder), dict(os.environ))


def memory_section(machine: Machine) -> Iterator[Row]:
    """Peak memory of whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        yield from peak_memory_rows(Path(folder), dict(os.environ))


def growth_section(machine: Machine) -> Iterator[Row]:
    """How time and memory grow with images, classes and models."""
    yield from class_rows()
    with tempfile.TemporaryDirectory() as folder:
        yield from table_rows(Path(folder), dict(os.environ))
        yield from evaluation_rows(Path(folder), dict(os.environ))


def sections(within: float | None = None) -> dict[str, Section]:
    """Return the sections by name, in the order of the report; those of a GPU say so where there is none.

    Args:
        within: Seconds after which the studies for a GPU are stopped; None for those of their target.
    """
    on_a_card: dict[str, Section] = {
        "gpu_loss": gpu.loss_section,
        "gpu_attacks": gpu.attacks_section,
        "gpu_step": gpu.step_section,
        "gpu_packing": gpu.packing_section,
        "gpu_lenets": gpu.lenets_section,
        "gpu_strong": gpu.strong_section,
        "gpu_speedrun": gpu.speedrun_section,
        "gpu_sharing": gpu.sharing_section,
        "gpu_studies": functools.partial(gpu.studies_section, within=within),
    }
    return {
        "loss": loss_section,
        "training": training_section,
        "attacks": attacks_section,
        "strong": strong_section,
        "sweeps": sweeps_section,
        "startup": startup_section,
        "memory": memory_section,
        "growth": growth_section,
        **{name: functools.partial(_where_there_is_a_gpu, name, section) for name, section in on_a_card.items()},
    }


def _where_there_is_a_gpu(name: str, section: Section, machine: Machine) -> Iterator[Row]:
    return section(machine) if torch.cuda.is_available() else gpu.missing_rows(name, gpu.NO_GPU)
