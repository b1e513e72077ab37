"""Granulated coefficients against a count of pairs by hand, and what their intervals and p-values promise."""

from collections.abc import Callable
from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from drs.granulated import COLUMNS, granulated_table
from drs.report_statistics import granulated_section

FAST = {"n_permutations": 99}
SETTINGS = [("ce", 0.0), ("dr_softmax", 0.001), ("dr_softmax", 0.005), ("dr_softmax", 0.02), ("gce", 1.0)]


def _models(
    seed: int, n_seeds: int = 4, settings: list[tuple[str, float]] = SETTINGS, data: str = "mnist"
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        {"data": data, "model": "net", "loss": loss, "loss_weight": weight, "seed": number, "excluded": None,
         "procedure": "standard", "stat.spread": rng.normal(), "stat.margin": float(rng.integers(3)),
         "clean_accuracy": rng.normal(), "acc.pgd@mean": rng.normal(), "acc.pgd@0.1": rng.normal()}
        for loss, weight in settings for number in range(n_seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _cell(table: pd.DataFrame, axis: str, statistic: str = "spread", attack: str = "pgd@mean") -> pd.Series:
    rows = table[(table["axis"] == axis) & (table["statistic"] == statistic) & (table["attack"] == attack)]
    assert len(rows) == 1
    return rows.iloc[0]


def _by_hand(models: pd.DataFrame, axis: str, left: str, right: str) -> tuple[float, int, int]:
    """Coefficient, pairs and models, by going through all pairs."""
    cells: dict[object, list[float]] = {}
    used = set()
    kept = models.dropna(subset=[left, right])
    for (i, a), (j, b) in combinations(kept.iterrows(), 2):
        same_loss, same_seed = a["loss"] == b["loss"], a["seed"] == b["seed"]
        same_weight = a["loss_weight"] == b["loss_weight"]
        cell: object
        if axis == "weight" and same_loss and same_seed and not same_weight:
            cell = (a["loss"], a["seed"])
        elif axis == "seed" and same_loss and same_weight and not same_seed:
            cell = (a["loss"], a["loss_weight"])
        elif axis == "loss" and same_seed and not same_loss and "ce" in (a["loss"], b["loss"]):
            cell = a["seed"]
        else:
            continue
        used |= {i, j}
        cells.setdefault(cell, []).append(float(np.sign(a[left] - b[left]) * np.sign(a[right] - b[right])))
    return float(np.mean([np.mean(own) for own in cells.values()])), sum(map(len, cells.values())), len(used)


def _incomplete(seed: int) -> pd.DataFrame:
    """Some models were never trained, some lack a value."""
    models = _models(seed).drop(index=[1, 6, 13])
    models.loc[[5, 10], "acc.pgd@mean"] = [np.nan, np.inf]
    models.loc[8, "stat.spread"] = np.nan
    return models


@pytest.mark.parametrize("axis", ["weight", "seed", "loss"])
@pytest.mark.parametrize("make", [_models, _incomplete])
def test_coefficient_counts_the_pairs_of_each_cell(make: Callable[[int], pd.DataFrame], axis: str) -> None:
    models = make(0)
    table = granulated_table(models, **FAST)
    assert list(table) == COLUMNS
    finite = models.replace(np.inf, np.nan)
    for statistic in ("spread", "margin"):
        for attack, column in (("pgd@mean", "acc.pgd@mean"), ("clean", "clean_accuracy")):
            coefficient, n_pairs, n_models = _by_hand(finite, axis, f"stat.{statistic}", column)
            row = _cell(table, axis, statistic, attack)
            assert row["coefficient"] == pytest.approx(coefficient, abs=1e-12)
            assert (row["n_pairs"], row["n_models"]) == (n_pairs, n_models)
    assert set(table["attack"]) == {"pgd@mean", "clean"}, "no single epsilon"


def test_granulated_is_the_mean_of_weight_and_seed_without_loss() -> None:
    table = granulated_table(_incomplete(1), **FAST)
    parts = [_cell(table, axis) for axis in ("weight", "seed")]
    row = _cell(table, "granulated")
    assert row["coefficient"] == pytest.approx((parts[0]["coefficient"] + parts[1]["coefficient"]) / 2)
    assert row["n_pairs"] == parts[0]["n_pairs"] + parts[1]["n_pairs"]
    assert row["n_models"] == 14  # all but the three never trained, and the three without a value


def test_one_cell_without_ties_is_kendalls_tau() -> None:
    models = _models(2, 1, [("dr_softmax", 0.001 * weight) for weight in range(1, 10)])
    row = _cell(granulated_table(models, **FAST), "weight")
    assert row["coefficient"] == pytest.approx(stats.kendalltau(models["stat.spread"], models["acc.pgd@mean"])[0])
    assert np.isnan(row["ci_low"]), "one seed has no interval"


def test_interval_is_the_jackknife_over_seeds_of_published_formula() -> None:
    models = _models(3, 5).drop(index=[1, 7])
    models.loc[16, "acc.pgd@mean"] = np.nan
    table = granulated_table(models, **FAST)
    seeds = [models[models["seed"] != seed] for seed in range(5)]
    for axis in ("weight", "seed", "granulated", "loss"):
        left_out = np.array([_cell(granulated_table(part, n_permutations=1), axis)["coefficient"] for part in seeds])
        half = stats.t.ppf(0.975, 4) * np.sqrt(4 / 5 * ((left_out - left_out.mean()) ** 2).sum())
        row = _cell(table, axis)
        assert row["ci_low"] == pytest.approx(max(row["coefficient"] - half, -1))
        assert row["ci_high"] == pytest.approx(min(row["coefficient"] + half, 1))
    assert np.isnan(_cell(granulated_table(_incomplete(3), **FAST), "weight")["ci_low"]), "two seeds have a pair"
    two = granulated_table(models[models["seed"] < 2], **FAST)
    assert two[["ci_low", "ci_high"]].isna().all(axis=None)
    assert two["coefficient"].notna().any()


def test_p_value_is_that_of_all_orders() -> None:
    """Four weights and three seeds: 24 and 6 orders, all tried here by hand."""
    settings = [("dr_softmax", 0.001 * weight) for weight in range(1, 5)]
    models = _models(4, 3, settings)
    models["stat.spread"] += 2 * models.groupby("loss_weight").ngroup()
    models["acc.pgd@mean"] += 2 * models.groupby("loss_weight").ngroup()
    found = granulated_table(models, n_permutations=9999)
    accuracy = models["acc.pgd@mean"].to_numpy().reshape(4, 3)
    for axis, orders in (("weight", permutations(range(4))), ("seed", permutations(range(3)))):
        values = []
        for order in orders:
            moved = accuracy[list(order)] if axis == "weight" else accuracy[:, list(order)]
            values.append(abs(_by_hand(models.assign(moved=moved.ravel()), axis, "stat.spread", "moved")[0]))
        exact = np.mean(np.array(values) >= values[0] - 1e-12)
        assert _cell(found, axis)["p_value"] == pytest.approx(exact, abs=3 * np.sqrt(exact * (1 - exact) / 9999) + 1e-3)


def test_a_chance_difference_between_weights_counts_once_however_many_seeds() -> None:
    """Accuracy differs between weights by chance, alike at every seed; three standard errors of 5 % are 6.0 points."""
    hits = {"weight": 0, "seed": 0, "granulated": 0}
    for seed in range(120):
        rng = np.random.default_rng(seed)
        models = _models(seed, 4, [("dr_softmax", 0.001 * weight) for weight in range(1, 7)])
        weight, number = models.groupby("loss_weight").ngroup().to_numpy(), models["seed"].to_numpy()
        # Seeds have an effect of their own, the same at every weight.
        models["stat.spread"] = weight + rng.normal(size=4)[number] + 0.3 * models["stat.spread"]
        models["acc.pgd@mean"] = 2 * rng.normal(size=6)[weight] + rng.normal(size=4)[number] + 0.3 * rng.normal(size=24)
        table = granulated_table(models.drop(columns=["stat.margin", "clean_accuracy"]), n_permutations=99)
        for axis in hits:
            hits[axis] += _cell(table, axis)["p_value"] < 0.05
    assert all(count / 120 <= 0.11 for count in hits.values()), hits


def test_a_relation_along_every_axis_is_found() -> None:
    models = _models(5, 5, [("dr_softmax", 0.001 * weight) for weight in range(1, 7)])
    models["acc.pgd@mean"] = -models["stat.spread"]
    table = granulated_table(models, n_permutations=999)
    for axis in ("weight", "seed", "granulated"):
        assert _cell(table, axis)["coefficient"] == -1
        assert _cell(table, axis)["p_value"] < 0.05
    assert np.isnan(_cell(table, "loss")["coefficient"]), "one loss has no pair of losses"


def test_an_axis_without_pairs_or_without_differences_has_no_coefficient() -> None:
    one_seed = granulated_table(_models(6, 1), **FAST)
    for axis, exists in (("weight", True), ("seed", False), ("granulated", False), ("loss", True)):
        row = _cell(one_seed, axis)
        assert np.isfinite(row["coefficient"]) == exists
        assert np.isfinite(row["p_value"]) == exists
    constant = granulated_table(_models(7).assign(**{"acc.pgd@mean": 0.0}), **FAST)
    own = constant[constant["attack"] == "pgd@mean"]
    assert own[["coefficient", "ci_low", "ci_high", "p_value"]].isna().all(axis=None)
    assert (own["n_pairs"] > 0).all()
    models = _models(8)
    models["stat.spread"] = models.groupby("loss_weight").ngroup().astype(float)  # seeds do not change it
    assert np.isnan(_cell(granulated_table(models, **FAST), "seed")["coefficient"])
    assert np.isfinite(_cell(granulated_table(models, **FAST), "weight")["coefficient"])


def test_only_usable_models_of_the_standard_procedure_count_and_twins_are_averaged() -> None:
    models = _models(9)
    expected = granulated_table(models, **FAST)
    reference = _models(10).assign(procedure="trades", loss="trades")
    dead = _models(11).assign(excluded="near chance on clean data")
    pd.testing.assert_frame_equal(granulated_table(pd.concat([models, reference, dead]), **FAST), expected)
    columns = [name for name in models if name[:4] in ("stat", "acc.", "clea")]
    twins = [models.assign(**{name: models[name] + shift for name in columns}) for shift in (-1, 1)]
    found = granulated_table(pd.concat(twins, ignore_index=True), **FAST)
    pd.testing.assert_series_equal(found["coefficient"], expected["coefficient"])


def test_an_empty_study_gives_an_empty_table() -> None:
    for models in (pd.DataFrame(), _models(0).iloc[:0], _models(0).assign(excluded="near chance")):
        table = granulated_table(models, **FAST)
        assert table.empty
        assert list(table) == COLUMNS


def test_the_seed_decides_and_other_groups_and_the_order_of_rows_do_not() -> None:
    one, other = _models(12), _models(13, data="cifar10")
    alone = granulated_table(one, **FAST)
    both = granulated_table(pd.concat([other, one], ignore_index=True), **FAST)
    pd.testing.assert_frame_equal(both[both["data"] == "mnist"].reset_index(drop=True), alone)
    pd.testing.assert_frame_equal(granulated_table(one.sample(frac=1, random_state=0), **FAST), alone)
    assert not granulated_table(one, seed=1, **FAST)["p_value"].equals(alone["p_value"])


def test_seeds_that_all_agree_give_no_interval() -> None:
    models = _models(14)
    models["acc.pgd@mean"] = models["stat.spread"] = models.groupby("loss_weight").ngroup().astype(float)
    row = _cell(granulated_table(models, **FAST), "weight")
    assert row["coefficient"] == 1
    assert row[["ci_low", "ci_high"]].isna().all(), "not [1, 1], as if nothing else were possible"


def test_equal_values_rounded_differently_are_a_tie() -> None:
    models = _models(15, 3, [("dr_softmax", 0.1), ("dr_softmax", 0.2)])
    tied = models["seed"] == 0
    models.loc[tied, "acc.pgd@mean"] = [0.1 + 0.2, 0.3]
    assert 0.1 + 0.2 != 0.3
    changed = models.copy()
    changed.loc[tied, "acc.pgd@mean"] = [0.3, 0.3]
    assert _cell(granulated_table(models, **FAST), "weight").equals(_cell(granulated_table(changed, **FAST), "weight"))


def test_section_shows_the_axes_beside_each_other() -> None:
    models = _models(16).rename(columns={"stat.spread": "stat.nonlabel_var_log"})
    table = granulated_table(models, **FAST)
    text = granulated_section(table)
    primary, others = text.split("### The strongest other statistic")
    rows = [[cell.strip() for cell in line.split("|")] for line in primary.splitlines() if line.startswith("| mnist")]
    assert [row[2] for row in rows] == ["clean", "PGD"]
    for row, attack in zip(rows, ("clean", "pgd@mean"), strict=True):
        shown = [_cell(table, axis, "nonlabel_var_log", attack) for axis in ("granulated", "weight", "seed", "loss")]
        assert row[3] == "20"
        for cell, value in zip((row[4], *row[6:9]), shown, strict=True):
            assert cell.startswith(f"{value['coefficient']:.2f}".replace("-", "−"))
        assert row[5] == f"{shown[0]['p_value']:.3f}"
    assert "| margin |" in others
    assert "no two models" in granulated_section(granulated_table(models.iloc[:1], **FAST)).lower()
    assert "no two models" in granulated_section(granulated_table(models.iloc[:0], **FAST)).lower()
