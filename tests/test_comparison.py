"""drs.comparison: when two studies agree, and what is said where they do not."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic import study_tables, write_study

from drs.comparison import COLUMNS, SeedMean, compare_with_reference, comparison_text, half_width, machine_name
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


def _select(table: pd.DataFrame, kind: str, **equal: object) -> pd.DataFrame:
    rows = table[table["kind"] == kind]
    for column, value in equal.items():
        rows = rows[rows[column] == value]
    return rows


def test_a_study_agrees_with_itself(tmp_path: Path) -> None:
    own, reference = _studies(tmp_path, TABLES)
    table = compare_with_reference(own, reference)
    assert list(table.columns) == COLUMNS
    usable = TABLES["models"][TABLES["models"]["excluded"].isna()]
    # clean accuracy and six attacks of nine settings; a setting whose models are all excluded would be missing
    n_figures = 7 * len(usable.groupby(["data", "model", "loss", "loss_weight"]))
    assert len(_select(table, "accuracy", status="agrees")) == n_figures
    assert len(_select(table, "verdict", status="agrees")) == len(TABLES["claims"])
    assert len(_select(table, "time", status="information")) == len(TABLES["timing"])
    assert set(table["status"]) == {"agrees", "information"}
    lines = comparison_text(own, tmp_path / "reference").splitlines()
    assert "Verdicts: 12 of 12 are the same." in lines
    assert f"at most about 5% ({0.05 * n_figures:.1f}) disagree by chance." in "\n".join(lines)
    assert lines[-1] == (
        f"{n_figures} of {n_figures} figures agree with {reference} within their intervals; "
        "verdicts: C1 same, C2 same, C3 same (for information), C4 same, C5 same."
    )


def test_figures_are_the_seed_means_of_the_models(tmp_path: Path) -> None:
    own, reference = _studies(tmp_path, study_tables(seed=1))
    table = compare_with_reference(own, reference)
    row = _select(table, "accuracy", data="mnist", loss_weight=0.05, measure="acc.pgd@mean").iloc[0]
    for side, tables in (("here", study_tables(seed=1)), ("there", TABLES)):
        models = tables["models"]
        usable = models[(models["data"] == "mnist") & (models["loss_weight"] == 0.05) & models["excluded"].isna()]
        assert row[f"n_{side}"] == len(usable) == 3, "one of four seeds is excluded"
        assert row[side] == pytest.approx(usable["acc.pgd@mean"].mean())
    assert row["difference"] == pytest.approx(row["here"] - row["there"])
    assert row["half_width"] > 0 and row["status"] == "agrees"


def test_differences_are_listed_largest_first(tmp_path: Path) -> None:
    tables = _copy()
    models = tables["models"]
    setting = (models["data"] == "mnist") & (models["loss_weight"] == 0.001)
    for column, difference in (("pgd", 0.2), ("fgsm", -0.3), ("cw", 0.4)):
        models.loc[setting, f"acc.{column}@mean"] += difference
    own, reference = _studies(tmp_path, tables)
    differing = _select(compare_with_reference(own, reference), "accuracy", status="differs")
    assert sorted(differing["measure"]) == ["acc.cw@mean", "acc.fgsm@mean", "acc.pgd@mean"]
    assert set(differing["model"]) == {"lenet"} and set(differing["loss_weight"]) == {0.001}
    assert sorted(differing["difference"]) == pytest.approx([-0.3, 0.2, 0.4])
    lines = comparison_text(own, tmp_path / "reference").splitlines()
    shown = [line for line in lines if "points" in line]
    expected = (("cw@mean", "+40.0"), ("fgsm@mean", "-30.0"), ("pgd@mean", "+20.0"))
    for line, (measure, difference) in zip(shown, expected, strict=True):
        assert line.startswith(f"  mnist/lenet dr_softmax 0.001 {measure}:") and f"{difference} points" in line
    assert "n=4" in shown[0] and lines[-1].startswith("60 of 63 figures agree")
    limited = comparison_text(own, tmp_path / "reference", limit=1)
    assert "pgd@mean" not in limited and "and 2 more" in limited


def test_excluded_models_do_not_count(tmp_path: Path) -> None:
    tables = _copy()
    models = tables["models"]
    one = (models["data"] == "mnist") & (models["loss_weight"] == 0.001) & (models["seed"] == 0)
    models.loc[one, "excluded"] = "near chance on clean data"
    models.loc[one, "clean_accuracy"] = 0.1
    gone = (models["data"] == "mnist") & (models["loss_weight"] == 0.02)
    models.loc[gone, "excluded"] = "near chance on clean data"
    own, reference = _studies(tmp_path, tables)
    table = compare_with_reference(own, reference)
    row = _select(table, "accuracy", data="mnist", loss_weight=0.001, measure="clean_accuracy").iloc[0]
    assert (row["n_here"], row["n_there"], row["status"]) == (3, 4, "agrees")
    assert set(_select(table, "accuracy", status="only there")["loss_weight"]) == {0.02}
    text = comparison_text(own, tmp_path / "reference")
    assert "Only in the reference study:\n  mnist/lenet dr_softmax 0.02\n56 of 56 figures" in text


def test_what_only_one_study_has_is_named(tmp_path: Path) -> None:
    tables = _copy()
    models = tables["models"]
    models["acc.square@mean"] = np.where(models["data"] == "cifar10", models["acc.pgd@mean"], np.nan)
    models.loc[models["loss_weight"] == 0.02, "loss_weight"] = 0.03
    tables["claims"] = tables["claims"][tables["claims"]["claim"] != "C4"]
    own, _ = _studies(tmp_path, tables)
    lines = comparison_text(own, tmp_path / "reference").splitlines()
    here, there = lines.index("Only in this study:"), lines.index("Only in the reference study:")
    assert "  cifar10/smallcnn dr_softmax 0.001 square@mean" in lines[here:there]
    assert "  mnist/lenet dr_softmax 0.03" in lines[here:there]
    assert lines[there + 1 : -1] == [
        "  C4 all",
        "  C4 cifar10/smallcnn",
        "  C4 mnist/lenet",
        "  mnist/lenet dr_softmax 0.02",
    ]
    assert "C4" not in lines[-1]


def test_sample_sizes_are_those_of_the_attack(tmp_path: Path) -> None:
    tables = _copy()
    # With equal seeds only the sampling error of the images remains.
    for column in ("acc.cw@mean", "acc.pgd@mean", "clean_accuracy"):
        tables["models"][column] = 0.5
    tables["accuracy"].loc[tables["accuracy"]["attack"] == "cw", "n"] = 200
    own, reference = write_study(tmp_path / "own", tables), write_study(tmp_path / "other", tables)
    table = _select(compare_with_reference(own, reference), "accuracy", data="mnist", loss_weight=0.001)
    widths = table.set_index("measure")["half_width"]
    expected = {"acc.cw@mean": 200, "acc.pgd@mean": 1000, "clean_accuracy": 10000}
    for column, n in expected.items():
        assert widths[column] == pytest.approx(stats.norm.ppf(0.975) * np.sqrt(2 * 0.25 / (4 * n)), rel=1e-6)


def test_means_over_other_epsilons_are_not_compared(tmp_path: Path) -> None:
    tables = _copy()
    accuracy = tables["accuracy"]
    pgd = (accuracy["data"] == "mnist") & (accuracy["attack"] == "pgd") & (accuracy["epsilon_label"] == "0.3")
    tables["accuracy"] = accuracy[~pgd]
    own, reference = _studies(tmp_path, tables)
    table = _select(compare_with_reference(own, reference), "accuracy", measure="acc.pgd@mean")
    assert set(table[table["data"] == "mnist"]["status"]) == {"other epsilons"}
    assert set(table[table["data"] == "cifar10"]["status"]) == {"agrees"}
    assert "  mnist/lenet ce pgd@mean: 0.1, 0.2 here, 0.1, 0.2, 0.3 there\n" in comparison_text(
        own, tmp_path / "reference"
    )


def test_verdicts_of_timing_are_told_but_not_counted(tmp_path: Path) -> None:
    tables = _copy()
    claims = tables["claims"]
    claims.loc[(claims["claim"] == "C2") & (claims["data"] != "cifar10"), "verdict"] = "supported"
    claims.loc[(claims["claim"] == "C3") & (claims["data"] == "all"), "verdict"] = "not supported"
    own, reference = _studies(tmp_path, tables)
    row = _select(compare_with_reference(own, reference), "verdict", claim="C2", data="mnist").iloc[0]
    assert (row["verdict_here"], row["verdict_there"], row["status"]) == ("supported", "not supported", "differs")
    text = comparison_text(own, tmp_path / "reference")
    assert "Verdicts: 10 of 12 are the same." in text
    assert "  C2 mnist/lenet: supported here, not supported there\n" in text
    assert "  C3 all: not supported here, supported there (depends on the machine, not counted)\n" in text
    assert text.endswith("verdicts: C1 same, C2 differs, C3 differs (for information), C4 same, C5 same.")


def test_a_study_with_fewer_tables_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    own, _ = _studies(tmp_path, {"models": TABLES["models"]})
    text = comparison_text(own, tmp_path / "reference")
    assert "Verdicts: the two have none in common." in text
    assert "63 of 63 figures" in text and "Not comparable" not in text


@pytest.mark.parametrize(
    ("gpu", "expected"), [(None, "Some CPU, 2 cores"), ("none", "Some CPU, 2 cores"), ("Some GPU", "Some GPU")]
)
def test_machine_is_the_gpu_or_the_processor(gpu: str | None, expected: str) -> None:
    assert machine_name({"hardware": {"cpu": "Some CPU", "cores": 2, "gpu": gpu}}) == expected


def test_no_reference_is_one_line(tmp_path: Path) -> None:
    own = write_study(tmp_path / "mine", TABLES)
    assert comparison_text(own, tmp_path / "reference") == (
        "There is no reference study named mine, so nothing to compare with."
    )


def test_a_study_without_models_is_a_clear_error(tmp_path: Path) -> None:
    own, reference = _studies(tmp_path, TABLES)
    (own / "tables" / "models.csv").unlink()
    with pytest.raises(UserError, match=r"models\.csv is missing or empty; evaluate"):
        compare_with_reference(own, reference)
    (own / "tables" / "models.csv").write_text('run_id,data\n"open,1\n')
    with pytest.raises(UserError, match=r"models\.csv: not a table"):
        compare_with_reference(own, reference)


def test_needs_no_torch() -> None:
    code = "import sys, drs.comparison; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
