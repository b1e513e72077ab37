"""Files that are either whole or absent."""

import contextlib
import errno
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drs.errors import UnwritableError
from drs.processes import has_ended, process_place, read_process

CURES = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
}
"""What to do about a file that cannot be written; for other reasons, another folder."""
RESULTS_ELSEWHERE = "results_dir=FOLDER or DRS_RESULTS=FOLDER chooses another place"


@contextmanager
def atomic_write(path: str | Path, elsewhere: str = RESULTS_ELSEWHERE) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block ends without an exception.

    A reader sees the old file or the new one, never half of either. After an exception nothing is left behind.
    Missing parent folders are made.

    Args:
        path: The file.
        elsewhere: How the user chooses another folder, for the error.

    Raises:
        UnwritableError: If the system does not let the file be written: a full disk, a folder that is read-only.
    """
    path = Path(path)
    try:
        with _atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise unwritable(path, error, elsewhere) from error


def unwritable(path: Path, error: OSError, elsewhere: str = RESULTS_ELSEWHERE) -> UnwritableError:
    """Return the error that says in one line why ``path`` cannot be written, and what to do about it."""
    cure = CURES.get(error.errno or 0)
    return UnwritableError(
        f"{path}: cannot be written ({error.strerror or error}); {f'{cure}, or ' if cure else ''}{elsewhere}"
    )


@contextmanager
def _atomic_write(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name says whose it is, so that what a killed process leaves behind can be told from what is being written.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".{_writer(os.getpid())}.tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner can read; results are meant to be shared.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@functools.lru_cache(maxsize=4)
def _writer(pid: int) -> str:
    """Return what names a process in a temporary file: where it runs, its number and when it started."""
    found = read_process(pid)
    return f"{_place_digest()}-{pid}-{found[1] if found else ''}"


def _place_digest() -> str:
    return hashlib.sha256((process_place() or "").encode()).hexdigest()[:8]


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete what processes that have ended were writing in a folder; return what was deleted.

    Only processes of this machine, since it was started, can be known to have ended; files of others are left alone.
    """
    removed: list[Path] = []
    if process_place() is None or not folder.is_dir():
        return removed
    for path in folder.glob(".*.tmp"):
        place, _, process = path.name.split(".")[-2].partition("-")
        pid, _, started = process.partition("-")
        if place != _place_digest() or not pid.isdecimal() or not has_ended(int(pid), started):
            continue
        with contextlib.suppress(OSError):  # another has just deleted it, or the folder is read-only
            path.unlink()
            removed.append(path)
    return removed


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
