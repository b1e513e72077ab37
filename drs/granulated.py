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
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t

from drs.coefficients import Array, permutation_p
from drs.paired import BASELINE
from drs.partial import finite_values, mean_accuracies, standard_models
from drs.selection import group_models

AXES = ("weight", "seed")
GRANULATED = "granulated"
COLUMNS = [
    "data", "model", "statistic", "attack", "axis", "n_models", "n_pairs", "coefficient", "ci_low", "ci_high",
    "p_value",
]  # fmt: skip
MIN_SEEDS = 3  # fewer give no interval
_KEYS = ["loss", "loss_weight", "seed"]
_ORDERS_AT_ONCE = 250
_TIE = 1e-12  # relative difference below which two values are equal

Index = NDArray[np.int64]


@dataclass(frozen=True)
class _Grid:
    """The models of a group as a grid of R seeds and T settings, row by row; what was not trained is NaN.

    Attributes:
        losses: Index of the loss of each setting, ``[T]``.
        is_baseline: Whether a setting is cross-entropy, ``[T]``.
        left: Statistics ``[R * T, S]``.
        right: Accuracies ``[R * T, A]``.
    """

    losses: Index
    is_baseline: NDArray[np.bool_]
    left: Array
    right: Array

    @property
    def n_settings(self) -> int:
        return len(self.losses)

    @property
    def n_seeds(self) -> int:
        return len(self.left) // self.n_settings


@dataclass(frozen=True)
class _Pairs:
    """The pairs of an axis: positions in the grid, ``[P]`` each, and the cell that each belongs to."""

    first: Index
    second: Index
    cell: Index

    def without_seed(self, seed: int, n_settings: int) -> "_Pairs":
        kept = (self.first // n_settings != seed) & (self.second // n_settings != seed)
        return _Pairs(self.first[kept], self.second[kept], self.cell[kept])

    def present(self, values: Array) -> NDArray[np.bool_]:
        """Return the pairs ``[P, C]`` for which both values of a column are there."""
        known = ~np.isnan(values)
        return known[self.first] & known[self.second]


def _grid(rows: pd.DataFrame, left: list[str], right: list[str]) -> _Grid:
    values = pd.DataFrame(finite_values(rows, left + right), columns=[*left, *right], index=rows.index)
    # Several runs of one loss, weight and seed enter as their mean.
    means = values.groupby([rows[key] for key in _KEYS], dropna=False).mean()
    losses, weights, seeds = (means.index.get_level_values(key) for key in _KEYS)
    setting = pd.DataFrame({"loss": losses, "loss_weight": weights}).groupby(["loss", "loss_weight"], dropna=False)
    column, row = setting.ngroup().to_numpy(), pd.factorize(seeds, use_na_sentinel=False)[0]
    names = setting.first().index.get_level_values("loss")
    cube = np.full(((row.max() + 1) * len(names), len(left) + len(right)), np.nan)
    cube[row * len(names) + column] = means.to_numpy()
    codes = pd.factorize(names, use_na_sentinel=False)[0].astype(np.int64)
    return _Grid(codes, np.asarray(names == BASELINE), cube[:, : len(left)], cube[:, len(left) :])


def _pairs(grid: _Grid, axis: str) -> _Pairs:
    settings, seeds = range(grid.n_settings), range(grid.n_seeds)
    found: list[tuple[int, int, int]] = []
    if axis == "seed":
        for a, b in combinations(seeds, 2):
            found += [(a * len(settings) + s, b * len(settings) + s, s) for s in settings]
    for a, b in combinations(settings, 2):
        same = grid.losses[a] == grid.losses[b]
        if axis == "weight" and same:
            cells = [(seed, int(grid.losses[a]) * len(seeds) + seed) for seed in seeds]
        elif axis == "loss" and not same and (grid.is_baseline[a] or grid.is_baseline[b]):
            cells = [(seed, seed) for seed in seeds]
        else:
            continue
        found += [(seed * len(settings) + a, seed * len(settings) + b, cell) for seed, cell in cells]
    table = np.array(found, dtype=np.int64).reshape(-1, 3)
    table = table[np.argsort(table[:, 2], kind="stable")]
    return _Pairs(table[:, 0], table[:, 1], table[:, 2])


def _signs(values: Array, pairs: _Pairs) -> tuple[Array, Array]:
    """Return the sign of each pair's difference, 0 where a value is missing, and whether both are there."""
    first, second = values[..., pairs.first], values[..., pairs.second]
    known = ~np.isnan(first - second)
    # Equal means of different accuracies may differ by rounding.
    differs = known & (np.abs(first - second) > _TIE * (np.abs(first) + np.abs(second)))
    return np.sign(np.where(differs, first - second, 0.0)), known.astype(np.float64)


def _coefficient(left: Array, right: Array, pairs: _Pairs) -> Array:
    """``[S, N]`` and ``[M, A, N]`` -> ``[M, S, A]``: the mean over cells of the mean over each one's pairs."""
    signs_left, known_left = _signs(left, pairs)
    signs_right, known_right = _signs(right, pairs)
    total = np.zeros((len(right), len(left), right.shape[1]))
    cells = np.zeros_like(total)
    for cell in np.unique(pairs.cell):
        own = slice(*np.searchsorted(pairs.cell, [cell, cell + 1]))
        number = known_left[:, own] @ known_right[..., own].transpose(0, 2, 1)
        products = signs_left[:, own] @ signs_right[..., own].transpose(0, 2, 1)
        total += products / np.maximum(number, 1)
        cells += number > 0
    return np.divide(total, cells, out=np.full_like(total, np.nan), where=cells > 0)


def _orders(grid: _Grid, axis: str, number: int, rng: np.random.Generator) -> Index:
    """Return ``[number, R * T]``: for each place of the grid, the place whose accuracy comes there."""
    columns = np.tile(np.arange(grid.n_settings), (number, 1))
    rows = np.tile(np.arange(grid.n_seeds), (number, 1))
    if axis == "loss":
        columns = rng.permuted(columns, axis=1)
    if axis in ("weight", GRANULATED):
        for loss in np.unique(grid.losses):
            own = np.flatnonzero(grid.losses == loss)
            columns[:, own] = rng.permuted(columns[:, own], axis=1)
    if axis in ("seed", GRANULATED):
        rows = rng.permuted(rows, axis=1)
    places: Index = rows[:, :, None] * grid.n_settings + columns[:, None, :]
    return places.reshape(number, -1)


def _over_axes(left: Array, right: Array, axes: list[_Pairs]) -> Array:
    return np.asarray(sum(_coefficient(left, right, pairs) for pairs in axes)) / len(axes)


def _interval(grid: _Grid, axes: list[_Pairs], observed: Array) -> tuple[Array, Array]:
    """Return the jackknife interval over the seeds that take part in a pair, ``[S, A]`` twice."""
    left, right = grid.left.T, grid.right.T[None]
    values, takes_part = [], []
    for seed in range(grid.n_seeds):
        values.append(_over_axes(left, right, [pairs.without_seed(seed, grid.n_settings) for pairs in axes])[0])
        counts = np.zeros(observed.shape)
        for pairs in axes:
            own = (pairs.first // grid.n_settings == seed) | (pairs.second // grid.n_settings == seed)
            known = [pairs.present(side)[own].astype(np.float64) for side in (grid.left, grid.right)]
            counts += known[0].T @ known[1]
        takes_part.append(counts > 0)
    left_out, enters = np.array(values), np.array(takes_part)
    n = enters.sum(axis=0)
    spread = np.where(enters, left_out, -np.inf).max(axis=0) - np.where(enters, left_out, np.inf).min(axis=0)
    exists = (n >= MIN_SEEDS) & (spread > _TIE)  # not where a left-out coefficient does not exist, either
    kept = np.where(enters & exists, left_out, 0.0)
    number = np.maximum(n, 2)
    squares = np.where(enters & exists, (kept - kept.sum(axis=0) / number) ** 2, 0.0).sum(axis=0)
    half = t.ppf(0.975, number - 1) * np.sqrt((number - 1) / number * squares)
    bounds = [np.where(exists, np.clip(observed + side * half, -1.0, 1.0), np.nan) for side in (-1, 1)]
    return bounds[0], bounds[1]


def _counts(grid: _Grid, axes: list[_Pairs]) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Return the models and the pairs that count, and whether both columns vary on every axis, ``[S, A]`` each."""
    shape = grid.left.shape[1], grid.right.shape[1]
    pairs_of_model = np.zeros((*shape, len(grid.left)))
    n_pairs, varies = np.zeros(shape), np.ones(shape, dtype=bool)
    for pairs in axes:
        known = pairs.present(grid.left)[:, :, None] & pairs.present(grid.right)[:, None, :]
        n_pairs += known.sum(axis=0)
        differs = [_signs(side.T, pairs)[0].T != 0 for side in (grid.left, grid.right)]
        varies &= (known & differs[0][:, :, None]).any(axis=0) & (known & differs[1][:, None, :]).any(axis=0)
        places = np.eye(len(grid.left))
        pairs_of_model += known.transpose(1, 2, 0) @ (places[pairs.first] + places[pairs.second])
    return (pairs_of_model > 0).sum(axis=2).astype(float), n_pairs, varies


def _axis_rows(grid: _Grid, n_permutations: int, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, Array]]]:
    pairs = {axis: _pairs(grid, axis) for axis in (*AXES, "loss")}
    for axis in (*AXES, GRANULATED, "loss"):
        axes = [pairs[name] for name in AXES] if axis == GRANULATED else [pairs[axis]]
        n_models, n_pairs, varies = _counts(grid, axes)
        observed = _over_axes(grid.left.T, grid.right.T[None], axes)[0]
        observed = np.where(varies, observed, np.nan)
        low, high = _interval(grid, axes, observed)
        orders = _orders(grid, axis, n_permutations, rng)
        permuted = [
            _over_axes(grid.left.T, grid.right.T[:, orders[start : start + _ORDERS_AT_ONCE]].transpose(1, 0, 2), axes)
            for start in range(0, n_permutations, _ORDERS_AT_ONCE)
        ]
        p_value = permutation_p(observed, np.concatenate(permuted))
        yield axis, {
            "n_models": n_models, "n_pairs": n_pairs, "coefficient": observed, "ci_low": low, "ci_high": high,
            "p_value": p_value,
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
        grid = _grid(rows, statistics, list(attacks_here.values()))
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
