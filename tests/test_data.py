"""Splits, crops, flips and batches; the configs against the data they describe."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from real_data import data_cache, real_arrays, refused
from sklearn.datasets import load_digits
from torch import Tensor

from drs.config import PROJECT_ROOT
from drs.data import (
    DATASETS,
    LabelledImages,
    balanced_order,
    iterate_batches,
    load_arrays,
    load_test_split,
    load_training_split,
    random_crop,
    random_flip,
)

DIGITS_TEST_ORDER = [90, 254, 445, 461, 15, 489, 159, 468]
MNIST_TRAIN_ORDER = [3048, 19563, 40228, 56864, 845, 56085, 33623, 54592]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("cache"))
    load_arrays("digits", "train", cache=folder)
    return folder


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The configs


@pytest.mark.parametrize("name", DATASETS)
def test_config_describes_its_data_set(name: str) -> None:
    config = OmegaConf.load(PROJECT_ROOT / "configs" / "data" / f"{name}.yaml")
    spec = DATASETS[name]
    assert (config.name, config.num_classes, config.channels, config.size) == (
        spec.name, spec.num_classes, spec.channels, spec.size,
    )  # fmt: skip
    assert len(config.mean) == len(config.std) == spec.channels
    assert config.validation == (100 if name == "digits" else 5000)


@pytest.mark.parametrize("name", DATASETS)
def test_config_normalises_by_the_training_images(name: str) -> None:
    """The constants are the published ones, and the four digits that the verified training images give."""
    images = real_arrays(name, fetch=name in ("digits", "mnist"))["train"][0]
    config = OmegaConf.load(PROJECT_ROOT / "configs" / "data" / f"{name}.yaml")
    levels = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        counts = np.bincount((images if images.ndim == 3 else images[..., channel]).ravel(), minlength=256)
        exact_mean = (counts * levels).sum() / counts.sum()
        exact_std = np.sqrt((counts * (levels - exact_mean) ** 2).sum() / counts.sum())
        assert (mean, std) == (pytest.approx(exact_mean, abs=5.1e-5), pytest.approx(exact_std, abs=5.1e-5))


@pytest.mark.parametrize(
    ("name", "split", "labels"),
    [
        ("mnist", "train", [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]),
        ("mnist", "test", [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]),
        ("cifar10", "train", [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]),
        ("cifar10", "test", [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]),
    ],
)
def test_order_is_the_official_one(name: str, split: str, labels: list[int]) -> None:
    assert real_arrays(name, fetch=name == "mnist")[split][1][:10].tolist() == labels


def test_digits_lose_nothing(cache: str) -> None:
    """From both splits all of scikit-learn's images come back, level by level."""
    splits = [load_arrays("digits", split, cache=cache) for split in ("train", "test")]
    images, labels = (np.concatenate(parts) for parts in zip(*splits, strict=True))
    raw = load_digits()
    ours = {(np.rint(image / 255 * 16).astype(int).tobytes(), int(y)) for image, y in zip(images, labels, strict=True)}
    theirs = {(image.astype(int).tobytes(), int(y)) for image, y in zip(raw.images, raw.target, strict=True)}
    assert ours == theirs
    assert len(images) == len(raw.images)
    assert len(np.unique(images)) == 17


# Splits


def rows(data: LabelledImages) -> list[bytes]:
    return [
        image.numpy().tobytes() + bytes([int(label)]) for image, label in zip(data.images, data.labels, strict=True)
    ]


def test_validation_and_training_part_the_training_data(cache: str) -> None:
    images, labels = load_arrays("digits", "train", cache=cache)
    training, validation = load_training_split("digits", validation=100, cache=cache)
    whole = [image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True)]
    assert sorted(rows(training) + rows(validation)) == sorted(whole)
    assert torch.bincount(validation.labels).tolist() == [10] * 10
    assert (len(training), len(validation)) == (1197, 100)
    assert (training.images.shape[1:], training.images.dtype, training.labels.dtype) == (
        (1, 8, 8), torch.uint8, torch.int64,
    )  # fmt: skip


def test_fewer_training_samples_leave_the_validation_alone(cache: str) -> None:
    whole, validation = load_training_split("digits", validation=100, cache=cache)
    few, same = load_training_split("digits", validation=100, train_samples=200, cache=cache)
    assert rows(same) == rows(validation)
    assert rows(few) == rows(whole)[:200]
    assert torch.bincount(few.labels).tolist() == [20] * 10


def test_colour_becomes_channels_first() -> None:
    images = real_arrays("cifar10", fetch=False)["test"][0]
    data, indices = load_test_split("cifar10", n=20, cache=data_cache())
    assert data.images.shape == (20, 3, 32, 32)
    np.testing.assert_array_equal(data.images[7].permute(1, 2, 0).numpy(), images[indices[7]])


def test_test_splits_are_nested_and_balanced(cache: str) -> None:
    images, labels = load_arrays("digits", "test", cache=cache)
    small, few = load_test_split("digits", n=50, cache=cache)
    large, many = load_test_split("digits", n=200, cache=cache)
    everything, order = load_test_split("digits", cache=cache)
    assert few.tolist() == many.tolist()[:50] == order.tolist()[:50]
    assert sorted(order.tolist()) == list(range(500))
    assert torch.bincount(small.labels).tolist() == [5] * 10
    assert torch.bincount(large.labels).tolist() == [20] * 10
    np.testing.assert_array_equal(everything.images[:, 0].numpy(), images[order])
    np.testing.assert_array_equal(everything.labels.numpy(), labels[order])


def test_splits_do_not_drift(cache: str) -> None:
    """Published numbers depend on which samples are held out and attacked: the order is pinned."""
    assert load_test_split("digits", n=8, cache=cache)[1].tolist() == DIGITS_TEST_ORDER
    labels = real_arrays("mnist", fetch=True)["train"][1]
    assert balanced_order(labels)[:8].tolist() == MNIST_TRAIN_ORDER


def test_balanced_order_takes_classes_as_they_come() -> None:
    labels = np.array([0] * 90 + [1] * 7 + [2] * 3)
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(100))
    for n in range(1, 101):
        counts = np.bincount(labels[order[:n]], minlength=3)
        left = counts < [90, 7, 3]
        assert counts.max() - counts[left].min(initial=counts.max()) <= 1


def test_sizes_out_of_range_are_refused(cache: str) -> None:
    def training(**sizes: int) -> None:
        load_training_split("digits", cache=cache, **sizes)  # type: ignore[arg-type]

    refused(lambda: training(validation=1297), "data.validation=1297: must be between 0 and 1296")
    refused(lambda: training(validation=-1), "data.validation=-1")
    refused(lambda: training(validation=97, train_samples=1201), "data.train_samples=1201", "between 1 and 1200")
    refused(lambda: training(validation=97, train_samples=0), "data.train_samples=0")
    refused(lambda: load_test_split("digits", n=501, cache=cache), "501 test samples of digits", "there are 500")
    refused(lambda: load_test_split("digits", n=0, cache=cache), "0 test samples")
    refused(lambda: load_arrays("digits", "val", cache=cache), "split=val: must be one of train, test")
    refused(lambda: load_arrays("imagenet", "train", cache=cache), "data.name=imagenet: unknown", "cifar100")


# Augmentation


def numbered(batch: int, channels: int = 3, size: int = 5) -> Tensor:
    """Images whose every pixel is another number above 0."""
    return torch.arange(1, 1 + batch * channels * size * size).view(batch, channels, size, size)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_each_crop_is_one_of_the_shifts(dtype: torch.dtype) -> None:
    image = numbered(1).to(dtype)
    padded = torch.nn.functional.pad(image[0], (2, 2, 2, 2))
    shifts = [padded[:, top : top + 5, left : left + 5] for top in range(5) for left in range(5)]
    crops = random_crop(image.expand(2000, -1, -1, -1), 2, seeded())
    assert (crops.shape, crops.dtype) == ((2000, 3, 5, 5), dtype)
    counts = [int((crops == shift).flatten(1).all(1).sum()) for shift in shifts]
    assert sum(counts) == 2000
    # Each of the 25 is drawn 80 times on average, with a standard deviation below 9.
    assert min(counts) > 45 and max(counts) < 115


def test_crop_moves_rows_and_columns_of_oblong_images() -> None:
    images = torch.arange(1, 1 + 64 * 3 * 7).view(64, 1, 3, 7)
    for image, crop in zip(images, random_crop(images, 1, seeded()), strict=True):
        padded = torch.nn.functional.pad(image[0], (1, 1, 1, 1))
        assert any(torch.equal(crop[0], padded[t : t + 3, u : u + 7]) for t in range(3) for u in range(3))


def test_flip_mirrors_half_of_the_images_left_to_right() -> None:
    images = numbered(2000, channels=1, size=3)
    flipped = random_flip(images, seeded())
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images[..., [2, 1, 0]]).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 900 < int(mirrored.sum()) < 1100


@pytest.mark.parametrize("augment", [lambda x, g: random_crop(x, 2, g), random_flip])
def test_draws_follow_the_generator_alone(augment: object) -> None:
    assert callable(augment)
    images = numbered(32)
    torch.manual_seed(1)
    once = augment(images, seeded(0))
    torch.manual_seed(2)
    assert torch.equal(once, augment(images, seeded(0)))
    assert not torch.equal(once, augment(images, seeded(1)))
    assert torch.equal(images, numbered(32)), "the images given were changed"


# Batches


def tiny(n: int = 10) -> LabelledImages:
    return LabelledImages(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4), torch.arange(n))


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [4, 4]), (False, [4, 4, 2])])
def test_batches_hold_each_sample_once(drop_last: bool, sizes: list[int]) -> None:
    batches = list(iterate_batches(tiny(), 4, generator=seeded(), drop_last=drop_last))
    assert [len(labels) for _, labels in batches] == sizes
    labels = torch.cat([labels for _, labels in batches])
    assert len(set(labels.tolist())) == sum(sizes)
    assert labels.tolist() != sorted(labels.tolist())
    for pixels, labels in batches:
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels, (labels / 255.0)[:, None, None, None].expand(-1, 1, 4, 4))


def test_batches_augment_as_they_are_told(cache: str) -> None:
    data = load_training_split("digits", validation=0, cache=cache)[0]

    def one(augment: str, seed: int = 0) -> Tensor:
        return next(iterate_batches(data, 64, generator=seeded(seed), augment=augment, padding=2))[0]

    plain, cropped, both = one("none"), one("crop"), one("crop_flip")
    assert plain.min() == 0 and plain.max() == 1
    generator = seeded()
    torch.randperm(len(data), generator=generator)
    expected = random_crop((plain * 255).round().byte(), 2, generator)
    assert torch.equal(cropped, expected.float() / 255)
    assert torch.equal(both, random_flip(expected, generator).float() / 255)
    assert torch.equal(both, one("crop_flip"))
    assert not torch.equal(both, one("crop_flip", seed=1))


def test_batches_that_cannot_be_are_refused() -> None:
    refused(lambda: next(iterate_batches(tiny(), 11, generator=seeded())), "batch_size=11", "at most the 10 samples")
    refused(
        lambda: next(iterate_batches(tiny(), 2, generator=seeded(), augment="flip")), "data.augment=flip", "crop_flip"
    )


def test_pixels_are_float_in_the_unit_interval() -> None:
    data = LabelledImages(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([2, 1, 0]))
    assert len(data) == 3
    assert data.pixels().flatten().tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert data.pixels(torch.tensor([2, 1])).flatten().tolist() == pytest.approx([1.0, 0.2])
    assert data.images.flatten().tolist() == [0, 51, 255]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_batches_on_a_gpu_equal_those_on_the_cpu(cache: str) -> None:
    def first(device: str) -> tuple[Tensor, Tensor]:
        data = load_training_split("digits", validation=0, cache=cache, device=device)[0]
        return next(iterate_batches(data, 64, generator=seeded(), augment="crop_flip", padding=2))

    for one, other in zip(first("cuda"), first("cpu"), strict=True):
        assert one.device.type == "cuda"
        assert torch.equal(one.cpu(), other)
