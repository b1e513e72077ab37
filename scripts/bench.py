"""Measure how fast this is beside other ways to do the same work.

    python scripts/bench.py [--only SECTION]

Sections: loss, training, attacks, sweeps, startup, memory, growth, gpu, gpu_training, gpu_studies. Results go to
results/bench (bench.csv, REPORT.md). Nothing else should run on the machine meanwhile.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from drs.allocator import keep_freed_memory
from drs.attack_config import AttackConfig
from drs.benchmarks.attacks import attack_rows, look_rows
from drs.benchmarks.cards import (
    packing_row,
    seconds_of,
    seconds_of_sweep,
    sharing_row,
    speedrun_rows,
    studies_row,
    study_commands,
    train_here,
    train_with_airbench,
)
from drs.benchmarks.gpu import missing_rows, moved
from drs.benchmarks.growth import class_rows, evaluation_rows, table_rows
from drs.benchmarks.harness import Machine, Row, measure_machine, torch_threads
from drs.benchmarks.losses import loss_rows, step_rows
from drs.benchmarks.report import read_provenance, read_rows, write_rows
from drs.benchmarks.startup import peak_memory_rows, startup_rows
from drs.benchmarks.suites import suite_rows
from drs.benchmarks.sweeps import cores, packing_rows, worker_rows
from drs.benchmarks.training import training_rows
from drs.benchmarks.waiting import waiting_rows
from drs.config import PROJECT_ROOT, EvaluateConfig, TrainConfig, evaluate_config, train_config
from drs.data import load_split
from drs.entrypoint import let_threads_doze, run_script
from drs.errors import UserError
from drs.filling import load_test
from drs.provenance import describe_machine
from drs.suite_config import suite_epsilons
from drs.sweeper import register_plugins
from drs.training import fit

N_IMAGES = 500
USUAL_EPSILON = 0.3  # on MNIST (Madry et al. 2018)
EPSILON = 0.1  # the decisive one of the studies here, where an undefended model keeps much of its accuracy
NO_GPU = "no GPU at hand"
SPEEDRUNS, LENETS = 5, 64


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


def loss_section(machine: Machine) -> Iterator[Row]:
    """The loss and the training step, on one thread and on all."""
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        with torch_threads(threads):
            yield from loss_rows(machine)
    yield from step_rows(composed("data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam"))


def training_section(machine: Machine) -> Iterator[Row]:
    """Whole trainings, on part of the data."""
    mnist = composed("data=mnist", "model=lenet", "loss=ce", "optim=adam", "epochs=1")
    yield from training_rows(mnist, ">= 4")
    cifar = composed(
        "data=cifar10", "model=smallcnn", "loss=ce", "optim=sgd", "epochs=1", "data.train_samples=20000"
    )  # fmt: skip
    yield from training_rows(cifar, ">= 2")
    small = ["data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam", "epochs=1", "data.train_samples=20000"]
    yield from waiting_rows(small, os.environ)


def attacks_section(machine: Machine) -> Iterator[Row]:
    """Gradient steps on an undefended and on an adversarially trained model, and the paper suite."""
    return attacks_on(torch.device("cpu"))


def attacks_on(device: torch.device) -> Iterator[Row]:
    """The attacks on a device."""
    plain = composed("data=mnist", "model=lenet", "loss=ce", "optim=adam", "epochs=2")
    adversarial = composed(
        "data=mnist", "model=lenet", "loss=ce", "optim=adam", "epochs=3", "data.train_samples=20000",
        "procedure=adversarial", f"procedure.epsilon={EPSILON}", "procedure.steps=3",
        "procedure.relative_step_size=0.5",
    )  # fmt: skip
    test, _ = load_test(plain.data, N_IMAGES, device)
    undefended = trained(plain, device)
    for model, epsilon, described, target in (
        (undefended, USUAL_EPSILON, "undefended lenet", ">= 3"),
        (undefended, EPSILON, "undefended lenet", ">= 3"),
        (trained(adversarial, device), EPSILON, "adversarially trained lenet", ">= 1"),
    ):
        yield from attack_rows(model, test.pixels(), test.labels, epsilon, described=described, target=target)
    yield from look_rows(undefended, test.pixels(), test.labels, described="undefended lenet")
    suite = paper_suite().suite
    attacks: dict[str, AttackConfig] = suite.attacks
    epsilons = [epsilon.value for epsilon in suite_epsilons(suite, "mnist", "linf")]
    yield from suite_rows(
        undefended, test.pixels(), test.labels, attacks, epsilons, suite.batch_size, described="undefended lenet",
        target=">= 2",
    )  # fmt: skip


def sweeps_section(machine: Machine) -> Iterator[Row]:
    """Trainings of one sweep, in turn, side by side and packed."""
    overrides = ["data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam", "epochs=1", "data.train_samples=10000"]
    with tempfile.TemporaryDirectory() as folder:
        yield from worker_rows(overrides, Path(folder), dict(os.environ), max(2, cores()))
    yield from packing_rows(composed(*overrides[:-1], "data.train_samples=4000"), torch.device("cpu"))


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
    yield from table_rows()
    with tempfile.TemporaryDirectory() as folder:
        yield from evaluation_rows(Path(folder), dict(os.environ))


def gpu_section(machine: Machine) -> Iterator[Row]:
    """The loss, the step, the attacks and packing on a GPU, where there is one."""
    if not torch.cuda.is_available():
        yield from missing_rows("gpu", NO_GPU)
        return
    yield from moved(loss_rows(machine, "cuda"))
    yield from moved(step_rows(composed("data=cifar10", "model=resnet18", "loss=dr_softmax", "optim=sgd")))
    yield from moved(attacks_on(torch.device("cuda")))
    packed = composed("data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam", "epochs=1")
    yield from moved(packing_rows(packed, torch.device("cuda")))


def gpu_training_section(machine: Machine) -> Iterator[Row]:
    """Whole trainings on a GPU, where there is one: CIFAR-10 beside airbench, and many LeNets."""
    if not torch.cuda.is_available():
        yield from missing_rows("gpu_training", NO_GPU)
        return
    device, environment = torch.device("cuda"), dict(os.environ)
    recipe = [
        "data=cifar10", "model=resnet9", "loss=ce", "optim=sgd", "epochs=20", "batch_size=512", "precision=bfloat16",
    ]  # fmt: skip
    lenets = ["data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam", "epochs=5"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = composed(*recipe)
        try:
            theirs = train_with_airbench(folder / "airbench", config, SPEEDRUNS)
        except ImportError:
            theirs = None
        yield from speedrun_rows(train_here(config, device, SPEEDRUNS), theirs, "resnet9, 20 epochs", "cuda")
        seconds = seconds_of_sweep(recipe, 8, 4, folder / "sharing", environment)
        yield sharing_row(seconds, 8, 4, theirs, "cuda")
        swept = {n: seconds_of_sweep(lenets, LENETS, n, folder / f"by-{n}", environment) for n in (4, 8)}
        yield packing_row(composed(*lenets), LENETS, 60, device, swept)


def gpu_studies_section(machine: Machine) -> Iterator[Row]:
    """The studies for a GPU under the paper suite, where there is one."""
    if not torch.cuda.is_available():
        yield from missing_rows("gpu_studies", NO_GPU)
        return
    with tempfile.TemporaryDirectory() as folder:
        studies = ("mnist", "cifar10")
        seconds = seconds_of(study_commands(studies, 4), {**os.environ, "DRS_RESULTS": folder})
        yield studies_row(studies, seconds, 600, "cuda")


SECTIONS: dict[str, Callable[[Machine], Iterator[Row]]] = {
    "loss": loss_section,
    "training": training_section,
    "attacks": attacks_section,
    "sweeps": sweeps_section,
    "startup": startup_section,
    "memory": memory_section,
    "growth": growth_section,
    "gpu": gpu_section,
    "gpu_training": gpu_training_section,
    "gpu_studies": gpu_studies_section,
}


def main() -> int:
    """Run the sections asked for and write what they found beside the rows of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="SECTION", help=f"one of {', '.join(SECTIONS)}")
    only = parser.parse_args().only
    if only is not None and only not in SECTIONS:
        raise UserError(f"ONLY={only}: must be one of {', '.join(SECTIONS)}")
    folder = PROJECT_ROOT / "results" / "bench"
    keep_freed_memory()
    chosen = [only] if only else list(SECTIONS)
    rows = [row for row in read_rows(folder) if row.section not in chosen]
    print("measuring the machine", flush=True)
    machine = measure_machine()
    here = {**describe_machine(torch.device("cpu")), "machine": asdict(machine)}
    provenance = {**read_provenance(folder), **dict.fromkeys(chosen, here)}
    began = time.perf_counter()
    for section in chosen:
        for row in SECTIONS[section](machine):
            rows.append(row)
            ratio = "not measured" if row.ratio is None else f"{row.ratio:.3g}"
            passed = time.perf_counter() - began
            print(f"[{passed:5.0f} s] {row.case}: {row.ours} against {row.theirs}: {ratio} {row.verdict}", flush=True)
    rows.sort(key=lambda row: list(SECTIONS).index(row.section))
    write_rows(folder, rows, provenance)
    print(f"{folder / 'REPORT.md'}")
    return 0


if __name__ == "__main__":
    if let_threads_doze():  # as trainings have it; torch has been imported by now and reads it at the start
        os.execv(sys.executable, [sys.executable, *sys.argv])
    run_script(main)
