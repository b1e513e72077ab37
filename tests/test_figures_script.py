"""scripts/figures.py and the notebook that it runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from synthetic import study_tables, write_study

from drs.figure_plan import KINDS

ROOT = Path(__file__).parent.parent
TABLES = study_tables()


def test_notebook_is_clean_and_only_calls_the_package() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "figures.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    shown = [cell.source for cell in code if cell.source.startswith("show(")]
    assert shown == [f'show("{kind}")' for kind in _kinds(shown)]
    assert set(_kinds(shown)) == set(KINDS)
    assert not any(word in cell.source for cell in code for word in ("pandas", "numpy", "pyplot"))


def _kinds(sources: list[str]) -> list[str]:
    return [source.split('"')[1] for source in sources]


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "figures.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )


def test_script_redraws_a_study_through_the_notebook(tmp_path: Path) -> None:
    keep = TABLES["models"].query("data == 'cifar10'")["run_id"]
    tables = {name: TABLES[name][TABLES[name]["run_id"].isin(keep)] for name in ("models", "accuracy")}
    study = write_study(tmp_path / "one", {**tables, "correlations": TABLES["correlations"]})
    stale = study / "figures" / "epsilon_curves-mnist-lenet.png"
    stale.parent.mkdir()
    stale.touch()
    result = _script(str(study))
    assert result.returncode == 0, result.stderr
    assert str(study / "figures" / "correlation_heatmap.png") in result.stdout
    assert not stale.exists() and (study / "figures" / "epsilon_curves-cifar10-smallcnn.pdf").is_file()
    assert result.stderr == ""


def test_script_names_a_study_without_tables() -> None:
    result = _script("no-such-study")
    assert result.returncode == 2
    assert result.stderr.startswith("error: study 'no-such-study' has no tables") and result.stderr.count("\n") == 1


def test_drawing_and_reporting_need_no_torch() -> None:
    code = "import sys, drs.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_the_notebook_to_try_runs_on_what_is_committed(capsys: pytest.CaptureFixture[str]) -> None:
    """Its code, in order; the models that it loads are not fetched or trained here."""
    notebook = nbformat.read(ROOT / "notebooks" / "try_it.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    names: dict[str, object] = {}
    for cell in code:
        exec(compile(cell.source, "try_it.ipynb", "exec"), names)
    printed = capsys.readouterr().out
    counts = re.findall(r"PGD on (.+): (\d+) of 10 images stand", printed)
    assert [kind for kind, _ in counts] == ["cross-entropy", "margins"] * 2
    spreads = [float(value) for value in re.findall(r"log-softmax ([0-9.]+) nat", printed)]
    assert spreads[1] < spreads[0] / 2, "the loss restrains what it says it does"
