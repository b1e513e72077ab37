"""How much of a gain under PGD is left under the worst case, and which checks say that gradients are masked."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t

from drs.image_outcomes import DECISIVE_PGD, GroupOutcomes
from drs.paired import BASELINE, mean_interval
from drs.selection import usable_models
from drs.two_way import crossed_interval, crossed_ratio_interval

MASKING_CHECKS = (
    "objective_gap", "logit_shift_and_scale", "zero_gradient", "square_not_stronger", "transfer_not_stronger",
    "noise_weaker", "unbounded_succeeds",
)  # fmt: skip
"""Checks whose failure shows that an attack missed what another one found, or that gradients are exactly 0.

It does not show why. ``objective_gap`` and ``logit_shift_and_scale`` compare attacks that climb equally often and take
as many steps, which still may be too few for one of the two; ``more_steps`` and ``more_restarts``, which are not among
these, say so of the margin alone.
"""


_ROUNDING = 1e-12  # of a mean of shares that is 0


class Gain(NamedTuple):
    """A mean difference to cross-entropy over ``n`` pairs of seeds, with its 95 % interval (shares of samples)."""

    n: int
    difference: float
    ci_low: float
    ci_high: float


class Survival(NamedTuple):
    """What is left of a gain: under PGD, under the worst case on the same samples, and the ratio of the two."""

    pgd: Gain
    worst: Gain
    share: float
    ci_low: float
    ci_high: float


def fieller_interval(numerator: np.ndarray, denominator: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return Fieller's interval of a ratio of two paired means (1954, J. R. Stat. Soc. B 16, 175-185).

    Args:
        numerator: ``[n]``.
        denominator: ``[n]``, paired with it.
        level: Confidence level.

    Returns:
        Bounds of ``mean(numerator) / mean(denominator)``; NaN where the mean of the denominator cannot be told from 0,
        so that the ratio is unbounded, and for n < 2.
    """
    n = len(numerator)
    if n < 2:
        return math.nan, math.nan
    quantile = float(t.ppf((1 + level) / 2, n - 1)) ** 2
    covariance = np.cov(np.stack([numerator, denominator]), ddof=1) / n
    top, bottom = float(np.mean(numerator)), float(np.mean(denominator))
    square = bottom**2 - quantile * covariance[1, 1]
    if square <= 0:
        return math.nan, math.nan
    middle = top * bottom - quantile * covariance[0, 1]
    root = math.sqrt(max(0.0, middle**2 - square * (top**2 - quantile * covariance[0, 0])))
    return (middle - root) / square, (middle + root) / square


def paired_gains(worst_case: pd.DataFrame, loss: str, weight: float, norm: str = "linf") -> pd.DataFrame:
    """Return the gains of a setting over cross-entropy at the same seed, averaged over the decisive epsilons.

    Args:
        worst_case: worst_case.csv of one data set and architecture.
        loss: The setting's loss label.
        weight: The setting's weight.
        norm: ``linf`` or ``l2``.

    Returns:
        Index ``seed``; columns ``clean``, ``pgd`` and ``worst``, each a difference of shares of the same samples.
    """
    columns = ["clean", "pgd", "worst"]
    if worst_case.empty:
        return pd.DataFrame(columns=columns, dtype=float)
    rows = usable_models(worst_case)
    rows = rows[rows["norm"] == norm]
    own = rows[(rows["loss"] == loss) & np.isclose(rows["loss_weight"].astype(float), weight)]
    baseline = rows[rows["loss"] == BASELINE]
    means = [part.groupby("seed")[columns].mean() for part in (own, baseline)]
    left, right = means[0].align(means[1], join="inner", axis=0)
    return (left - right).astype(float)


def _gain(values: pd.Series) -> Gain:
    numbers = values.dropna().to_numpy(dtype=float)
    _, low, high = mean_interval(numbers)
    return Gain(len(numbers), float(numbers.mean()) if len(numbers) else math.nan, low, high)


def survival(gains: pd.DataFrame) -> Survival:
    """Return how much of the PGD gain is left under the worst case, from ``paired_gains``; intervals are over seeds.

    Where the mean under PGD is no gain there is nothing of which a share could be left, and the share is NaN.
    """
    complete = gains[["pgd", "worst"]].dropna()
    pgd, worst = _gain(complete["pgd"]), _gain(complete["worst"])
    if not pgd.difference > _ROUNDING:
        return Survival(pgd, worst, math.nan, math.nan, math.nan)
    low, high = fieller_interval(complete["worst"].to_numpy(), complete["pgd"].to_numpy())
    return Survival(pgd, worst, worst.difference / pgd.difference, low, high)


def crossed_survival(outcomes: GroupOutcomes, loss: str, weight: float) -> tuple[Survival, int]:
    """Return what ``survival`` does with intervals over seeds and images, in Linf, and how many images there were.

    The intervals of gains are ``drs.two_way.crossed_interval``, that of the share ``crossed_ratio_interval``. Without
    outcomes of pairs n is 0 and all else NaN.
    """
    pgd, worst = (outcomes.difference(name, loss, weight, BASELINE) for name in (DECISIVE_PGD, "worst_linf@mean"))
    if pgd.shape != worst.shape or not pgd.size:
        nothing = Gain(0, math.nan, math.nan, math.nan)
        return Survival(nothing, nothing, math.nan, math.nan, math.nan), 0
    gains = [Gain(len(layout), float(layout.mean()), *crossed_interval(layout)) for layout in (pgd, worst)]
    share = low = high = math.nan
    if gains[0].difference > _ROUNDING:
        share = gains[1].difference / gains[0].difference
        low, high = crossed_ratio_interval(worst, pgd)
    return Survival(gains[0], gains[1], share, low, high), pgd.shape[1]


def failing_share(sanity: pd.DataFrame, check: str) -> float:
    """Return the share of models that fail a check, among those for which it was run; NaN where it was not."""
    rows = sanity[(sanity["check"] == check) & sanity["passed"].isin(["pass", "fail"])]
    return float((rows["passed"] == "fail").mean()) if len(rows) else math.nan


def masked_checks(own: pd.DataFrame, baseline: pd.DataFrame, checks: Iterable[str] = MASKING_CHECKS) -> list[str]:
    """Return the checks that most models of a setting fail and most of the baseline's do not.

    Args:
        own: sanity.csv of the setting's models.
        baseline: sanity.csv of the cross-entropy models.
        checks: Which checks to look at.
    """
    return [check for check in checks if failing_share(own, check) > 0.5 and not failing_share(baseline, check) > 0.5]
