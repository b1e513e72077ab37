"""Intervals of means over seeds and images at once: every seed's model is judged on the same images.

The differences of some pairs of models on some images are a complete two-way layout with one value in a cell, seeds
crossed with images, both drawn at random: ``D[s, i] = mean + seed[s] + image[i] + residual[s, i]``. Its mean squares
estimate the variance of the grand mean (Cornfield and Tukey 1956, Ann. Math. Stat. 27, 907-949), with the degrees of
freedom of such a combination after Satterthwaite (1946, Biometrics Bull. 2, 110-114). Owen (2007, Ann. Appl. Stat. 1,
386-411) shows that no bootstrap is exact for such data; his pigeonhole bootstrap, which draws seeds and images anew,
comes out a little wider.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

_ROUNDING = 1e-12
"""Means over images that differ by no more than this share of them are the same."""


class MeanSquares(NamedTuple):
    """What varies in a two-way layout of S seeds and N images, per value; expectations by the model above.

    Attributes:
        seeds: ``N var(seed) + var(residual)``, with S - 1 degrees of freedom.
        images: ``S var(image) + var(residual)``, with N - 1.
        residual: ``var(residual)``, with (S - 1) (N - 1).
        n_seeds: S.
        n_images: N.
    """

    seeds: float
    images: float
    residual: float
    n_seeds: int
    n_images: int


def mean_products(first: np.ndarray, second: np.ndarray) -> MeanSquares:
    """Return the mean products of two layouts ``[S, N]``, S and N at least 2; of one with itself, its mean squares."""
    n_seeds, n_images = first.shape
    seeds, images, rest = zip(_effects(first), _effects(second), strict=True)
    return MeanSquares(
        float(n_images * (seeds[0] * seeds[1]).sum() / (n_seeds - 1)),
        float(n_seeds * (images[0] * images[1]).sum() / (n_images - 1)),
        float((rest[0] * rest[1]).sum() / ((n_seeds - 1) * (n_images - 1))),
        n_seeds,
        n_images,
    )


def _effects(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = values.mean()
    seeds, images = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    return seeds, images, values - mean - seeds[:, None] - images


def variance_of_mean(squares: MeanSquares) -> tuple[float, float]:
    """Return the estimated variance of the grand mean of a layout, and its degrees of freedom.

    It is ``(seeds + images - residual) / (S N)`` from the mean squares, but never less than ``seeds / (S N)``, the
    variance for these very images, nor less than ``images / (S N)``, that for these very seeds: below them chance has
    made a variance component negative.
    """
    seeds, images, residual, n_seeds, n_images = squares
    cells = n_seeds * n_images
    total = seeds + images - residual
    if residual > min(seeds, images):
        return max(seeds, images) / cells, n_seeds - 1 if seeds >= images else n_images - 1
    parts = seeds**2 / (n_seeds - 1) + images**2 / (n_images - 1) + residual**2 / ((n_seeds - 1) * (n_images - 1))
    return total / cells, total**2 / parts if parts > 0 else n_seeds - 1


def _half_width(squares: MeanSquares, level: float) -> float:
    """Return half the width of the interval of the grand mean, at least that over the seeds alone.

    With few seeds and large degrees of freedom from the images the two-way interval can be the narrower one, but one
    that is to hold for other images as well cannot be.
    """
    variance, freedom = variance_of_mean(squares)
    over_seeds = squares.seeds / (squares.n_seeds * squares.n_images)
    halves = [
        float(stdtrit(df, (1 + level) / 2)) * math.sqrt(max(0.0, value))
        for value, df in ((variance, freedom), (over_seeds, squares.n_seeds - 1))
    ]
    return max(halves)


def _has_interval(values: np.ndarray) -> bool:
    if values.ndim != 2 or min(values.shape) < 2:
        return False
    means = values.mean(axis=1)
    return bool(np.std(means, ddof=1) > _ROUNDING * max(1.0, abs(float(means.mean()))))


def crossed_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the mean of a layout, for other seeds and other images.

    Args:
        values: ``[S, N]``, finite.
        level: Confidence level.

    Returns:
        Bounds around the grand mean, never inside the t interval over the S means; NaN for fewer than two seeds or
        images, and where all seeds have the same mean, which is the coarseness of what was counted.
    """
    if not _has_interval(values):
        return math.nan, math.nan
    mean, half = float(values.mean()), _half_width(mean_products(values, values), level)
    return mean - half, mean + half


def crossed_ratio_interval(numerator: np.ndarray, denominator: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return Fieller's interval of the ratio of the means of two layouts, for other seeds and other images.

    Fieller (1954, J. R. Stat. Soc. B 16, 175-185): the ratios r for which the interval of the mean of
    ``numerator - r denominator`` holds 0. Its mean squares follow from the mean squares and products of the two.

    Args:
        numerator: ``[S, N]``.
        denominator: ``[S, N]``, of the same seeds and images.
        level: Confidence level.

    Returns:
        Bounds; NaN where the mean of the denominator cannot be told from 0, so that the ratio is unbounded, and where
        it has no interval.
    """
    if not _has_interval(denominator):
        return math.nan, math.nan
    top, bottom = float(numerator.mean()), float(denominator.mean())
    squares, products, own = (
        mean_products(*pair) for pair in ((numerator, numerator), (numerator, denominator), (denominator, denominator))
    )
    if abs(bottom) <= _half_width(own, level):
        return math.nan, math.nan

    def excess(ratio: float) -> float:
        seeds, images, residual = (
            max(0.0, a - 2 * ratio * b + ratio**2 * c)
            for a, b, c in zip(squares[:3], products[:3], own[:3], strict=True)
        )
        rest = MeanSquares(seeds, images, residual, own.n_seeds, own.n_images)
        return abs(top - ratio * bottom) - _half_width(rest, level)

    ratio = top / bottom
    return _first_beyond(excess, ratio, -1), _first_beyond(excess, ratio, 1)


def _first_beyond(excess: Callable[[float], float], ratio: float, sign: int) -> float:
    """Return where ``excess`` becomes positive on one side of ``ratio``; far out it is, as the denominator is not 0."""
    step = 1e-3 * max(1.0, abs(ratio))
    while excess(ratio + sign * step) <= 0:
        step *= 2
    return float(brentq(excess, ratio, ratio + sign * step, xtol=1e-12))
