"""Our training loop beside the plain one: DataLoader, torchvision's transforms, float32, the same model and epochs."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from drs.benchmarks.harness import Row, ratio_of_medians, time_in_turn
from drs.checkpoints import build_model_of
from drs.config import TrainConfig, project_path
from drs.data import LabelledImages, balanced_order, iterate_batches, load_arrays, load_split
from drs.filling import load_test
from drs.optimisation import build_optimizer, build_schedule
from drs.torchvision_compat import import_torchvision
from drs.training import autocast, fit

REPEATS = 3
STEPS = 30
WORKERS = 2


class _Images(Dataset[tuple[torch.Tensor, int]]):
    """Images as torchvision's own data sets give them: one PIL image at a time, through the transforms."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Any) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def _loader(config: TrainConfig, images: np.ndarray, labels: np.ndarray) -> DataLoader[tuple[torch.Tensor, int]]:
    """Return the batches of the plain loop."""
    transforms = import_torchvision().transforms
    steps: list[Any] = [transforms.ToPILImage()]
    if config.data.augment != "none":
        steps.append(transforms.RandomCrop(config.data.size, padding=4))
    if config.data.augment == "crop_flip":
        steps.append(transforms.RandomHorizontalFlip())
    data = _Images(images, labels, transforms.Compose([*steps, transforms.ToTensor()]))
    return DataLoader(data, config.batch_size, shuffle=True, drop_last=True, num_workers=WORKERS)


def _plain(config: TrainConfig, seed: int, images: np.ndarray, labels: np.ndarray) -> nn.Module:
    """Train as tutorials do, with the same optimiser and schedule."""
    loader = _loader(config, images, labels)
    torch.manual_seed(seed)
    model = build_model_of(config)  # it normalises in its first layer
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, config.epochs * len(loader))
    for _ in range(config.epochs):
        model.train()
        for batch, truth in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), truth).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def training_rows(config: TrainConfig, target: str) -> Iterator[Row]:
    """Yield the seconds of whole trainings, ours and the plain one in turn, with their test accuracies."""
    device = torch.device("cpu")
    training, validation = load_split(config.data, device)
    nothing = validation.first(0)
    images, labels = load_arrays(config.data.name, "train", cache=project_path(config.data.cache))
    rest = balanced_order(labels)[config.data.validation :][: len(training)]
    test, _ = load_test(config.data, None, device)
    seconds, accuracies = np.empty((REPEATS, 2)), np.empty((REPEATS, 2))
    for repeat in range(REPEATS):
        for which in (0, 1) if repeat % 2 else (1, 0):
            config.seed = repeat
            began = time.perf_counter()
            if which == 0:
                model, _ = fit(config, training, nothing, device)
            else:
                model = _plain(config, repeat, images[rest], labels[rest])
            seconds[repeat, which] = time.perf_counter() - began
            with torch.no_grad():
                logits = torch.cat([model(test.pixels(part)) for part in torch.arange(len(test)).split(1000)])
            accuracies[repeat, which] = float((logits.argmax(dim=1) == test.labels).float().mean())
    steps = step_seconds(config, training)
    least = config.epochs * (len(training) // config.batch_size) * float(np.median(steps["as in training"]))
    (ours, plain), (ours_sd, plain_sd) = accuracies.mean(axis=0), accuracies.std(axis=0, ddof=1)
    medians = np.median(seconds, axis=0)
    yield Row(
        "training", f"{config.data.name}, {config.model.name}, {len(training)} images, {config.epochs} epochs", "ours",
        f"DataLoader with {WORKERS} workers", "s", float(medians[0]), float(medians[1]),
        *ratio_of_medians(seconds[:, 1], seconds[:, 0]), REPEATS, target, "cpu", torch.get_num_threads(),
        note=f"test accuracy {100 * ours:.2f} ± {100 * ours_sd:.2f} %, plain {100 * plain:.2f} ± {100 * plain_sd:.2f} %"
        f" (mean ± sd of {REPEATS} seeds); neither validates after an epoch",
        least=least, floor="as many steps of the model, forward, backward and the optimiser's, on one batch in memory",
        reason=f"At the floor the ratio would be {medians[1] / least:.3g}: {100 * least / medians[1]:.0f} % of the "
        "plain loop's time is arithmetic of the model, which both do; the rest is what a loop can save.",
    )  # fmt: skip
    yield from _tried_rows(config, training, steps, images[rest], labels[rest])


def step_seconds(config: TrainConfig, training: LabelledImages, repeats: int = STEPS) -> dict[str, np.ndarray]:
    """Time steps of the model on one batch in memory, as ``fit`` takes them and in what was tried instead.

    Returns:
        Seconds ``[repeats]`` by the name of what was done.
    """
    images = training.pixels(torch.arange(config.batch_size))
    labels = training.labels[: config.batch_size]

    def step_of(memory_format: torch.memory_format, precision: str, *, compiled: bool = False) -> Callable[[], None]:
        torch.manual_seed(0)
        model = build_model_of(config).to(memory_format=memory_format).train()  # type: ignore[call-overload]
        optimizer = build_optimizer(model, config.optim)
        forward = torch.compile(model) if compiled else model
        batch = images.contiguous(memory_format=memory_format)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with autocast(batch.device, precision):
                logits = forward(batch)
            F.cross_entropy(logits, labels).backward()
            optimizer.step()

        return step

    steps = {
        "as in training": step_of(torch.channels_last, "float32"),
        "channels first": step_of(torch.contiguous_format, "float32"),
        "bfloat16": step_of(torch.channels_last, "bfloat16"),
    }
    if shutil.which(os.environ.get("CXX", "g++")):
        steps["compiled"] = step_of(torch.channels_last, "float32", compiled=True)
    return dict(zip(steps, time_in_turn(list(steps.values()), repeats, warmup=3).T, strict=True))


def _tried_rows(
    config: TrainConfig,
    training: LabelledImages,
    steps: dict[str, np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
) -> Iterator[Row]:
    """Yield what the batches alone take, ours and the plain loop's, and what was tried to make a step cheaper."""

    def ours() -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in iterate_batches(
            training, config.batch_size, generator=generator, augment=config.data.augment, padding=config.data.padding
        ):
            pass

    def theirs() -> None:
        for _ in _loader(config, images, labels):
            pass

    seconds = time_in_turn([ours, theirs], REPEATS, warmup=0)
    medians = np.median(seconds, axis=0)
    where = f"{config.data.name}, {config.model.name}"
    yield Row(
        "training", f"{where}, the batches of an epoch and no model", "whole batches from memory",
        f"DataLoader with {WORKERS} workers", "s", float(medians[0]), float(medians[1]),
        *ratio_of_medians(seconds[:, 1], seconds[:, 0]), REPEATS, "", "cpu", torch.get_num_threads(), tried=True,
        note="images stay in memory as bytes; gathering, crop and flip work on a whole batch",
    )  # fmt: skip
    base = steps["as in training"]
    notes = {
        "channels first": "PyTorch's default order of memory",
        "bfloat16": "precision=bfloat16, which changes the results and is left to who asks for it",
        "compiled": "compile=true, the first step, which compiles, not counted; it rounds in another order",
    }
    for name in list(steps)[1:]:
        yield Row(
            "training", f"{where}, a step on a batch in memory", name, "as in training: float32, channels last", "ms",
            1e3 * float(np.median(steps[name])), 1e3 * float(np.median(base)), *ratio_of_medians(steps[name], base),
            len(base), "", "cpu", torch.get_num_threads(), tried=True, note=notes[name],
        )  # fmt: skip
