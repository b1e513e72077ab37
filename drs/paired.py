"""Differences between a loss and cross-entropy, paired by seed."""

import numpy as np
import pandas as pd
from scipy.stats import t

from drs.selection import accuracy_columns, group_models, usable_models

BASELINE = "ce"
COLUMNS = [
    "data", "model", "loss", "loss_weight", "attack", "n_pairs", "baseline_mean", "loss_mean", "difference", "sd",
    "ci_low", "ci_high",
]  # fmt: skip


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Return the standard deviation (n - 1) and the t interval of the mean of ``values`` ``[n]``; NaN for n < 2."""
    n = len(values)
    if n < 2:
        return float("nan"), float("nan"), float("nan")
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf((1 + level) / 2, n - 1)) * sd / n**0.5
    return sd, mean - half, mean + half


def paired_difference_table(models: pd.DataFrame) -> pd.DataFrame:
    """Compare every loss and weight with cross-entropy at the same seed, in each group of usable models.

    Args:
        models: A row per model: ``data``, ``model``, ``loss``, ``loss_weight``, ``seed``, ``clean_accuracy``,
            ``acc.<attack>``, ``norm.<attack>``, and optionally ``excluded``. Several runs of one loss, weight and
            seed enter as their mean.

    Returns:
        ``COLUMNS``, a row per group, loss, weight and column. ``attack`` is ``clean``, ``<attack>@<epsilon>`` (shares
        of correct samples) or ``norm.<attack>`` (median minimal norm, pixel units). Means, differences (loss minus
        baseline), their standard deviation and the 95 % t interval are over the ``n_pairs`` seeds for which both
        values are finite; with one pair there is no interval, without any there is no row.
    """
    names = accuracy_columns(models)
    names |= {str(column): str(column) for column in models if str(column).startswith("norm.")}
    columns = list(names.values())
    rows: list[dict[str, object]] = []
    for data, model, group in group_models(usable_models(models)):
        means = group.groupby(["loss", "loss_weight", "seed"], dropna=False)[columns].mean()
        baseline = means[means.index.get_level_values("loss") == BASELINE].groupby("seed").mean()
        for (loss, weight), own in means.groupby(["loss", "loss_weight"], dropna=False):
            if loss == BASELINE:
                continue
            own, other = own.droplevel(["loss", "loss_weight"]).align(baseline, join="inner", axis=0)
            for attack, column in names.items():
                values = np.column_stack([own[column], other[column]]).astype(float)
                values = values[np.isfinite(values).all(axis=1)]
                if not len(values):
                    continue
                difference = values[:, 0] - values[:, 1]
                sd, low, high = mean_interval(difference)
                rows.append({
                    "data": data, "model": model, "loss": loss, "loss_weight": weight, "attack": attack,
                    "n_pairs": len(values), "baseline_mean": values[:, 1].mean(), "loss_mean": values[:, 0].mean(),
                    "difference": difference.mean(), "sd": sd, "ci_low": low, "ci_high": high,
                })  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)
