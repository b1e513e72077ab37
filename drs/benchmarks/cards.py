"""What is asked of a card as a whole: CIFAR-10 to 94 %, 64 LeNets, the two studies.

airbench is the PyPI package of Keller Jordan ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498).
"""

import contextlib
import copy
import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from drs.benchmarks.harness import Row, ratio_of_medians
from drs.benchmarks.packing import fit_packed
from drs.config import PROJECT_ROOT, TrainConfig, project_path
from drs.data import LabelledImages, load_arrays, load_split
from drs.filling import load_test
from drs.torchvision_compat import import_torchvision
from drs.training import fit

ACCURACY = 0.94
"""Mean test accuracy that airbench's recipe was made for."""
INSTALL = "pip install -e '.[bench]'"
Trained = tuple[np.ndarray, np.ndarray]
"""Seconds and test accuracies (shares), ``[repeats]`` each."""


def train_here(config: TrainConfig, device: torch.device, repeats: int) -> Trained:
    """Train a config at seeds 0 to ``repeats`` - 1 on data that are in memory, after a training that is not counted."""
    training, validation = load_split(config.data, device)
    nothing = validation.first(0)
    test, _ = load_test(config.data, None, device)

    def train(seed: int) -> nn.Module:
        chosen = copy.deepcopy(config)
        chosen.seed = seed
        return fit(chosen, training, nothing, device)[0]

    return _timed(train, lambda model: accuracy_on(model, test), device, repeats)


def train_with_airbench(folder: Path, data: TrainConfig, repeats: int) -> Trained:
    """Train with airbench's recipe for 94 %, in ``folder``, where it looks for its copy of the data.

    Its accuracy is with its own test-time augmentation, as its author counts.

    Raises:
        ImportError: If it is not installed.
    """
    import_torchvision()  # which airbench imports
    library: Any = importlib.import_module("airbench")
    (folder / "cifar10").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        images, labels = load_arrays("cifar10", split, cache=project_path(data.data.cache))
        content = {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels).long(), "classes": []}
        torch.save(content, folder / "cifar10" / f"{split}.pt")
    with contextlib.chdir(folder):
        test = library.CifarLoader("cifar10", train=False, batch_size=2000)
        return _timed(
            lambda _: library.train94(verbose=False),
            lambda model: library.evaluate(model, test, 2),
            torch.device("cuda"),
            repeats,
        )


def _timed(
    train: Callable[[int], nn.Module], measure: Callable[[nn.Module], float], device: torch.device, repeats: int
) -> Trained:
    seconds, accuracies = np.empty(repeats), np.empty(repeats)
    for repeat in range(-1, repeats):  # the first compiles, and chooses algorithms
        began = time.perf_counter()
        model = train(max(repeat, 0))
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repeat >= 0:
            seconds[repeat] = time.perf_counter() - began
            accuracies[repeat] = measure(model)
    return seconds, accuracies


@torch.no_grad()
def accuracy_on(model: nn.Module, test: LabelledImages) -> float:
    """Return the share of test images that a model is right on."""
    model.eval()
    parts = torch.arange(len(test)).split(1000)
    right = sum(int((model(test.pixels(part)).argmax(dim=1) == test.labels[part]).sum()) for part in parts)
    return right / len(test)


def speedrun_rows(ours: Trained, theirs: Trained | None, recipe: str, device: str) -> Iterator[Row]:
    """Yield the accuracy of our recipe beside 94 %, and its time beside airbench's.

    Args:
        ours: From ``train_here``.
        theirs: From ``train_with_airbench``; None where it is not installed.
        recipe: Ours, for the rows.
        device: Of both.
    """
    seconds, accuracies = ours
    repeats, mean = len(seconds), float(accuracies.mean())
    yield Row(
        "gpu_training", "CIFAR-10, mean test accuracy", recipe, f"{ACCURACY:.0%}", "%", 100 * mean, 100 * ACCURACY,
        mean / ACCURACY, mean / ACCURACY, mean / ACCURACY, repeats, ">= 1", device, torch.get_num_threads(),
        note=f"sd over seeds {100 * accuracies.std(ddof=1):.2f} points; without test-time augmentation",
        reason="The recipe is the plain one of this project; nothing of it was tuned for this.",
    )  # fmt: skip
    case = f"CIFAR-10, training to {ACCURACY:.0%}"
    if theirs is None:
        yield Row(
            "gpu_training", case, recipe, "airbench", "s", float(np.median(seconds)), None, None, None, None, repeats,
            "<= 1.2", device, torch.get_num_threads(), note=f"airbench is not installed; {INSTALL} installs it",
        )  # fmt: skip
        return
    yield Row(
        "gpu_training", case, recipe, "airbench", "s", float(np.median(seconds)), float(np.median(theirs[0])),
        *ratio_of_medians(seconds, theirs[0]), repeats, "<= 1.2", device, torch.get_num_threads(),
        note=f"test accuracy {100 * mean:.2f} %, airbench {100 * theirs[1].mean():.2f} % with its own test-time "
        "augmentation; a time counts for this target where the row above meets its own",
        reason="airbench has a network, an initialisation and an optimiser's schedule of its own for these seconds; "
        "here the network is a standard one.",
    )  # fmt: skip


def seconds_of_sweep(overrides: Sequence[str], models: int, workers: int, folder: Path, environment: Any) -> float:
    """Return the wall time of a sweep over seeds as one command, its start included.

    Raises:
        RuntimeError: If it fails.
    """
    command = [
        "train.py", "-m", *overrides, f"seed=range({models})", "study=cards", "progress=false",
        f"results_dir={folder}", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}",
    ]  # fmt: skip
    return seconds_of([command], environment)


def seconds_of(commands: Sequence[Sequence[str]], environment: Any) -> float:
    """Return the wall time of scripts run one after the other; ``RuntimeError`` if one fails."""
    began = time.perf_counter()
    for script, *arguments in commands:
        command = [sys.executable, str(PROJECT_ROOT / "scripts" / script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{script} {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-500:]}")
    return time.perf_counter() - began


def sharing_row(seconds: float, models: int, workers: int, theirs: Trained | None, device: str) -> Row:
    """Return the models a minute of several trainings on one card beside airbench, one after another."""
    rate = 60 * models / seconds
    case = f"CIFAR-10, {models} models, {workers} at a time on one card"
    if theirs is None:
        return Row(
            "gpu_training", case, "ours", "airbench", "models/min", rate, None, None, None, None, 1, ">= 1.5", device,
            torch.get_num_threads(), note=f"airbench is not installed; {INSTALL} installs it",
        )  # fmt: skip
    peer = 60 / float(np.median(theirs[0]))
    return Row(
        "gpu_training", case, "ours", "airbench", "models/min", rate, peer, rate / peer, rate / peer, rate / peer, 1,
        ">= 1.5", device, torch.get_num_threads(), note="ours as one command, its start included",
        reason="One model of this network fills the card; several at a time share what there is.",
    )  # fmt: skip


def packing_row(config: TrainConfig, models: int, bound: float, device: torch.device, workers: dict[int, float]) -> Row:
    """Return the time of many small trainings in the way that is fastest, beside a bound in seconds.

    Args:
        config: Of each but for its seed, in a form that ``fit_packed`` takes.
        models: How many.
        bound: What is asked for, in seconds.
        device: Of the packed ones.
        workers: Seconds of the same trainings as a sweep, by how many processes shared the device.
    """
    training, _ = load_split(config.data, device)
    configs = [copy.deepcopy(config) for _ in range(models)]
    for seed, each in enumerate(configs):
        each.seed = seed
    began = time.perf_counter()
    fit_packed(configs, training, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    ways = {"packed through torch.func": time.perf_counter() - began}
    ways |= {f"a sweep of {count} processes": seconds for count, seconds in workers.items()}
    best = min(ways, key=ways.__getitem__)
    ratio = ways[best] / bound
    return Row(
        "gpu_training", f"{models} trainings of {config.model.name} on {config.data.name}, {config.epochs} epochs",
        best, f"{bound:g} s", "s", ways[best], bound, ratio, ratio, ratio, 1, "<= 1", device.type,
        torch.get_num_threads(), note="; ".join(f"{name}: {seconds:.1f} s" for name, seconds in ways.items()),
        reason="It is the fastest of the ways that the note lists.",
    )  # fmt: skip


def study_commands(experiments: Sequence[str], workers: int) -> list[list[str]]:
    """Return the commands of whole studies under the paper suite, so many trainings at a time."""
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}"]
    return [
        command
        for name in experiments
        for command in (
            ["train.py", f"experiment={name}", *launcher],
            ["evaluate.py", f"experiment={name}", "suite=paper"],
        )
    ]


def studies_row(experiments: Sequence[str], seconds: float, bound: float, device: str) -> Row:
    """Return the time of whole studies beside what is asked for, both in seconds."""
    ratio = seconds / bound
    return Row(
        "gpu_studies", f"experiment {' and '.join(experiments)} under the paper suite", "ours", f"{bound:g} s", "s",
        seconds, bound, ratio, ratio, ratio, 1, "<= 1", device, torch.get_num_threads(),
        note="tables, figures and report included",
        reason="The report of the studies says how much of it is training and how much is attacks.",
    )  # fmt: skip
