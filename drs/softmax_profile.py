"""Clean samples of all runs of a setting -> quartiles of their non-label softmax values, sorted within each sample."""

import numpy as np
import torch

from drs.cells import Cell, read_cells


def nonlabel_sorted(clean: dict[str, np.ndarray]) -> np.ndarray:
    """Return the non-label softmax values of each sample, largest first, ``[N, K-1]``."""
    probabilities = torch.from_numpy(clean["logits"]).double().softmax(1).numpy()
    count, classes = probabilities.shape
    others = probabilities[np.arange(classes) != clean["labels"][:, None]].reshape(count, classes - 1)
    return -np.sort(-others, axis=1)


def profile_rows(cells: list[Cell]) -> list[dict[str, float | int]]:
    """Return a row per rank over the samples of some clean cells: ``rank, q25, median, q75, n``.

    Raises:
        DamagedFileError: If the file of a cell is not what was written.
    """
    parts = [nonlabel_sorted(read_cells(cell.run, [cell])[cell.path]) for cell in cells]
    low, median, high = np.quantile(np.concatenate(parts), [0.25, 0.5, 0.75], axis=0)
    count = sum(len(part) for part in parts)
    return [
        {"rank": rank + 1, "q25": low[rank], "median": median[rank], "q75": high[rank], "n": count}
        for rank in range(len(median))
    ]
