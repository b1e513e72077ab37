"""What became of each image under an attack, model by model: what intervals over seeds and images are made from.

image_outcomes.csv has a row per model and attack, of the attacks that claims and reports compare. Its column
``standing`` is a text with a letter per image, in the fixed order of the test images: how many of the attack's
``n_epsilons`` bounds the image withstands, ``A`` for none, ``B`` for one, and so on in Unicode's order. The mean over
images, over ``n_epsilons``, is the robust accuracy that models.csv has as ``acc.<attack>``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from drs.selection import usable_models

COMPARED = (
    "fgsm@mean", "pgd@mean", "cw_torchattacks@mean", "cw@mean", "margin_pgd@mean", "targeted_pgd@mean",
    "worst_linf@mean", "worst_l2@mean",
)  # fmt: skip
"""What has rows, besides ``DECISIVE_PGD``; see ``drs.figure_style.IN_PANELS``."""
DECISIVE_PGD = "pgd@decisive"
"""PGD at the mean of the decisive epsilons in Linf, on the images of the worst case there."""
_FIRST = ord("A")

Outcomes = dict[int, np.ndarray]
"""By seed, the share of epsilons that each image withstands, ``[n]``; the mean over a seed's models."""


def outcome_rows(standing: Mapping[str, Sequence[np.ndarray]]) -> list[dict[str, Any]]:
    """Return a model's rows of image_outcomes.csv.

    Args:
        standing: Which of the first images stand, ``[n]`` for each epsilon, by attack. Where epsilons differ in n, only
            the images of all of them count.
    """
    rows = []
    for attack, lists in standing.items():
        n = min(map(len, lists))
        counts = np.stack([item[:n] for item in lists]).sum(axis=0)
        text = "".join(chr(_FIRST + count) for count in counts.tolist())
        rows.append({"attack": attack, "n": n, "n_epsilons": len(lists), "standing": text})
    return rows


def outcomes_by_seed(rows: pd.DataFrame) -> Outcomes:
    """Return the outcomes of some rows of image_outcomes.csv, all of one attack and one setting.

    Several models of one seed enter as their mean, on the images that all of them have.
    """
    found: dict[int, list[np.ndarray]] = {}
    for seed, text, n_epsilons in zip(rows["seed"], rows["standing"], rows["n_epsilons"], strict=True):
        counts = np.frombuffer(str(text).encode("utf-32-le"), dtype="<u4").astype(float) - _FIRST
        found.setdefault(int(seed), []).append(counts / n_epsilons)
    return {seed: np.mean(_common(arrays), axis=0) for seed, arrays in found.items()}


def paired_layout(own: Outcomes, other: Outcomes) -> np.ndarray:
    """Return the differences ``[S, N]`` of two settings on the S seeds and the N first images that both have."""
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return np.empty((0, 0))
    left, right = (np.stack(_common([part[seed] for seed in seeds])) for part in (own, other))
    n = min(left.shape[1], right.shape[1])
    difference: np.ndarray = left[:, :n] - right[:, :n]
    return difference


def _common(arrays: list[np.ndarray]) -> list[np.ndarray]:
    n = min(map(len, arrays))
    return [array[:n] for array in arrays]


class GroupOutcomes:
    """The outcomes of the usable models of one data set and architecture.

    Args:
        table: image_outcomes.csv; None where a study has none.
        data: The data set.
        model: The architecture.
    """

    def __init__(self, table: pd.DataFrame | None, data: str, model: str) -> None:
        self._rows: dict[tuple[str, str], pd.DataFrame] = {}
        if table is not None and len(table):
            rows = usable_models(table[(table["data"] == data) & (table["model"] == model)])
            self._rows = {(str(attack), str(loss)): part for (attack, loss), part in rows.groupby(["attack", "loss"])}

    def difference(self, attack: str, loss: str, weight: float, baseline: str) -> np.ndarray:
        """Return the differences ``[S, N]`` of a setting to a baseline, whatever its weight; empty without a pair."""
        own, other = (self._rows.get((attack, name)) for name in (loss, baseline))
        if own is None or other is None:
            return np.empty((0, 0))
        at_weight = own[np.isclose(own["loss_weight"].astype(float), weight)]
        return paired_layout(outcomes_by_seed(at_weight), outcomes_by_seed(other))
