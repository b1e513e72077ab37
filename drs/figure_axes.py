"""Axes on which values and the names of ticks can be told apart."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

CHARACTER = 0.033
"""Width of a character of a tick's name, and a little air, over the width of a panel."""


def legible(ticks: Sequence[float], names: Sequence[str], width: float | None = None) -> list[str]:
    """Return the names of rising ticks, on a second line where one would run into its neighbour on the left.

    Args:
        ticks: Where they are, along the axis.
        names: Their names; one that has no room on a second line either comes back empty.
        width: Of the panel, in the unit of the ticks; by default the first and the last tick are at its edges.
    """
    panel = ticks[-1] - ticks[0] if width is None else width
    shown: list[str] = []
    ends = [-math.inf, -math.inf]
    for tick, name in zip(ticks, names, strict=True):
        half = CHARACTER * panel * len(name) / 2
        line = next((line for line, end in enumerate(ends) if tick - half > end), None)
        shown.append("" if line is None else "\n" * line + name)
        if line is not None:
            ends[line] = tick + half
    return shown


def statistic_scale(values: "pd.Series[float]") -> str:
    """Return the scale of an axis on which values are told apart.

    Args:
        values: Of a statistic, one per model.

    Returns:
        ``log`` where they span decades; ``logit`` where they are shares and what they lack of 1 does, such as the
        entropies of nearly uniform distributions, which a linear axis would print over each other; else ``linear``.
    """
    if not len(values) or not (values > 0).all():
        return "linear"
    if values.max() > 20 * values.min():
        return "log"
    return "logit" if values.max() < 1 and 1 - values.min() > 20 * (1 - values.max()) else "linear"


def scale_statistic(axis: Axes, scale: str, values: "pd.Series[float]") -> None:
    """Give an x axis the scale that ``statistic_scale`` chose for some values, and ticks to match."""
    if scale == "log":
        axis.set_xscale("log")
        decades = np.log10(values.max() / values.min())
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.8 else (1,)))
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    elif scale == "logit":
        axis.set_xscale("logit")
        low, high = axis.get_xlim()
        shares = [0.01, 0.1, 0.5, *(1 - 10.0**-digits for digits in range(1, 9))]
        ticks = [share for share in shares if low <= share <= values.max()]
        names = [f"{share:.8g}" for share in ticks]
        axis.set_xticks(ticks, legible([_logit(share) for share in ticks], names, _logit(high) - _logit(low)))
        axis.xaxis.set_minor_locator(NullLocator())


def _logit(share: float) -> float:
    return math.log10(share / (1 - share))
