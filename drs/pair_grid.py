"""A grid of seeds by settings: the pairs of models along one axis, and their coefficients in thousands of orders.

A place is a position in the grid, row by row: ``seed * n_settings + setting``. What the axes and the coefficient mean
is told in ``drs.granulated``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from drs.coefficients import Array
from drs.paired import BASELINE
from drs.partial import finite_values

AXES = ("weight", "seed")
GRANULATED = "granulated"
TIE = 1e-12  # relative difference below which two values are equal
_KEYS = ["loss", "loss_weight", "seed"]
_SIGNS_AT_ONCE = 250_000  # of one cell's pairs in some orders: 1 MB, which stays in the cache

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
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
class Pairs:
    """The pairs of an axis: places of the grid, ``[P]`` each, and the cell of each; the cells one after the other.

    The pairs of a cell share their seed or, on the axis ``seed``, their setting.
    """

    axis: str
    first: Index
    second: Index
    cell: Index

    def where(self, kept: NDArray[np.bool_]) -> "Pairs":
        return Pairs(self.axis, self.first[kept], self.second[kept], self.cell[kept])

    def of_seed(self, seed: int, n_settings: int) -> NDArray[np.bool_]:
        """Return which pairs ``[P]`` a seed takes part in."""
        return (self.first // n_settings == seed) | (self.second // n_settings == seed)

    def cells(self) -> Iterator[slice]:
        """Return where the pairs of each cell are."""
        bounds = np.flatnonzero(np.diff(self.cell, prepend=-1, append=-1))
        return (slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True))


@dataclass(frozen=True)
class Signs:
    """Signs of pairs' differences, 0 where a value is missing, and whether both are there: ``[C, P]`` each."""

    values: Array
    known: Array

    def where(self, kept: NDArray[np.bool_]) -> "Signs":
        return Signs(self.values[:, kept], self.known[:, kept])


@dataclass(frozen=True)
class Orders:
    """Orders of the accuracies: what stands at ``rows[m, r], columns[m, t]`` comes to seed r and setting t.

    Attributes:
        rows: ``[M, R]``.
        columns: ``[M, T]``.
    """

    rows: Index
    columns: Index

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, some: slice) -> "Orders":
        return Orders(self.rows[some], self.columns[some])


def model_grid(rows: pd.DataFrame, left: list[str], right: list[str]) -> Grid:
    """Return a group's models as a grid; several runs of one loss, weight and seed enter as their mean."""
    values = pd.DataFrame(finite_values(rows, left + right), columns=[*left, *right], index=rows.index)
    means = values.groupby([rows[key] for key in _KEYS], dropna=False).mean()
    losses, weights, seeds = (means.index.get_level_values(key) for key in _KEYS)
    setting = pd.DataFrame({"loss": losses, "loss_weight": weights}).groupby(["loss", "loss_weight"], dropna=False)
    column, row = setting.ngroup().to_numpy(), pd.factorize(seeds, use_na_sentinel=False)[0]
    names = setting.first().index.get_level_values("loss")
    cube = np.full(((row.max() + 1) * len(names), len(left) + len(right)), np.nan)
    cube[row * len(names) + column] = means.to_numpy()
    codes = pd.factorize(names, use_na_sentinel=False)[0].astype(np.int64)
    return Grid(codes, np.asarray(names == BASELINE), cube[:, : len(left)], cube[:, len(left) :])


def axis_pairs(grid: Grid, axis: str) -> Pairs:
    """Return the pairs of the axis ``weight``, ``seed`` or ``loss``."""
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
    return Pairs(axis, table[:, 0], table[:, 1], table[:, 2])


def _differences(first: Array, second: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return the signs of ``first - second``, 0 where a value is missing, and whether both are there."""
    difference = first - second
    known = ~np.isnan(difference)
    # Equal means of different accuracies may differ by rounding.
    differs = known & (np.abs(difference) > TIE * (np.abs(first) + np.abs(second)))
    return np.sign(np.where(differs, difference, 0.0)), known


def pair_signs(values: Array, pairs: Pairs) -> Signs:
    """``[N, C]`` -> the signs ``[C, P]`` of the differences of its columns."""
    signs, known = _differences(values.T[:, pairs.first], values.T[:, pairs.second])
    return Signs(signs, known.astype(np.float64))


def coefficient(left: Signs, right: Signs, pairs: Pairs) -> Array:
    """Return ``[S, A]``: the mean over cells of the mean over each one's pairs; NaN where no cell has a pair."""
    total = np.zeros((len(left.values), len(right.values)))
    cells = np.zeros_like(total)
    for own in pairs.cells():
        number = left.known[:, own] @ right.known[:, own].T
        total += left.values[:, own] @ right.values[:, own].T / np.maximum(number, 1)
        cells += number > 0
    return np.divide(total, cells, out=np.full_like(total, np.nan), where=cells > 0)


def draw_orders(grid: Grid, axis: str, number: int, rng: np.random.Generator) -> Orders:
    """Return random orders of what an axis compares, alike in all its cells."""
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
    return Orders(rows, columns)


class _Reordered:
    """The signs of pairs of a grid's accuracies, looked up for any order of them.

    The two accuracies that come to the places of a pair were in one line of the grid before: a row, or on the axis
    ``seed`` a column. The signs of all pairs of a line are therefore made once, and orders pick from them.
    """

    def __init__(self, grid: Grid, axis: str) -> None:
        self.by_column = axis == "seed"
        self.n_settings = grid.n_settings
        lines = grid.right.reshape(grid.n_seeds, grid.n_settings, -1)
        lines = lines.transpose(1, 0, 2) if self.by_column else lines
        self.length = lines.shape[1]
        signs, known = _differences(lines[:, :, None], lines[:, None])
        self.complete = not np.isnan(lines).any()
        # Columns that miss the same models have the same pairs.
        _, kept, self.pattern = np.unique(np.isnan(grid.right), axis=1, return_index=True, return_inverse=True)
        self.signs, self.known = (
            table.astype(np.float32).reshape(-1, table.shape[-1]) for table in (signs, known[..., kept])
        )

    def places(self, pairs: Pairs, own: slice, orders: Orders) -> Index:
        """Return where in the tables the signs of a cell's pairs are in each order, ``[P, M]``."""
        seeds, settings = np.divmod(np.array([pairs.first[own], pairs.second[own]]), self.n_settings)
        (line, place), (to_line, to_place) = (seeds, settings), (orders.rows, orders.columns)
        if self.by_column:
            (line, place), (to_line, to_place) = (settings, seeds), (orders.columns, orders.rows)
        # Orders are the last axis: whole rows are moved and added then, not single numbers.
        to_place = np.ascontiguousarray(to_place.T)
        found: Index = (to_place * self.length + to_line[:, line[0, 0]] * self.length**2).take(place[0], axis=0)
        found += to_place.take(place[1], axis=0)
        return found


def permuted_coefficients(grid: Grid, left: Signs, pairs: Pairs, orders: Orders) -> Array:
    """Return ``[M, S, A]``: bit for bit what ``coefficient`` gives of the accuracies in each of some orders.

    Every sum over the pairs of a cell is a whole number, which float32 holds exactly below 2**24.
    """
    table = _Reordered(grid, pairs.axis)
    n_right, cells = grid.right.shape[1], list(pairs.cells())
    signs_left, known_left = left.values.astype(np.float32), left.known.astype(np.float32)
    complete = table.complete and bool(left.known.all())
    at_once = max(1, _SIGNS_AT_ONCE // max((n_right * (own.stop - own.start) for own in cells), default=1))
    result = np.full((len(orders), len(signs_left), n_right), np.nan)
    for some in (slice(start, start + at_once) for start in range(0, len(orders), at_once)):
        here = orders.where(some)
        shape = len(signs_left), len(here), n_right
        total, number_of_cells = np.zeros(shape), np.zeros(shape)
        for own in cells:
            places = table.places(pairs, own, here)  # all of them inside: "clip" only leaves out the check
            products = signs_left[:, own] @ table.signs.take(places, axis=0, mode="clip").reshape(len(places), -1)
            number: Array | float = float(len(places))
            if not complete:
                counted = known_left[:, own] @ table.known.take(places, axis=0, mode="clip").reshape(len(places), -1)
                number = counted.reshape(*shape[:2], -1)[..., table.pattern].astype(np.float64)
            total += products.reshape(shape) / np.maximum(number, 1)
            number_of_cells += np.greater(number, 0)
        mean = np.divide(total, number_of_cells, out=np.full(shape, np.nan), where=number_of_cells > 0)
        result[some] = mean.transpose(1, 0, 2)
    return result
