"""Inside one model: do samples with another softmax distribution need a larger perturbation?

Correlations over models ask which model is more robust. Here the unit is the sample: the statistics of its clean
softmax against the norm of the smallest perturbation that an attack found for it (``fmn_linf``, ``fmn_l2``, ``cw``).
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.stats import norm, spearmanr

from drs.statistics import STATISTICS, softmax_statistics

MIN_SAMPLES = 10  # fewer give no coefficient: the interval and the p-value are large-sample ones
LEVEL = 0.95


def spearman_interval(coefficient: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of Spearman's coefficient of n independent pairs, from Fisher's z.

    The variance of z is taken as ``(1 + rho**2 / 2) / (n - 3)`` (Bonett and Wright 2000, Psychometrika 65, 23-28),
    which covers at its nominal level up to about 0.95 where Fisher's own ``1 / (n - 3)`` falls short. The samples of
    a test set are independent draws and count in hundreds, so a bootstrap would give much the same bounds at a
    thousand times the cost.
    """
    if not abs(coefficient) < 1 or n <= 3:
        return coefficient, coefficient
    half = norm.ppf((1 + level) / 2) * math.sqrt((1 + coefficient**2 / 2) / (n - 3))
    centre = math.atanh(coefficient)
    return math.tanh(centre - half), math.tanh(centre + half)


def sample_correlation_rows(clean: dict[str, np.ndarray], attacked: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return Spearman's correlation over samples of each statistic with the minimal perturbation norm.

    A sample that is wrong already needs no perturbation and is left out. So is one that the attack did not fool: its
    norm is unknown, though likely large, so that many of them weaken the coefficient; they are counted.

    Args:
        clean: ``indices [N]``, ``labels [N]`` and ``logits [N, K]`` without an attack.
        attacked: The same after a minimal-norm attack, for the first n of those samples, and ``distance [n]``, the
            norm of the perturbation in pixel units. A sample counts as found if its adversarial logits are
            misclassified.

    Returns:
        A row per statistic: ``statistic``, ``n`` (samples that count), ``n_not_found``, ``coefficient``, ``ci_low``,
        ``ci_high`` (see ``spearman_interval``), ``p_value`` (two-sided, Student's t). NaN after ``n_not_found`` for a
        constant column and below ``MIN_SAMPLES`` samples.

    Raises:
        ValueError: If the attacked samples are not the first of the clean ones, or a found one has no finite norm.
    """
    count = len(attacked["indices"])
    if not np.array_equal(clean["indices"][:count], attacked["indices"]):
        raise ValueError("the attacked samples are not the first of the clean ones")
    labels = attacked["labels"].astype(np.int64)
    logits = clean["logits"][:count]
    right = logits.argmax(1) == labels
    found = right & (attacked["logits"].argmax(1) != labels)
    distance = attacked["distance"][found].astype(np.float64)
    if not np.isfinite(distance).all():
        sample = int(attacked["indices"][found][~np.isfinite(distance)][0])
        raise ValueError(f"sample {sample} is misclassified, but the norm of its perturbation is not finite")
    statistics = softmax_statistics(torch.from_numpy(logits[found]), torch.from_numpy(labels[found]))
    counts = {"n": int(found.sum()), "n_not_found": int((right & ~found).sum())}
    return [{"statistic": name, **counts, **_correlate(statistics[name].numpy(), distance)} for name in STATISTICS]


def _correlate(values: np.ndarray, distance: np.ndarray) -> dict[str, float]:
    n = len(distance)
    if n < MIN_SAMPLES or not np.ptp(values) > 0 or not np.ptp(distance) > 0:
        return dict.fromkeys(("coefficient", "ci_low", "ci_high", "p_value"), math.nan)
    coefficient, p_value = (float(value) for value in spearmanr(values, distance))
    low, high = spearman_interval(coefficient, n)
    return {"coefficient": coefficient, "ci_low": low, "ci_high": high, "p_value": p_value}
