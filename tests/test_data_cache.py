"""The cache of verified arrays: a damaged file is named, fetched anew where a source has it, and never in silence."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from real_data import TOY_GREY, Touch, assert_same, refused, toy_arrays

from drs.data import load_arrays
from drs.data_cache import DATASETS, Arrays, cache_path, read_cache, write_cache
from drs.errors import UserError


@pytest.fixture
def digits_cache(tmp_path: Path) -> Path:
    load_arrays("digits", "train", cache=tmp_path, report=lambda line: None)
    return tmp_path


def test_first_load_says_its_source_and_later_ones_are_quiet(tmp_path: Path) -> None:
    lines: list[str] = []
    first = load_arrays("digits", "test", cache=tmp_path, report=lines.append)
    again = load_arrays("digits", "test", cache=tmp_path, report=lines.append)
    assert lines == [f"digits: from scikit-learn, verified, cached in {tmp_path}"]
    assert_same({"test": again}, {"test": first})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-test.npz", "digits-train.npz"]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.98, 0.9999])
def test_truncated_cache_file_is_named_and_fetched_anew(digits_cache: Path, kept: float) -> None:
    path = cache_path(digits_cache, "digits", "train")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refused(lambda: read_cache(DATASETS["digits"], "train", digits_cache), str(path), "not a whole cache file")
    lines: list[str] = []
    found = load_arrays("digits", "train", cache=digits_cache, report=lines.append)
    assert len(lines) == 2 and lines[0].startswith(f"{path}: not a whole cache file (")
    assert lines[0].endswith("; the data must be fetched anew")
    assert lines[1] == f"digits: from scikit-learn, verified, cached in {digits_cache}"
    again = load_arrays("digits", "train", cache=digits_cache, report=lines.append)
    assert_same({"train": again}, {"train": found})
    assert len(lines) == 2, "what was fetched anew is whole"


def test_damaged_cache_that_no_source_can_replace_is_an_error_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRS_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setitem(DATASETS, "toy", replace(TOY_GREY, torchvision="FashionMNIST"))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    path = cache_path(tmp_path, "toy", "train")
    path.write_bytes(b"half")
    refused(
        lambda: load_arrays("toy", "train", cache=tmp_path, report=lambda line: None),
        f"no source has toy. Tried: (1) the cache: {path}: not a whole cache file (",
    )
    assert path.read_bytes() == b"half"


def test_no_damaged_byte_passes_or_crashes(digits_cache: Path) -> None:
    path = cache_path(digits_cache, "digits", "train")
    content = path.read_bytes()
    expected = load_arrays("digits", "train", cache=digits_cache)
    generator = np.random.default_rng(0)
    headers = [*range(300), *range(len(content) - 700, len(content))]
    refusals = 0
    for position in [*headers, *generator.integers(len(content), size=200).tolist()]:
        flipped = bytes([content[position] ^ int(generator.integers(1, 256))])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            found = read_cache(DATASETS["digits"], "train", digits_cache)
        except UserError as error:
            assert str(path) in str(error)
            refusals += 1
        else:
            # Some bytes of a zip file mean nothing, such as times; then the content must be whole.
            assert found is not None
            assert_same({"train": found}, {"train": expected})
    assert refusals > 600


def test_other_content_in_the_cache_is_refused(digits_cache: Path) -> None:
    path = cache_path(digits_cache, "digits", "train")
    images, labels = load_arrays("digits", "train", cache=digits_cache)

    def store(**arrays: np.ndarray) -> None:
        with path.open("wb") as file:
            np.savez(file, **arrays)

    def load() -> Arrays | None:
        return read_cache(DATASETS["digits"], "train", digits_cache)

    changed = images.copy()
    changed[0, 0, 0] ^= 1
    official = DATASETS["digits"].sha256["train"]
    nothing = np.array(["", ""])
    store(images=changed, labels=labels, sha256=nothing)
    refused(load, str(path), "images of digits train have SHA-256", official[0], "fetched anew")
    store(images=images, labels=labels[::-1], sha256=nothing)
    refused(load, str(path), "labels of digits train have SHA-256", official[1])
    store(images=images[1:], labels=labels, sha256=nothing)
    refused(load, "must be uint8 (1297, 8, 8), but they are uint8 (1296, 8, 8)")
    store(images=images.astype(np.float32), labels=labels, sha256=nothing)
    refused(load, "but they are float32")
    store(images=images)
    refused(load, str(path), "not a whole cache file")
    np.save(path.open("wb"), images)
    refused(load, str(path), "not a whole cache file")


def test_cache_never_unpickles(digits_cache: Path) -> None:
    path, trace = cache_path(digits_cache, "digits", "train"), digits_cache / "trace"
    with path.open("wb") as file:
        np.savez(file, images=np.array([Touch(trace)], dtype=object), labels=np.zeros(1), sha256=np.zeros(1))
    refused(lambda: read_cache(DATASETS["digits"], "train", digits_cache), "not a whole cache file")
    path.write_bytes(pickle.dumps(Touch(trace)))
    refused(lambda: read_cache(DATASETS["digits"], "train", digits_cache), "not a whole cache file")
    load_arrays("digits", "train", cache=digits_cache, report=lambda line: None)
    assert not trace.exists()


def test_cache_without_published_digest_keeps_its_own(tmp_path: Path) -> None:
    images, labels = toy_arrays(TOY_GREY)["train"]
    write_cache(TOY_GREY, "train", (images, labels), tmp_path)
    found = read_cache(TOY_GREY, "train", tmp_path)
    assert found is not None
    assert_same({"train": found}, {"train": (images, labels)})
    path = cache_path(tmp_path, "toy", "train")
    recorded = np.load(path)["sha256"]
    np.savez(path, images=images ^ 1, labels=labels, sha256=recorded)
    refused(
        lambda: read_cache(TOY_GREY, "train", tmp_path), str(path), "has changed since it was cached", "fetched anew"
    )


def test_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(lambda: load_arrays("digits", "train", cache=tmp_path / "file" / "sub"), "cannot be written", "DRS_CACHE")
