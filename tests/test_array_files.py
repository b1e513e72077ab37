"""Files of arrays: no flipped bit and no cut passes, older files without a digest are read, nothing is unpickled."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from real_data import Touch

from drs.array_files import load_arrays_file, save_arrays
from drs.errors import DamagedFileError

ARRAYS = {
    "indices": np.arange(7, dtype=np.int32),
    "logits": np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32),
    "attacked": np.array([True, False] * 3 + [True]),
    "about": np.array('{"attack": "pgd", "seconds": 0.25}'),
    "nothing": np.zeros((0, 3)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_arrays(tmp_path / "cell.npz", **ARRAYS)
    return tmp_path / "cell.npz"


def assert_whole(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_arrays_come_back_as_they_were(path: Path) -> None:
    assert_whole(load_arrays_file(path))


def test_every_flipped_bit_is_refused_or_harmless(path: Path) -> None:
    content = bytearray(path.read_bytes())
    refusals = 0
    for position in range(len(content)):
        # A bit of each byte; the lowest ones of the directory's lengths are what can hide entries.
        for bit in {position % 8, 5} if position > len(content) - 400 else {position % 8}:
            content[position] ^= 1 << bit
            path.write_bytes(content)
            content[position] ^= 1 << bit
            try:
                found = load_arrays_file(path)
            except DamagedFileError as error:
                assert str(error).startswith(f"{path}: not a whole array file") and "\n" not in str(error)
                refusals += 1
            else:
                # Some bits of a zip file mean nothing here, such as those of times; then the content must be whole.
                assert_whole(found)
    assert refusals > 0.8 * len(content)


def test_no_cut_passes(path: Path) -> None:
    content = path.read_bytes()
    for kept in range(0, len(content), 5):
        path.write_bytes(content[:kept])
        with pytest.raises(DamagedFileError, match="not a whole array file"):
            load_arrays_file(path)
    path.unlink()
    with pytest.raises(DamagedFileError, match="No such file"):
        load_arrays_file(path)


def test_content_that_is_whole_but_other_than_recorded_is_refused(path: Path) -> None:
    """What zip's own checksums cannot see: an entry written anew, swapped or left out."""
    digest = np.load(path)["sha256"]
    for changed in (
        {**ARRAYS, "logits": ARRAYS["logits"] * 2},
        {**ARRAYS, "logits": ARRAYS["logits"].reshape(3, 7)},
        {**ARRAYS, "indices": ARRAYS["indices"].view(np.float32)},
        {name: array for name, array in ARRAYS.items() if name != "nothing"},
        {**ARRAYS, "another": np.zeros(1)},
    ):
        np.savez_compressed(path, **changed, sha256=digest)
        with pytest.raises(DamagedFileError, match="do not have the recorded SHA-256"):
            load_arrays_file(path)


def test_files_without_a_digest_are_read(path: Path) -> None:
    np.savez_compressed(path, **ARRAYS)
    assert_whole(load_arrays_file(path))


def test_objects_are_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Python objects"):
        save_arrays(tmp_path / "a.npz", bad=np.array([{}]))
    assert not list(tmp_path.iterdir())
    trace, path = tmp_path / "trace", tmp_path / "cell.npz"
    entry = io.BytesIO()
    np.save(entry, np.array([Touch(trace)], dtype=object))
    plain = pickle.dumps(Touch(trace))
    for content in (entry.getvalue(), plain):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("logits.npy", content)
        with pytest.raises(DamagedFileError):
            load_arrays_file(path)
    path.write_bytes(plain)
    with pytest.raises(DamagedFileError):
        load_arrays_file(path)
    assert not trace.exists()
