"""Spearman, Pearson and Kendall coefficients of many pairs of columns under many resamples at once.

A resample of n rows is a vector of n counts: how often each row was drawn. All three coefficients are normalised
inner products (of values, of ranks, of the signs of pairwise differences), so resamples become matrix products.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Array = NDArray[np.float64]
METHODS = ("spearman", "pearson", "kendall")
_CHUNK_VALUES = 4_000_000  # the largest temporary array: 32 MB of float64
LARGE = 300
"""Groups of more models than this get Kendall's resamples by their first-order terms: pairs grow with the square of
the models, and what is left out shrinks with them, to a few per cent of an interval's width here."""
_TIE = 1e-10  # a permuted coefficient this close below the observed one is the same arrangement, rounded differently


def _signs(columns: Array) -> NDArray[np.float32]:
    """``[n, C]`` -> ``[C, n, n]``: the sign of value i minus value j."""
    values = columns.T
    return np.sign(values[:, :, None] - values[:, None, :]).astype(np.float32)


def _standard(columns: Array) -> Array:
    # Before centring, so that a column of tiny or huge values neither underflows nor overflows when squared.
    largest = np.abs(columns - columns[0]).max(axis=0)
    scaled = (columns - columns[0]) / np.where(largest > 0, largest, 1.0)
    return scaled - scaled.mean(axis=0)


def _ratio(numerator: Array, left: Array, right: Array) -> Array:
    """Divide inner products ``[B, S, A]`` by the norms whose squares are ``[B, S]`` and ``[B, A]``; 0/0 is NaN."""
    denominator = np.sqrt(np.maximum(left, 0.0))[:, :, None] * np.sqrt(np.maximum(right, 0.0))[:, None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(np.where(denominator > 0, numerator / denominator, np.nan), -1.0, 1.0)


def chunks(total: int, values_each: int) -> Iterator[slice]:
    """Cut ``total`` resamples of ``values_each`` numbers into parts that fit the memory."""
    size = max(1, _CHUNK_VALUES // max(values_each, 1))
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _pearson(left: Array, right: Array, counts: Array) -> Array:
    left, right = _standard(left), _standard(right)
    n = counts.sum(axis=1, keepdims=True)
    products = (left[:, :, None] * right[:, None, :]).reshape(len(left), -1)
    sum_left, sum_right = counts @ left, counts @ right
    shape = (len(counts), left.shape[1], right.shape[1])
    numerator = (counts @ products).reshape(shape) - sum_left[:, :, None] * sum_right[:, None, :] / n[:, :, None]
    return _ratio(numerator, counts @ left**2 - sum_left**2 / n, counts @ right**2 - sum_right**2 / n)


def _ties(column: Array) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the order of ``[n]`` values and, in it, where the values equal to each one begin and end."""
    order = np.argsort(column, kind="stable")
    begins = np.flatnonzero(np.r_[True, np.diff(column[order]) != 0])
    ends = np.r_[begins[1:], len(column)]
    return order, np.repeat(begins, ends - begins), np.repeat(ends, ends - begins)


def _resampled_ranks(columns: Array, counts: Array) -> Array:
    """``[n, C]`` and ``[B, n]`` -> ``[B, C, n]``: twice the centred rank of each row within each resample.

    The rank of a value, ties averaged, is half of how many drawn values lie below it less how many lie above it, up to
    a constant; so ranks are exact whole numbers here, and the values are sorted once for all resamples.
    """
    # Resamples are the last axis on the way: whole rows are moved and added then, not single numbers.
    counts_of_row = np.ascontiguousarray(counts.T)
    ranks = np.empty((len(counts), columns.shape[1], len(columns)))
    drawn = np.zeros((len(columns) + 1, len(counts)))
    place = np.empty(len(columns), dtype=np.int64)
    for position, column in enumerate(columns.T):
        order, begins, ends = _ties(column)
        place[order] = np.arange(len(column))
        np.cumsum(counts_of_row[order], axis=0, out=drawn[1:])
        twice = drawn[begins[place]]
        twice += drawn[ends[place]]
        twice -= drawn[-1]
        ranks[:, position] = twice.T
    return ranks


def _spearman(left: Array, right: Array, counts: Array) -> Array:
    ranks_left = _resampled_ranks(left, counts)
    ranks_right = ranks_left if right is left else _resampled_ranks(right, counts)
    drawn = counts[:, None, :]
    numerator = (ranks_left * drawn) @ ranks_right.transpose(0, 2, 1)
    squares = [(ranks**2 @ counts[:, :, None])[..., 0] for ranks in (ranks_left, ranks_right)]
    return _ratio(numerator, *squares)


def _kendall(left: Array, right: Array, counts: Array) -> Array:
    if len(left) > LARGE:
        return _kendall_first_order(left, right, counts)
    # Whole numbers below 2**24 throughout, which float32 holds exactly.
    first, second = np.triu_indices(len(left), 1)
    signs_left, signs_right = (_signs(side)[:, first, second] for side in (left, right))
    weights = (counts[:, first] * counts[:, second]).astype(np.float32)
    products = (signs_left[:, None, :] * signs_right[None, :, :]).reshape(-1, len(first))
    numerator = (weights @ products.T).reshape(len(counts), len(signs_left), len(signs_right)).astype(np.float64)
    squares = [(weights @ (side**2).T).astype(np.float64) for side in (signs_left, signs_right)]
    return _ratio(numerator, *squares)


def _kendall_first_order(left: Array, right: Array, counts: Array) -> Array:
    """Return Kendall's coefficients with their sums over pairs linear in the counts around one each (Hajek 1968).

    The coefficient of the rows as they are, and those that leave one row out, are exact.
    """
    shares = []  # of each row in the sums over all ordered pairs
    for start in range(0, len(left), 64):
        own = slice(start, start + 64)
        signs = [np.sign(side[own, None, :] - side[None]).astype(np.float32) for side in (left, right)]
        products = signs[0].transpose(0, 2, 1) @ signs[1]
        shares.append((products, *((side**2).sum(axis=1) for side in signs)))
    product, *squares = (np.concatenate(part).astype(np.float64) for part in zip(*shares, strict=True))
    change = counts - 1

    def total(share: Array) -> Array:
        flat = share.reshape(len(share), -1)
        return (flat.sum(axis=0) / 2 + change @ flat).reshape(len(counts), *share.shape[1:])

    return _ratio(total(product), *(total(share) for share in squares))


def _kendall_spread(column: Array) -> tuple[float, float, float, int]:
    """Return what ties do to Kendall's sum in random orders, summed over the groups of equal values, and how many
    groups there are."""
    sizes = np.unique(column, return_counts=True)[1].astype(np.float64)
    pairs = sizes * (sizes - 1)
    sums = (pairs * (2 * sizes + 5)).sum(), (pairs * (sizes - 2)).sum(), pairs.sum()
    return float(sums[0]), float(sums[1]), float(sums[2]), len(sizes)


def _kendall_from_spearman(left: Array, right: Array, spearman: Array) -> Array:
    """Return Kendall's coefficients in random orders from Spearman's, ``[M, S, A]``.

    Over random orders of n rows the two correlate at ``2 (n + 1) / sqrt(2 n (2 n + 5))``, 0.998 at 300 (Kendall 1970,
    Rank Correlation Methods); what is left is their ratio of standard deviations, ties included.
    """
    n = len(left)
    sides = [[_kendall_spread(column) for column in side.T] for side in (left, right)]
    ratio = np.full((left.shape[1], right.shape[1]), np.nan)
    for i, (five, three, two, groups) in enumerate(sides[0]):
        for j, (other_five, other_three, other_two, other_groups) in enumerate(sides[1]):
            if min(groups, other_groups) < 2:
                continue
            variance = (n * (n - 1) * (2 * n + 5) - five - other_five) / 18
            variance += three * other_three / (9 * n * (n - 1) * (n - 2)) + two * other_two / (2 * n * (n - 1))
            squares = (n * (n - 1) - two) / 2 * (n * (n - 1) - other_two) / 2
            ratio[i, j] = np.sqrt(variance / squares * (n - 1))
    return np.clip(spearman * ratio, -1.0, 1.0)


def coefficients(
    left: Array, right: Array, counts: Array | None = None, methods: Sequence[str] = METHODS
) -> dict[str, Array]:
    """Return every coefficient of every column of ``left`` with every column of ``right`` in every resample.

    Args:
        left: ``[n, S]`` finite values.
        right: ``[n, A]`` finite values.
        counts: ``[B, n]``: how often each row was drawn; None for the rows as they are (B = 1).
        methods: Which coefficients.

    Returns:
        Method -> ``[B, S, A]``: Spearman's rho (ties get average ranks), Pearson's r, Kendall's tau-b (of more than
        ``LARGE`` rows by its first-order terms). NaN where a column is constant in the resample.
    """
    counts = np.ones((1, len(left))) if counts is None else counts.astype(np.float64)
    n, columns = len(left), left.shape[1] * right.shape[1]
    pairs = n * n // 2 if n <= LARGE and "kendall" in methods else 0
    cost = max(n * (left.shape[1] + right.shape[1]), pairs, columns)
    found: dict[str, Array] = {}
    if "kendall" in methods and n > LARGE:
        found["kendall"] = _kendall(left, right, counts)
    parts: dict[str, list[Array]] = {method: [] for method in methods if method not in found}
    for chunk in chunks(len(counts), cost):
        spearman = _spearman(left, right, counts[chunk])
        if "spearman" in parts:
            parts["spearman"].append(spearman)
        if "pearson" in parts:
            # Rounding leaves a constant resample a tiny variance of values, but never of ranks.
            parts["pearson"].append(np.where(np.isnan(spearman), np.nan, _pearson(left, right, counts[chunk])))
        if "kendall" in parts:
            parts["kendall"].append(_kendall(left, right, counts[chunk]))
    return found | {method: np.concatenate(part) for method, part in parts.items()}


def draw_counts(n: int, n_bootstrap: int, rng: np.random.Generator) -> Array:
    """Return bootstrap resamples of n rows as counts ``[n_bootstrap, n]``."""
    return rng.multinomial(n, np.full(n, 1 / n), size=n_bootstrap).astype(np.float64)


def draw_permutations(n: int, n_permutations: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return random orders of n rows, ``[n_permutations, n]``."""
    return rng.permuted(np.tile(np.arange(n), (n_permutations, 1)), axis=1)


def permuted_coefficients(left: Array, right: Array, orders: NDArray[np.int64]) -> dict[str, Array]:
    """Return every coefficient after the rows of one side were put in each of ``orders`` ``[M, n]``.

    Returns:
        Method -> ``[M, S, A]``, as ``coefficients`` gives it; NaN where a column is constant.
    """
    if left.shape[1] > right.shape[1]:  # reorder the narrower side; the inverse orders are as random
        swapped = permuted_coefficients(right, left, orders)
        return {method: values.transpose(0, 2, 1) for method, values in swapped.items()}
    n, columns = left.shape
    large = n > LARGE
    ranks = [_resampled_ranks(side, np.ones((1, n)))[0].T for side in (left, right)]
    sides = {"spearman": (ranks[0], ranks[1]), "pearson": (_standard(left), _standard(right))}
    result = {method: np.empty((len(orders), columns, right.shape[1])) for method in METHODS}
    if not large:
        first, second = np.triu_indices(n, 1)
        signs_left = _signs(left)
        kendall_right = _signs(right)[:, first, second].T
        pairs_left = signs_left[:, first, second]
    for chunk in chunks(len(orders), columns * n if large else columns * max(n * (n - 1) // 2, n) + n * n):
        order = orders[chunk]
        for method, (values_left, values_right) in sides.items():
            numerator = values_left.T[:, order].transpose(1, 0, 2) @ values_right
            squares = (values_left**2).sum(axis=0)[None], (values_right**2).sum(axis=0)[None]
            result[method][chunk] = _ratio(numerator, *squares)
        if large:
            continue
        reordered = signs_left[:, order[:, first], order[:, second]].reshape(-1, len(first))
        numerator = (reordered @ kendall_right).reshape(columns, len(order), -1).transpose(1, 0, 2).astype(np.float64)
        squares = (pairs_left**2).sum(axis=1)[None], (kendall_right**2).sum(axis=0)[None]
        result["kendall"][chunk] = _ratio(numerator, *(side.astype(np.float64) for side in squares))
    if large:
        result["kendall"] = _kendall_from_spearman(left, right, result["spearman"])
    constant = np.isnan(result["spearman"])
    result["pearson"][constant] = np.nan
    return result


def bca_interval(observed: Array, draws: Array, influence: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Return bias-corrected and accelerated bootstrap intervals (Efron 1987, J. Am. Stat. Assoc. 82, 171-185).

    Draws in which the coefficient does not exist (NaN) are dropped; where more than half are, there is no interval. Nor
    is there one where it has no width, or leaves the coefficient out: a column of few values gives few different draws.
    Of a coefficient of 1 or -1 the interval is that number, if all draws are.

    Args:
        observed: ``[S, A]`` coefficients.
        draws: ``[B, S, A]`` coefficients of bootstrap resamples.
        influence: ``[n, S, A]``: mean of the leave-one-out coefficients minus each of them; NaN counts as 0.
        level: Confidence level.

    Returns:
        Lower and upper bounds, ``[S, A]`` each, NaN where there is none.
    """
    ordered = np.sort(draws, axis=0)  # NaN comes last
    kept = np.isfinite(draws).sum(axis=0)
    exists = (2 * kept >= len(draws)) & np.isfinite(observed)
    total = np.maximum(kept, 1)
    below = (draws < observed - _TIE).sum(axis=0) + 0.5 * (np.abs(draws - observed) <= _TIE).sum(axis=0)
    # Half a draw away from 0 and 1, where the correction would be infinite.
    bias = norm.ppf(np.clip(below, 0.5, total - 0.5) / total)
    influence = np.nan_to_num(influence)
    cubes, squares = (influence**3).sum(axis=0), (influence**2).sum(axis=0)
    acceleration = cubes / np.where(squares > 0, 6 * squares**1.5, 1.0)
    bounds = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + norm.ppf(tail)
        position = norm.cdf(bias + shifted / (1 - acceleration * shifted)) * (total - 1)
        low = np.floor(position).astype(np.int64)
        high = np.minimum(low + 1, total - 1)
        values = [np.take_along_axis(ordered, index[None], axis=0)[0] for index in (low, high)]
        bound = values[0] + (position - low) * (values[1] - values[0])
        bounds.append(np.where(exists, bound, np.nan))
    contains = (bounds[0] <= observed + _TIE) & (observed <= bounds[1] + _TIE)
    degenerate = (bounds[1] - bounds[0] <= _TIE) & (np.abs(observed) < 1 - _TIE)
    sound = contains & ~degenerate
    return np.where(sound, bounds[0], np.nan), np.where(sound, bounds[1], np.nan)


def permutation_p(observed: Array, permuted: Array, *, alternative: str = "two-sided") -> Array:
    """Return ``(b + 1) / (m + 1)``: b of the m random orders gave a coefficient at least as extreme.

    Args:
        observed: ``[S, A]`` coefficients.
        permuted: ``[M, S, A]`` coefficients of random orders.
        alternative: ``two-sided`` (by absolute value) or ``greater``.

    Returns:
        ``[S, A]``, NaN where the coefficient is.
    """
    if alternative not in ("two-sided", "greater"):
        raise ValueError(f"alternative={alternative!r} is unknown; it is two-sided or greater")
    if alternative == "two-sided":
        observed, permuted = np.abs(observed), np.abs(permuted)
    extreme = (permuted >= observed - _TIE).sum(axis=0)
    return np.where(np.isfinite(observed), (extreme + 1) / (len(permuted) + 1), np.nan)
