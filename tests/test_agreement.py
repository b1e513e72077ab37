"""Library attacks beside a second implementation: what is compared, and what the script says of it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_data import real_arrays
from test_attacks import linear_problem, minimal_norms

from drs.agreement import FAB, MARGIN, PAIRS, SECOND, STRONGER, Agreement, agreement_table, compare
from drs.attack_config import APGDConfig, FABConfig, FMNFromStartConfig, ProjectedConfig, TargetedFABConfig
from drs.config import PROJECT_ROOT
from drs.errors import UserError
from drs.suite_config import SuiteConfig

SPEC = importlib.util.spec_from_file_location("agreement", PROJECT_ROOT / "scripts" / "agreement.py")
assert SPEC is not None and SPEC.loader is not None
SCRIPT = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SCRIPT)


def suite(radii: list[float]) -> SuiteConfig:
    """Return a suite of a bounded attack and a search, with Linf radii for a data set that is called toy."""
    attacks = {
        "apgd_ce": APGDConfig("apgd_ce", "linf", n_samples=1, steps=20),
        "fmn_linf": FMNFromStartConfig("fmn_from_start", "linf", n_samples=1, steps=60),
    }
    return SuiteConfig("small", attacks, {"toy": {"linf": radii}}, {"default": 10})


def test_both_implementations_leave_standing_what_is_further_off_than_the_radius() -> None:
    """Of two classes, because on cross-entropy more of them draw an attack between two boundaries."""
    model, images, labels = linear_problem(classes=2)
    distances = minimal_norms(model, images, labels, "linf")
    radii = distances.quantile(torch.tensor([0.3, 0.7], dtype=torch.float64)).tolist()
    rows = list(compare("linear", "toy", model, images, labels, suite(radii), ["apgd_ce", "fmn_linf"]))
    assert [(row.attack, row.epsilon, row.second) for row in rows] == [
        (attack, str(radius), PAIRS[attack]) for attack in ("apgd_ce", "fmn_linf") for radius in radii
    ]
    for row in rows:
        exact = 100 * float((distances > float(row.epsilon)).double().mean())
        near = 100 * float(((distances / float(row.epsilon) - 1).abs() < 0.02).double().mean())
        assert near < 10 < exact < 90, "a radius at which nearly all stand or fall compares nothing"
        assert abs(row.standing - exact) <= near + 1e-9, "all of the images count, whatever the suite's n_samples"
        assert abs(row.standing_second - exact) <= near + 1e-9


def test_an_attack_without_a_second_implementation_or_a_place_in_the_suite_is_refused() -> None:
    model, images, labels = linear_problem(classes=2)
    with pytest.raises(UserError, match="square: has no second implementation here; one of apgd_ce, "):
        next(compare("linear", "toy", model, images, labels, suite([0.1]), ["square"]))
    with pytest.raises(UserError, match="cw: the small suite has no such attack"):
        next(compare("linear", "toy", model, images, labels, suite([0.1]), ["apgd_ce", "cw"]))


def test_a_point_is_still_within_one_and_more_is_not_in_either_direction() -> None:
    def row(standing: float) -> Agreement:
        return Agreement("a_model", "l2", "1.5", "cw", PAIRS["cw"], standing, 40.0)

    rows = [row(standing) for standing in (41.0, 39.0, 41.34, 38.66)]
    assert [item.agrees for item in rows] == [True, True, False, False]
    lines = agreement_table(rows).splitlines()
    assert lines[2].startswith(
        "| a_model | l2 1.5 | cw | PGD on margin and cross-entropy | agreement | 41.00 | 40.00 |"
    )
    assert lines[2].endswith("| +1.00 | yes |")
    assert lines[5].endswith("| 38.66 | 40.00 | −1.34 | no |")


def test_attacks_on_cross_entropy_and_on_the_margin_are_not_mixed() -> None:
    seconds = {attack: SECOND[second] for attack, second in PAIRS.items()}
    climbed = {attack: second.objectives for attack, second in seconds.items() if isinstance(second, ProjectedConfig)}
    assert seconds.keys() - climbed.keys() == {"fab_t"}
    assert climbed["apgd_ce"] == ["ce"]
    assert all(any("margin" in name for name in names) for attack, names in climbed.items() if attack != "apgd_ce")


def test_fab_is_held_to_fab_at_the_suites_settings_and_shown_beside_a_stronger_attack() -> None:
    assert (PAIRS["fab_t"], STRONGER) == (FAB, {"fab_t": MARGIN})
    ours, theirs = SECOND[FAB], SCRIPT.strong_suite().attacks["fab_t"]
    assert isinstance(ours, FABConfig) and isinstance(theirs, TargetedFABConfig)
    assert (ours.norm, ours.steps, 1) == (theirs.norm, theirs.steps, theirs.restarts)
    model, images, labels = linear_problem(classes=4)
    distances = minimal_norms(model, images, labels, "linf").sort().values[15:25]
    widest = distances.diff().argmax()
    radius = float(distances[widest : widest + 2].mean())  # no image is so near to it that an overshoot would matter
    small = SuiteConfig(
        "small", {"fab_t": TargetedFABConfig("fab_t", "linf", steps=30)}, {"toy": {"linf": [radius]}}, {"default": 10}
    )
    rows = list(compare("linear", "toy", model, images, labels, small, ["fab_t"]))
    assert [(row.second, row.required) for row in rows] == [(FAB, True), (MARGIN, False)]
    assert rows[0].standing == rows[1].standing and all(row.agrees for row in rows)
    assert [line.split(" | ")[4] for line in agreement_table(rows).splitlines()[2:]] == ["agreement", "strength"]


@pytest.mark.parametrize(("required", "status"), [(True, 1), (False, 0)])
def test_status_is_of_the_rows_that_must_agree(
    required: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Agreement("a_model", "linf", "0.1", "fab_t", MARGIN, 65.0, 62.0, required)
    monkeypatch.setattr(SCRIPT, "agreements", lambda *_: [row])
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--runs", "mnist-lenet-ce"])
    assert SCRIPT.main() == status
    assert "| +3.00 | no |" in capsys.readouterr().out


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT.__file__), *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


def test_models_are_found_by_name_among_the_published_and_the_trained(tmp_path: Path) -> None:
    for folder in ("models/mnist-lenet-ce", "runs/0123456789ab"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").touch()
    found = SCRIPT.find_runs(tmp_path, ["0123456789ab", "mnist-lenet-ce"])
    assert [run.path.parent.name for run in found] == ["runs", "models"]
    with pytest.raises(UserError, match="^nothing: no model is at .*models/nothing or .*runs/nothing$"):
        SCRIPT.find_runs(tmp_path, ["mnist-lenet-ce", "nothing"])
    with pytest.raises(UserError, match="no published model of mnist; name runs with --runs"):
        SCRIPT.find_runs(tmp_path / "elsewhere", [])
    published = SCRIPT.find_runs(SCRIPT.STUDY, [])
    assert published and all(run.run_id.startswith("mnist-") for run in published)


def test_a_mistake_is_told_in_one_line() -> None:
    finished = _run("--images", "0")
    assert finished.returncode == 2 and not finished.stdout
    assert finished.stderr == "error: --images 0: must be at least 1\n"


def test_script_compares_a_published_model_and_writes_the_table_where_it_is_told(tmp_path: Path) -> None:
    real_arrays("mnist", fetch=True)
    out = tmp_path / "agreement.md"
    finished = _run("--runs", "mnist-lenet-ce", "--images", "20", "--attacks", "fmn_linf", "--out", str(out))
    lines = finished.stdout.splitlines()
    assert len(lines) == 4 and out.read_text().endswith("\n\n" + finished.stdout), finished.stderr
    assert "# Agreement" in out.read_text() and "over 20 test images" in out.read_text()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["linf 0.1", "linf 0.2"]
    # An image is five points here, so the status says what the last column does.
    assert finished.returncode == (1 if any(line.endswith("| no |") for line in lines) else 0)
