"""Where attacks land: which class a successful attack ends in, against what the clean softmax says."""

from typing import Any

import numpy as np
import pandas as pd
import torch


def landing_row(
    clean: dict[str, np.ndarray], attacked: dict[str, np.ndarray], softmax: np.ndarray | None = None
) -> tuple[dict[str, Any], np.ndarray]:
    """Compare an attack's flips with the clean softmax of the same model.

    Args:
        clean: ``logits [N, K]``, ``labels [N]`` and ``indices [N]`` without an attack.
        attacked: The same after it, for the first n of those samples.
        softmax: The ``class_means`` of the clean samples, where they are known already.

    Returns:
        ``n_flips`` (samples right before and wrong after), ``runner_up_rate`` (share of flips that end in the class
        with the largest clean softmax value after the label's), ``chance`` (1/(K-1)) and ``matrix_correlation``
        (Pearson over the off-diagonal entries of the two matrices); and the matrices ``[2, K, K]``: the class-mean
        softmax and the post-attack confusion counts, each row divided by its off-diagonal sum (NaN where that is 0).
    """
    count, classes = attacked["logits"].shape
    if not np.array_equal(clean["indices"][:count], attacked["indices"]):
        raise ValueError("the attacked samples are not the first of the clean ones")
    labels = attacked["labels"].astype(np.int64)
    before = clean["logits"][:count]
    after = attacked["logits"].argmax(1)
    flipped = (before.argmax(1) == labels) & (after != labels)
    others = before.copy()
    others[np.arange(count), labels] = -np.inf
    runner_up = others.argmax(1)
    rate = float((after[flipped] == runner_up[flipped]).mean()) if flipped.any() else float("nan")
    if softmax is None:
        softmax = class_means(clean)
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels[flipped], after[flipped]), 1)
    pair = np.stack([_off_diagonal(softmax), _off_diagonal(confusion)])
    inside = np.isfinite(pair).all(axis=0)
    usable = inside.sum() > 2 and pair[0][inside].std() > 0 and pair[1][inside].std() > 0
    correlation = float(np.corrcoef(pair[0][inside], pair[1][inside])[0, 1]) if usable else float("nan")
    row = {
        "n_flips": int(flipped.sum()),
        "runner_up_rate": rate,
        "chance": 1 / (classes - 1),
        "matrix_correlation": correlation,
    }
    return row, pair


def class_means(clean: dict[str, np.ndarray]) -> np.ndarray:
    """Return the mean softmax of each class, ``[K, K]``, of samples with ``logits [N, K]`` and ``labels [N]``."""
    logits, labels = clean["logits"], clean["labels"].astype(np.int64)
    probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
    classes = logits.shape[1]
    sums = np.zeros((classes, classes))
    np.add.at(sums, labels, probabilities)
    counts = np.bincount(labels, minlength=classes)[:, None]
    return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Divide each row by its off-diagonal sum; the diagonal, and rows whose sum is 0, become NaN."""
    result = matrix.astype(float).copy()
    np.fill_diagonal(result, 0)
    sums = result.sum(axis=1, keepdims=True)
    result = np.divide(result, sums, out=np.full_like(result, np.nan), where=sums > 0)
    np.fill_diagonal(result, np.nan)
    return result


def mean_matrices(matrices: dict[tuple[Any, ...], list[np.ndarray]]) -> pd.DataFrame:
    """Average the matrices of ``landing_row`` over seeds; a row per entry off the diagonal.

    Args:
        matrices: (data, model, loss, loss_weight, attack, epsilon label) -> one ``[2, K, K]`` per seed.
    """
    columns = ["data", "model", "loss", "loss_weight", "attack", "epsilon_label"]
    parts = []
    for key, stack in sorted(matrices.items()):
        stacked = np.stack(stack)
        counts = np.isfinite(stacked).sum(axis=0)
        mean = np.divide(np.nansum(stacked, axis=0), counts, out=np.full(counts.shape, np.nan), where=counts > 0)
        kinds, rows, others = np.nonzero(np.isfinite(mean))
        part = pd.DataFrame(dict(zip(columns, key, strict=True)), index=range(len(kinds)))
        part["kind"] = np.array(["softmax", "confusion"])[kinds]
        part["true_class"], part["other_class"], part["value"] = rows, others, mean[kinds, rows, others].round(6)
        parts.append(part)
    empty = pd.DataFrame(columns=[*columns, "kind", "true_class", "other_class", "value"])
    return pd.concat(parts, ignore_index=True) if parts else empty
