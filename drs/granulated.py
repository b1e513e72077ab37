"""Rows of models -> granulated Kendall coefficients: pairs of models that differ in one hyper-parameter only.

A cluster of cross-entropy models beside a cluster of other models makes any two columns look related. Here a pair of
models counts only if it differs in a single hyper-parameter, so that only what changes along that axis can show
(Jiang et al. 2020, arXiv 1912.02178, section 2.2; Dziugaite et al. 2020, arXiv 2010.11924).

Within a cell, the models that share all other hyper-parameters, the coefficient is the mean over pairs of
sign(difference of the statistic) * sign(difference of the accuracy); a tie counts as 0. The coefficient of an axis is
the mean over its cells that have a pair, and the granulated coefficient is the mean over the axes:

- ``weight``: the same loss and seed, another weight;
- ``seed``: the same loss and weight, another seed.

The axis ``loss``, cross-entropy against another loss at the same seed (a cell per seed), is reported beside them but
does not enter the mean, because it is that very comparison of clusters.

Models of one seed share initialisation and batch order, and models of one setting (loss and weight) share what that
setting does. Intervals and p-values respect both:

- The interval is a jackknife over seeds, the independent replicates, with Student's t and one degree of freedom less
  than there are seeds (Efron and Tibshirani 1993, chapter 11). Settings are fixed by design, so it speaks of these
  settings and new seeds, not of other weights; that question is left to the p-value. Where leaving out one seed or
  another changes nothing, there is no spread to judge by and no interval. In simulated studies of three to eight
  seeds 94 to 100 % of the intervals held the truth (300 studies each; one standard error is 1.3 points); of a
  percentile bootstrap over seeds, on the axis ``weight``, only 36 to 88 %.
- The p-value moves accuracies within the cells of an axis, and in all cells alike: one order of each loss's weights
  for all seeds (``weight``), one order of seeds for all settings (``seed``), one order of all settings for all seeds
  (``loss``), and the first two at once (``granulated``). A chance difference between weights, repeated at every
  seed, therefore counts once. With few weights or seeds no small p is possible: k values have k! orders.
"""

import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t

from drs.coefficients import Array, permutation_p
from drs.pair_grid import (
    AXES,
    GRANULATED,
    TIE,
    Grid,
    Pairs,
    Signs,
    axis_pairs,
    coefficient,
    draw_orders,
    model_grid,
    pair_signs,
    permuted_coefficients,
)
from drs.partial import mean_accuracies, standard_models
from drs.selection import group_models

COLUMNS = [
    "data", "model", "statistic", "attack", "axis", "n_models", "n_pairs", "coefficient", "ci_low", "ci_high",
    "p_value",
]  # fmt: skip
MIN_SEEDS = 3  # fewer give no interval

_Compared = tuple[Pairs, Signs, Signs]  # an axis: its pairs, and how statistics and accuracies differ within them


def _mean(values: list[Array]) -> Array:
    return np.asarray(sum(values)) / len(values)


def _interval(grid: Grid, axes: list[_Compared], observed: Array) -> tuple[Array, Array]:
    """Return the jackknife interval over the seeds that take part in a pair, ``[S, A]`` twice."""
    values, takes_part = [], []
    for seed in range(grid.n_seeds):
        left_out = []
        counts = np.zeros(observed.shape)
        for pairs, left, right in axes:
            own = pairs.of_seed(seed, grid.n_settings)
            left_out.append(coefficient(left.where(~own), right.where(~own), pairs.where(~own)))
            counts += left.known[:, own] @ right.known[:, own].T
        values.append(_mean(left_out))
        takes_part.append(counts > 0)
    without, enters = np.array(values), np.array(takes_part)
    n = enters.sum(axis=0)
    spread = np.where(enters, without, -np.inf).max(axis=0) - np.where(enters, without, np.inf).min(axis=0)
    exists = (n >= MIN_SEEDS) & (spread > TIE)  # not where a left-out coefficient does not exist, either
    kept = np.where(enters & exists, without, 0.0)
    number = np.maximum(n, 2)
    squares = np.where(enters & exists, (kept - kept.sum(axis=0) / number) ** 2, 0.0).sum(axis=0)
    half = t.ppf(0.975, number - 1) * np.sqrt((number - 1) / number * squares)
    bounds = [np.where(exists, np.clip(observed + side * half, -1.0, 1.0), np.nan) for side in (-1, 1)]
    return bounds[0], bounds[1]


def _counts(grid: Grid, axes: list[_Compared]) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Return the models and the pairs that count, and whether both columns vary on every axis, ``[S, A]`` each."""
    shape = grid.left.shape[1], grid.right.shape[1]
    has_pair = np.zeros((*shape, len(grid.left)), dtype=bool)
    n_pairs, varies = np.zeros(shape), np.ones(shape, dtype=bool)
    for pairs, left, right in axes:
        known = left.known.astype(bool)[:, None] & right.known.astype(bool)[None]
        n_pairs += known.sum(axis=2)
        varies &= (known & (left.values != 0)[:, None]).any(axis=2) & (known & (right.values != 0)[None]).any(axis=2)
        for i, j in np.ndindex(shape):
            has_pair[i, j, pairs.first[known[i, j]]] = has_pair[i, j, pairs.second[known[i, j]]] = True
    return has_pair.sum(axis=2).astype(float), n_pairs, varies


def _axis_rows(grid: Grid, n_permutations: int, rng: np.random.Generator) -> Iterator[tuple[str, Mapping[str, Array]]]:
    compared: dict[str, _Compared] = {}
    for axis in (*AXES, "loss"):
        pairs = axis_pairs(grid, axis)
        compared[axis] = pairs, pair_signs(grid.left, pairs), pair_signs(grid.right, pairs)
    for axis in (*AXES, GRANULATED, "loss"):
        axes = [compared[name] for name in AXES] if axis == GRANULATED else [compared[axis]]
        n_models, n_pairs, varies = _counts(grid, axes)
        observed = _mean([coefficient(left, right, pairs) for pairs, left, right in axes])
        observed = np.where(varies, observed, np.nan)
        low, high = _interval(grid, axes, observed)
        orders = draw_orders(grid, axis, n_permutations, rng)
        permuted = _mean([permuted_coefficients(grid, left, pairs, orders) for pairs, left, _ in axes])
        yield axis, {
            "n_models": n_models, "n_pairs": n_pairs, "coefficient": observed, "ci_low": low, "ci_high": high,
            "p_value": permutation_p(observed, permuted),
        }  # fmt: skip


def granulated_table(models: pd.DataFrame, *, n_permutations: int = 4999, seed: int = 0) -> pd.DataFrame:
    """Return the granulated coefficient of every statistic with every accuracy, in each group of models.

    Args:
        models: A row per model: ``data``, ``model``, ``loss``, ``loss_weight``, ``seed``, ``stat.<statistic>``,
            ``clean_accuracy``, ``acc.<attack>@mean``, and optionally ``excluded`` and ``procedure``. Only usable
            models of the standard procedure count; several runs of one loss, weight and seed enter as their mean.
        n_permutations: Random orders for the two-sided p.
        seed: Of the random orders; a group's numbers do not depend on which other groups there are.

    Returns:
        ``COLUMNS``, a row per group (dataset and architecture), statistic, attack (``clean`` or ``<attack>@mean``)
        and axis: ``weight``, ``seed``, ``granulated`` (their mean) and ``loss``. ``n_pairs`` counts the pairs of the
        axis, ``n_models`` the models in them. Everything after ``n_pairs`` is NaN where an axis (for
        ``granulated`` one of the two) has no pair or a column that never differs within its pairs. There is no
        interval below ``MIN_SEEDS`` seeds, and where the seeds all agree.
    """
    usable = standard_models(models)
    statistics = [str(column) for column in models if str(column).startswith("stat.")]
    attacks = ({"clean": "clean_accuracy"} if "clean_accuracy" in models else {}) | mean_accuracies(models)
    tables = []
    for data, model, rows in group_models(usable):
        attacks_here = {name: column for name, column in attacks.items() if rows[column].notna().any()}
        if not (statistics and attacks_here):
            continue
        grid = model_grid(rows, statistics, list(attacks_here.values()))
        rng = np.random.default_rng([seed, zlib.crc32(f"{data}/{model}".encode())])
        names = [name.removeprefix("stat.") for name in statistics]
        index = pd.MultiIndex.from_product([names, attacks_here], names=["statistic", "attack"])
        for axis, columns in _axis_rows(grid, n_permutations, rng):
            table = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=index).reset_index()
            tables.append(table.assign(data=data, model=model, axis=axis))
    if not tables:
        return pd.DataFrame({column: pd.Series(dtype=object if column in COLUMNS[:5] else float) for column in COLUMNS})
    result = pd.concat(tables, ignore_index=True)[COLUMNS]
    return result.astype({"n_models": int, "n_pairs": int})
