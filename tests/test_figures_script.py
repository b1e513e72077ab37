"""scripts/figures.py and the notebook that it runs."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from drs.errors import UserError
from drs.readme import BLOCKS
from drs.report import read_tables, report_sections

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "results" / "reference" / "laptop"


def test_notebook_is_clean_and_only_calls_the_package() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "figures.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    sections = report_sections(read_tables(REFERENCE), {})
    assert _named(code, "study.show(") == [section.title for section in sections]
    assert sorted(_named(code, "study.show_readme(")) == sorted(BLOCKS)
    assert not any(word in cell.source for cell in code for word in ("pandas", "numpy", "pyplot"))
    # A line of reading stands under each.
    for cell, below in pairwise(notebook.cells):
        if cell.source.startswith("study.show"):
            assert below.cell_type == "markdown" and not below.source.startswith("#") and len(below.source) > 30


def _named(cells: list[nbformat.NotebookNode], call: str) -> list[str]:
    return [cell.source.split('"')[1] for cell in cells if cell.source.startswith(call)]


def _script(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "figures.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
        cwd=cwd,
    )


def test_script_redraws_the_reference_as_it_is_committed(tmp_path: Path) -> None:
    study = tmp_path / "one"
    shutil.copytree(REFERENCE / "tables", study / "tables")
    shutil.copyfile(REFERENCE / "provenance.json", study / "provenance.json")
    stale = study / "figures" / "epsilon_curves-mnist-resnet18.png"
    stale.parent.mkdir()
    stale.touch()
    result = _script(str(study), cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"], "no sockets are left where it was called"
    assert str(study / "figures" / "correlation_heatmap.png") in result.stdout
    names = [sorted(path.name for path in (folder / "figures").iterdir()) for folder in (study, REFERENCE)]
    assert names[0] == names[1], "make figures has not been run since the figures changed"
    for path in sorted((study / "figures").glob("*.png")):
        new, old = (
            np.asarray(Image.open(file).convert("L"), float) for file in (path, REFERENCE / "figures" / path.name)
        )
        assert new.shape == old.shape, path.name
        # Another build of the font renderer may set a pixel beside a letter otherwise.
        assert (np.abs(new - old) > 32).mean() < 1e-3, f"{path.name} is not the committed one: make figures"
    assert (study / "REPORT.md").read_text() == (REFERENCE / "REPORT.md").read_text(), "make figures"
    assert (study / "report.html").stat().st_size > 1e5


def test_script_names_a_study_without_tables() -> None:
    result = _script("no-such-study")
    assert result.returncode == 2
    assert result.stderr.startswith("error: study 'no-such-study' has no tables") and result.stderr.count("\n") == 1


def test_studies_are_found_by_folder_and_by_name(tmp_path: Path) -> None:
    find = runpy.run_path(str(ROOT / "scripts" / "figures.py"))["find_studies"]
    results, reference = tmp_path / "results", tmp_path / "reference"
    with pytest.raises(UserError, match="make smoke"):
        find(None, results, reference)
    for folder in (results / "mine", results / "both", reference / "both", reference / "kept"):
        (folder / "tables").mkdir(parents=True)
        (folder / "tables" / "models.csv").touch()
    assert find("mine", results, reference) == find(str(results / "mine"), tmp_path, tmp_path) == [results / "mine"]
    assert find("both", results, reference) == [results / "both"] and find("kept", results, reference)
    assert find(None, results, reference) == [reference / "both", reference / "kept"]
    assert len(find(None, results, tmp_path / "none")) == 1


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
