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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drs.array_files import load_arrays_file
from drs.claiming import ClaimedElsewhere, claim
from drs.config import run_id
from drs.config_checks import check_study
from drs.errors import DamagedFileError, UserError
from drs.files import sha256_of
from drs.integrity import CHECKPOINT, CONFIG, METRICS, check_files
from drs.jobs import CLAIM_FILE
from drs.runs import RunFolder

HEAD = "results.json"
_MEMBER = re.compile(
    r"runs/[0-9a-f]{12}/(config\.yaml|status\.json|metrics\.csv|checkpoint\.safetensors|eval/\w[\w@.+-]*\.npz)",
    re.ASCII,
)
_STATUS = "status.json"
_NEEDED = (CONFIG, _STATUS, METRICS, CHECKPOINT)


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

    A run that is new here, or that was started here but not finished or is damaged, is moved into place, its status
    last; one that a process is at work on is refused. Of a run that is finished on both sides the evaluations that are
    missing here are added, if both have the same weights.

    Raises:
        UserError: If the archive is damaged or holds what no archive of results holds. Nothing is changed then.
    """
    with _opened(archive) as file, ExitStack() as stack:
        about = _head(file, archive)
        study = results / about["study"]
        study.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(study)
        stack.callback(_remove_if_empty, study)
        prefix = f".merge-{socket.gethostname()}-{os.getpid()}-"
        with tempfile.TemporaryDirectory(dir=study, prefix=prefix, suffix=".tmp") as folder:
            stage = Path(folder)
            _extract(file, about["files"], archive, stage)
            merged = Merged(study, str(about.get("host")))
            for path in sorted((stage / "runs").iterdir()) if (stage / "runs").is_dir() else []:
                _merge_run(RunFolder(path), RunFolder(study / "runs" / path.name), merged)
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
            output.flush()
            os.fsync(output.fileno())
        if sha256_of(target) != digests[member.name]:
            raise UserError(f"{archive}: {member.name} does not have its SHA-256; copy the archive again")
    if missing:
        raise UserError(f"{archive}: lacks {min(missing)}; copy it again; nothing was merged")


def _merge_run(theirs: RunFolder, ours: RunFolder, merged: Merged) -> None:
    reason = _why_not(theirs)
    if reason:
        merged.refused[theirs.run_id] = reason
        return
    try:
        with claim(ours.path / CLAIM_FILE, f"run {ours.run_id}"):
            state = _state(ours)
            if state in ("done", "diverged"):
                merged.kept.append(ours.run_id)
                if state == "done":
                    _add_cells(theirs, ours, merged)
            else:
                _take(theirs, ours)
                (merged.replaced if state else merged.added).append(ours.run_id)
    except ClaimedElsewhere as error:
        merged.refused[ours.run_id] = str(error)


def _state(run: RunFolder) -> str | None:
    """Return done or diverged for a run that is settled and whole, another word for one that is not, None for none."""
    try:
        status = run.status()
        check_files(run.path, status.get("files", {}))
    except DamagedFileError:
        return "damaged"
    return "diverged" if status.get("reason") == "diverged" else status.get("state")


def _take(theirs: RunFolder, ours: RunFolder) -> None:
    """Move a run's files into a folder that is claimed; its status, which says that all are there, comes last."""
    for path in ours.path.iterdir():
        if path.name.startswith(CLAIM_FILE) or path.name == _STATUS:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in sorted(theirs.path.iterdir(), key=lambda path: path.name == _STATUS):
        path.rename(ours.path / path.name)


def _why_not(run: RunFolder) -> str | None:
    """Return why a run of an archive cannot be merged, None where it can."""
    try:
        status, config = run.status(), run.config()
        check_files(run.path, status.get("files", {}))
    except UserError as error:
        return str(error).replace(f"{run.path}/", "")
    if status.get("state") != "done" and status.get("reason") != "diverged":
        return f"not finished there: {status.get('state')}"
    if run_id(config) != run.run_id:
        return f"its config belongs to run {run_id(config)}"
    needed = _NEEDED if status.get("state") == "done" else _NEEDED[:2]
    lacking = [name for name in needed if not (run.path / name).exists()]
    return f"lacks {lacking[0]}" if lacking else None


def _add_cells(theirs: RunFolder, ours: RunFolder, merged: Merged) -> None:
    """Add the evaluations that we lack of a run that is done on both sides."""
    found = [
        path for path in sorted((theirs.path / "eval").glob("*.npz")) if not (ours.path / "eval" / path.name).exists()
    ]
    if not found:
        return
    if not (ours.path / CHECKPOINT).exists() or sha256_of(theirs.path / CHECKPOINT) != sha256_of(
        ours.path / CHECKPOINT
    ):
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


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something
        folder.rmdir()


def _remove_leftovers(study: Path) -> None:
    """Remove what a merge left that was killed on this machine."""
    for path in study.glob(f".merge-{socket.gethostname()}-*.tmp"):
        pid = path.name.removeprefix(f".merge-{socket.gethostname()}-").partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
