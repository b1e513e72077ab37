"""The smallest perturbation that any attack found for each image, and how many images a search for it misses.

A search for the smallest perturbation (FMN, CW) that stops early makes a model look robust, and one loss may make it
stop earlier than another. So the smallest norm of an image is taken over all attacks of that norm: the searches, and
every attack at a fixed radius that fooled the model, whose perturbation is at most its radius. Where an attack at a
fixed radius fells an image that a search says needs more, the search did not converge on it.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from drs.attack_config import NORMS, AttackConfig, CWConfig, FMNConfig, TransferConfig, is_bounded
from drs.cells import Cell, standing_at
from drs.suite_config import SuiteConfig, decisive_epsilons

Arrays = dict[str, np.ndarray]


def smallest_name(norm: str) -> str:
    """Return the name under which tables show the smallest norm over all attacks: ``smallest_l2``."""
    return f"smallest_{norm}"


def searches(planned: list[Cell], norm: str) -> list[Cell]:
    """Return the cells of attacks that look for the smallest perturbation in a norm."""
    return [cell for cell in planned if isinstance(cell.config, CWConfig | FMNConfig) and cell.config.norm == norm]


def _comparable(planned: list[Cell], norm: str) -> list[Cell]:
    """Return the attacks of a norm that every model of a study has: not those made on a twin, which some models lack.

    What an attack after such a one found rests on it, so it does not count either.
    """
    return [
        cell
        for cell in planned
        if isinstance(cell.config, AttackConfig)
        and cell.config.norm == norm
        and not any(isinstance(other.config, TransferConfig) for other in (cell, *cell.after))
    ]


def smallest_outcome(planned: list[Cell], arrays: dict[Path, Arrays], norm: str) -> Arrays | None:
    """Return, image by image, what the attack with the smallest perturbation made of it, as a cell holds it.

    Args:
        planned: All cells of a model, the clean one first.
        arrays: What they hold.
        norm: ``linf`` or ``l2``.

    Returns:
        ``indices [n]``, ``labels [n]``, ``logits [n, K]`` and ``distance [n]`` (pixel units), for the n images that
        the search with the most of them saw; an image that nothing felled, or that is wrong already, has its clean
        logits and distance 0. Attacks on a subset take the first images of the same order, the same for every model
        of a study. None where nothing searched in this norm.
    """
    n = max((len(arrays[cell.path]["labels"]) for cell in searches(planned, norm)), default=0)
    if not n:
        return None
    clean = arrays[planned[0].path]
    result = {name: clean[name][:n].copy() for name in ("indices", "labels", "logits")}
    smallest = np.where(_fooled(result), 0.0, math.inf)
    for cell in _comparable(planned, norm):
        found = arrays[cell.path]
        count = min(n, len(found["labels"]))
        norms = np.where(_fooled(found), found["distance"], math.inf)[:count]
        better = np.flatnonzero(norms < smallest[:count])
        smallest[better] = norms[better]
        result["logits"][better] = found["logits"][better]
    return result | {"distance": np.where(np.isfinite(smallest), smallest, 0.0)}


def _fooled(arrays: Arrays) -> np.ndarray:
    fooled: np.ndarray = arrays["logits"].argmax(1) != arrays["labels"]
    return fooled


def median_norm(arrays: Arrays, n: int | None = None) -> float:
    """Return the median norm over the first n images (all), pixel units: infinite for one that was not felled.

    An image that the model gets wrong already needs no perturbation: its norm is 0.
    """
    norms = np.where(_fooled(arrays), arrays["distance"], math.inf)
    return float(np.median(norms[:n]))


def norm_rows(planned: list[Cell], arrays: dict[Path, Arrays], suite: SuiteConfig) -> list[dict[str, Any]]:
    """Return how each search of a model compares with the other attacks on the same images.

    Returns:
        Rows of minimal_norms.csv, one per search and decisive epsilon of its norm: ``attack``, ``norm``, ``epsilon``,
        ``epsilon_label``, ``n`` (images that the search saw), ``median`` (of its norms, pixel units) and
        ``median_smallest`` (of the smallest norms over all attacks, the same images); ``n_fixed`` (those of the images
        that an attack at the radius epsilon saw too), ``n_missed`` (those of them that such an attack fells, but that
        the search says need more) and ``missed`` (their share; NaN where no attack has that radius).
    """
    rows = []
    for norm in NORMS:
        smallest = smallest_outcome(planned, arrays, norm)
        if smallest is None:
            continue
        for cell in searches(planned, norm):
            found = arrays[cell.path]
            n = len(found["labels"])
            for epsilon in decisive_epsilons(suite, cell.train.data.name, norm):
                fixed = [
                    standing_at(arrays[other.path], epsilon.value)
                    for other in _comparable(planned, norm)
                    if other.epsilon == epsilon and isinstance(other.config, AttackConfig) and is_bounded(other.config)
                ]
                stands = standing_at(found, epsilon.value)
                missed = np.zeros(min(n, max(map(len, fixed), default=0)), dtype=bool)
                for others in fixed:
                    count = min(n, len(others))
                    missed[:count] |= stands[:count] & ~others[:count]
                rows.append({
                    "attack": cell.attack, "norm": norm, "epsilon": epsilon.value, "epsilon_label": epsilon.label,
                    "n": n, "median": median_norm(found), "median_smallest": median_norm(smallest, n),
                    "n_fixed": len(missed), "n_missed": int(missed.sum()),
                    "missed": float(missed.mean()) if len(missed) else math.nan,
                })  # fmt: skip
    return rows
