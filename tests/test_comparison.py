"""drs.comparison: when two studies agree, and what is said where they do not."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic import study_tables, write_study

from drs.comparison import Claim, SeedMean, Setting, compare, compare_with_reference, half_width
from drs.errors import UserError

TABLES = study_tables()
MANY = 10**9  # so many samples that the binomial error is nothing


def _copy() -> dict[str, pd.DataFrame]:
    return {name: table.copy() for name, table in TABLES.items()}


def _studies(folder: Path, own: dict[str, pd.DataFrame]) -> tuple[Path, Path]:
    """Write ``own`` and the untouched study as its reference."""
    return write_study(folder / "results" / "tiny", own), write_study(folder / "reference" / "tiny", TABLES)


def _side(values: np.ndarray, n_samples: int = MANY) -> SeedMean:
    variance = float(values.var(ddof=1)) if len(values) > 1 else np.nan
    return SeedMean(float(values.mean()), variance, len(values), n_samples)


def test_interval_is_welchs() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.5, 0.02, 4), rng.normal(0.5, 0.05, 3)
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    width = half_width(_side(first), _side(second))
    assert width == pytest.approx((expected.high - expected.low) / 2, rel=1e-6)


def test_one_seed_borrows_the_spread_of_the_other_side() -> None:
    seeds = np.array([0.40, 0.43, 0.47, 0.41])
    expected = stats.t.ppf(0.975, 3) * seeds.std(ddof=1) * np.sqrt(1 + 1 / 4)
    assert half_width(_side(seeds), _side(np.array([0.5]))) == pytest.approx(expected, rel=1e-6)
    assert half_width(_side(np.array([0.5])), _side(seeds)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_sampling_error_is_the_floor(n_seeds: int) -> None:
    same = _side(np.full(n_seeds, 0.3), n_samples=1000)
    expected = stats.norm.ppf(0.975) * np.sqrt(2 * 0.3 * 0.7 / (1000 * n_seeds))
    assert half_width(same, same) == pytest.approx(expected, rel=0.01)
    zero = _side(np.zeros(n_seeds), n_samples=1000)
    assert 0 < half_width(zero, zero) < 0.01


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3), (1, 4)])
def test_about_five_per_cent_disagree_by_chance(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    draws = [[_side(rng.normal(0.5, 0.03, size)) for size in sizes] for _ in range(3000)]
    agree = np.mean([abs(own.mean - other.mean) <= half_width(own, other) for own, other in draws])
    assert 0.935 < agree < 0.975


def test_a_study_agrees_with_itself(tmp_path: Path) -> None:
    own, reference = _studies(tmp_path, TABLES)
    result = compare(own, reference)
    usable = TABLES["models"][TABLES["models"]["excluded"].isna()]
    # clean accuracy and six attacks of nine settings; a setting whose models are all excluded would be missing
    assert len(result.cells) == 7 * len(usable.groupby(["data", "model", "loss", "loss_weight"]))
    assert not result.disagreements and not result.only_own and not result.only_reference
    assert len(result.ratios) == len(TABLES["timing"])
    text = compare_with_reference(own, tmp_path / "reference")
    assert "Verdicts: 9 of 9 are the same." in text
    assert f"{len(result.cells)} of {len(result.cells)} means over seeds agree" in text
    assert f"5% ({0.05 * len(result.cells):.1f}) would disagree by chance" in text


def test_differences_are_listed_largest_first(tmp_path: Path) -> None:
    tables = _copy()
    models = tables["models"]
    setting = (models["data"] == "mnist") & (models["loss_weight"] == 0.001)
    models.loc[setting, "acc.pgd@mean"] += 0.2
    models.loc[setting, "acc.fgsm@mean"] -= 0.3
    own, reference = _studies(tmp_path, tables)
    result = compare(own, reference)
    assert [cell.column for cell in result.disagreements] == ["acc.fgsm@mean", "acc.pgd@mean"]
    worst = result.disagreements[0]
    assert worst.setting == Setting("mnist", "lenet", "dr_softmax", 0.001)
    assert worst.difference == pytest.approx(-0.3)
    lines = compare_with_reference(own, tmp_path / "reference").splitlines()
    shown = [line for line in lines if "difference" in line and line.startswith("  ")]
    assert shown[0].startswith("  mnist/lenet dr_softmax 0.001 fgsm@mean:") and "-30.0 points" in shown[0]
    assert "n=4" in shown[0]
    limited = compare_with_reference(own, tmp_path / "reference", limit=1)
    assert "pgd@mean" not in limited and "and 1 more" in limited


def test_excluded_models_do_not_count(tmp_path: Path) -> None:
    tables = _copy()
    models = tables["models"]
    one = (models["data"] == "mnist") & (models["loss_weight"] == 0.001) & (models["seed"] == 0)
    models.loc[one, "excluded"] = "near chance on clean data"
    models.loc[one, "clean_accuracy"] = 0.1
    gone = (models["data"] == "mnist") & (models["loss_weight"] == 0.02)
    models.loc[gone, "excluded"] = "near chance on clean data"
    own, reference = _studies(tmp_path, tables)
    result = compare(own, reference)
    cell = next(
        cell
        for cell in result.cells
        if cell.setting[3] == 0.001 and cell.setting[0] == "mnist" and cell.column[0] == "c"
    )
    assert cell.own.n_seeds == 3 and cell.reference.n_seeds == 4 and cell.agrees
    assert result.only_reference == ["mnist/lenet dr_softmax 0.02"]
    assert "Only in the reference study:\n  mnist/lenet dr_softmax 0.02" in compare_with_reference(
        own, tmp_path / "reference"
    )


def test_sample_sizes_are_those_of_the_attack(tmp_path: Path) -> None:
    tables = _copy()
    tables["accuracy"].loc[tables["accuracy"]["attack"] == "cw", "n"] = 200
    own, reference = _studies(tmp_path, tables)
    sizes = {cell.column: cell.own.n_samples for cell in compare(own, reference).cells}
    assert sizes["acc.cw@mean"] == 200 and sizes["acc.pgd@mean"] == 1000 and sizes["clean_accuracy"] == 10000


def test_means_over_other_epsilons_are_not_compared(tmp_path: Path) -> None:
    tables = _copy()
    accuracy = tables["accuracy"]
    pgd = (accuracy["data"] == "mnist") & (accuracy["attack"] == "pgd") & (accuracy["epsilon_label"] == "0.3")
    tables["accuracy"] = accuracy[~pgd]
    own, reference = _studies(tmp_path, tables)
    result = compare(own, reference)
    assert not any(cell.column == "acc.pgd@mean" and cell.setting.data == "mnist" for cell in result.cells)
    assert "mnist/lenet ce acc.pgd@mean: 0.1, 0.2 here, 0.1, 0.2, 0.3 there" in result.not_comparable


def test_verdicts_of_timing_are_told_but_not_counted(tmp_path: Path) -> None:
    tables = _copy()
    claims = tables["claims"]
    claims.loc[(claims["claim"] == "C2") & (claims["data"] == "mnist"), "verdict"] = "supported"
    claims.loc[(claims["claim"] == "C3") & (claims["data"] == "all"), "verdict"] = "not supported"
    own, reference = _studies(tmp_path, tables)
    assert compare(own, reference).verdicts[Claim("C2", "mnist", "lenet")] == ("supported", "not supported")
    text = compare_with_reference(own, tmp_path / "reference")
    assert "Verdicts: 8 of 9 are the same." in text
    assert "  C2 mnist/lenet: supported here, not supported there\n" in text
    assert "  C3 all: not supported here, supported there (depends on the machine, not counted)\n" in text


def test_a_study_with_fewer_tables_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    own, _ = _studies(tmp_path, {"models": TABLES["models"]})
    text = compare_with_reference(own, tmp_path / "reference")
    assert "Verdicts: the two have none in common." in text
    assert "Accuracies: 63 of 63 means" in text and "Not comparable" not in text


def test_no_reference_is_one_line(tmp_path: Path) -> None:
    own = write_study(tmp_path / "mine", TABLES)
    assert compare_with_reference(own, tmp_path / "reference") == (
        "There is no reference study named mine, so nothing to compare with."
    )


def test_a_study_without_models_is_a_clear_error(tmp_path: Path) -> None:
    own, reference = _studies(tmp_path, TABLES)
    (own / "tables" / "models.csv").unlink()
    with pytest.raises(UserError, match=r"models\.csv is missing or empty; evaluate"):
        compare(own, reference)
    (own / "tables" / "models.csv").write_text('run_id,data\n"open,1\n')
    with pytest.raises(UserError, match=r"models\.csv: not a table"):
        compare(own, reference)


def test_needs_no_torch() -> None:
    code = "import sys, drs.comparison; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
