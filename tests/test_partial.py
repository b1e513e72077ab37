"""Partial correlations against plain regressions of ranks, and what their intervals and p-values promise."""

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from drs.coefficients import coefficients, draw_permutations, permutation_p
from drs.partial import (
    ALL_CONTROLS,
    COLUMNS,
    freedman_lane,
    partial_correlation_table,
    partial_from_correlations,
    standard_models,
)
from drs.report_statistics import partial_section

FAST = {"n_bootstrap": 100, "n_permutations": 99}


def _models(seed: int, n: int = 20, data: str = "mnist", statistics: int = 2, attacks: int = 2) -> pd.DataFrame:
    """Every column shares a factor with the controls."""
    rng = np.random.default_rng(seed)
    controls = rng.normal(size=(n, 3)) + rng.normal(size=(n, 1))
    columns = {"clean_accuracy": controls[:, 0], "stat.margin": controls[:, 1], "stat.logit_norm": controls[:, 2]}
    for i in range(statistics):
        columns[f"stat.s{i}"] = controls @ rng.normal(size=3) + 2 * rng.normal(size=n)
    for i in range(attacks):
        noise = rng.normal(size=n)
        columns[f"acc.a{i}@mean"] = np.round(controls.sum(axis=1) + columns[f"stat.s{i % statistics}"] + 2 * noise)
    columns["acc.a0@0.1"] = rng.normal(size=n)
    return pd.DataFrame({"data": data, "model": "net", "excluded": None, "procedure": "standard", **columns})


def _residuals(values: pd.Series, controls: pd.DataFrame) -> np.ndarray:
    design = np.column_stack([np.ones(len(controls)), *(stats.rankdata(controls[name]) for name in controls)])
    ranks = stats.rankdata(values)
    return ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]


def _cell(
    table: pd.DataFrame, controls: str = ALL_CONTROLS, statistic: str = "s0", attack: str = "a0@mean"
) -> pd.Series:
    rows = table[(table["controls"] == controls) & (table["statistic"] == statistic) & (table["attack"] == attack)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_coefficient_is_the_correlation_of_the_residuals_of_ranks() -> None:
    models = _models(0)
    table = partial_correlation_table(models, **FAST)
    assert list(table) == COLUMNS
    assert len(table) == 4 * 2 * 2, "four sets of controls, two statistics, two attacks; no control, no single epsilon"
    for row in table.itertuples():
        names = [{"clean_accuracy": "clean_accuracy"}.get(name, f"stat.{name}") for name in row.controls.split("+")]
        left = _residuals(models[f"stat.{row.statistic}"], models[names])
        right = _residuals(models[f"acc.{row.attack}"], models[names])
        assert row.coefficient == pytest.approx(np.corrcoef(left, right)[0, 1], abs=1e-10)
        assert row.ci_low < row.coefficient < row.ci_high
        assert row.n_models == 20
    np.testing.assert_allclose(table["q_value"], stats.false_discovery_control(table["p_value"]))


def test_one_control_agrees_with_the_published_formula() -> None:
    models = _models(1)
    a, b, c = (models[name] for name in ("stat.s0", "acc.a0@mean", "stat.margin"))
    ab, ac, bc = (stats.spearmanr(*pair)[0] for pair in ((a, b), (a, c), (b, c)))
    expected = (ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2))
    assert _cell(partial_correlation_table(models, **FAST), "margin")["coefficient"] == pytest.approx(expected)


def test_resamples_are_ranked_and_regressed_anew() -> None:
    models = _models(2)
    names = ["clean_accuracy", "stat.margin", "stat.logit_norm", "stat.s0", "acc.a0@mean"]
    values = models[names].to_numpy()
    counts = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), size=15)
    found = partial_from_correlations(coefficients(values, values, counts)["spearman"], 3, 1)
    for draw, count in enumerate(counts):
        rows = models.iloc[np.repeat(np.arange(20), count)]
        left, right = (_residuals(rows[name], rows[names[:3]]) for name in names[3:])
        assert found[draw, 0, 0] == pytest.approx(np.corrcoef(left, right)[0, 1], abs=1e-9)


def test_freedman_lane_agrees_with_regressing_each_order_by_hand() -> None:
    models = _models(3, n=12)
    controls = models[["clean_accuracy", "stat.margin"]]
    left, right = models[["stat.s0", "stat.s1"]], models[["acc.a0@mean", "acc.a1@mean", "acc.a0@0.1"]]
    orders = draw_permutations(12, 9, np.random.default_rng(0))
    found = freedman_lane(controls.to_numpy(), left.to_numpy(), right.to_numpy(), orders)
    design = np.column_stack([np.ones(12), stats.rankdata(controls, axis=0)])
    for draw, order in enumerate(orders):
        for j, name in enumerate(right):
            residuals = _residuals(right[name], controls)
            target = stats.rankdata(right[name]) - residuals + residuals[order]
            again = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
            for i, other in enumerate(left):
                expected = np.corrcoef(_residuals(left[other], controls), again)[0, 1]
                assert found[draw, i, j] == pytest.approx(expected, abs=1e-10)


def test_false_positives_where_the_controls_explain_everything() -> None:
    """5 % of 500 studies of ten models; three standard errors are 2.9 points."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        control = rng.normal(size=(10, 1))
        left, right = (control + 0.5 * rng.normal(size=(10, 1)) for _ in range(2))
        every = np.column_stack([control, left, right])
        observed = partial_from_correlations(coefficients(every, every)["spearman"], 1, 1)[0]
        permuted = freedman_lane(control, left, right, draw_permutations(10, 199, rng))
        hits += permutation_p(observed, permuted)[0, 0] < 0.05
    assert 0.02 <= hits / 500 <= 0.08


@pytest.mark.parametrize(("n", "controls", "exists"), [(8, ALL_CONTROLS, True), (7, ALL_CONTROLS, False),
                                                       (6, "margin", True), (5, "margin", False)])  # fmt: skip
def test_too_few_models_have_no_coefficient(n: int, controls: str, exists: bool) -> None:
    row = _cell(partial_correlation_table(_models(4, n), **FAST), controls)
    assert row["n_models"] == n
    assert np.isfinite(row["coefficient"]) == exists
    assert np.isfinite(row["p_value"]) == exists
    assert np.isfinite(row["q_value"]) == exists


def test_degenerate_regressions_have_no_coefficient() -> None:
    models = _models(5)
    numbers = ["coefficient", "ci_low", "ci_high", "p_value", "q_value"]
    determined = models.assign(**{"stat.s0": np.exp(models["stat.margin"])})
    table = partial_correlation_table(determined, **FAST)
    assert _cell(table, "margin")[numbers].isna().all()
    assert _cell(table)[numbers].isna().all()
    assert _cell(table, "logit_norm")[numbers].notna().all()
    assert _cell(table, statistic="s1")[numbers].notna().all()
    collinear = partial_correlation_table(models.assign(**{"stat.logit_norm": -models["stat.margin"]}), **FAST)
    assert collinear.loc[collinear["controls"] == ALL_CONTROLS, numbers].isna().all(axis=None)
    assert collinear.loc[collinear["controls"] == "margin", numbers].notna().all(axis=None)
    constant = partial_correlation_table(models.assign(**{"acc.a0@mean": 0.0}), **FAST)
    assert constant.loc[constant["attack"] == "a0@mean", numbers].isna().all(axis=None)
    assert constant.loc[constant["attack"] == "a1@mean", numbers].notna().all(axis=None)


def test_only_usable_models_of_the_standard_procedure_count() -> None:
    models = _models(6)
    others = _models(7, n=8)
    others["procedure"] = ["trades"] * 3 + ["adversarial"] * 3 + ["standard"] * 2
    others["excluded"] = [None] * 6 + ["near chance on clean data"] * 2
    both = pd.concat([others, models], ignore_index=True)
    expected = partial_correlation_table(models, **FAST)
    pd.testing.assert_frame_equal(partial_correlation_table(both, **FAST), expected)
    pd.testing.assert_frame_equal(partial_correlation_table(models.drop(columns="procedure"), **FAST), expected)
    assert len(standard_models(both)) == 20


def test_missing_values_are_left_out() -> None:
    models = _models(8)
    models.loc[[0, 3], "acc.a0@mean"] = [np.nan, np.inf]
    models.loc[5, "stat.margin"] = np.nan
    table = partial_correlation_table(models, **FAST)
    for attack, kept in (("a0@mean", models.drop(index=[0, 3, 5])), ("a1@mean", models.drop(index=5))):
        row = _cell(table, "clean_accuracy", attack=attack)
        left, right = (_residuals(kept[name], kept[["clean_accuracy"]]) for name in ("stat.s0", f"acc.{attack}"))
        assert row["n_models"] == len(kept)
        assert row["coefficient"] == pytest.approx(np.corrcoef(left, right)[0, 1])
    absent = partial_correlation_table(models.drop(columns="stat.logit_norm"), **FAST)
    assert set(absent["controls"]) == {"clean_accuracy", "margin"}


def test_an_empty_study_gives_an_empty_table() -> None:
    for models in (pd.DataFrame(), _models(0).iloc[:0], _models(0).assign(excluded="near chance")):
        table = partial_correlation_table(models, **FAST)
        assert table.empty
        assert list(table) == COLUMNS


def test_the_seed_decides_and_other_groups_do_not() -> None:
    one, other = _models(9), _models(10, data="cifar10")
    both = partial_correlation_table(pd.concat([other, one], ignore_index=True), **FAST)
    numbers = ["coefficient", "ci_low", "ci_high", "p_value"]
    alone = partial_correlation_table(one, **FAST)
    own = both[both["data"] == "mnist"].reset_index(drop=True)
    pd.testing.assert_frame_equal(own[numbers], alone[numbers])
    assert not partial_correlation_table(one, seed=1, **FAST)[numbers].equals(alone[numbers])


def test_a_whole_study_takes_seconds() -> None:
    models = pd.concat([_models(0, 24, "mnist", 7, 10), _models(1, 24, "cifar10", 7, 10)], ignore_index=True)
    began = time.process_time()
    table = partial_correlation_table(models)
    assert len(table) == 2 * 4 * 7 * 10
    assert time.process_time() - began < 10


def test_section_shows_the_sets_of_controls_beside_each_other() -> None:
    models = _models(11).rename(columns={"stat.s0": "stat.nonlabel_var_log"})
    table = partial_correlation_table(models, **FAST)
    text = partial_section(table)
    primary, others = text.split("### The strongest other statistic")
    rows = [[cell.strip() for cell in line.split("|")] for line in primary.splitlines() if line.startswith("| mnist")]
    assert [row[2] for row in rows] == ["a0", "a1"]
    for row, attack in zip(rows, ("a0@mean", "a1@mean"), strict=True):
        sets = [ALL_CONTROLS, "clean_accuracy", "margin", "logit_norm"]
        shown = [_cell(table, controls, "nonlabel_var_log", attack) for controls in sets]
        values = [f"{value['coefficient']:.2f}".replace("-", "−") for value in shown]
        assert row[3] == "20"
        assert row[4].split(" ")[0] == values[0]
        assert "[" in row[4], "with its interval"
        assert row[7:10] == values[1:]
    assert others.count("| s1 |") == 2
    assert "too few models" in partial_section(partial_correlation_table(models.iloc[:3], **FAST)).lower()
    assert "too few models" in partial_section(partial_correlation_table(models.iloc[:0], **FAST)).lower()


def test_section_without_all_controls_shows_what_there_is() -> None:
    models = _models(12).rename(columns={"stat.s0": "stat.nonlabel_var_log"}).drop(columns="stat.logit_norm")
    text = partial_section(partial_correlation_table(models, **FAST))
    row = next(line for line in text.splitlines() if line.startswith("| mnist"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[4:7] == ["–", "–", "–"]
    assert cells[9] == "–"
    assert "–" not in cells[7:9]
    assert "No other statistic has a coefficient" in text
