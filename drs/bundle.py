"""Pack code, data and wheels for a machine without a network; ``scripts/node.py`` unpacks and runs them there.

A bundle is a folder of pieces under 40 MB with a ``manifest.json`` that gives the SHA-256 of each, and ``run.py``,
which needs Python alone. Packages that such a machine brings itself, torch first of all, are left out.
"""

import gzip
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, BinaryIO

from drs.config import PROJECT_ROOT
from drs.data import SPLITS, dataset, fetch_all
from drs.data_cache import cache_path
from drs.errors import UserError

FORMAT = 1
PIECE_BYTES = 39_000_000
EXCLUDE = ("torch", "torchvision")
PYTHONS = ("3.11", "3.12")
_OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
"""glibc's minor version -> what its platform tag was called before PEP 600."""


@dataclass(frozen=True)
class Target:
    """The machine that a bundle is for.

    Attributes:
        python: Its Python, such as 3.12.
        platform: Its platform tag, such as manylinux_2_28_x86_64: glibc 2.28 or later on x86_64.
        exclude: Packages that it brings itself.
    """

    python: str
    platform: str
    exclude: tuple[str, ...] = EXCLUDE


def check_target(target: Target) -> None:
    """Raise ``UserError`` for a Python that the project does not run on or a platform that is no manylinux tag."""
    if target.python not in PYTHONS:
        raise UserError(f"PYTHON={target.python}: must be {' or '.join(PYTHONS)}, the node's Python")
    platform_tags(target.platform)
    pins = locked_pins()
    for name in target.exclude:
        if normalised(name) not in pins:
            raise UserError(f"EXCLUDE={name}: not in requirements.lock, so nothing of it would be packed anyway")


def this_platform() -> str:
    """Return the platform tag of this machine: what its glibc and its processor are."""
    library, version = platform.libc_ver()
    if library != "glibc":
        raise UserError(
            "PLATFORM is needed, such as PLATFORM=manylinux_2_28_x86_64: this machine has no glibc to go by"
        )
    return f"manylinux_{version.replace('.', '_')}_{platform.machine()}"


def platform_tags(tag: str) -> list[str]:
    """Return the tags of all wheels that run on a platform: its own glibc and every older one, newest first.

    Raises:
        UserError: For a tag that is not of the form manylinux_2_28_x86_64.
    """
    match = re.fullmatch(r"manylinux_2_(\d+)_(x86_64|aarch64)", tag)
    if match is None:
        raise UserError(f"PLATFORM={tag}: must be manylinux_2_N_x86_64 or manylinux_2_N_aarch64, glibc 2.N of the node")
    newest, machine = int(match[1]), match[2]
    tags = []
    for minor in range(newest, 4, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        if minor in _OLD_NAMES:
            tags.append(f"{_OLD_NAMES[minor]}_{machine}")
    return tags


def normalised(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked_pins() -> dict[str, str]:
    """Return normalised name -> exact version of every package in requirements.lock."""
    lines = (PROJECT_ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normalised(name): version for name, version in pins}


def needed_packages(exclude: Iterable[str]) -> dict[str, str]:
    """Return the pins of what training and evaluation import, without ``exclude`` and what only those need.

    What a package needs is read from the metadata of this environment, which ``make setup`` holds to the lock.

    Raises:
        UserError: If a package of the lock is not installed here.
    """
    pins, left_out = locked_pins(), {normalised(name) for name in exclude}
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    waiting, found = list(project["dependencies"]), set()
    while waiting:
        text = waiting.pop()
        match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", text)
        assert match is not None, text
        name = normalised(match[0])
        # Of a marker only the extras matter here: the lock holds what the others leave.
        if name in found or name in left_out or name not in pins or re.search(r"\bextra\s*==", text):
            continue
        found.add(name)
        try:
            waiting += requires(name) or []
        except PackageNotFoundError:
            raise UserError(f"{name} is in requirements.lock but not installed here; make setup installs it") from None
    return {name: pins[name] for name in sorted(found)}


def collect_wheels(pins: dict[str, str], target: Target, folder: Path) -> None:
    """Fetch a wheel of every pin for the target, and build one where only the sources of pure Python are published.

    Raises:
        UserError: If a package has no wheel for the target and cannot be built for it, or the index cannot be reached.
    """
    folder.mkdir(parents=True)
    options = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", target.python]
    for tag in platform_tags(target.platform):
        options += ["--platform", tag]
    published, sources = dict(pins), {}
    while published:
        listed = [f"{name}=={version}" for name, version in published.items()]
        done = _pip("download", *options, "--dest", str(folder), *listed)
        missing = re.search(r"No matching distribution found for ([A-Za-z0-9._-]+)==", done.stderr)
        if done.returncode == 0:
            break
        if missing is None or normalised(missing[1]) not in published:
            raise UserError(f"pip download: {_last_line(done.stderr)}")
        name = normalised(missing[1])
        sources[name] = published.pop(name)
    for name, version in sources.items():
        before = set(folder.iterdir())
        done = _pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), f"{name}=={version}")
        if done.returncode != 0:
            where = f"Python {target.python} and {target.platform}"
            raise UserError(f"{name}=={version}: no wheel for {where}, and pip wheel says: {_last_line(done.stderr)}")
        for wheel in set(folder.iterdir()) - before:
            if not wheel.name.endswith("-none-any.whl"):
                raise UserError(f"{name}=={version}: no wheel for {target.platform}, and it can only be built there")


def _pip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pip", arguments[0], "-q", "--disable-pip-version-check", "--no-deps"]
    return subprocess.run([*command, *arguments[1:]], capture_output=True, text=True)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("ERROR")] or text.splitlines() or ["no reason"]
    return lines[-1].removeprefix("ERROR: ")


def collect_data(names: Iterable[str], cache: Path, folder: Path) -> None:
    """Put the verified cache files of data sets into ``folder``, packed, fetching what the cache lacks.

    Raises:
        UserError: For an unknown set, a damaged file, or data that no source has.
    """
    chosen = list(names)
    for name in chosen:
        dataset(name)
    for error in fetch_all(chosen, None, cache).values():
        raise error
    folder.mkdir(parents=True)
    for name in chosen:
        for split in SPLITS:
            source = cache_path(cache, name, split)
            # No date and no name in the header: the same data makes the same bytes.
            with (
                source.open("rb") as file,
                (folder / f"{source.name}.gz").open("wb") as raw,
                gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
            ):
                shutil.copyfileobj(file, packed, 2**20)


def collect_code(path: Path) -> dict[str, Any]:
    """Write the files of the last commit as a tar file; return the commit, and whether there were changes beside it.

    Raises:
        UserError: Outside a git checkout.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        _git("archive", "--format=tar", "-o", str(path), "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise UserError(f"{PROJECT_ROOT}: a bundle holds the last commit, but git says: {reason.strip()}") from None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout.strip()


def split_file(source: Path, folder: Path, limit: int = PIECE_BYTES) -> list[dict[str, Any]]:
    """Copy a file into pieces of at most ``limit`` bytes; return name, size and SHA-256 of each, in order."""
    pieces: list[dict[str, Any]] = []
    several = source.stat().st_size > limit
    with source.open("rb") as file:
        while True:
            name = f"{source.name}.{len(pieces):03d}" if several else source.name
            size, digest = _copy_some(file, folder / name, limit)
            if size == 0 and pieces:
                (folder / name).unlink()
                return pieces
            pieces.append({"name": name, "size": size, "sha256": digest})
            if not several:
                return pieces


def _copy_some(file: BinaryIO, path: Path, limit: int) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as piece:
        while size < limit and (chunk := file.read(min(2**20, limit - size))):
            piece.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def make_bundle(target: Target, data: Iterable[str], cache: Path, output: Path) -> dict[str, Any]:
    """Make a bundle in ``output``, replacing what is there once the new one is whole; return its manifest.

    Raises:
        UserError: For a target, a package or data that cannot be packed. ``output`` is left as it was.
    """
    check_target(target)
    names = list(data)
    if (output.exists() and not output.is_dir()) or (
        output.is_dir() and any(output.iterdir()) and not (output / "manifest.json").exists()
    ):
        raise UserError(f"{output}: holds something else than a bundle; name another place with --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp") as work:
        parts, pieces = Path(work) / "parts", Path(work) / "pieces"
        pieces.mkdir()
        packages = needed_packages(target.exclude)
        print(f"{len(packages)} packages for Python {target.python} and {target.platform}", flush=True)
        collect_wheels(packages, target, parts / "wheels")
        print(f"data: {', '.join(names) or 'none'}", flush=True)
        collect_data(names, cache, parts / "data")
        code = collect_code(parts / "code.tar")
        files = {
            str(path.relative_to(parts)): split_file(path, pieces)
            for path in sorted(parts.rglob("*"))
            if path.is_file()
        }
        pins = locked_pins()
        manifest: dict[str, Any] = {
            "format": FORMAT,
            **asdict(target),
            **code,
            "data": names,
            "packages": packages,
            "brought": {normalised(name): pins[normalised(name)] for name in target.exclude},
            "files": files,
        }
        (pieces / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.copyfile(PROJECT_ROOT / "scripts" / "node.py", pieces / "run.py")
        if output.exists():
            output.rename(Path(work) / "old")
        pieces.rename(output)
    return manifest
