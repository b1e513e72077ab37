"""What a bundle holds, and how its script for the node unpacks, checks and packs."""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drs import bundle
from drs.bundle import (
    EXCLUDE,
    PIECE_BYTES,
    Target,
    check_target,
    collect_code,
    collect_data,
    locked_pins,
    needed_packages,
    platform_tags,
    split_file,
    this_platform,
)
from drs.config import PROJECT_ROOT
from drs.data import load_arrays
from drs.errors import UserError

NODE = PROJECT_ROOT / "scripts" / "node.py"
HERE = "{}.{}".format(*sys.version_info)


@pytest.fixture(scope="module")
def node() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drs_node", NODE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_node_script_needs_python_alone() -> None:
    names = re.findall(r"^(?:import|from) (\w+)", NODE.read_text(), flags=re.MULTILINE)
    assert names and set(names) <= set(sys.stdlib_module_names)


def test_platform_takes_older_glibc_too() -> None:
    tags = platform_tags("manylinux_2_28_x86_64")
    assert tags[0] == "manylinux_2_28_x86_64" and {"manylinux2014_x86_64", "manylinux1_x86_64"} <= set(tags)
    assert not any("2_29" in tag for tag in tags)
    assert "manylinux2014_x86_64" not in platform_tags("manylinux_2_12_x86_64")
    assert this_platform() in platform_tags(this_platform())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("3.10", "manylinux_2_28_x86_64"), "PYTHON=3.10: must be 3.11 or 3.12"),
        (Target("3.12", "win_amd64"), "PLATFORM=win_amd64: must be manylinux_2_N_x86_64"),
        (Target("3.12", "manylinux_2_28_x86_64", ("tourch",)), "EXCLUDE=tourch: not in requirements.lock"),
    ],
)
def test_wrong_targets_are_named(target: Target, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_target(target)


def test_packages_are_what_running_needs() -> None:
    needed = needed_packages(EXCLUDE)
    pins = locked_pins()
    assert needed.items() <= pins.items()
    # antlr4 is needed by omegaconf alone, which is a package of ours; sympy by torch alone, which the node brings.
    assert {"hydra-core", "antlr4-python3-runtime", "numpy", "wandb", "torchattacks", "requests"} <= needed.keys()
    assert not {"torch", "torchvision", "sympy", "pytest", "ruff", "jupyter-core", "mypy"} & needed.keys()
    assert needed_packages((*EXCLUDE, "NumPy")).keys() == needed.keys() - {"numpy"}
    assert "sympy" in needed_packages(())


def test_pieces_are_small_and_join_to_the_file(tmp_path: Path, node: ModuleType) -> None:
    source, folder = tmp_path / "file", tmp_path / "pieces"
    folder.mkdir()
    content = os.urandom(3_000_000)
    source.write_bytes(content)
    for limit, sizes in ((1_100_000, [1_100_000, 1_100_000, 800_000]), (1_500_000, [1_500_000] * 2), (4_000_000, None)):
        pieces = split_file(source, folder, limit)
        assert [piece["size"] for piece in pieces] == (sizes or [len(content)])
        paths = [folder / piece["name"] for piece in pieces]
        assert [path.stat().st_size for path in paths] == [piece["size"] for piece in pieces]
        assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == [p["sha256"] for p in pieces]
        assert node.Pieces(paths).readall() == content
        for path in folder.iterdir():
            path.unlink()
    source.write_bytes(b"")
    assert [piece["size"] for piece in split_file(source, folder)] == [0]
    assert PIECE_BYTES < 40_000_000


def test_data_are_verified_and_packed_alike_each_time(tmp_path: Path) -> None:
    for name in ("first", "second"):
        collect_data(["digits"], tmp_path / "cache", tmp_path / name)
    files = sorted((tmp_path / "first").iterdir())
    assert [path.name for path in files] == ["digits-test.npz.gz", "digits-train.npz.gz"]
    for path in files:
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
        assert gzip.decompress(path.read_bytes()) == (tmp_path / "cache" / path.stem).read_bytes()
    with pytest.raises(UserError, match=r"data\.name=mnits: unknown"):
        collect_data(["mnits"], tmp_path / "cache", tmp_path / "third")


def wheel(path: Path, files: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = (0o755 if name.endswith("-core") else 0o644) << 16
            archive.writestr(member, content)


CODE = """import os, sys
from pathlib import Path
run = Path("results/mine/runs/0123456789ab")
run.mkdir(parents=True, exist_ok=True)
for name in ("config.yaml", "metrics.csv", "checkpoint.safetensors", ".claim"):
    (run / name).write_text(" ".join(sys.argv[1:]))
(run / "status.json").write_text('{"state": "done"}')
other = Path("results/mine/runs/ba9876543210")
other.mkdir(parents=True, exist_ok=True)
(other / "status.json").write_text('{"state": "running"}')
import addition
print(Path(sys.argv[0]).name, *sys.argv[1:], addition.__name__, "DRS_RESULTS" in os.environ)
"""


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole bundle of little: one wheel, digits, and a project whose scripts only say what they were given."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    for name in ("train.py", "evaluate.py"):
        (project / "scripts" / name).write_text(CODE if name == "train.py" else CODE.replace("import addition", ""))
    (project / "scripts" / "evaluate.py").write_text("import sys; print('evaluate.py', *sys.argv[1:])")
    (project / "scripts" / "node.py").write_bytes(NODE.read_bytes())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "All"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    (project / "scripts" / "train.py").write_text("changed since")
    monkeypatch.setattr(bundle, "PROJECT_ROOT", project)
    monkeypatch.setattr(bundle, "needed_packages", lambda exclude: {"addition": "1"})
    monkeypatch.setattr(bundle, "locked_pins", lambda: {"pytest": "0.1", "torchvision": "9"})

    def collect(pins: dict[str, str], target: Target, folder: Path) -> None:
        folder.mkdir(parents=True)
        files = {
            "addition.py": "",
            "addition-1.data/": "",
            "addition-1.data/purelib/add-core": "x",
            "addition-1.data/scripts/cmd": "y",
        }
        wheel(folder / "addition-1-py3-none-any.whl", files)

    monkeypatch.setattr(bundle, "collect_wheels", collect)
    target = Target(HERE, this_platform(), ("pytest", "torchvision"))
    manifest = bundle.make_bundle(target, ["digits"], tmp_path / "cache", tmp_path / "dist")
    assert manifest["dirty"]
    return tmp_path / "dist"


def run_node(packed: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(packed / "run.py"), *arguments]
    environment = {**os.environ, "DRS_RESULTS": "/nowhere"}
    return subprocess.run(command, cwd=packed.parent, env=environment, capture_output=True, text=True)


def test_bundle_is_unpacked_run_and_packed(packed: Path, tmp_path: Path) -> None:
    done = run_node(packed, "--experiment", "mine", "--train", "seed=3", "--evaluate", "workers=1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    root = tmp_path / "drs-node"
    assert "train.py experiment=mine seed=3 addition False" in lines
    assert "evaluate.py experiment=mine workers=1" in lines
    assert any(re.match(r"pytest \S+ is here, the project is pinned to 0\.1", line) for line in lines)
    assert (root / ".packages" / "add-core").stat().st_mode & 0o111
    assert not list(root.rglob("cmd"))
    for split in ("train", "test"):
        images, labels = load_arrays("digits", split, cache=root / "data")
        assert len(images) == len(labels) > 0
    archives = list(tmp_path.glob("results-mine-*.tar.gz"))
    listed = subprocess.run(["tar", "tzf", archives[0]], capture_output=True, text=True, check=True).stdout.split()
    run = "runs/0123456789ab"
    names = ["checkpoint.safetensors", "config.yaml", "metrics.csv", "status.json"]
    assert listed == ["results.json", *(f"{run}/{name}" for name in names)], "claims and unfinished runs stay"
    again = run_node(packed, "--experiment", "mine")
    assert "unpacked before" in again.stdout


def test_new_bundle_replaces_code_and_keeps_results(packed: Path, tmp_path: Path) -> None:
    assert run_node(packed, "--experiment", "mine").returncode == 0
    root = tmp_path / "drs-node"
    (root / "scripts" / "old.py").touch()
    manifest = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps({**manifest, "commit": "other"}))
    assert run_node(packed, "--unpack").returncode == 0
    assert not (root / "scripts" / "old.py").exists()
    assert (root / "results" / "mine" / "runs" / "0123456789ab" / "status.json").exists()
    assert json.loads((root / ".bundle.json").read_text())["commit"] == "other"


def damaged(packed: Path, what: str) -> None:
    piece = packed / "digits-train.npz.gz"
    manifest = json.loads((packed / "manifest.json").read_text())
    if what == "flipped":
        content = bytearray(piece.read_bytes())
        content[len(content) // 2] ^= 1
        piece.write_bytes(content)
    elif what == "missing":
        piece.unlink()
    elif what == "manifest":
        (packed / "manifest.json").write_text("{")
    else:
        changes: dict[str, Any] = {
            "python": {"python": "3.9"},
            "glibc": {"platform": manifest["platform"].replace("2_", "2_9", 1)},
            "machine": {"platform": "manylinux_2_5_sparc"},
        }
        (packed / "manifest.json").write_text(json.dumps({**manifest, **changes[what]}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("flipped", "digits-train.npz.gz: its SHA-256 is"),
        ("missing", "digits-train.npz.gz: No such file or directory; copy this piece"),
        ("manifest", "manifest.json: not JSON"),
        ("python", "but the bundle was made for 3.9"),
        ("glibc", "but the bundle needs glibc 2.9"),
        ("machine", "but the bundle was made for sparc linux"),
    ],
)
def test_what_is_wrong_with_a_bundle_is_one_line(packed: Path, tmp_path: Path, what: str, message: str) -> None:
    damaged(packed, what)
    done = run_node(packed, "--unpack")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "drs-node").exists(), "nothing is unpacked before all is checked"


def test_missing_torch_is_told_before_anything_runs(packed: Path) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps({**manifest, "brought": {"no-such-torch": "1"}}))
    done = run_node(packed, "--experiment", "mine")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no-such-torch is not installed for {sys.executable}")
    assert "-- train.py" not in done.stdout


def test_folder_of_something_else_is_left_alone(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    done = run_node(packed, "--unpack", "--into", "mine")
    assert done.returncode == 2 and "is not empty and holds no bundle" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="holds something else than a bundle"):
        bundle.make_bundle(Target(HERE, this_platform(), ()), [], tmp_path / "cache", tmp_path / "mine")


def test_wheel_cannot_write_outside_its_folder(tmp_path: Path, node: ModuleType) -> None:
    wheel(tmp_path / "bad.whl", {"../outside.py": "x"})
    (tmp_path / "packages").mkdir()
    with pytest.raises(SystemExit):
        node.install_wheel(node.Pieces([tmp_path / "bad.whl"]), tmp_path / "packages")
    assert not (tmp_path / "outside.py").exists()


def test_code_is_the_last_commit(tmp_path: Path) -> None:
    found = collect_code(tmp_path / "code.tar")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert found["commit"] == head.stdout.strip()
    listed = subprocess.run(["tar", "tf", tmp_path / "code.tar"], capture_output=True, text=True, check=True).stdout
    assert {"drs/config.py", "scripts/train.py", "configs/train.yaml"} <= set(listed.split())
