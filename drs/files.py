"""Files that are either whole or absent."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drs.errors import UserError

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
        UserError: If the system does not let the file be written: a full disk, a folder that is read-only.
    """
    path = Path(path)
    try:
        with _atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise unwritable(path, error, elsewhere) from error


def unwritable(path: Path, error: OSError, elsewhere: str = RESULTS_ELSEWHERE) -> UserError:
    """Return the error that says in one line why ``path`` cannot be written, and what to do about it."""
    cure = CURES.get(error.errno or 0)
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); {f'{cure}, or ' if cure else ''}{elsewhere}"
    )


@contextmanager
def _atomic_write(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
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


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
