"""The environment, the make targets and what is kept out of the repository."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][A-Za-z0-9.]*)")
# A CUDA build of torch brings these itself; see the head of requirements.lock.
CUDA = re.compile(r"(nvidia|cuda)-.*|triton")


# Run below make test, a make would take its parent's flags and say which folder it enters.
CLEAN = {
    name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON")
}


def _make(*arguments: str) -> str:
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=CLEAN).stdout


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins(lines: list[str]) -> dict[str, str]:
    """Return normalised name -> version; every line must be an exact pin."""
    matches = [PIN.fullmatch(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    pins = {_name(match[1]): match[2] for match in matches if match}
    assert len(pins) == len(lines), "a package is pinned twice"
    return pins


def _lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return _pins([line for line in lines if not line.startswith("#")])


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pyproject_pins_what_the_lock_pins() -> None:
    project = _project()
    extras = project["project"]["optional-dependencies"]["dev"]
    direct = _pins([*project["project"]["dependencies"], *extras])
    lock = _lock()
    assert direct == {name: lock.get(name) for name in direct}
    # setup builds the package with what the lock installs, so that it fetches nothing
    assert _pins(project["build-system"]["requires"]).items() <= lock.items()
    assert (lock["torch"], lock["torchvision"]) == ("2.13.0", "0.28.0")


def test_environment_yml_pins_what_the_lock_pins() -> None:
    environment = OmegaConf.to_container(OmegaConf.load(ROOT / "environment.yml"))
    assert isinstance(environment, dict)
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip"]
    assert pip["pip"][-1] == "-e ."
    assert _pins(pip["pip"][:-1]) == _lock()


def test_lock_leaves_out_cuda_libraries() -> None:
    assert not [name for name in _lock() if CUDA.fullmatch(name)]


def test_lock_is_closed() -> None:
    """Whatever a locked package needs on this Python is locked too."""
    lock = _lock()
    missing = {}
    for distribution in distributions():
        if _name(distribution.name) in lock:
            needs = [Requirement(text) for text in distribution.requires or []]
            for need in needs:
                wanted = need.marker is None or need.marker.evaluate({"extra": ""})
                if wanted and _name(need.name) not in lock and not CUDA.fullmatch(_name(need.name)):
                    missing[need.name] = distribution.name
    assert sys.platform != "linux" or not missing


def test_what_is_installed_is_what_the_lock_says() -> None:
    # Of the environment alone: setuptools, once imported, adds copies of its own to the path.
    here = list(dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib")))
    installed = {_name(item.name): item.version.partition("+")[0] for item in distributions(path=here)}
    different = {name: (version, installed.get(name)) for name, version in _lock().items()}
    different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
    assert not different, "package: (locked, installed)"


def _imported(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"drs", "hydra_plugins"}


@pytest.mark.parametrize(("folder", "dev"), [("drs", False), ("scripts", True)])
def test_what_is_imported_is_a_direct_dependency(folder: str, dev: bool) -> None:
    project = _project()["project"]
    declared = set(_pins(project["dependencies"] + (project["optional-dependencies"]["dev"] if dev else [])))
    owners = packages_distributions()
    undeclared = {module for module in _imported(ROOT / folder) if not {_name(o) for o in owners[module]} & declared}
    assert not undeclared


def test_make_lists_its_targets() -> None:
    listed = _make().splitlines()
    names = [line.split()[1] for line in listed]
    assert names == [
        "setup", "data", "smoke", "reproduce", "status", "figures", "publish", "readme", "bench", "agreement",
        "bundle", "merge", "test", "test-slow", "test-bundle", "test-slurm", "test-scale", "lint", "clean", "lock",
    ]  # fmt: skip
    assert all(len(line) <= 120 and len(line.split()) > 2 for line in listed)


@pytest.mark.parametrize(
    "target",
    [
        "data",
        "smoke",
        "reproduce",
        "status",
        "figures",
        "publish",
        "readme",
        "bench",
        "bundle",
        "merge",
        "test",
        "lint",
    ],
)
def test_targets_set_up_first_and_call_scripts_that_exist(target: str) -> None:
    plan = _make("-n", target)
    assert plan.startswith("sh scripts/setup.sh")
    scripts = re.findall(r"scripts/\w+\.py", plan)
    assert all((ROOT / script).is_file() for script in scripts), scripts
    assert scripts or target in ("test", "lint")


def test_ci_runs_the_test_target() -> None:
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    assert path.read_text().splitlines()[-1] == "make test"
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_runs_and_own_studies_are_ignored_and_the_reference_is_not() -> None:
    paths = {
        "results/mine/runs/0123/status.json": True,
        "results/mine/tables/models.csv": True,
        "results/reference/laptop/runs/0123/status.json": True,
        "results/reference/laptop/tables/claims.csv": False,
        "results/reference/laptop/figures/curves.pdf": False,
        "results/bench/step.csv": False,
        "data/mnist-test.npz": True,
        "configs/data/mnist.yaml": False,
        "configs/tracking/wandb.yaml": False,
        ".venv/bin/python": True,
    }
    for path, ignored in paths.items():
        status = subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT).returncode
        assert (status == 0) == ignored, path


# Installing for real takes minutes and is what make test does before it starts; here an interpreter that only keeps
# a log shows when setup.sh installs and when it leaves .venv alone.
INTERPRETER = """#!/bin/sh
case "$*" in
    "-c import sys"*) echo "${FAKE_VERSION:-3.11}" ;;
    "-c "*) ;;
    --version) echo "Python 3.11.0" ;;
    "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip "*"-r requirements.lock") echo lock >>log; [ ! -e broken ] ;;
    "-m pip "*"--no-deps"*"-e .") echo package >>log ;;
    *) exit 9 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", root)
    shutil.copy(ROOT / "scripts" / "setup.sh", root / "scripts")
    (root / "requirements.lock").write_text("# head\na==1\nb==2\n")
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "interpreter").write_text(INTERPRETER)
    (root / "interpreter").chmod(0o755)
    return root


def _setup(root: Path, **environment: str) -> tuple[int, str, list[str]]:
    """Run make setup; return its status, what it printed, and what was installed."""
    (root / "log").unlink(missing_ok=True)
    command = ["make", "-s", "setup", f"PYTHON={root / 'interpreter'}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**CLEAN, **environment})
    log = (root / "log").read_text().split() if (root / "log").exists() else []
    return done.returncode, done.stdout + done.stderr, log


def test_setup_installs_once(checkout: Path) -> None:
    status, text, log = _setup(checkout)
    assert (status, log) == (0, ["lock", "package"])
    assert "installing 2 packages into .venv (Python 3.11)" in text
    started = time.monotonic()
    status, text, log = _setup(checkout)
    assert time.monotonic() - started < 2
    assert (status, log) == (0, []) and text == "setup: .venv is up to date (Python 3.11.0)\n"


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_setup_installs_again_after_a_change(checkout: Path, name: str) -> None:
    _setup(checkout)
    with (checkout / name).open("a") as file:
        file.write("c==3\n")
    assert _setup(checkout)[2] == ["lock", "package"]
    assert _setup(checkout)[2] == []


def test_setup_installs_again_after_an_interruption(checkout: Path) -> None:
    (checkout / "broken").touch()
    assert _setup(checkout)[0] != 0
    (checkout / "broken").unlink()
    assert _setup(checkout)[2] == ["lock", "package"]
    with (checkout / "requirements.lock").open("a") as file:
        file.write("c==3\n")
    (checkout / "broken").touch()
    assert _setup(checkout)[0] != 0
    (checkout / "requirements.lock").write_text("# head\na==1\nb==2\n")
    (checkout / "broken").unlink()
    assert _setup(checkout)[2] == ["lock", "package"], "half of another lock was installed in between"


def test_setup_leaves_alone_what_a_link_points_to(checkout: Path) -> None:
    _setup(checkout)
    (checkout / ".venv").rename(checkout / "elsewhere")
    (checkout / ".venv").symlink_to("elsewhere")
    (checkout / "requirements.lock").write_text("a==2\n")
    status, text, log = _setup(checkout)
    assert status != 0 and not log and "error: .venv is a link to elsewhere" in text
    assert (checkout / "elsewhere" / "bin" / "python").exists()


def test_setup_installs_again_in_another_folder(checkout: Path) -> None:
    _setup(checkout)
    moved = checkout.rename(checkout.parent / "moved")
    assert _setup(moved)[2] == ["lock", "package"]


@pytest.mark.parametrize("version", ["3.10", "3.13", "3.1"])
def test_setup_refuses_another_python(checkout: Path, version: str) -> None:
    status, text, log = _setup(checkout, FAKE_VERSION=version)
    assert status != 0 and not log and not (checkout / ".venv").exists()
    errors = [line for line in text.splitlines() if not line.startswith("make")]
    assert len(errors) == 1 and errors[0].startswith("error: PYTHON=")
    assert f"is {version}, but 3.11 or 3.12 is needed" in errors[0]
