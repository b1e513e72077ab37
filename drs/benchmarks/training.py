"""Our training loop beside the plain one: DataLoader, torchvision's transforms, float32, the same model and epochs."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from drs.allocator import keep_freed_memory
from drs.benchmarks.harness import Machine, Row, count_flops, ratio_of_medians, time_in_turn
from drs.checkpoints import build_model_of
from drs.config import PROJECT_ROOT, TrainConfig, project_path
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


def training_rows(config: TrainConfig, machine: Machine, target: str) -> Iterator[Row]:
    """Yield the seconds of whole trainings, ours and the plain one in turn, with their test accuracies."""
    device = torch.device("cpu")
    training, validation = load_split(config.data, device)
    images, labels = load_arrays(config.data.name, "train", cache=project_path(config.data.cache))
    rest = balanced_order(labels)[config.data.validation :][: len(training)]
    test, _ = load_test(config.data, None, device)
    seconds, accuracies = np.empty((REPEATS, 2)), np.empty((REPEATS, 2))
    for repeat in range(REPEATS):
        for which in (0, 1) if repeat % 2 else (1, 0):
            config.seed = repeat
            began = time.perf_counter()
            if which == 0:
                model, _ = fit(config, training, validation.first(0), device)
            else:
                model = _plain(config, repeat, images[rest], labels[rest])
            seconds[repeat, which] = time.perf_counter() - began
            with torch.no_grad():
                logits = torch.cat([model(test.pixels(part)) for part in torch.arange(len(test)).split(1000)])
            accuracies[repeat, which] = float((logits.argmax(dim=1) == test.labels).float().mean())
    steps = _steps(config, training)
    taken = time_in_turn(list(steps.values()), STEPS, warmup=3).T
    n_steps = config.epochs * (len(training) // config.batch_size)
    least = n_steps * count_flops(steps[CHOSEN]) / machine.gigaflops / 1e9
    own = n_steps * float(np.median(taken[0]))
    (ours, plain), (ours_sd, plain_sd) = accuracies.mean(axis=0), accuracies.std(axis=0, ddof=1)
    medians = np.median(seconds, axis=0)
    yield Row(
        "training", f"{config.data.name}, {config.model.name}, {len(training)} images, {config.epochs} epochs", "ours",
        f"DataLoader with {WORKERS} workers", "s", float(medians[0]), float(medians[1]),
        *ratio_of_medians(seconds[:, 1], seconds[:, 0]), REPEATS, target, "cpu", torch.get_num_threads(),
        note=f"test accuracy {100 * ours:.2f} ± {100 * ours_sd:.2f} %, plain {100 * plain:.2f} ± {100 * plain_sd:.2f} %"
        f" (mean ± sd of {REPEATS} seeds); neither validates after an epoch",
        least=least, floor="the convolutions and matrix products of all steps at the rate of large products",
        reason=f"As many steps on a batch in memory take {own:.3g} s, {own / least:.2g} times their products: this "
        "small a network is calls of PyTorch, pooling and convolutions of few channels, which both loops pay. With "
        f"nothing but those steps the ratio would be {medians[1] / own:.3g}.",
    )  # fmt: skip
    yield _batches_row(config, training, images[rest], labels[rest])
    yield from _step_rows(config, dict(zip(steps, taken, strict=True)))
    yield _memory_row(config)


CHOSEN = "as in training: float32, channels last"
NOTES = {
    "channels first": "PyTorch's default order of memory",
    "bfloat16": "precision=bfloat16, which changes the results and is left to who asks for it",
    "ReLU before pooling": "the usual order, which gives the same values and gradients",
    "optimiser not fused": "the optimiser's default, a pass over all parameters for each of its operations",
    "compiled": "compile=true, the first step, which compiles, not counted; it rounds in another order",
}


def _steps(config: TrainConfig, training: LabelledImages) -> dict[str, Callable[[], None]]:
    """Return steps of the model on one batch in memory, by name: as ``fit`` takes them, and what was tried instead."""
    images = training.pixels(torch.arange(config.batch_size))
    labels = training.labels[: config.batch_size]

    def step_of(
        memory_format: torch.memory_format = torch.channels_last, precision: str = "float32",
        *, change: Callable[[nn.Module], nn.Module] = lambda model: model, fused: bool = True,
    ) -> Callable[[], None]:  # fmt: skip
        torch.manual_seed(0)
        model = build_model_of(config).to(memory_format=memory_format).train()  # type: ignore[call-overload]
        optimizer = build_optimizer(model, config.optim)
        for group in optimizer.param_groups:
            group["fused"] = fused
        forward = change(model)
        batch = images.contiguous(memory_format=memory_format)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with autocast(batch.device, precision):
                logits = forward(batch)
            F.cross_entropy(logits, labels).backward()
            optimizer.step()

        return step

    steps = {
        CHOSEN: step_of(),
        "channels first": step_of(torch.contiguous_format),
        "bfloat16": step_of(precision="bfloat16"),
        "ReLU before pooling": step_of(change=_relu_first),
        "optimiser not fused": step_of(fused=False),
    }
    if shutil.which(os.environ.get("CXX", "g++")):
        steps["compiled"] = step_of(change=_compiled)
    return steps


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def _relu_first(model: nn.Module) -> nn.Module:
    """Swap each pooling with the ReLU after it, in place, and return the model."""
    for part in model.modules():
        if isinstance(part, nn.Sequential):
            for index, (one, other) in enumerate(pairwise(list(part))):
                if isinstance(one, nn.MaxPool2d) and isinstance(other, nn.ReLU):
                    part[index], part[index + 1] = other, one
    return model


def _batches_row(config: TrainConfig, training: LabelledImages, images: np.ndarray, labels: np.ndarray) -> Row:
    """Return what the batches alone take, ours and the plain loop's."""

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
    return Row(
        "training", f"{config.data.name}, {config.model.name}, the batches of an epoch and no model",
        "whole batches from memory", f"DataLoader with {WORKERS} workers", "s", float(medians[0]), float(medians[1]),
        *ratio_of_medians(seconds[:, 1], seconds[:, 0]), REPEATS, "", "cpu", torch.get_num_threads(), tried=True,
        note="images stay in memory as bytes; gathering, crop and flip work on a whole batch",
    )  # fmt: skip


def _step_rows(config: TrainConfig, seconds: dict[str, np.ndarray]) -> Iterator[Row]:
    """Yield what was tried to make a step cheaper, from the seconds ``[repeats]`` by name."""
    base = seconds.pop(CHOSEN)
    for name, values in seconds.items():
        yield Row(
            "training", f"{config.data.name}, {config.model.name}, a step on a batch in memory", name, CHOSEN, "ms",
            1e3 * float(np.median(values)), 1e3 * float(np.median(base)), *ratio_of_medians(values, base), len(base),
            "", "cpu", torch.get_num_threads(), tried=True, note=NOTES[name],
        )  # fmt: skip


def _memory_row(config: TrainConfig) -> Row:
    """Return what a step takes where the C library gives freed memory back to the kernel, in processes of their own."""
    seconds = np.empty((REPEATS, 2))
    for repeat in range(REPEATS):
        for which in (0, 1) if repeat % 2 else (1, 0):
            seconds[repeat, which] = _alone(config, keep=bool(which))
    medians = 1e3 * np.median(seconds, axis=0)
    return Row(
        "training", f"{config.data.name}, {config.model.name}, a step on a batch in memory, in a process of its own",
        "freed memory goes back", "freed memory is kept, as in training", "ms", float(medians[0]), float(medians[1]),
        *ratio_of_medians(seconds[:, 0], seconds[:, 1]), REPEATS, "", "cpu", torch.get_num_threads(), tried=True,
        note=f"glibc's own thresholds, under which large tensors are mapped anew; medians of {STEPS} steps each",
    )  # fmt: skip


def _alone(config: TrainConfig, *, keep: bool) -> float:
    """Return the median seconds of a step in a new process.

    Raises:
        RuntimeError: If it fails.
    """
    code = (
        "import pickle, sys\nsys.path.insert(0, sys.argv[2])\nfrom drs.benchmarks.training import print_step_seconds\n"
        "print_step_seconds(pickle.load(sys.stdin.buffer), keep=sys.argv[1] == 'True')"
    )
    command = [sys.executable, "-c", code, str(keep), str(PROJECT_ROOT)]
    done = subprocess.run(command, input=pickle.dumps(config), capture_output=True)
    if done.returncode:
        raise RuntimeError(f"a step in a process of its own ended with {done.returncode}: {done.stderr[-500:]!r}")
    return float(done.stdout.split()[-1])


def print_step_seconds(config: TrainConfig, *, keep: bool) -> None:
    """Print the median seconds of a training step; ``keep`` says whether freed memory is kept, as in training."""
    if keep:
        keep_freed_memory()
    training, _ = load_split(config.data, torch.device("cpu"))
    print(float(np.median(time_in_turn([_steps(config, training)[CHOSEN]], STEPS, warmup=5))))
