"""Every loss and procedure in one table: accuracy by attack, worst case, minimal norms, time, what survives."""

from typing import Any

import numpy as np
import pandas as pd

from drs.image_outcomes import GroupOutcomes
from drs.marks import counted
from drs.masking import crossed_survival, paired_gains, survival
from drs.paired import BASELINE
from drs.selection import group_models, usable_models

ACCURACIES = (
    "fgsm", "pgd", "margin_pgd", "targeted_pgd", "apgd_ce", "fmn_linf", "adaptive", "apgd_t", "fab_t", "square",
    "transfer", "noise", "hop_skip_jump", "cw_torchattacks", "cw", "margin_pgd_l2", "fmn_l2",
)  # fmt: skip
"""Every attack that a worst case is taken over."""
NORMS = ("smallest_linf", "smallest_l2", "fmn_linf", "fmn_l2", "cw")


def comparator_table(
    models: pd.DataFrame,
    accuracy: pd.DataFrame,
    worst_case: pd.DataFrame,
    outcomes: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Summarise every setting, a loss and weight with its procedure, over its usable seeds.

    Args:
        models: models.csv.
        accuracy: accuracy.csv.
        worst_case: worst_case.csv.
        outcomes: image_outcomes.csv; without it there are no intervals over images.

    Returns:
        A row per group and setting: ``data, model, loss, loss_weight, n_seeds``; ``mean.<x>`` and ``sd.<x>`` over seeds
        for x in ``clean``, every attack at the decisive epsilons (their mean), ``worst_linf``, ``worst_l2``,
        ``norm.<attack>`` (median minimal norm, pixel units), ``train_seconds`` and ``seconds_10k`` (training time for
        10 000 images, each epoch's counted anew); against cross-entropy at the same
        seed, in Linf: ``n_images`` of the worst case, ``n_pairs``, ``gain_pgd`` and ``gain_worst`` with ``_low`` and
        ``_high`` (shares of samples, t intervals) and ``share`` with ``share_low`` and ``share_high`` (Fieller; NaN
        where unbounded), all for other seeds on these images, and with ``_crossed_low`` and ``_crossed_high`` for other
        seeds and other images (``drs.two_way``); ``failed_checks``, how many of the models fail each check.
    """
    rows: list[dict[str, Any]] = []
    for data, model, group in group_models(usable_models(models)):
        worst = worst_case[(worst_case["data"] == data) & (worst_case["model"] == model)]
        images = None if outcomes is None else GroupOutcomes(outcomes, data, model)
        n_images = worst.loc[worst["norm"] == "linf", "n"].min()  # NaN where there are none
        cells = accuracy[accuracy["run_id"].isin(group["run_id"])]
        decisive = worst[["norm", "epsilon"]].drop_duplicates()
        cells = cells.merge(decisive, on=["norm", "epsilon"])
        values = cells.groupby(["run_id", "attack"])["robust_accuracy"].mean().unstack()
        for (loss, weight), own in group.groupby(["loss", "loss_weight"], sort=False):
            row: dict[str, Any] = {"data": data, "model": model, "loss": loss, "loss_weight": weight}
            row |= {"n_seeds": len(own), "n_images": n_images}
            columns = {"clean": own["clean_accuracy"], "train_seconds": own["train_seconds"]}
            columns["seconds_10k"] = seconds_for_10000(own)
            seen = values.reindex(own["run_id"])
            columns |= {name: seen[name] for name in (*ACCURACIES, "worst_linf", "worst_l2") if name in seen}
            columns |= {f"norm.{name}": own[f"norm.{name}"] for name in NORMS if f"norm.{name}" in own}
            for name, numbers in columns.items():
                # A model that withstands an attack on most samples has no finite median norm.
                finite = numbers.astype(float).replace(np.inf, np.nan)
                row |= {f"mean.{name}": finite.mean(), f"sd.{name}": finite.std()}
            if loss != BASELINE:
                row |= _survival(worst, images, str(loss), float(str(weight)))
            row["failed_checks"] = _failures(own)
            rows.append(row)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["data", "model", "loss", "loss_weight", "n_seeds"])


def seconds_for_10000(models: pd.DataFrame) -> pd.Series:
    """Return the training time of models for 10 000 images, in seconds: losses may be trained on different numbers."""
    return 10000 * models["train_seconds"] / models["images_seen"]


def _survival(worst: pd.DataFrame, images: GroupOutcomes | None, loss: str, weight: float) -> dict[str, float]:
    left = survival(paired_gains(worst, loss, weight))
    row: dict[str, float] = {"n_pairs": left.pgd.n}
    for name, gain in (("gain_pgd", left.pgd), ("gain_worst", left.worst)):
        row |= {name: gain.difference, f"{name}_low": gain.ci_low, f"{name}_high": gain.ci_high}
    row |= {"share": left.share, "share_low": left.ci_low, "share_high": left.ci_high}
    if images is None:
        return row
    both, _ = crossed_survival(images, loss, weight)
    for name, gain in (("gain_pgd", both.pgd), ("gain_worst", both.worst)):
        row |= {f"{name}_crossed_low": gain.ci_low, f"{name}_crossed_high": gain.ci_high}
    return row | {"share_crossed_low": both.ci_low, "share_crossed_high": both.ci_high}


def _failures(own: pd.DataFrame) -> str:
    return counted(own["failed_checks"].fillna("").astype(str)) if "failed_checks" in own else ""
