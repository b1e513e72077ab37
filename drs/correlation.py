"""Rows of models -> coefficients between softmax statistics and accuracy, with intervals and p-values.

The unit is the trained model. Intervals and p-values take models as independent draws; seeds of one loss and weight
are replicates rather than independent evidence for a relation, so ``correlate_settings`` asks the same question of
their means.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from drs.coefficients import (
    METHODS,
    Array,
    bca_interval,
    coefficients,
    draw_counts,
    draw_permutations,
    permutation_p,
    permuted_coefficients,
)
from drs.selection import accuracy_columns, group_models, standard_models

MIN_GROUP = 4  # fewer models than this give no coefficient
COLUMNS = [
    "data", "model", "statistic", "attack", "method", "n_models", "coefficient", "ci_low", "ci_high", "p_value",
    "q_value", "n_draws",
]  # fmt: skip


@dataclass(frozen=True)
class Correlation:
    """One coefficient. ``n`` counts its models (or settings); what does not exist is NaN.

    Attributes:
        p_value: Two-sided permutation p.
        p_greater: One-sided permutation p against a positive relation.
    """

    n: int
    coefficient: float
    ci_low: float
    ci_high: float
    p_value: float
    p_greater: float


@dataclass(frozen=True)
class _Resampled:
    """Coefficients of S x A pairs of columns: of the models as they are, resampled, left out one by one, permuted."""

    n: Array  # [S, A]
    observed: dict[str, Array]  # method -> [S, A]
    draws: dict[str, Array]  # method -> [B, S, A]
    influence: dict[str, Array]  # method -> [models, S, A]
    permuted: dict[str, Array]  # method -> [M, S, A]


def _values(models: pd.DataFrame, columns: list[str]) -> Array:
    values = models[columns].apply(pd.to_numeric, errors="raise").to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def _resample(
    left: Array,
    right: Array,
    n_bootstrap: int,
    n_permutations: int,
    seed: list[int],
    methods: Sequence[str] = METHODS,
) -> _Resampled:
    rng = np.random.default_rng(seed)
    shape = left.shape[1], right.shape[1]
    present = ~np.isnan(left)[:, :, None] & ~np.isnan(right)[:, None, :]
    lengths = {"observed": 1, "draws": n_bootstrap, "influence": len(left), "permuted": n_permutations}
    parts = {part: {m: np.full((length, *shape), np.nan) for m in methods} for part, length in lengths.items()}
    # Columns that miss the same models are resampled together.
    patterns_left = np.unique(np.isnan(left), axis=1, return_inverse=True)[1].ravel()
    patterns_right = np.unique(np.isnan(right), axis=1, return_inverse=True)[1].ravel()
    for i in np.unique(patterns_left):
        for j in np.unique(patterns_right):
            rows_s, rows_a = np.flatnonzero(patterns_left == i), np.flatnonzero(patterns_right == j)
            complete = np.flatnonzero(present[:, rows_s[0], rows_a[0]])
            n = len(complete)
            if n < MIN_GROUP:
                continue
            x, y = left[np.ix_(complete, rows_s)], right[np.ix_(complete, rows_a)]
            left_out = coefficients(x, y, 1 - np.eye(n), methods)
            computed = {
                "observed": coefficients(x, y, methods=methods),
                "draws": coefficients(x, y, draw_counts(n, n_bootstrap, rng), methods),
                "permuted": permuted_coefficients(x, y, draw_permutations(n, n_permutations, rng)),
            }
            for method in methods:
                for part, values in computed.items():
                    parts[part][method][:, rows_s[:, None], rows_a] = values[method]
                known = np.nan_to_num(left_out[method], nan=0.0)
                number = np.maximum(np.isfinite(left_out[method]).sum(axis=0), 1)
                influence = known.sum(axis=0) / number - left_out[method]
                parts["influence"][method][np.ix_(complete, rows_s, rows_a)] = influence
    observed = {method: values[0] for method, values in parts["observed"].items()}
    return _Resampled(
        present.sum(axis=0).astype(float), observed, parts["draws"], parts["influence"], parts["permuted"]
    )


def _pool(groups: list[_Resampled]) -> _Resampled:
    """Average the groups' coefficients, weighted by their numbers of models.

    That is the coefficient of values (Pearson) or ranks (Spearman) standardised within each group. A group in which
    a column is constant does not enter; fewer than two groups give no pooled coefficient.
    """
    enters = [np.isfinite(group.observed["spearman"]) for group in groups]
    n = [np.where(exists, group.n, 0.0) for exists, group in zip(enters, groups, strict=True)]
    enough = sum(exists.astype(int) for exists in enters) >= 2
    total = np.where(enough, sum(n), 0.0)
    share = [counts / np.where(enough, total, np.nan) for counts in n]

    def average(part: str, method: str) -> Array:
        each = [getattr(group, part)[method] for group in groups]
        weighted = [np.where(w == 0, 0.0, w * values) for w, values in zip(share, each, strict=True)]
        return np.asarray(sum(weighted))

    influence = {
        m: np.concatenate([np.nan_to_num(g.influence[m] * w) for g, w in zip(groups, share, strict=True)])
        for m in METHODS
    }
    averages = [{m: average(part, m) for m in METHODS} for part in ("observed", "draws", "permuted")]
    return _Resampled(total, averages[0], averages[1], influence, averages[2])


def _rows(result: _Resampled, data: str, model: str, statistics: list[str], attacks: list[str]) -> pd.DataFrame:
    tables = []
    for method in METHODS:
        observed, draws = result.observed[method], result.draws[method]
        low, high = bca_interval(observed, draws, result.influence[method])
        columns = {
            "n_models": result.n.astype(int),
            "coefficient": observed,
            "ci_low": low,
            "ci_high": high,
            "p_value": permutation_p(observed, result.permuted[method]),
            "n_draws": np.isfinite(draws).sum(axis=0),
        }
        index = pd.MultiIndex.from_product([statistics, attacks], names=["statistic", "attack"])
        table = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=index).reset_index()
        tables.append(table.assign(method=method))
    table = pd.concat(tables, ignore_index=True)
    order = pd.Categorical(table["statistic"], statistics), pd.Categorical(table["attack"], attacks)
    table = table.iloc[np.lexsort((np.arange(len(table)), order[1].codes, order[0].codes))]
    return table[table["n_models"] > 0].assign(data=data, model=model)


def benjamini_hochberg(p_values: pd.Series) -> pd.Series:
    """Return Benjamini-Hochberg q-values (1995, J. R. Stat. Soc. B 57, 289-300); NaN stays NaN and is not counted."""
    q_values = pd.Series(np.nan, index=p_values.index, dtype=float)
    known = p_values.notna()
    if known.any():
        q_values[known] = false_discovery_control(p_values[known].to_numpy(dtype=float), method="bh")
    return q_values


def correlation_table(
    models: pd.DataFrame, *, n_bootstrap: int = 2000, n_permutations: int = 4999, seed: int = 0
) -> pd.DataFrame:
    """Correlate every statistic with every accuracy over the models of each group, and over all groups pooled.

    Args:
        models: A row per model: ``data``, ``model``, ``clean_accuracy``, ``stat.<statistic>``, ``acc.<attack>``, and
            optionally ``excluded`` with the reason why a model must not count.
        n_bootstrap: Resamples of models for the 95 % intervals (bias-corrected and accelerated).
        n_permutations: Random orders for the two-sided p.
        seed: Of the resamples; a group's numbers do not depend on which other groups there are.

    Returns:
        ``COLUMNS``, a row per group (dataset and architecture, with at least ``MIN_GROUP`` usable models), statistic,
        attack (``clean`` is clean accuracy) and method. Rows with data = model = ``pooled`` average the groups'
        coefficients, weighted by their numbers of models, for clean and mean accuracies: no difference between
        datasets can enter, and resamples and orders are drawn within the groups. ``q_value`` is Benjamini-Hochberg
        over the whole table, for each method. Without a coefficient (a constant column, or fewer than ``MIN_GROUP``
        models with both values) everything after ``n_models`` is NaN and stays out of the correction. ``n_draws``
        counts the resamples that had a coefficient.
    """
    usable = standard_models(models)
    statistics = [str(column).removeprefix("stat.") for column in models if str(column).startswith("stat.")]
    tables: list[pd.DataFrame] = []
    results: list[_Resampled] = []
    attacks = accuracy_columns(models)
    averages = [name for name in attacks if name == "clean" or name.endswith("@mean")]
    for data, model, rows in group_models(usable):
        if len(rows) < MIN_GROUP or not statistics:
            continue
        left = _values(rows, [f"stat.{name}" for name in statistics])
        right = _values(rows, list(attacks.values()))
        own_seed = [seed, zlib.crc32(f"{data}/{model}".encode())]
        result = _resample(left, right, n_bootstrap, n_permutations, own_seed)
        tables.append(_rows(result, data, model, statistics, list(attacks)))
        picked = [list(attacks).index(name) for name in averages]
        results.append(_select(result, picked))
    if len(results) > 1:
        tables.append(_rows(_pool(results), "pooled", "pooled", statistics, averages))
    if not tables:
        return pd.DataFrame({column: pd.Series(dtype=object if column in COLUMNS[:5] else float) for column in COLUMNS})
    table = pd.concat(tables, ignore_index=True)
    table["q_value"] = table.groupby("method")["p_value"].transform(benjamini_hochberg)
    return table[COLUMNS]


def _select(result: _Resampled, attacks: list[int]) -> _Resampled:
    parts = (result.observed, result.draws, result.influence, result.permuted)
    return _Resampled(result.n[:, attacks], *({m: v[..., attacks] for m, v in part.items()} for part in parts))


def correlate(
    models: pd.DataFrame,
    statistic: str,
    accuracy: str,
    *,
    method: str = "spearman",
    n_bootstrap: int = 2000,
    n_permutations: int = 4999,
    seed: int = 0,
) -> Correlation:
    """Correlate one statistic with one accuracy over the usable models given, as ``correlation_table`` does.

    Args:
        models: See ``correlation_table``; all rows are one group.
        statistic: Column, such as ``stat.nonlabel_var_log``.
        accuracy: Column, such as ``clean_accuracy`` or ``acc.pgd@mean``.
        method: One of ``METHODS``.
        n_bootstrap, n_permutations, seed: See ``correlation_table``.
    """
    rows = standard_models(models)
    rows = rows.reindex(columns=[statistic, accuracy])
    left, right = _values(rows, [statistic]), _values(rows, [accuracy])
    result = _resample(left, right, n_bootstrap, n_permutations, [seed], (method,))
    observed, permuted = result.observed[method], result.permuted[method]
    low, high = bca_interval(observed, result.draws[method], result.influence[method])
    p_values = [permutation_p(observed, permuted, alternative=side) for side in ("two-sided", "greater")]
    return Correlation(int(result.n[0, 0]), *(float(v[0, 0]) for v in (observed, low, high, *p_values)))


def correlate_settings(
    models: pd.DataFrame, statistic: str, accuracy: str, *, n_permutations: int = 9999, seed: int = 0
) -> Correlation:
    """Return Spearman's coefficient over settings: a point per loss and weight, the mean over its usable seeds.

    Seeds of one setting share whatever that setting does to accuracy. Permuting whole settings asks whether the
    order of the settings, not the number of seeds, carries the relation. Up to seven settings every order is tried,
    which makes the p-values exact.

    Args:
        models: See ``correlation_table``, with ``loss`` and ``loss_weight``; all rows are one group.
        statistic: Column of the statistic.
        accuracy: Column of the accuracy.
        n_permutations: Random orders where there are more than seven settings.
        seed: Of the random orders.

    Returns:
        The coefficient without an interval; ``n`` counts settings.
    """
    rows = standard_models(models)
    if not {"loss", "loss_weight", statistic, accuracy} <= set(rows.columns):
        return Correlation(0, *[float("nan")] * 5)
    pair = [statistic, accuracy]
    rows = rows.assign(**{column: _values(rows, [column])[:, 0] for column in pair}).dropna(subset=pair)
    means = rows.groupby(["loss", "loss_weight"], dropna=False)[pair].mean()
    n = len(means)
    if n < 3:
        return Correlation(n, *[float("nan")] * 5)
    left, right = means[[statistic]].to_numpy(), means[[accuracy]].to_numpy()
    observed = coefficients(left, right)["spearman"][0]
    if n <= 7:
        orders = np.array(list(permutations(range(n))))[1:]  # the order as it is counts once, in permutation_p
    else:
        orders = draw_permutations(n, n_permutations, np.random.default_rng(seed))
    permuted = permuted_coefficients(left, right, orders)["spearman"]
    p_values = [permutation_p(observed, permuted, alternative=side)[0, 0] for side in ("two-sided", "greater")]
    return Correlation(n, float(observed[0, 0]), float("nan"), float("nan"), *(float(p) for p in p_values))
