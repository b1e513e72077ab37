"""Library attacks beside a second implementation: what is compared, and what the script says of it."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import compose_train
from omegaconf import OmegaConf
from real_data import real_arrays
from test_attacks import linear_problem, minimal_norms

from drs import agreement
from drs.agreement import FAB, MARGIN, PAIRS, SECOND, STRONGER, Agreement, agreement_table, compare, without_missing
from drs.agreement_report import (
    COLUMNS,
    PAGE,
    PUBLISHED,
    TABLE,
    failed_checks,
    keys,
    page,
    put_records,
    read_records,
    record,
    write_page,
)
from drs.attack_config import APGDConfig, FABConfig, FMNFromStartConfig, ProjectedConfig, TargetedFABConfig
from drs.config import PROJECT_ROOT, TrainConfig, run_id
from drs.errors import UserError
from drs.marks import MARK
from drs.runs import RunFolder
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
        assert (row.n, len(row.standing), row.medians) == (len(images), 1, None)
        exact = 100 * float((distances > float(row.epsilon)).double().mean())
        near = 100 * float(((distances / float(row.epsilon) - 1).abs() < 0.02).double().mean())
        assert near < 10 < exact < 90, "a radius at which nearly all stand or fall compares nothing"
        assert abs(row.standing[0] - exact) <= near + 1e-9, "all of the images count, whatever the suite's n_samples"
        assert abs(row.standing_second[0] - exact) <= near + 1e-9


def test_an_attack_without_a_second_implementation_or_a_place_in_the_suite_is_refused() -> None:
    model, images, labels = linear_problem(classes=2)
    with pytest.raises(UserError, match="noise: has no second implementation here; one of apgd_ce, "):
        next(compare("linear", "toy", model, images, labels, suite([0.1]), ["noise"]))
    with pytest.raises(UserError, match="cw: the small suite has no such attack"):
        next(compare("linear", "toy", model, images, labels, suite([0.1]), ["apgd_ce", "cw"]))


def test_a_point_is_still_within_one_and_more_is_not_in_either_direction() -> None:
    def row(*standing: float) -> Agreement:
        return Agreement("a_model", "l2", "1.5", "cw", PAIRS["cw"], standing, [40.0] * len(standing), n=300)

    rows = [row(41.0), row(39.0), row(41.34), row(38.66), row(42.0, 38.5, 42.0)]
    assert [item.agrees for item in rows] == [True, True, False, False, True]
    assert not replace(rows[2], medians=(0.1, 0.1)).agrees, "equal norms make up for no share"
    lines = agreement_table(rows).splitlines()
    assert lines[2].startswith(
        "| a_model | l2 1.5 | 300 | cw | PGD on margin and cross-entropy | agreement | 41.00 | 40.00 |"
    )
    assert lines[2].endswith("| +1.00 | yes | – | – |")
    assert lines[5].endswith("| 38.66 | 40.00 | −1.34 | no | – | – |")
    assert lines[6].endswith("| 40.83 | 40.00 | +0.83 ± 5.02 | yes | 3: 38.50 to 42.00 / 40.00 to 40.00 | – |")


def test_attacks_on_cross_entropy_and_on_the_margin_are_not_mixed() -> None:
    seconds = {attack: SECOND[second] for attack, second in PAIRS.items()}
    climbed = {attack: second.objectives for attack, second in seconds.items() if isinstance(second, ProjectedConfig)}
    assert seconds.keys() - climbed.keys() == {"fab_t", "square", "hop_skip_jump", "cw_torchattacks"}
    assert climbed["apgd_ce"] == ["ce"]
    assert all(any("margin" in name for name in names) for attack, names in climbed.items() if attack != "apgd_ce")


def test_fab_is_held_to_fab_at_the_suites_settings_and_shown_beside_a_stronger_attack() -> None:
    assert (PAIRS["fab_t"], STRONGER["fab_t"]) == (FAB, MARGIN)
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
    assert [line.split(" | ")[5] for line in agreement_table(rows).splitlines()[2:]] == ["agreement", "strength"]


@pytest.mark.parametrize(("required", "status"), [(True, 1), (False, 0)])
def test_status_is_of_the_rows_that_must_agree(
    required: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Agreement("a_model", "linf", "0.1", "fab_t", MARGIN, [65.0], [62.0], required)
    monkeypatch.setattr(SCRIPT, "agreements", lambda *_: [row])
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--runs", "mnist-lenet-ce"])
    assert SCRIPT.main() == status
    assert "| +3.00 | no | – | – |" in capsys.readouterr().out


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
    (by_path,) = SCRIPT.find_runs(tmp_path / "elsewhere", [str(tmp_path / "models" / "mnist-lenet-ce")])
    assert by_path.path == tmp_path / "models" / "mnist-lenet-ce"
    with pytest.raises(UserError, match="^nothing: no model is at .*models/nothing or .*runs/nothing or .*/nothing$"):
        SCRIPT.find_runs(tmp_path, ["mnist-lenet-ce", "nothing"])
    with pytest.raises(UserError, match="no published model of mnist; name runs with --runs"):
        SCRIPT.find_runs(tmp_path / "elsewhere", [])
    published = SCRIPT.find_runs(SCRIPT.STUDY, [])
    assert published and all(run.run_id.startswith("mnist-") for run in published)


def test_a_mistake_is_told_in_one_line() -> None:
    finished = _run("--runs", "mnist-lenet-ce", "--images", "10001", "--attacks", "cw")
    assert (finished.returncode, finished.stderr) == (2, "error: --images 10001: mnist has 10000 test images\n")
    finished = _run("--images", "0")
    assert finished.returncode == 2 and not finished.stdout
    assert finished.stderr == "error: --images 0: must be at least 1\n"


def test_script_compares_a_published_model_and_writes_the_table_where_it_is_told(tmp_path: Path) -> None:
    real_arrays("mnist", fetch=True)
    out = tmp_path / "agreement.md"
    finished = _run("--runs", "mnist-lenet-ce", "--images", "20", "--attacks", "fmn_linf", "--out", str(out))
    lines = finished.stdout.splitlines()
    (run,) = SCRIPT.find_runs(SCRIPT.STUDY, ["mnist-lenet-ce"])
    key = bool(failed_checks(run))
    assert len(lines) == (6 if key else 4), "no key where no check is failed, and no note where none is needed"
    assert out.is_file() and out.read_text().endswith("\n\n" + finished.stdout), finished.stderr
    assert (
        "# Agreement" in out.read_text()
        and "## 20 test images\n\nMade by `python scripts/agreement.py --runs" in out.read_text()
    )
    assert [line.split("|")[2].strip() for line in lines[2:4]] == ["linf 0.1", "linf 0.2"]
    assert all(line.split("|")[1].strip() == ("mnist-lenet-ce †" if key else "mnist-lenet-ce") for line in lines[2:4])
    # An image is five points here, so the status says what the last column does.
    assert finished.returncode == (1 if any("| no |" in line for line in lines) else 0)


def _folder(tmp_path: Path, name: str, config: TrainConfig) -> RunFolder:
    folder = tmp_path / "models" / name
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    return RunFolder(folder)


def test_model_that_fails_a_sanity_check_is_marked_with_its_key_and_one_that_is_not_checked_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        _folder(tmp_path, f"mnist-lenet-{seed}", compose_train("data=mnist", "model=lenet", "loss=ce", f"seed={seed}"))
        for seed in range(3)
    ]
    ids = [run_id(run.config()) for run in runs]
    models = pd.DataFrame({"run_id": ids[:2], "failed_checks": ["objective_gap;more_steps", None]})
    (tmp_path / "tables").mkdir()
    models.to_csv(tmp_path / "tables" / "models.csv", index=False)
    assert [failed_checks(run) for run in runs] == [["objective_gap", "more_steps"], [], None]
    assert keys(runs[:2]) == [
        f"{MARK} fails sanity checks of its study. mnist-lenet-ce mnist-lenet-0: objective_gap, more_steps."
    ]
    assert keys(runs[2:]) == ["Its study's tables say nothing of sanity checks of: mnist-lenet-ce mnist-lenet-2."]
    monkeypatch.setattr(SCRIPT, "load_test", lambda *_: (SimpleNamespace(pixels=lambda: None, labels=None), None))
    monkeypatch.setattr(RunFolder, "load_model", lambda *_: None)
    monkeypatch.setattr(SCRIPT, "compare", lambda name, *_: [Agreement(name, "l2", "1", "cw", MARGIN, [1.0], [1.0])])
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--study", str(tmp_path), "--out", str(tmp_path / "out.md")])
    assert SCRIPT.main() == 0
    text = capsys.readouterr().out
    assert f"| mnist-lenet-ce mnist-lenet-0 {MARK} |" in text and "| mnist-lenet-ce mnist-lenet-1 |" in text
    assert f"\n{MARK} fails sanity checks" in text
    told = (tmp_path / "out.md").read_text()
    assert [line for line in told.splitlines() if line.startswith("#")] == [
        "# Agreement of library attacks with a second implementation", "## 300 test images",
    ]  # fmt: skip


MADE = {"created": "2026-11-27", "commit": "0123456789ab", "dirty": False, "versions": "torch 2.13.0, ART 1.20.1"}


def _reference(tmp_path: Path) -> Path:
    """Return a folder with the tables and published models of two studies, one of which fails a check."""
    for study, failed in (("laptop", "more_steps"), ("desktop", None)):
        config = compose_train("data=mnist", "model=lenet", "loss=ce", "seed=0")
        _folder(tmp_path / study, "mnist-lenet-ce", config)
        (tmp_path / study / "tables").mkdir()
        rows = pd.DataFrame({"run_id": [run_id(config)], "failed_checks": [failed]})
        rows.to_csv(tmp_path / study / "tables" / "models.csv", index=False)
    return tmp_path


def test_published_comparisons_are_kept_in_a_table_and_laid_out_with_the_marks_of_now(tmp_path: Path) -> None:
    reference = _reference(tmp_path)
    square = Agreement("mnist-lenet-ce", "linf", "0.1", "square", PAIRS["square"], [80.0, 81.5], [80.5, 81.0], n=250)
    hop = Agreement(
        f"mnist-lenet-ce {MARK}", "linf", "0.1", "hop_skip_jump", PAIRS["hop_skip_jump"], [70.0, 72.0], [71.0, 72.0],
        n=200, medians=(0.17821, 0.179),
    )  # fmt: skip
    later = [replace(hop, epsilon=epsilon) for epsilon in ("0.1", "0.2")]
    put_records(reference, [record("desktop", row, MADE) for row in later])
    put_records(reference, [record("laptop", square, MADE)])
    assert list(read_records(reference).columns) == COLUMNS
    assert list(read_records(reference)["study"]) == ["laptop", "desktop", "desktop"], "in the order of the page"
    text = page(reference)
    assert (
        "| mnist-lenet-ce † | linf 0.1 | 250 | square | Square of ART | agreement | 80.75 | 80.75 | 0.00 ± 6.35 |"
        in text
    )
    assert (
        "| mnist-lenet-ce | linf 0.2 | 200 | hop_skip_jump | HopSkipJump of ART | agreement | 71.00 | 71.50 |" in text
    )
    assert "| 0.1782 / 0.1790 |" in text and "| 2: 80.00 to 81.50 / 80.50 to 81.00 | – |" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Models of the laptop study", "## Models of the desktop study", "## How they were compared",
    ]  # fmt: skip
    assert text.count("square: both make 500 queries") == 1
    assert text.endswith(
        "\n\nMade by `make agreement` on 2026-11-27 at commit `0123456789ab`: torch 2.13.0, ART 1.20.1.\n"
    )
    # A comparison that is made anew takes the place of the earlier one; one of another commit is told apart.
    put_records(reference, [record("laptop", replace(square, n=100), {**MADE, "commit": "fedcba987654"})])
    assert list(read_records(reference)["n"]) == [100, 200, 200]
    assert write_page(reference) == reference / PAGE
    ends = (reference / PAGE).read_text().splitlines()
    assert ends[-3].startswith("Made by `make agreement`, square on") and "`fedcba987654`" in ends[-3]
    assert ends[-1].startswith("Made by `make agreement`, hop_skip_jump on")
    # The marks follow the tables of the studies.
    models = reference / "laptop" / "tables" / "models.csv"
    pd.read_csv(models).assign(failed_checks="").to_csv(models, index=False)
    assert MARK not in page(reference)


def test_a_published_page_that_cannot_be_laid_out_says_why(tmp_path: Path) -> None:
    reference = _reference(tmp_path)
    with pytest.raises(UserError, match="agreement.csv has no comparison; make it: make agreement"):
        write_page(reference)
    row = Agreement("mnist-mlp-ce", "l2", "1", "cw", PAIRS["cw"], [1.0], [1.0], n=10)
    put_records(reference, [record("laptop", row, MADE)])
    with pytest.raises(UserError, match="laptop has no published model mnist-mlp-ce; compare it anew"):
        write_page(reference)
    put_records(reference, [record("laptop", replace(row, model="mnist-lenet-ce", second="CW of nobody"), MADE)])
    read_records(reference).iloc[:1].to_csv(reference / TABLE, index=False)
    with pytest.raises(UserError, match="'CW of nobody' is no second implementation here"):
        write_page(reference)
    assert not (reference / PAGE).exists()
    read_records(reference).drop(columns="required").to_csv(reference / TABLE, index=False)
    with pytest.raises(UserError, match="agreement.csv lacks the column 'required'"):
        write_page(reference)


def test_published_comparisons_are_made_of_the_named_attacks_and_kept_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = _reference(tmp_path)
    compared: list[tuple[str, str, int, list[str]]] = []

    def agreements(run: RunFolder, suite: SuiteConfig, images: int, attacks: list[str]) -> list[Agreement]:
        if len(compared) == 2:
            raise UserError("no power")
        compared.append((run.path.parent.parent.name, run.run_id, images, attacks))
        return [Agreement(run.run_id, "l2", "1", attacks[0], PAIRS[attacks[0]], [9.0], [7.0], n=images)]

    monkeypatch.setattr(SCRIPT, "REFERENCE", reference)
    monkeypatch.setattr(SCRIPT, "agreements", agreements)
    monkeypatch.setattr(
        SCRIPT, "PUBLISHED", [replace(one, models=("mnist-lenet-ce",)) for one in PUBLISHED if one.study != "pairs"]
    )
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--published", "--attacks", "fab_t", "apgd_ce", "cw"])
    with pytest.raises(UserError, match="no power"):
        SCRIPT.main()
    assert compared == [("laptop", "mnist-lenet-ce", 300, ["apgd_ce"]), ("laptop", "mnist-lenet-ce", 300, ["fab_t"])]
    assert list(read_records(reference)["attack"]) == ["apgd_ce", "fab_t"], "what is done is not lost"
    monkeypatch.setattr(SCRIPT, "agreements", lambda *given: agreements(*given) if compared.clear() is None else [])
    assert SCRIPT.main() == 1, "two points apart"
    assert len(read_records(reference)) == 4
    assert capsys.readouterr().out.endswith(f"the page is {reference / PAGE}\n")
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--lay-out"])
    (reference / PAGE).unlink()
    assert SCRIPT.main() == 0 and (reference / PAGE).is_file()
    for ignored in (["--published", "--images", "3"], ["--lay-out", "--attacks", "cw"]):
        monkeypatch.setattr(sys, "argv", ["agreement.py", *ignored])
        with pytest.raises(UserError, match=f"{ignored[1]} says nothing to {ignored[0]}"):
            SCRIPT.main()
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--published", "--attacks", "fab"])
    with pytest.raises(UserError, match="fab: has no second implementation here"):
        SCRIPT.main()


def test_the_page_in_the_repository_is_of_its_table_and_of_the_present_tables_of_the_studies() -> None:
    reference = PROJECT_ROOT / "results" / "reference"
    assert (reference / PAGE).read_text(encoding="utf-8") == page(reference), "python scripts/agreement.py --lay-out"
    compared = read_records(reference)
    told = {(one.study, model, attack) for one in PUBLISHED for model in one.models for attack in one.attacks}
    found = set(compared[["study", "model", "attack"]].itertuples(index=False, name=None))
    assert {(*rest, attack.removesuffix(", sound")) for *rest, attack in found} == told
    assert not compared["dirty"].any()


def test_pairs_of_an_optional_package_are_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agreement, "is_installed", lambda module: module != "art.estimators")
    assert without_missing(["fmn_l2", "square", "cw", "hop_skip_jump"])[0] == ["fmn_l2", "cw"]
    assert without_missing(["fmn_l2", "cw"]) == (["fmn_l2", "cw"], "")
    monkeypatch.setattr(SCRIPT, "agreements", lambda *_: [Agreement("m", "l2", "1", "cw", MARGIN, [1.0], [1.0])])
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--runs", "mnist-lenet-ce", "--attacks", "square", "cw"])
    assert SCRIPT.main() == 0
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "left out: square; the second implementation is ART's, which is not installed; " in text
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--runs", "mnist-lenet-ce", "--attacks", "square"])
    with pytest.raises(UserError, match="left out: square; .* not installed; .*pip install"):
        SCRIPT.main()
    monkeypatch.setattr(agreement, "is_installed", lambda module: True)
    assert without_missing(["square"]) == (["square"], "")
