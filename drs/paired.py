"""Differences between a loss and cross-entropy, paired by seed: by itself, and within a procedure of training."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.stats import t

from drs.image_outcomes import GroupOutcomes
from drs.selection import accuracy_columns, group_models, usable_models
from drs.two_way import crossed_interval

BASELINE = "ce"
ROUNDING = 1e-12
"""A spread of values by this share of them is none."""
COLUMNS = [
    "data", "model", "loss", "loss_weight", "baseline", "attack", "n_pairs", "baseline_mean", "loss_mean", "difference",
    "sd", "ci_low", "ci_high", "n_images", "crossed_low", "crossed_high",
]  # fmt: skip


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Return the standard deviation (n - 1) and the t interval of the mean of ``values`` ``[n]``; NaN for n < 2.

    Where all values are the same, as shares of a hundred images at three seeds may be, there is no interval either: a
    spread of 0 is then the coarseness of what was counted.
    """
    n = len(values)
    if n < 2:
        return float("nan"), float("nan"), float("nan")
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    if sd <= ROUNDING * max(1.0, abs(mean)):
        return 0.0, float("nan"), float("nan")
    half = float(t.ppf((1 + level) / 2, n - 1)) * sd / n**0.5
    return sd, mean - half, mean + half


def baselines_of(loss: str) -> list[str]:
    """Return what a loss is compared with: cross-entropy, and under a reference procedure that procedure's with it."""
    procedure, joined, _ = loss.partition("+")
    return [BASELINE, *([procedure] if joined else [])]


def paired_difference_table(models: pd.DataFrame, outcomes: pd.DataFrame | None = None) -> pd.DataFrame:
    """Compare every loss and weight with its baselines at the same seed, in each group of usable models.

    Args:
        models: A row per model: ``data``, ``model``, ``loss``, ``loss_weight``, ``seed``, ``clean_accuracy``,
            ``acc.<attack>``, ``norm.<attack>``, and optionally ``excluded``. Several runs of one loss, weight and
            seed enter as their mean.
        outcomes: image_outcomes.csv, see ``drs.image_outcomes``.

    Returns:
        ``COLUMNS``, a row per group, loss, weight, baseline and column. ``baseline`` is a loss, see ``baselines_of``.
        ``attack`` is ``clean``, ``<attack>@<epsilon>`` (shares of correct samples) or ``norm.<attack>`` (median minimal
        norm, pixel units). Means, differences (loss minus baseline), their standard deviation and the 95 % t interval
        are over the ``n_pairs`` seeds for which both values are finite; with one pair there is no interval, without
        any there is no row. ``ci_low`` and ``ci_high`` hold for other seeds on these images; ``crossed_low`` and
        ``crossed_high`` (``drs.two_way.crossed_interval``) hold for other seeds and other images, of which there were
        ``n_images``. The last three are NaN for what ``outcomes`` does not have: clean accuracy, single epsilons,
        minimal norms.
    """
    names = accuracy_columns(models)
    names |= {str(column): str(column) for column in models if str(column).startswith("norm.")}
    columns = list(names.values())
    rows: list[dict[str, object]] = []
    for data, model, group in group_models(usable_models(models)):
        means = group.groupby(["loss", "loss_weight", "seed"], dropna=False)[columns].mean()
        images = GroupOutcomes(outcomes, data, model)
        for (loss, weight), own in means.groupby(["loss", "loss_weight"], dropna=False):
            for reference in baselines_of(str(loss)):
                if loss == reference:
                    continue
                baseline = means[means.index.get_level_values("loss") == reference].groupby("seed").mean()
                at = {"data": data, "model": model, "loss": loss, "loss_weight": weight, "baseline": reference}
                pairs = own.droplevel(["loss", "loss_weight"]).align(baseline, join="inner", axis=0)
                for row in _differences(*pairs, names):
                    layout = images.difference(str(row["attack"]), str(loss), float(str(weight)), reference)
                    rows.append({**at, **row, **_over_images(layout)})
    return pd.DataFrame(rows, columns=COLUMNS)


def _differences(own: pd.DataFrame, other: pd.DataFrame, names: dict[str, str]) -> Iterator[dict[str, object]]:
    for attack, column in names.items():
        values = np.column_stack([own[column], other[column]]).astype(float)
        values = values[np.isfinite(values).all(axis=1)]
        if not len(values):
            continue
        difference = values[:, 0] - values[:, 1]
        sd, low, high = mean_interval(difference)
        yield {
            "attack": attack, "n_pairs": len(values), "baseline_mean": values[:, 1].mean(),
            "loss_mean": values[:, 0].mean(), "difference": difference.mean(), "sd": sd, "ci_low": low,
            "ci_high": high,
        }  # fmt: skip


def _over_images(layout: np.ndarray) -> dict[str, float]:
    low, high = crossed_interval(layout)
    return {"n_images": layout.shape[1] or float("nan"), "crossed_low": low, "crossed_high": high}
