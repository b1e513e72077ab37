"""What the tests of data share: real arrays from the cache, made-up ones, and a look at one-line errors."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drs.config import project_path
from drs.data import load_arrays
from drs.data_cache import SPLITS, Arrays, DatasetSpec, cache_path
from drs.data_sources import NoSourceError
from drs.errors import UserError

TOY_GREY = DatasetSpec("toy", 10, 1, 28, 12, 6, {}, "MNIST")
TOY_COLOUR = DatasetSpec("toy", 10, 3, 32, 10, 2, {}, "CIFAR10")


def data_cache() -> Path:
    """Return the cache folder of this project."""
    return project_path(os.environ.get("DRS_CACHE", "data"))


def real_arrays(name: str, *, fetch: bool) -> dict[str, Arrays]:
    """Return a data set's arrays from the project's cache; fetch them if allowed, or skip the test with the reason."""
    cache = data_cache()
    if not fetch and not all(cache_path(cache, name, split).exists() for split in SPLITS):
        pytest.skip(f"{name} is not in the cache {cache}; python scripts/fetch_data.py {name} brings it")
    try:
        return {split: load_arrays(name, split, cache=cache) for split in SPLITS}
    except NoSourceError as error:
        pytest.skip(str(error))


def toy_arrays(spec: DatasetSpec) -> dict[str, Arrays]:
    generator = np.random.default_rng(0)
    result = {}
    for split in ("train", "test"):
        shape = spec.shape(split)
        images, labels = generator.integers(256, size=shape, dtype=np.uint8), np.arange(shape[0], dtype=np.uint8) % 10
        result[split] = (images, labels)
    return result


def assert_same(found: dict[str, Arrays], expected: dict[str, Arrays]) -> None:
    assert found.keys() == expected.keys()
    for split, arrays in expected.items():
        for one, other in zip(found[split], arrays, strict=True):
            np.testing.assert_array_equal(one, other)


def refused(action: Callable[[], object], *parts: str) -> str:
    """Return the message of the ``UserError`` that ``action`` raises: one line that holds every part."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    return message


class Touch:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")
