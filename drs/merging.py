"""Bring the results of another machine home: an archive of ``scripts/node.py`` into ``results/<study>``.

A run that is finished here stays as it is, byte for byte. Nothing of an archive is believed: only regular files with
names that a run has are taken, their digests are checked, and a run's config must be the one that its id names.
"""

import json
import os
import re
import shutil
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drs.array_files import load_arrays_file
from drs.config import run_id
from drs.config_checks import check_study
from drs.errors import UserError
from drs.files import sha256_of
from drs.runs import RunFolder

HEAD = "results.json"
_MEMBER = re.compile(
    r"runs/[0-9a-f]{12}/([\w-]+\.(json|yaml|csv|log)|checkpoint\.safetensors|eval/[\w@.+-]+\.(npz|json))", re.ASCII
)
_NEEDED = ("config.yaml", "status.json", "metrics.csv", "checkpoint.safetensors")
_DIVERGED = ("config.yaml", "status.json")


@dataclass
class Merged:
    """What became of an archive's runs: ids of runs, the number of cells added, and run id -> why it was refused."""

    study: Path
    host: str
    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    cells: int = 0


def merge_results(archive: Path, results: Path) -> Merged:
    """Merge an archive of finished runs into its study under ``results``.

    A run that is new here, or that was started here but not finished, is moved into place whole. Of a run that is
    finished on both sides the evaluations that are missing here are added, if both have the same weights.

    Raises:
        UserError: If the archive is damaged or holds what no archive of results holds. Nothing is changed then.
    """
    with _opened(archive) as file:
        about = _head(file, archive)
        study = results / about["study"]
        study.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(study)
        prefix = f".merge-{socket.gethostname()}-{os.getpid()}-"
        with tempfile.TemporaryDirectory(dir=study, prefix=prefix, suffix=".tmp") as folder:
            stage = Path(folder)
            _extract(file, about["files"], archive, stage)
            merged = Merged(study, str(about.get("host")))
            for path in sorted((stage / "runs").iterdir()) if (stage / "runs").is_dir() else []:
                _merge_run(RunFolder(path), RunFolder(study / "runs" / path.name), stage, merged)
    return merged


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive, "r:gz") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: there is no such file") from None
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: not a whole archive ({error}); copy it again; nothing was merged") from None
    except OSError as error:
        raise UserError(f"{error.filename or archive}: {error.strerror or error}; nothing was merged") from None


def _head(file: tarfile.TarFile, archive: Path) -> dict[str, Any]:
    member = file.next()
    source = file.extractfile(member) if member is not None and member.name == HEAD and member.isfile() else None
    if source is None:
        raise UserError(f"{archive}: does not begin with {HEAD}, as an archive that run.py packs does")
    try:
        about = json.loads(source.read(2**26))
    except ValueError as error:
        raise UserError(f"{archive}: its {HEAD} is not JSON ({error}); nothing was merged") from None
    if (
        not isinstance(about, dict)
        or about.get("format") != 1
        or not isinstance(about.get("study"), str)
        or not isinstance(about.get("files"), dict)
    ):
        raise UserError(f"{archive}: its {HEAD} is of a kind that this version does not know; nothing was merged")
    check_study(about["study"])
    return about


def _extract(file: tarfile.TarFile, digests: dict[str, str], archive: Path, stage: Path) -> None:
    """Write the archive's files under ``stage``, each checked; ``UserError`` for anything unexpected."""
    missing = set(digests)
    for member in file:
        if member.name == HEAD:
            continue
        if not member.isreg() or not _MEMBER.fullmatch(member.name) or member.name not in missing:
            raise UserError(f"{archive}: holds {member.name!r}, which is no file of a run; nothing was merged")
        missing.discard(member.name)
        source = file.extractfile(member)
        assert source is not None
        target = stage / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as output:
            shutil.copyfileobj(source, output, 2**20)
        if sha256_of(target) != digests[member.name]:
            raise UserError(f"{archive}: {member.name} does not have its SHA-256; copy the archive again")
    if missing:
        raise UserError(f"{archive}: lacks {min(missing)}; copy it again; nothing was merged")


def _merge_run(theirs: RunFolder, ours: RunFolder, stage: Path, merged: Merged) -> None:
    reason = _why_not(theirs)
    if reason:
        merged.refused[theirs.run_id] = reason
        return
    try:
        state = ours.status()
    except UserError:
        state = {}  # a status that cannot be read belongs to no finished run
    if state.get("state") == "done" or state.get("reason") == "diverged":
        merged.kept.append(ours.run_id)
        if state.get("state") == "done":
            _add_cells(theirs, ours, merged)
        return
    if ours.path.exists():
        # Moved away whole, then the other one moved in whole: whoever looks sees one of them, or for an instant none.
        ours.path.rename(stage / f"old-{ours.run_id}")
        merged.replaced.append(ours.run_id)
    else:
        ours.path.parent.mkdir(exist_ok=True)
        merged.added.append(ours.run_id)
    theirs.path.rename(ours.path)


def _why_not(run: RunFolder) -> str | None:
    """Return why a run of an archive cannot be merged, None where it can."""
    try:
        status, config = run.status(), run.config()
    except UserError as error:
        return str(error)
    if status.get("state") != "done" and status.get("reason") != "diverged":
        return f"not finished there: {status.get('state')}"
    if run_id(config) != run.run_id:
        return f"its config belongs to run {run_id(config)}"
    needed = _NEEDED if status.get("state") == "done" else _DIVERGED
    lacking = [name for name in needed if not (run.path / name).exists()]
    return f"lacks {lacking[0]}" if lacking else None


def _add_cells(theirs: RunFolder, ours: RunFolder, merged: Merged) -> None:
    """Add the evaluations that we lack of a run that is done on both sides."""
    name = "checkpoint.safetensors"
    found = [
        path for path in sorted((theirs.path / "eval").glob("*.npz")) if not (ours.path / "eval" / path.name).exists()
    ]
    if not found:
        return
    if not (ours.path / name).exists() or sha256_of(theirs.path / name) != sha256_of(ours.path / name):
        merged.refused[ours.run_id] = f"trained on both machines to other weights; {len(found)} evaluations left out"
        return
    for path in found:
        try:
            load_arrays_file(path)
        except UserError as error:
            merged.refused[ours.run_id] = f"{path.name}: {error}"
            continue
        (ours.path / "eval").mkdir(exist_ok=True)
        path.rename(ours.path / "eval" / path.name)
        merged.cells += 1


def _remove_leftovers(study: Path) -> None:
    """Remove what a merge left that was killed on this machine."""
    for path in study.glob(f".merge-{socket.gethostname()}-*.tmp"):
        pid = path.name.removeprefix(f".merge-{socket.gethostname()}-").partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
