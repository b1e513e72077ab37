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


def best_weight(standing: "pd.Series[float]", near: float) -> float:
    """Return the weight that stands best, between equals the one nearest to ``near``.

    Args:
        standing: Accuracy by weight, not empty.
    """
    rounded = standing.round(9)
    return float(min(rounded.index, key=lambda weight: (-rounded[weight], abs(weight - near))))
