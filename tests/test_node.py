"""A bundle from end to end, as ``make test-bundle`` runs it: minutes, most of them for pip to install torch.

A fresh environment gets torch alone, as a node brings it. There the smoke study runs from the bundle, with the package
index out of reach, comes home as an archive and is merged.
"""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from drs.bundle import Target, locked_pins, make_bundle, this_platform
from drs.config import PROJECT_ROOT, project_path

pytestmark = pytest.mark.skipif("DRS_TEST_BUNDLE" not in os.environ, reason="takes minutes: make test-bundle")

CLOSED = "http://127.0.0.1:9"
OFFLINE = {
    "PIP_INDEX_URL": CLOSED,
    "PIP_NO_INDEX": "1",
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "npm_config_registry"), CLOSED),
}


@pytest.fixture(scope="module")
def node_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has torch and what pip installs with it, nothing else."""
    folder = tmp_path_factory.mktemp("node") / "environment"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"torch=={locked_pins()['torch']}"]
    subprocess.run(command, check=True)
    return python


def without_network() -> list[str]:
    """Return a command prefix that leaves no network at all, where this machine allows that."""
    prefix = ["unshare", "--net", "--map-root-user"]
    try:
        return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


def test_smoke_study_runs_without_a_network_and_comes_home(tmp_path: Path, node_python: Path) -> None:
    python = "{}.{}".format(*sys.version_info)
    cache = project_path(os.environ.get("DRS_CACHE", "data"))
    make_bundle(Target(python, this_platform()), ["mnist"], cache, tmp_path / "dist")
    assert all(path.stat().st_size < 40_000_000 for path in (tmp_path / "dist").iterdir())
    node = tmp_path / "node"
    node.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DRS_", "PIP_"))}
    command = [*without_network(), str(node_python), str(tmp_path / "dist" / "run.py")]

    def on_node(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments], cwd=node, env={**kept, **OFFLINE}, capture_output=True, text=True
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = on_node("--experiment", "smoke")
    assert "torchvision is not here" in first and "8 finished runs of smoke in" in first
    # The real MNIST is there as well: no source but the cache that was brought can be reached.
    mnist = ["data=mnist", "model=lenet", "loss=ce", "epochs=1", "data.train_samples=1000"]
    subprocess.run(
        [*without_network(), node_python, "scripts/train.py", *mnist, "study=mnist-there"], check=True,
        cwd=node / "drs-node", env={**kept, **OFFLINE, "PYTHONPATH": str(node / "drs-node" / ".packages")},
    )  # fmt: skip
    second = on_node("--experiment", "smoke")
    assert "unpacked before" in second and "nothing has changed" in second

    home = {**os.environ, "DRS_RESULTS": str(tmp_path / "home")}
    (archive,) = node.glob("results-smoke-*.tar.gz")
    merge = [sys.executable, str(PROJECT_ROOT / "scripts" / "merge.py"), str(archive)]
    done = subprocess.run(merge, env=home, capture_output=True, text=True, check=True)
    assert "8 runs added" in done.stdout
    again = subprocess.run(merge, env=home, capture_output=True, text=True, check=True)
    assert "0 runs added, 0 unfinished ones replaced, 8 kept as they are" in again.stdout
    evaluate = [sys.executable, str(PROJECT_ROOT / "scripts" / "evaluate.py"), "experiment=smoke", "timing=false"]
    done = subprocess.run(evaluate, env=home, capture_output=True, text=True, check=True)
    assert " 0 to compute" in done.stdout, "the evaluations came home too"
    tables = [
        pd.read_csv(folder / "smoke" / "tables" / "accuracy.csv")
        for folder in (node / "drs-node" / "results", tmp_path / "home")
    ]
    pd.testing.assert_frame_equal(*tables)
