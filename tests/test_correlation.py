"""Correlations against scipy, and what intervals, p-values and pooling promise."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from drs.coefficients import (
    METHODS,
    bca_interval,
    coefficients,
    draw_counts,
    draw_permutations,
    permutation_p,
    permuted_coefficients,
)
from drs.correlation import benjamini_hochberg, correlate, correlate_settings, correlation_table
from drs.selection import usable_models

SCIPY: dict[str, Callable[..., tuple[float, float]]] = {
    "spearman": stats.spearmanr,
    "pearson": stats.pearsonr,
    "kendall": stats.kendalltau,
}
FAST = {"n_bootstrap": 200, "n_permutations": 199}


def _columns(seed: int, n: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """Two columns and three: with ties, tiny, shifted far from zero."""
    rng = np.random.default_rng(seed)
    left = np.column_stack([rng.integers(0, 5, n), 1e-9 * rng.normal(size=n)]).astype(float)
    right = np.column_stack([rng.integers(0, 3, n), left[:, 1] * 1e9 + rng.normal(size=n), 100 + rng.normal(size=n)])
    return left, right


def _models(seed: int, n: int, data: str = "mnist", relation: float = 0.0, shift: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    statistic = rng.normal(size=n)
    accuracy = relation * statistic + np.sqrt(1 - relation**2) * rng.normal(size=n)
    return pd.DataFrame({
        "data": data, "model": "net", "loss": "dr_softmax", "loss_weight": 0.01 * np.arange(n), "seed": 0,
        "stat.spread": shift + statistic, "acc.pgd@mean": shift + accuracy, "acc.pgd@0.1": accuracy,
        "clean_accuracy": rng.normal(size=n), "excluded": None,
    })  # fmt: skip


def _cell(table: pd.DataFrame, data: str = "mnist", attack: str = "pgd@mean", method: str = "spearman") -> pd.Series:
    rows = table[(table["data"] == data) & (table["attack"] == attack) & (table["method"] == method)]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_coefficients_agree_with_scipy(method: str, seed: int) -> None:
    left, right = _columns(seed)
    found = coefficients(left, right)[method][0]
    for i in range(2):
        for j in range(3):
            assert found[i, j] == pytest.approx(SCIPY[method](left[:, i], right[:, j])[0], abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_counted_rows_are_repeated_rows(method: str) -> None:
    left, right = _columns(3)
    counts = draw_counts(17, 20, np.random.default_rng(0))
    assert (counts.sum(axis=1) == 17).all()
    found = coefficients(left, right, counts)[method]
    for draw, count in enumerate(counts.astype(int)):
        rows = np.repeat(np.arange(17), count)
        for i in range(2):
            for j in range(3):
                assert found[draw, i, j] == pytest.approx(SCIPY[method](left[rows, i], right[rows, j])[0], abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_permuted_coefficients_agree_with_scipy(method: str) -> None:
    left, right = _columns(4)
    orders = np.array([np.random.default_rng(i).permutation(17) for i in range(10)])
    found = permuted_coefficients(left, right, orders)[method]
    assert found.shape == (10, 2, 3)
    for draw, order in enumerate(orders):
        for i in range(2):
            for j in range(3):
                assert found[draw, i, j] == pytest.approx(SCIPY[method](left[order, i], right[:, j])[0], abs=1e-12)


def test_long_inputs_are_cut_into_chunks_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = _columns(5)
    counts = draw_counts(17, 30, np.random.default_rng(1))
    orders = np.array([np.random.default_rng(i).permutation(17) for i in range(30)])
    whole = coefficients(left, right, counts), permuted_coefficients(left, right, orders)
    monkeypatch.setattr("drs.coefficients._CHUNK_VALUES", 1000)
    for before, after in zip(
        whole, (coefficients(left, right, counts), permuted_coefficients(left, right, orders)), strict=True
    ):
        for method in METHODS:
            np.testing.assert_allclose(after[method], before[method], atol=1e-14)


def test_interval_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=12)
    y = x + 0.7 * rng.normal(size=12)

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return stats.pearsonr(x, y, axis=axis).statistic

    theirs = stats.bootstrap((x, y), statistic, paired=True, method="BCa", rng=np.random.default_rng(1))
    models = pd.DataFrame({"stat.spread": x, "acc.pgd@mean": y})
    found = correlate(models, "stat.spread", "acc.pgd@mean", method="pearson", n_bootstrap=9999, n_permutations=1)
    assert found.ci_low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert found.ci_high == pytest.approx(theirs.confidence_interval.high, abs=0.004)


def test_correction_of_the_interval() -> None:
    """Draws off-centre and influence askew, put through the published formula by hand."""
    rng = np.random.default_rng(0)
    draws, influence, observed = rng.beta(5, 2, 4999), rng.exponential(size=15) ** 3, 0.65
    low, high = bca_interval(np.array([[observed]]), draws[:, None, None], influence[:, None, None])
    bias = stats.norm.ppf((draws < observed).mean())
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    assert abs(bias) > 0.1
    assert abs(acceleration) > 0.03
    for bound, tail in ((low, -1.96), (high, 1.96)):
        level = stats.norm.cdf(bias + (bias + tail) / (1 - acceleration * (bias + tail)))
        assert bound[0, 0] == pytest.approx(np.quantile(draws, level), abs=1e-4)
    flat = bca_interval(np.ones((1, 1)), np.ones((50, 1, 1)), np.zeros((15, 1, 1)))
    assert flat[0] == flat[1] == 1


@pytest.mark.parametrize(("relation", "n"), [(0.0, 24), (0.8, 12)])
def test_intervals_cover_the_true_coefficient(relation: float, n: int) -> None:
    """95 % intervals of 250 studies; three standard errors of that share are 4 points."""
    true = 6 / np.pi * np.arcsin(relation / 2)  # Spearman's rho of a bivariate normal distribution
    covered = 0
    for seed in range(250):
        found = correlate(
            _models(seed, n, relation=relation), "stat.spread", "acc.pgd@mean", n_bootstrap=400, n_permutations=1
        )
        covered += found.ci_low <= true <= found.ci_high
    assert 0.90 <= covered / 250 <= 0.995


def test_false_positives_of_the_permutation_test() -> None:
    """5 % of 600 studies without a relation; three standard errors are 2.7 points."""
    rng = np.random.default_rng(0)
    hits = {(method, side): 0 for method in METHODS for side in ("two-sided", "greater")}
    for _ in range(600):
        left, right = rng.normal(size=(9, 1)), rng.integers(0, 4, (9, 1)).astype(float)
        observed = coefficients(left, right)
        permuted = permuted_coefficients(left, right, draw_permutations(9, 199, rng))
        for method, side in hits:
            hits[method, side] += permutation_p(observed[method][0], permuted[method], alternative=side)[0, 0] < 0.05
    for name, count in hits.items():
        assert 0.02 <= count / 600 <= 0.08, name


def test_one_sided_p_follows_the_sign() -> None:
    up = correlate(_models(0, 20, relation=0.9), "stat.spread", "acc.pgd@mean", **FAST)
    down = correlate(_models(0, 20, relation=-0.9), "stat.spread", "acc.pgd@mean", **FAST)
    assert up.p_greater == up.p_value == 1 / 200
    assert down.p_value == 1 / 200
    assert down.p_greater > 0.99


def test_settings_are_permuted_exactly() -> None:
    rng = np.random.default_rng(2)
    models = pd.concat([_models(seed, 6) for seed in range(3)], ignore_index=True)  # six weights, three seeds
    models["acc.pgd@mean"] = rng.normal(size=18)
    found = correlate_settings(models, "stat.spread", "acc.pgd@mean")
    means = models.groupby("loss_weight")[["stat.spread", "acc.pgd@mean"]].mean().to_numpy().T
    assert found.n == 6
    assert found.coefficient == pytest.approx(stats.spearmanr(*means)[0])
    for alternative, p in (("two-sided", found.p_value), ("greater", found.p_greater)):

        def statistic(x: np.ndarray, y: np.ndarray = means[1], two_sided: bool = alternative == "two-sided") -> float:
            rho = stats.spearmanr(x, y)[0]
            return abs(rho) if two_sided else rho

        test = stats.permutation_test((means[0],), statistic, permutation_type="pairings", alternative="greater")
        assert p == pytest.approx(test.pvalue)


@pytest.mark.parametrize("weights", [2, 3, 9])
def test_few_and_many_settings(weights: int) -> None:
    models = _models(0, weights, relation=0.95)
    models["acc.pgd@mean"] = models["stat.spread"]
    found = correlate_settings(models, "stat.spread", "acc.pgd@mean")
    assert found.n == weights
    if weights == 2:
        assert np.isnan(found.coefficient)
    else:
        assert found.coefficient == pytest.approx(1)
        assert found.p_value == (pytest.approx(2 / 6) if weights == 3 else pytest.approx(1e-4))


def test_seeds_do_not_make_a_chance_difference_between_settings_significant() -> None:
    """Accuracy differs between six settings by chance, the same at every seed: only p over settings is honest."""
    found = {"models as settings": [], "models": [], "settings": []}
    pair = "stat.spread", "acc.pgd@mean"
    for seed in range(120):
        rng = np.random.default_rng(seed)
        setting = np.repeat(np.arange(6), 4)
        models = pd.DataFrame({
            "loss": "dr_softmax", "loss_weight": 0.01 * setting, "stat.spread": -setting + rng.normal(0, 0.2, 24),
            "acc.pgd@mean": rng.normal(size=6)[setting] + rng.normal(0, 0.5, 24),
        })  # fmt: skip
        found["models as settings"].append(correlate(models[list(pair)], *pair, n_bootstrap=1, n_permutations=199))
        found["models"].append(correlate(models, *pair, n_bootstrap=1, n_permutations=199))
        found["settings"].append(correlate_settings(models, *pair))
    shares = {name: np.mean([one.p_value < 0.05 for one in own]) for name, own in found.items()}
    assert shares["models as settings"] > 0.15
    assert shares["models"] == shares["settings"] <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 120)


def test_benjamini_hochberg_agrees_with_scipy_and_skips_missing() -> None:
    p_values = pd.Series([0.01, np.nan, 0.04, 0.03, 0.2, np.nan, 0.005], index=list("abcdefg"))
    known = p_values.dropna()
    found = benjamini_hochberg(p_values)
    assert found.isna().equals(p_values.isna())
    np.testing.assert_allclose(found[known.index], stats.false_discovery_control(known))
    assert benjamini_hochberg(pd.Series([np.nan])).isna().all()


def test_table_agrees_with_scipy_in_every_cell() -> None:
    models = pd.concat([_models(0, 12, relation=0.5), _models(1, 7, "cifar10")], ignore_index=True)
    table = correlation_table(models, **FAST)
    for row in table[table["data"] != "pooled"].itertuples():
        group = models[models["data"] == row.data]
        column = "clean_accuracy" if row.attack == "clean" else f"acc.{row.attack}"
        assert row.coefficient == pytest.approx(SCIPY[row.method](group["stat.spread"], group[column])[0], abs=1e-12)
        assert row.n_models == len(group)
        assert row.ci_low <= row.coefficient <= row.ci_high
    assert set(table["attack"]) == {"clean", "pgd@mean", "pgd@0.1"}
    assert set(table.loc[table["data"] == "pooled", "attack"]) == {"clean", "pgd@mean"}
    for _, rows in table.groupby("method"):
        np.testing.assert_allclose(rows["q_value"], stats.false_discovery_control(rows["p_value"]))


def test_pooled_is_the_coefficient_of_values_standardised_within_groups() -> None:
    models = pd.concat([_models(0, 12, relation=0.5), _models(1, 7, "cifar10", relation=-0.3)], ignore_index=True)
    pair = ["stat.spread", "acc.pgd@mean"]
    table = correlation_table(models, **FAST)
    standardised = models.groupby("data")[pair].transform(lambda c: (c - c.mean()) / c.std(ddof=0))
    ranks = (
        models.groupby("data")[pair].rank().groupby(models["data"]).transform(lambda c: (c - c.mean()) / c.std(ddof=0))
    )
    for method, values in (("pearson", standardised), ("spearman", ranks)):
        row = _cell(table, "pooled", method=method)
        assert row["coefficient"] == pytest.approx(stats.pearsonr(values[pair[0]], values[pair[1]])[0], abs=1e-12)
        assert row["n_models"] == 19
    taus = [stats.kendalltau(*group[pair].to_numpy().T)[0] for _, group in models.groupby("data", sort=False)]
    assert _cell(table, "pooled", method="kendall")["coefficient"] == pytest.approx((12 * taus[0] + 7 * taus[1]) / 19)


@pytest.mark.parametrize("method", METHODS)
def test_a_difference_between_datasets_makes_no_pooled_correlation(method: str) -> None:
    models = pd.concat([_models(5, 60), _models(6, 60, "cifar10", shift=100.0)], ignore_index=True)
    assert SCIPY[method](models["stat.spread"], models["acc.pgd@mean"])[0] > 0.4, "the shift must be large"
    row = _cell(correlation_table(models, **FAST), "pooled", method=method)
    assert abs(row["coefficient"]) < 0.2
    assert row["ci_low"] < 0 < row["ci_high"]
    assert row["p_value"] > 0.05


def test_pooled_false_positives() -> None:
    """5 % of 60 studies; three standard errors are 8.4 points."""
    hits = 0
    for seed in range(60):
        models = pd.concat([_models(seed, 8), _models(1000 + seed, 6, "cifar10", shift=9.0)], ignore_index=True)
        models = models.drop(columns=["acc.pgd@0.1", "clean_accuracy"])
        table = correlation_table(models, n_bootstrap=4, n_permutations=99, seed=seed)
        hits += _cell(table, "pooled")["p_value"] < 0.05
    assert hits / 60 <= 0.134


def test_pooled_needs_two_groups_with_a_coefficient() -> None:
    one = _models(0, 8)
    assert "pooled" not in set(correlation_table(one, **FAST)["data"])
    constant = _models(1, 8, "cifar10").assign(**{"acc.pgd@mean": 0.0})
    table = correlation_table(pd.concat([one, constant], ignore_index=True), **FAST)
    assert set(table.loc[table["data"] == "pooled", "attack"]) == {"clean"}
    third = _models(2, 5, "digits")
    table = correlation_table(pd.concat([one, constant, third], ignore_index=True), **FAST)
    row = _cell(table, "pooled")
    assert row["n_models"] == 13
    mean = (8 * _cell(table)["coefficient"] + 5 * _cell(table, "digits")["coefficient"]) / 13
    assert row["coefficient"] == pytest.approx(mean)


def test_a_constant_column_has_no_coefficient_and_stays_out_of_the_correction() -> None:
    models = _models(0, 10)
    table = correlation_table(models.assign(**{"acc.pgd@0.1": 0.3}), **FAST)
    for method in METHODS:
        row = _cell(table, attack="pgd@0.1", method=method)
        assert row["n_models"] == 10
        assert row[["coefficient", "ci_low", "ci_high", "p_value", "q_value"]].isna().all()
    without = correlation_table(models.drop(columns="acc.pgd@0.1"), **FAST)
    assert _cell(table)["q_value"] == _cell(without)["q_value"]


def test_degenerate_resamples_are_dropped_and_counted() -> None:
    models = _models(0, 5).assign(**{"acc.pgd@mean": [0.0, 0.0, 0.0, 0.0, 1.0]})
    row = _cell(correlation_table(models, **FAST))
    assert 50 < row["n_draws"] < 200  # a third of the resamples miss the only value that differs
    assert np.isnan([row["ci_low"], row["ci_high"]]).all(), "those that are left say where it is, not how sure that is"
    more = _models(0, 6).assign(**{"acc.pgd@mean": [0.0, 0.0, 0.0, 0.0, 1.0, 2.0]})
    row = _cell(correlation_table(more, **FAST))
    assert row["n_draws"] < 200 and row["ci_low"] < row["coefficient"] < row["ci_high"]


def test_interval_without_width_or_without_its_coefficient_is_none() -> None:
    draws = np.random.default_rng(0).normal(0.3, 0.1, (200, 1, 1))
    none = np.zeros((9, 1, 1))
    for observed, drawn, exists in (
        (0.3, draws, True), (0.65, np.full_like(draws, 0.65), False), (1.0, np.ones_like(draws), True),
        (0.9, draws, False),
    ):  # fmt: skip
        low, high = bca_interval(np.full((1, 1), observed), drawn, none)
        assert np.isfinite([low, high]).all() == exists, observed


def test_excluded_models_never_count() -> None:
    models = _models(0, 10)
    dead = _models(1, 3).assign(excluded="near chance on clean data", **{"acc.pgd@mean": 50.0})
    both = pd.concat([models, dead], ignore_index=True)
    pd.testing.assert_frame_equal(correlation_table(both, **FAST), correlation_table(models, **FAST))
    counted = correlation_table(both.assign(excluded=None), **FAST)
    assert _cell(counted)["coefficient"] != _cell(correlation_table(models, **FAST))["coefficient"]
    assert correlate(both, "stat.spread", "acc.pgd@mean", **FAST).n == 10


@pytest.mark.parametrize("blank", [None, np.nan, "", " "])
def test_a_blank_reason_excludes_nothing(blank: object) -> None:
    models = _models(0, 4)
    models["excluded"] = pd.Series([blank, "diverged", blank, blank], dtype=object)
    assert list(usable_models(models).index) == [0, 2, 3]
    assert len(usable_models(models.drop(columns="excluded"))) == 4


def test_missing_values_are_left_out_pair_by_pair() -> None:
    models = _models(0, 12)
    models.loc[[1, 4], "acc.pgd@mean"] = [np.nan, np.inf]
    table = correlation_table(models, **FAST)
    kept = models.drop(index=[1, 4])
    row = _cell(table, method="kendall")
    assert row["n_models"] == 10
    assert row["coefficient"] == pytest.approx(stats.kendalltau(kept["stat.spread"], kept["acc.pgd@mean"])[0])
    assert _cell(table, attack="pgd@0.1")["n_models"] == 12


def test_small_groups_and_absent_columns_give_no_row() -> None:
    models = pd.concat([_models(0, 8), _models(1, 3, "digits"), _models(2, 8, "cifar10")], ignore_index=True)
    models["acc.fgsm@8/255"] = np.where(models["data"] == "cifar10", np.random.default_rng(0).normal(size=19), np.nan)
    table = correlation_table(models, **FAST)
    assert "digits" not in set(table["data"])
    assert set(table.loc[table["attack"] == "fgsm@8/255", "data"]) == {"cifar10"}


def test_an_empty_study_gives_an_empty_table() -> None:
    table = correlation_table(_models(0, 2), **FAST)
    assert table.empty
    assert list(table) == list(correlation_table(_models(0, 8), **FAST))


def test_the_seed_decides_and_other_groups_do_not() -> None:
    one, other = _models(0, 9), _models(1, 9, "cifar10")
    table = correlation_table(one, **FAST)
    pd.testing.assert_frame_equal(table, correlation_table(one, **FAST))
    both = correlation_table(pd.concat([other, one], ignore_index=True), **FAST)
    numbers = ["coefficient", "ci_low", "ci_high", "p_value"]
    pd.testing.assert_series_equal(_cell(both)[numbers], _cell(table)[numbers], check_names=False)
    assert not _cell(correlation_table(one, seed=1, **FAST))[numbers].equals(_cell(table)[numbers])


def test_large_groups_get_kendalls_resamples_close_to_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    n = 320
    left = rng.normal(size=(n, 2))
    left[:, 1] = left[:, 1].round()  # ties
    right = np.column_stack([0.4 * left[:, 0] + rng.normal(size=n), rng.normal(size=n).round(1)])
    counts, orders = draw_counts(n, 300, rng), draw_permutations(n, 300, rng)
    left_out = 1 - np.eye(n)[:20]
    fast = [coefficients(left, right, c)["kendall"] for c in (None, left_out, counts)]
    fast.append(permuted_coefficients(left, right, orders)["kendall"])
    monkeypatch.setattr("drs.coefficients.LARGE", n)
    full = [coefficients(left, right, c)["kendall"] for c in (None, left_out, counts)]
    full.append(permuted_coefficients(left, right, orders)["kendall"])
    np.testing.assert_allclose(fast[0], full[0], atol=1e-12)
    np.testing.assert_allclose(fast[1], full[1], atol=1e-12)
    for found, expected in zip(fast[2:], full[2:], strict=True):
        spread = expected.std(axis=0)
        np.testing.assert_allclose(found.std(axis=0), spread, rtol=0.05)
        assert np.all(np.abs(found - expected).std(axis=0) < 0.15 * spread)
        assert np.all(np.abs(found.mean(axis=0) - expected.mean(axis=0)) < 0.1 * spread)
