"""Which interval of a gain a report or a figure shows, and what it holds for."""

import pandas as pd

_GAINS = ("gain_pgd", "gain_worst", "share")


def counts_images(table: pd.DataFrame) -> bool:
    """Say whether a table of gains has intervals over seeds and images; one that was made before there were any, not.

    Args:
        table: paired_differences.csv or comparators.csv.
    """
    return any(str(column).endswith("crossed_low") for column in table)


def kind_of_interval(table: pd.DataFrame) -> str:
    """Name the interval that is shown of a table's gains, with what it holds for."""
    if counts_images(table):
        return "95 % intervals over seeds and images, for other seeds and other images"
    return "95 % t intervals over seeds, for other seeds on the same images"


def shown_gains(comparators: pd.DataFrame) -> pd.DataFrame:
    """Return comparators.csv with the intervals to show in ``<gain>_low`` and ``<gain>_high``."""
    if not counts_images(comparators):
        return comparators
    ends = [f"{name}_{end}" for name in _GAINS for end in ("low", "high")]
    shown = {end: comparators[end.replace("_low", "_crossed_low").replace("_high", "_crossed_high")] for end in ends}
    return comparators.assign(**shown)


def shown_differences(differences: pd.DataFrame) -> pd.DataFrame:
    """Return paired_differences.csv with the intervals to show in ``ci_low`` and ``ci_high``.

    Clean accuracy and minimal norms, whose outcomes image by image are in no table, keep those over seeds.
    """
    if not counts_images(differences):
        return differences
    shown = {
        f"ci_{end}": differences[f"crossed_{end}"].where(differences["n_images"].notna(), differences[f"ci_{end}"])
        for end in ("low", "high")
    }
    return differences.assign(**shown)
