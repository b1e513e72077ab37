"""Which rows of models.csv count, and how they are grouped. Reads tables only."""

from collections.abc import Iterator

import pandas as pd


def usable_models(models: pd.DataFrame) -> pd.DataFrame:
    """Return the models that no reason in the column ``excluded`` keeps out of correlations and claims."""
    if "excluded" not in models:
        return models
    reason = models["excluded"].astype("string").fillna("").str.strip()
    return models[(reason == "").to_numpy(dtype=bool)]


def standard_models(models: pd.DataFrame) -> pd.DataFrame:
    """Return the usable models of the standard training procedure; without a column ``procedure`` all are.

    Adversarial training changes robustness by other means than the softmax distribution, so its models are points of
    reference and stay out of correlations.
    """
    usable = usable_models(models)
    if "procedure" not in usable:
        return usable
    return usable[(usable["procedure"].astype("string") == "standard").fillna(False).to_numpy(dtype=bool)]


def group_models(models: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield data, model and rows of every pair of a dataset and an architecture, in order of appearance."""
    if models.empty:  # perhaps without these columns
        return
    for (data, model), rows in models.groupby(["data", "model"], sort=False, dropna=False):
        yield str(data), str(model), rows


def accuracy_columns(models: pd.DataFrame) -> dict[str, str]:
    """Return attack name -> column of ``models``: ``clean`` and every ``acc.<attack>@<epsilon>``."""
    names = {"clean": "clean_accuracy"} if "clean_accuracy" in models else {}
    attacks = [str(column) for column in models if str(column).startswith("acc.") and "@" in str(column)]
    return names | {column.removeprefix("acc."): column for column in attacks}


CLEARLY_BETTER = 0.02
"""How much better, a share of the images, a weight must stand than the published one to be shown beside it."""
MOST_CLEAN_LOSS = 0.1
"""How much clean accuracy (a share) a weight may lose against cross-entropy and still be called the best."""


def best_weight(ours: pd.DataFrame, baseline_clean: float, near: float) -> float:
    """Return the weight that stands best in the worst case on average; ``near`` unless one stands clearly better.

    Clearly is by ``CLEARLY_BETTER``; between equals it is the one nearest to ``near``. A weight that costs more than
    ``MOST_CLEAN_LOSS`` of clean accuracy is not chosen, unless all do.

    Args:
        ours: Rows of worst_case.csv of one loss, with ``loss_weight``, ``clean`` and ``worst``; not empty.
        baseline_clean: Mean clean accuracy of cross-entropy on the same images; NaN if there is none.
        near: A weight.
    """
    means = ours.groupby("loss_weight")[["clean", "worst"]].mean().round(9)
    useful = means[~(means["clean"] < round(baseline_clean - MOST_CLEAN_LOSS, 9))]
    worst = (useful if len(useful) else means)["worst"]
    best = float(min(worst.index, key=lambda weight: (-worst[weight], abs(weight - near))))
    return near if near in worst.index and worst[best] - worst[near] < CLEARLY_BETTER else best
