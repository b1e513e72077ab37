"""Rows of models -> coefficients between softmax statistics and accuracy, with intervals and p-values.

The unit of a coefficient is the trained model. Seeds of one setting (a loss and its weight) are replicates rather than
independent evidence for a relation, so intervals and p-values are over settings (``drs.clusters``): where a setting has
several models, an interval leaves out whole settings, and a p-value permutes the settings' means. Where every setting
has one model, models are as good as independent, and the interval is a bootstrap over them.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from drs.clusters import MIN_TESTED, membership, setting_index, setting_means
from drs.coefficients import METHODS, Array
from drs.resampling import MIN_GROUP, SIDES, Resampled, over_settings, pool, resample
from drs.selection import accuracy_columns, group_models, standard_models

COLUMNS = [
    "data", "model", "statistic", "attack", "method", "n_models", "coefficient", "ci_low", "ci_high", "p_value",
    "q_value", "n_draws", "n_settings", "settings_coefficient",
]  # fmt: skip


@dataclass(frozen=True)
class Correlation:
    """One coefficient. ``n`` counts its models (or settings); what does not exist is NaN.

    Attributes:
        p_value: Two-sided permutation p over settings.
        p_greater: One-sided permutation p over settings, against a positive relation.
    """

    n: int
    coefficient: float
    ci_low: float
    ci_high: float
    p_value: float
    p_greater: float


def _values(models: pd.DataFrame, columns: list[str]) -> Array:
    values = models[columns].apply(pd.to_numeric, errors="raise").to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def _rows(result: Resampled, data: str, model: str, statistics: list[str], attacks: list[str]) -> pd.DataFrame:
    tables = []
    for method in METHODS:
        low, high = result.interval(method)
        columns = {
            "n_models": result.n.astype(int),
            "coefficient": result.observed[method],
            "ci_low": low,
            "ci_high": high,
            "p_value": result.p_values["two-sided"][method],
            "n_draws": result.n_draws(method),
            "n_settings": np.asarray(sum(result.n_settings)).astype(int),
            "settings_coefficient": result.settings[method],
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
            optionally ``excluded`` with the reason why a model must not count. ``loss`` and ``loss_weight`` say which
            models share a setting; without them each is a setting of its own.
        n_bootstrap: Resamples of models for the 95 % intervals (bias-corrected and accelerated) of groups in which
            every setting has one model; those of other groups leave out one setting at a time
            (``drs.clusters.jackknife_interval``).
        n_permutations: Random orders of the settings for the two-sided p; of up to ``ALL_ORDERS`` settings, all.
        seed: Of the resamples; a group's numbers do not depend on which other groups there are.

    Returns:
        ``COLUMNS``, a row per group (dataset and architecture, with at least ``MIN_GROUP`` usable models), statistic,
        attack (``clean`` is clean accuracy) and method. Rows with data = model = ``pooled`` average the groups'
        coefficients, weighted by their numbers of models, for clean and mean accuracies: no difference between
        datasets can enter, and resamples and orders are drawn within the groups. ``q_value`` is Benjamini-Hochberg
        over the whole table, for each method. Without a coefficient (a constant column, or fewer than ``MIN_GROUP``
        models with both values) the numbers are NaN and stay out of the correction, and so does a p of fewer than
        ``MIN_TESTED`` settings. What ``p_value`` tests is ``settings_coefficient``, the coefficient of the
        ``n_settings`` settings' means; where every setting has one model it is ``coefficient``. ``n_draws`` counts the
        resamples, or the left-out settings, that had a coefficient.
    """
    usable = standard_models(models)
    statistics = [str(column).removeprefix("stat.") for column in models if str(column).startswith("stat.")]
    tables: list[pd.DataFrame] = []
    results: list[Resampled] = []
    attacks = accuracy_columns(models)
    averages = [name for name in attacks if name == "clean" or name.endswith("@mean")]
    for data, model, rows in group_models(usable):
        if len(rows) < MIN_GROUP or not statistics:
            continue
        left = _values(rows, [f"stat.{name}" for name in statistics])
        right = _values(rows, list(attacks.values()))
        own_seed = [seed, zlib.crc32(f"{data}/{model}".encode())]
        result = resample(left, right, setting_index(rows), n_bootstrap, n_permutations, own_seed)
        tables.append(_rows(result, data, model, statistics, list(attacks)))
        picked = [list(attacks).index(name) for name in averages]
        results.append(result.of_accuracies(picked))
    if len(results) > 1:
        tables.append(_rows(pool(results), "pooled", "pooled", statistics, averages))
    if not tables:
        return pd.DataFrame({column: pd.Series(dtype=object if column in COLUMNS[:5] else float) for column in COLUMNS})
    table = pd.concat(tables, ignore_index=True)
    table["q_value"] = table.groupby("method")["p_value"].transform(benjamini_hochberg)
    return table[COLUMNS]


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
    index = setting_index(rows)
    rows = rows.reindex(columns=[statistic, accuracy])
    left, right = _values(rows, [statistic]), _values(rows, [accuracy])
    result = resample(left, right, index, n_bootstrap, n_permutations, [seed], (method,))
    values = result.observed[method], *result.interval(method), *(result.p_values[side][method] for side in SIDES)
    return Correlation(int(result.n[0, 0]), *(float(value[0, 0]) for value in values))


def correlate_settings(
    models: pd.DataFrame, statistic: str, accuracy: str, *, n_permutations: int = 9999, seed: int = 0
) -> Correlation:
    """Return Spearman's coefficient over settings: a point per loss and weight, the mean over its usable seeds.

    Its p-values are those of ``correlate`` and of ``correlation_table``: permuting whole settings asks whether the
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
    members = membership(setting_index(rows))
    n = len(members)
    if n < MIN_TESTED:
        return Correlation(n, *[float("nan")] * 5)
    means = [setting_means(rows[[column]].to_numpy(dtype=np.float64), members) for column in pair]
    observed, _, p_values = over_settings(means[0], means[1], n_permutations, np.random.default_rng(seed))
    tested = (float(p_values[side]["spearman"][0, 0]) for side in SIDES)
    return Correlation(n, float(observed["spearman"][0, 0]), float("nan"), float("nan"), *tested)
