"""Files of named arrays: whole or absent, checked by digest when they are read, and never pickled. Imports no torch."""

import hashlib
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from drs.errors import DamagedFileError
from drs.files import atomic_write

DIGEST = "sha256"
"""Name of the entry that holds the digest of all others."""


def arrays_digest(arrays: dict[str, np.ndarray]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of some arrays, as 64 hex digits; their order is nothing."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {arrays[name].shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays to a compressed ``.npz`` with their digest, whole or not at all; object arrays are refused."""
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"array {name!r} holds Python objects")
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays, **{DIGEST: np.array(arrays_digest(arrays))})  # type: ignore[arg-type]


def _announced_entries(path: Path) -> int:
    """Return how many entries the end of a zip file announces; zipfile does not compare, and a damaged length in the
    directory can hide what follows it."""
    with path.open("rb") as file:
        file.seek(-_END.size, io.SEEK_END)
        return int(_END.unpack(file.read())[4])


_END = struct.Struct("<4s4H2LH")
"""The end record of a zip file without a comment: signature, disks, entries, size and place of the directory."""


def load_arrays_file(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an ``.npz`` that ``save_arrays`` wrote.

    Files of before there were digests have the zip format's checksums alone, which are checked in any case.

    Raises:
        DamagedFileError: If it is missing or not what was written.
    """
    arrays = {}
    try:
        # Each entry is read to its end, where zipfile compares its checksum, before numpy looks at it: a header that
        # is damaged makes numpy fail in any of many ways, or ask for any amount of memory.
        with zipfile.ZipFile(path) as archive:
            if len(archive.namelist()) != _announced_entries(path):
                raise ValueError("its directory does not list every entry")
            for name in archive.namelist():
                content = io.BytesIO(archive.read(name))
                arrays[name.removesuffix(".npy")] = np.lib.format.read_array(content, allow_pickle=False)
        recorded = arrays.pop(DIGEST, None)
        if recorded is not None and str(recorded) != arrays_digest(arrays):
            raise ValueError(f"its arrays do not have the recorded SHA-256 {str(recorded)[:12]}...")
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, NotImplementedError, struct.error, OverflowError,
            MemoryError, zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedFileError(path, f"not a whole array file ({reason}); the evaluation computes it again") from None
    return arrays
