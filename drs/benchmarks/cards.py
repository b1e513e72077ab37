"""What is asked of a card as a whole: CIFAR-10 to 94 %, several models on one card, 64 LeNets.

airbench is the PyPI package of Keller Jordan ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498).
"""

import contextlib
import copy
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from drs.benchmarks.graphs import fit_graphed
from drs.benchmarks.harness import Row, ratio_of_medians
from drs.benchmarks.packing import Fit, Pace, fit_packed, warm_up
from drs.config import TrainConfig, project_path
from drs.data import LabelledImages, load_arrays, load_split
from drs.filling import load_test
from drs.torchvision_compat import import_torchvision
from drs.training import fit

ACCURACY = 0.94
"""Mean test accuracy that airbench's recipe was made for."""
INSTALL = "pip install -e '.[bench]'"
Trained = tuple[np.ndarray, np.ndarray]
"""Seconds and test accuracies (shares), ``[repeats]`` each."""


@dataclass(frozen=True)
class Recipe:
    """A way to train a model.

    Attributes:
        prepare: Takes a seed and returns the training, which returns a model; only the latter is timed.
        accuracy: Of a model on the test images, a share.
        warm_up: What has to run once before a training is timed; None for a whole training.
    """

    prepare: Callable[[int], Callable[[], nn.Module]]
    accuracy: Callable[[nn.Module], float]
    warm_up: Callable[[], object] | None = None


def our_recipe(config: TrainConfig, device: torch.device) -> Recipe:
    """Return the training of a config, whose data are in the device's memory, without validation after an epoch."""
    training, validation = load_split(config.data, device)
    test, _ = load_test(config.data, None, device)

    def prepare(seed: int, epochs: int = config.epochs) -> Callable[[], nn.Module]:
        chosen = copy.deepcopy(config)
        chosen.seed, chosen.epochs = seed, epochs
        return lambda: fit(chosen, training, validation.first(0), device)[0]

    return Recipe(prepare, lambda model: accuracy_on(model, test), prepare(0, epochs=1))


def airbench_recipe(folder: Path, config: TrainConfig) -> Recipe:
    """Return airbench's recipe for 94 %, with its data in the card's memory as well.

    Its accuracy is with its own test-time augmentation, as its author counts.

    Args:
        folder: Where it looks for its copy of the data, which is written there.
        config: For the place of the data.

    Raises:
        ImportError: If it is not installed.
    """
    import_torchvision()  # which airbench imports
    with chosen_algorithms():  # importing it has cuDNN choose algorithms by trial, for everybody
        library: Any = importlib.import_module("airbench")
        settings: Any = importlib.import_module("airbench.lib_airbench94").hyp
    (folder / "cifar10").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        images, labels = load_arrays("cifar10", split, cache=project_path(config.data.cache))
        content = {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels).long(), "classes": []}
        torch.save(content, folder / "cifar10" / f"{split}.pt")
    with contextlib.chdir(folder):
        test = library.CifarLoader("cifar10", train=False, batch_size=2000)

    def prepare(_: int) -> Callable[[], nn.Module]:
        with contextlib.chdir(folder):
            loader = library.CifarLoader(
                "cifar10", train=True, batch_size=settings["opt"]["batch_size"], aug=settings["aug"], altflip=True
            )

        def train() -> nn.Module:
            with contextlib.chdir(folder), chosen_algorithms(by_trial=True):  # it loads its test images there
                model: nn.Module = library.train94(train_loader=loader, verbose=False)
            return model

        return train

    return Recipe(prepare, lambda model: float(library.evaluate(model, test, 2)))


@contextlib.contextmanager
def chosen_algorithms(*, by_trial: bool | None = None) -> Iterator[None]:
    """Have cuDNN choose its algorithms by trial or not (None: as it is), and let nothing inside change that."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before if by_trial is None else by_trial
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def train_in_turn(recipes: Sequence[Recipe], device: torch.device, repeats: int) -> list[Trained]:
    """Train by each recipe at seeds 0 to ``repeats`` - 1, in turn, after a warm-up each that is not counted."""
    seconds, accuracies = np.empty((2, len(recipes), repeats))
    for recipe in recipes:  # the first steps compile, and choose algorithms
        (recipe.warm_up or recipe.prepare(0))()
    for repeat in range(repeats):
        for which in range(len(recipes))[:: 1 if repeat % 2 else -1]:
            train = recipes[which].prepare(repeat)
            _wait(device)
            began = time.perf_counter()
            model = train()
            _wait(device)
            seconds[which, repeat] = time.perf_counter() - began
            accuracies[which, repeat] = recipes[which].accuracy(model)
    return list(zip(seconds, accuracies, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


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
        ours: From ``train_in_turn``.
        theirs: Likewise, of airbench; None where it is not installed.
        recipe: Ours, for the rows.
        device: Of both.
    """
    seconds, accuracies = ours
    repeats, mean = len(seconds), float(accuracies.mean())
    yield Row(
        "gpu_speedrun", "CIFAR-10, mean test accuracy", recipe, f"{ACCURACY:.0%}", "%", 100 * mean, 100 * ACCURACY,
        mean / ACCURACY, mean / ACCURACY, mean / ACCURACY, repeats, ">= 1", device, torch.get_num_threads(),
        note=f"sd over seeds {100 * accuracies.std(ddof=1):.2f} points; without test-time augmentation",
        reason="The recipe is the plain one of this project; nothing of it was tuned for this.",
    )  # fmt: skip
    case = f"CIFAR-10, training to {ACCURACY:.0%}"
    if theirs is None:
        yield Row(
            "gpu_speedrun", case, recipe, "airbench", "s", float(np.median(seconds)), None, None, None, None, repeats,
            "<= 1.2", device, torch.get_num_threads(), note=f"airbench is not installed; {INSTALL} installs it",
        )  # fmt: skip
        return
    yield Row(
        "gpu_speedrun", case, recipe, "airbench", "s", float(np.median(seconds)), float(np.median(theirs[0])),
        *ratio_of_medians(seconds, theirs[0]), repeats, "<= 1.2", device, torch.get_num_threads(),
        note=f"test accuracy {100 * mean:.2f} %, airbench {100 * theirs[1].mean():.2f} % with its own test-time "
        "augmentation; both train on all 50000 images, which are in the card's memory when the clock starts",
        held=mean >= ACCURACY,
        reason=("" if mean >= ACCURACY else f"Ours does not reach {ACCURACY:.0%}. ")
        + "airbench has a network, an initialisation and an optimiser's schedule of its own for these seconds; here "
        "the network is a standard one.",
    )  # fmt: skip


def sharing_row(seconds: float, models: int, workers: int, theirs: Trained | None, device: str) -> Row:
    """Return the models a minute of several trainings on one card beside airbench, one after another."""
    rate = 60 * models / seconds
    case = f"CIFAR-10, {models} models, {workers} at a time on one card"
    if theirs is None:
        return Row(
            "gpu_sharing", case, "ours", "airbench", "models/min", rate, None, None, None, None, 1, ">= 1.5", device,
            torch.get_num_threads(), note=f"airbench is not installed; {INSTALL} installs it",
        )  # fmt: skip
    peer = 60 / float(np.median(theirs[0]))
    return Row(
        "gpu_sharing", case, "ours", "airbench", "models/min", rate, peer, rate / peer, rate / peer, rate / peer, 1,
        ">= 1.5", device, torch.get_num_threads(), note="ours as one command, its start included",
        reason="One model of this network fills the card; several at a time share what there is.",
    )  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """What many trainings took.

    Attributes:
        seconds: All of them.
        models: What they made, in eval mode.
    """

    seconds: float
    models: Sequence[nn.Module]


def seconds_packed(
    config: TrainConfig, models: int, device: torch.device, within: float | None = None, *, compiled: bool = False
) -> Timing:
    """Return the seconds of a config's trainings at seeds 0 to ``models`` - 1, as one batch, and their models.

    Args:
        config: Of each but for its seed.
        models: How many.
        device: Of the data, which are in its memory, and of the trainings.
        within: Seconds that they may take.
        compiled: Whether the gradient is compiled; that is not counted, nor are the steps that warm up.

    Raises:
        TooSlow: If the first steps say that they would take longer than ``within``.
        RuntimeError: If the gradient cannot be compiled.
    """
    return _timed(functools.partial(fit_packed, compiled=compiled), config, models, device, within)


def seconds_graphed(config: TrainConfig, models: int, device: torch.device, within: float | None = None) -> Timing:
    """Return the same for trainings side by side in CUDA graphs, whose capture is counted."""
    return _timed(fit_graphed, config, models, device, within)


def _timed(fit_all: Fit, config: TrainConfig, models: int, device: torch.device, within: float | None) -> Timing:
    training, _ = load_split(config.data, device)
    configs = [copy.deepcopy(config) for _ in range(models)]
    for seed, each in enumerate(configs):
        each.seed = seed
    warm_up(fit_all, configs, training, device)
    _wait(device)
    began = time.perf_counter()
    trained = fit_all(configs, training, device, pace=None if within is None else Pace(within, device))
    _wait(device)
    return Timing(time.perf_counter() - began, trained)


def lenet_rows(
    config: TrainConfig,
    models: int,
    bound: float,
    device: str,
    ways: Mapping[str, Callable[[], Timing | float]],
) -> Iterator[Row]:
    """Yield the time of many small trainings in each of some ways, and of the fastest beside a bound in seconds.

    Args:
        config: Of each but for its seed.
        models: How many.
        bound: What is asked for, in seconds.
        device: That they share.
        ways: What all of them take, by name, or only the seconds; each is called once. One that fails or is stopped is
            not measured, and the row says why. The models' accuracy is not among the seconds.
    """
    case = f"{models} trainings of {config.model.name} on {config.data.name}, {config.epochs} epochs"
    empty = Row(
        "gpu_lenets", case, "the fastest", f"{bound:g} s", "s", None, bound, None, None, None, 1, "", device,
        torch.get_num_threads(),
    )  # fmt: skip
    best = replace(empty, target="<= 1", note="nothing of what was tried ended")
    for name, measure in ways.items():
        row = replace(empty, ours=name, tried=True)
        try:
            outcome = measure()
        except TimeoutError as error:
            yield replace(row, note=str(error)[:500])
            continue
        except Exception as error:
            yield replace(row, note=f"it failed: {' '.join(str(error).split())[:500]}")
            continue
        timing = outcome if isinstance(outcome, Timing) else Timing(outcome, ())
        ratio, note = timing.seconds / bound, accuracy_note(timing.models, config, device)
        yield replace(row, ours_median=timing.seconds, ratio=ratio, low=ratio, high=ratio, note=note)
        if best.ours_median is None or timing.seconds < best.ours_median:
            best = replace(
                best, ours=name, ours_median=timing.seconds, ratio=ratio, low=ratio, high=ratio,
                note="; ".join(filter(None, ("the fastest of what was tried", note))),
                reason="It is the fastest of what was tried.",
            )  # fmt: skip
    yield best


def accuracy_note(models: Sequence[nn.Module], config: TrainConfig, device: str) -> str:
    """Return the mean test accuracy of some models and its standard deviation, in words; empty for no models."""
    if not models:
        return ""
    test, _ = load_test(config.data, None, torch.device(device))
    shares = 100 * np.array([accuracy_on(model, test) for model in models])
    spread = f", sd {shares.std(ddof=1):.2f} points" if len(models) > 1 else ""
    return f"mean test accuracy of {len(models)} models {shares.mean():.2f} %{spread}"
