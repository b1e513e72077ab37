"""What tells a damaged file of a run from a whole one: its size and SHA-256, kept in ``status.json``. Imports no torch.

``status.json`` is written last and vouches for the other files of a finished run; its own ``checksum`` is over
everything else in it. Files and records of before there were checksums pass unchecked.
"""

from pathlib import Path
from typing import Any

from drs.config import fingerprint
from drs.errors import DamagedFileError
from drs.files import sha256_of

CONFIG, METRICS, CHECKPOINT = "config.yaml", "metrics.csv", "checkpoint.safetensors"
RETRAIN = "training again with the same config makes it anew"
SMALL_BYTES = 4 * 2**20
"""Up to this size a file is hashed wherever a run is skipped, some milliseconds; a larger one only when it is read."""


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a status file with its ``checksum``."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return {**rest, "checksum": fingerprint(rest, 64)}


def has_changed(content: dict[str, Any]) -> bool:
    """Return whether a status file does not have the checksum that it carries."""
    return "checksum" in content and with_checksum(content)["checksum"] != content["checksum"]


def describe_files(folder: Path, names: tuple[str, ...] = (CONFIG, METRICS, CHECKPOINT)) -> dict[str, dict[str, Any]]:
    """Return size in bytes and SHA-256 of some files of a folder, by name."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def check_files(
    folder: Path,
    recorded: dict[str, dict[str, Any]],
    names: tuple[str, ...] = (CONFIG, METRICS, CHECKPOINT),
    *,
    hash_up_to: int | None = None,
) -> None:
    """Check that files are still what was recorded of them by ``describe_files``.

    Args:
        folder: Where they are.
        recorded: Sizes and digests; a file that is not in it is not looked at.
        names: The files to check.
        hash_up_to: Compare only the size of files with more bytes than that; by default every byte counts.

    Raises:
        DamagedFileError: For the first that is missing or another.
    """
    for name in names:
        path, wanted = folder / name, recorded.get(name)
        if wanted is None:
            continue
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                raise DamagedFileError(path, f"has {size} bytes, but {wanted['bytes']} were written; {RETRAIN}")
            if hash_up_to is not None and size > hash_up_to:
                continue
            found = sha256_of(path)
        except OSError as error:
            raise DamagedFileError(path, f"cannot be read ({error.strerror}); {RETRAIN}") from None
        if found != wanted["sha256"]:
            raise DamagedFileError(path, f"its SHA-256 is {found[:12]}..., not the recorded one; {RETRAIN}")
