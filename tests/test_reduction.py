"""What is kept of a run's cells for the tables: the same tables, only for what it was made from."""

import os
import shutil
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from brief_study import configuration

from drs import reduction, setting_reduction, softmax_profile
from drs.array_files import load_arrays_file, save_arrays
from drs.cells import read_cells
from drs.errors import DamagedFileError
from drs.evaluation import StudyEvaluation, evaluate_study
from drs.tables import build_tables

KEPT = ".reduction-paper.json"


@pytest.fixture
def found(brief_results: Path, tmp_path: Path) -> StudyEvaluation:
    shutil.copytree(brief_results, tmp_path / "results")
    return evaluate_study(configuration(tmp_path / "results"))


def tables_of(found: StudyEvaluation, workers: int = 1) -> dict[str, pd.DataFrame]:
    return build_tables(found.cells, configuration(found.folder.parent).suite, found.folder, workers=workers)[0]


def watch_reading(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> set[str]:
    """Return a set to which the runs that a module reads are added."""
    read = set()

    def watched(run, planned):  # type: ignore[no-untyped-def]
        read.add(run.run_id)
        return read_cells(run, planned)

    monkeypatch.setattr(module, "read_cells", watched)
    return read


def read_anew(found: StudyEvaluation, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, pd.DataFrame], set[str]]:
    """Return the tables, and which runs were read for them, other than for the softmax profile."""
    read = watch_reading(monkeypatch, reduction)
    return tables_of(found), read


def assert_equal(found: dict[str, pd.DataFrame], expected: dict[str, pd.DataFrame]) -> None:
    assert found.keys() == expected.keys()
    for name, table in found.items():
        pd.testing.assert_frame_equal(table, expected[name], check_exact=True)


def test_evaluation_keeps_what_the_tables_need(found: StudyEvaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {cell.run for cell in found.cells}
    assert all((run.path / "eval" / KEPT).is_file() for run in runs)
    kept, read = read_anew(found, monkeypatch)
    assert read == set()
    for run in runs:
        (run.path / "eval" / KEPT).unlink()
    anew, read = read_anew(found, monkeypatch)
    assert read == {run.run_id for run in runs}
    assert_equal(kept, anew)
    assert len(kept["models"]) == 3 and len(kept["landing"]) == 3 * 4 and len(kept["landing_matrices"])


@pytest.mark.parametrize("change", ["a cell", "the weights", "the code", "damage"])
def test_kept_serves_only_for_what_it_was_made_from(
    found: StudyEvaluation, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    cell = found.cells[1]
    run, expected = cell.run, {cell.run.run_id}
    if change == "a cell":
        os.utime(cell.path, ns=(1, 1))
    elif change == "the weights":
        before = reduction.recorded_weights
        monkeypatch.setattr(reduction, "recorded_weights", lambda other: "0" * 64 if other == run else before(other))
    elif change == "the code":
        monkeypatch.setattr(reduction, "code_fingerprint", lambda: "another")
        expected = {other.run.run_id for other in found.cells}
    else:
        path = run.path / "eval" / KEPT
        path.write_bytes(path.read_bytes()[:-20])
    _, read = read_anew(found, monkeypatch)
    assert read == expected


def test_another_suite_has_its_own(found: StudyEvaluation) -> None:
    run = found.cells[0].run
    planned = [cell for cell in found.cells if cell.run == run]
    suite = configuration(found.folder.parent).suite
    before = (run.path / "eval" / KEPT).read_bytes()
    assert [row["epsilon"] for row in reduction.reduce_run(run, planned, suite).worst] == [0.1, 0.2]
    suite.decisive_epsilons = {"digits": {"linf": [0.2]}}
    assert [row["epsilon"] for row in reduction.reduce_run(run, planned, suite).worst] == [0.2]
    assert (run.path / "eval" / KEPT).read_bytes() != before


def test_a_softmax_profile_is_kept_until_one_of_its_runs_changes(
    found: StudyEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tables_of(found)
    read = watch_reading(monkeypatch, softmax_profile)
    assert_equal(tables_of(found), before)
    assert read == set()
    path = [cell.path for cell in found.cells if cell.attack == "clean"][-1]
    arrays = load_arrays_file(path)
    save_arrays(path, **{**arrays, "logits": 2 * arrays["logits"]})
    after = tables_of(found)
    assert read == {cell.run.run_id for cell in found.cells}, "all that share the setting"
    assert not after["softmax_profile"].equals(before["softmax_profile"])
    for kept in found.folder.glob("runs/*/eval/.profile-paper.json"):
        kept.unlink()
    assert_equal(tables_of(found), after)


def test_worker_processes_read_the_same_and_hand_on_what_is_damaged(
    found: StudyEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tables_of(found)
    monkeypatch.setattr(setting_reduction, "SPREAD_RUNS", 0)
    read = watch_reading(monkeypatch, reduction)
    for kept in found.folder.glob("runs/*/eval/.*.json"):
        kept.unlink()
    assert_equal(tables_of(found, workers=2), expected)
    assert read == set(), "in this process"
    path = found.cells[3].path
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DamagedFileError, match=path.name):
        tables_of(found, workers=2)
