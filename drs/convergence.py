"""Whether the searches for the smallest perturbation converged: read off minimal_norms.csv. Imports no torch."""

import pandas as pd

UNCONVERGED = 0.03
"""Above this share of missed images a search is said not to have converged."""


def missed_share(rows: pd.DataFrame) -> float:
    """Return the share of images that an attack at a fixed radius fells, but that a search says need more.

    Args:
        rows: Rows of minimal_norms.csv of one search, see ``drs.minimal_norms.norm_rows``; all their images count
            alike.

    Returns:
        The share; NaN where no attack at a fixed radius saw an image.
    """
    seen = float(rows["n_fixed"].sum())
    return float(rows["n_missed"].sum()) / seen if seen else float("nan")


def is_unconverged(rows: pd.DataFrame) -> bool:
    """Return whether a search misses more than ``UNCONVERGED`` of the images; a single one never says so."""
    return missed_share(rows) > UNCONVERGED and int(rows["n_missed"].sum()) > 1
