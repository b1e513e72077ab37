"""Our training loop beside the plain one: DataLoader, torchvision's transforms, float32, the same model and epochs."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from drs.benchmarks.harness import Row, ratio_of_medians
from drs.checkpoints import build_model_of
from drs.config import TrainConfig, project_path
from drs.data import balanced_order, load_arrays, load_split
from drs.filling import load_test
from drs.optimisation import build_optimizer, build_schedule
from drs.torchvision_compat import import_torchvision
from drs.training import fit

REPEATS = 3
WORKERS = 2


class _Images(Dataset[tuple[torch.Tensor, int]]):
    """Images as torchvision's own data sets give them: one PIL image at a time, through the transforms."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Any) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def _plain(config: TrainConfig, seed: int, images: np.ndarray, labels: np.ndarray) -> nn.Module:
    """Train as tutorials do, with the same optimiser and schedule."""
    transforms = import_torchvision().transforms
    steps: list[Any] = [transforms.ToPILImage()]
    if config.data.augment != "none":
        steps.append(transforms.RandomCrop(config.data.size, padding=4))
    if config.data.augment == "crop_flip":
        steps.append(transforms.RandomHorizontalFlip())
    data = _Images(images, labels, transforms.Compose([*steps, transforms.ToTensor()]))
    loader = DataLoader(data, config.batch_size, shuffle=True, drop_last=True, num_workers=WORKERS)
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
    images, labels = load_arrays(config.data.name, "train", cache=project_path(config.data.cache))
    rest = balanced_order(labels)[config.data.validation :][: len(training)]
    test, _ = load_test(config.data, None, device)
    seconds, accuracies = np.empty((REPEATS, 2)), np.empty((REPEATS, 2))
    for repeat in range(REPEATS):
        for which in (0, 1) if repeat % 2 else (1, 0):
            config.seed = repeat
            began = time.perf_counter()
            if which == 0:
                model, _ = fit(config, training, validation, device)
            else:
                model = _plain(config, repeat, images[rest], labels[rest])
            seconds[repeat, which] = time.perf_counter() - began
            with torch.no_grad():
                logits = torch.cat([model(test.pixels(part)) for part in torch.arange(len(test)).split(1000)])
            accuracies[repeat, which] = float((logits.argmax(dim=1) == test.labels).float().mean())
    (ours, plain), (ours_sd, plain_sd) = accuracies.mean(axis=0), accuracies.std(axis=0, ddof=1)
    medians = np.median(seconds, axis=0)
    yield Row(
        "training", f"{config.data.name}, {config.model.name}, {len(training)} images, {config.epochs} epochs", "ours",
        f"DataLoader with {WORKERS} workers", "s", float(medians[0]), float(medians[1]),
        *ratio_of_medians(seconds[:, 1], seconds[:, 0]), REPEATS, target, "cpu", torch.get_num_threads(),
        note=f"test accuracy {100 * ours:.2f} ± {100 * ours_sd:.2f} %, plain {100 * plain:.2f} ± {100 * plain_sd:.2f} %"
        f" (mean ± sd of {REPEATS} seeds); our time holds the validation after each epoch, the plain one has none",
    )  # fmt: skip
