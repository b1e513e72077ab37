"""Means over seeds and images at once: by hand, by simulation, and against a bootstrap."""

import math

import numpy as np
import pytest
from scipy import stats

from drs.masking import fieller_interval
from drs.paired import mean_interval
from drs.two_way import crossed_interval, crossed_ratio_interval, mean_products, variance_of_mean


def layout(
    rng: np.random.Generator, shape: tuple[int, int], mean: float, seeds: float, images: float, residual: float
) -> np.ndarray:
    """Draw a layout with these standard deviations of its three parts."""
    n_seeds, n_images = shape
    parts = rng.normal(0, seeds, (n_seeds, 1)), rng.normal(0, images, (1, n_images)), rng.normal(0, residual, shape)
    values: np.ndarray = mean + sum(parts)
    return values


def test_a_layout_of_two_seeds_and_three_images_by_hand() -> None:
    """Mean 4, seed means 3 and 5, image means 1, 4 and 7, and residuals of 1 and -1 in the outer images."""
    values = np.array([[1.0, 3.0, 5.0], [1.0, 5.0, 9.0]])
    squares = mean_products(values, values)
    assert squares == pytest.approx((6.0, 18.0, 2.0, 2, 3))
    variance, freedom = variance_of_mean(squares)
    assert variance == pytest.approx(22 / 6)
    assert freedom == pytest.approx(22**2 / (6**2 / 1 + 18**2 / 2 + 2**2 / 2))
    low, high = crossed_interval(values)
    assert (low + high) / 2 == pytest.approx(4)
    # With one degree of freedom the interval over the seeds is the wider one, and the other contains it.
    half = max(stats.t.ppf(0.975, freedom) * math.sqrt(22 / 6), stats.t.ppf(0.975, 1) * math.sqrt(6 / 6))
    assert (high - low) / 2 == pytest.approx(half) == pytest.approx(stats.t.ppf(0.975, 1))


def test_the_variance_is_never_below_that_for_these_seeds_or_these_images() -> None:
    rng = np.random.default_rng(0)
    floors = []
    for _ in range(200):
        values = layout(rng, (3, 6), 0.0, 0.05, 0.05, 1.0)
        squares = mean_products(values, values)
        variance, _ = variance_of_mean(squares)
        floor = max(squares.seeds, squares.images) / values.size
        assert variance >= floor
        assert squares.seeds / values.size == pytest.approx(values.mean(axis=1).var(ddof=1) / 3)
        floors.append(variance == floor)
        low, high = crossed_interval(values)
        _, *over_seeds = mean_interval(values.mean(axis=1))
        assert low <= over_seeds[0] + 1e-12 and high >= over_seeds[1] - 1e-12
    assert 0 < np.mean(floors) < 1


@pytest.mark.parametrize("shape", [(6, 125), (10, 500)])
@pytest.mark.parametrize(("seeds", "images", "residual"), [(0.01, 0.3, 0.4), (0.03, 0.2, 0.3)])
def test_intervals_cover_the_mean_and_those_over_seeds_alone_do_not(
    shape: tuple[int, int], seeds: float, images: float, residual: float
) -> None:
    rng = np.random.default_rng(1)
    studies, inside, alone = 1000, 0, 0
    for _ in range(studies):
        values = layout(rng, shape, 0.05, seeds, images, residual)
        low, high = crossed_interval(values)
        inside += low <= 0.05 <= high
        _, low, high = mean_interval(values.mean(axis=1))
        alone += low <= 0.05 <= high
    # Three standard errors of a share of 0.95 over 1000 studies are 2.1 points.
    assert 0.95 - 0.021 < inside / studies < 0.985
    assert alone / studies < 0.91


def test_intervals_cover_where_the_images_stand_or_fall() -> None:
    """Pairs of models that stand on an image where a noisy margin of theirs is positive: differences of -1, 0 and 1."""
    rng = np.random.default_rng(2)
    seeds, images, residual, gain, studies = 0.15, 1.0, 0.7, 0.3, 1000
    spread = math.sqrt(2 * seeds**2 + images**2 + residual**2)
    truth = stats.norm.cdf(gain / spread) - 0.5
    inside = alone = 0
    for _ in range(studies):
        pairs = []
        for mean in (gain, 0.0):
            noise = layout(rng, (8, 125), mean, math.sqrt(2) * seeds, 0.0, residual)
            pairs.append((noise + rng.normal(0, images, 125) > 0).astype(float))
        values = pairs[0] - pairs[1]
        low, high = crossed_interval(values)
        inside += low <= truth <= high
        _, low, high = mean_interval(values.mean(axis=1))
        alone += low <= truth <= high
    assert 0.95 - 0.021 < inside / studies < 0.985
    assert alone / studies < 0.85


def pigeonhole_bootstrap(values: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return means ``[draws]`` of layouts whose seeds and images are drawn anew, each by itself (Owen 2007)."""
    n_seeds, n_images = values.shape
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), draws)
    images = rng.multinomial(n_images, np.full(n_images, 1 / n_images), draws)
    means: np.ndarray = np.einsum("bs,si,bi->b", seeds, values, images, optimize=True) / values.size
    return means


def test_the_variance_is_that_of_the_pigeonhole_bootstrap() -> None:
    """It draws n of n, so its variance of seeds has n instead of n - 1 below; its residual counts three times."""
    rng = np.random.default_rng(3)
    values = layout(rng, (20, 200), 0.05, 0.05, 0.3, 0.3)
    squares = mean_products(values, values)
    variance, _ = variance_of_mean(squares)
    means = pigeonhole_bootstrap(values, 20000, rng)
    assert means.var() == pytest.approx(variance, rel=0.15)
    assert means.var() > 1.5 * squares.seeds / values.size and means.var() > 1.05 * squares.images / values.size
    bounds = np.quantile(means, [0.025, 0.975])
    assert bounds == pytest.approx(crossed_interval(values), abs=0.15 * np.ptp(bounds))


def test_without_images_that_differ_the_ratio_has_fiellers_interval() -> None:
    rng = np.random.default_rng(4)
    pgd, worst = rng.normal(0.16, 0.03, 10), rng.normal(0.07, 0.02, 10)
    wide = [np.tile(values[:, None], (1, 25)) for values in (worst, pgd)]
    assert crossed_ratio_interval(*wide) == pytest.approx(fieller_interval(worst, pgd), rel=1e-6)
    assert crossed_interval(wide[1]) == pytest.approx(mean_interval(pgd)[1:])


def test_the_ratio_covers_and_over_seeds_alone_does_not() -> None:
    rng = np.random.default_rng(5)
    studies, inside, alone = 600, 0, 0
    for _ in range(studies):
        common = layout(rng, (8, 125), 0.0, 0.01, 0.2, 0.2)
        pgd = 0.16 + common + layout(rng, (8, 125), 0.0, 0.01, 0.2, 0.2)
        worst = 0.08 + common + layout(rng, (8, 125), 0.0, 0.01, 0.2, 0.2)
        low, high = crossed_ratio_interval(worst, pgd)
        inside += low <= 0.5 <= high
        low, high = fieller_interval(worst.mean(axis=1), pgd.mean(axis=1))
        alone += low <= 0.5 <= high
    # Three standard errors over 600 studies are 2.7 points.
    assert 0.95 - 0.027 < inside / studies < 0.99
    assert alone / studies < 0.9


def test_the_bounds_of_a_ratio_are_where_the_difference_cannot_be_told_from_none() -> None:
    rng = np.random.default_rng(6)
    pgd, worst = layout(rng, (8, 50), 0.2, 0.02, 0.2, 0.2), layout(rng, (8, 50), 0.1, 0.02, 0.2, 0.2)
    low, high = crossed_ratio_interval(worst, pgd)
    for ratio, other in ((low, 0), (high, 1)):
        assert crossed_interval(worst - ratio * pgd)[other] == pytest.approx(0.0, abs=1e-9)
    assert low < worst.mean() / pgd.mean() < high
    fixed = fieller_interval(worst.mean(axis=1), pgd.mean(axis=1))
    assert low <= fixed[0] and high >= fixed[1]


@pytest.mark.parametrize(
    "values",
    [
        np.ones((4, 5)),
        np.arange(5.0)[None],
        np.arange(5.0)[:, None],
        np.empty((3, 0)),
        np.empty((0, 0)),
        np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
    ],
    ids=["constant", "one seed", "one image", "no image", "nothing", "seeds that have the same mean"],
)
def test_what_has_no_interval(values: np.ndarray) -> None:
    assert np.isnan(crossed_interval(values)).all()
    assert np.isnan(crossed_ratio_interval(values, values)).all()


def test_a_ratio_to_what_may_be_nothing_is_unbounded() -> None:
    rng = np.random.default_rng(7)
    nothing, gain = layout(rng, (6, 50), 0.0, 0.02, 0.2, 0.2), layout(rng, (6, 50), 0.2, 0.02, 0.2, 0.2)
    assert np.isnan(crossed_ratio_interval(gain, nothing - nothing.mean() + 0.001)).all()
    # Over seeds alone it is bounded here, because they agree on these images.
    few = np.array([0.1, 0.11, 0.09, 0.1])[:, None] + np.repeat([1.0, -1.0], 10)[None]
    assert np.isfinite(fieller_interval(few.mean(axis=1), few.mean(axis=1))).all()
    assert np.isnan(crossed_ratio_interval(few, few)).all()
