"""What marks a point of a figure, and the legends that say so: a hollow marker, a diamond, the settings' own looks."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from drs.figure_style import WIDTH, Setting, marked_label, of_setting, setting_style
from drs.marks import MARK, has_failed

HOLLOW: dict[str, Any] = {"markerfacecolor": "white"}
"""The marker of what fails a sanity check; it means nothing else in any figure."""
ONE_PAIR = "D"  # the marker of a gain over one pair of seeds, which has no interval


def point_face(failed: bool, colour: str) -> dict[str, Any]:
    """Return how a point is filled: hollow where a sanity check fails, else full with a white edge."""
    edge = {"markeredgecolor": colour} if failed else {"markeredgecolor": "white", "markeredgewidth": 0.4}
    return {**edge, **(HOLLOW if failed else {})}


def failed_key() -> Line2D:
    """Return the entry of a legend that says what a dagger and a hollow marker mean."""
    return Line2D([], [], color="0.3", marker="o", linestyle="none", label=f"{MARK}, hollow: fails a check", **HOLLOW)


def one_pair_key() -> Line2D:
    """Return the entry of a legend that says what a diamond means."""
    return Line2D(
        [], [], color="0.3", marker=ONE_PAIR, linestyle="none", markersize=4, label="one pair of seeds, no interval"
    )


def legend_below(
    figure: Figure, shown: Iterable[Setting], extra: Sequence[Line2D] = (), *, lines: bool, rows: pd.DataFrame
) -> None:
    """Put one legend for the whole figure under its panels, where it covers no data.

    Args:
        figure: Where to put it.
        shown: The settings to name.
        extra: Further handles.
        lines: Whether the settings are drawn as lines.
        rows: The rows drawn; a setting of which a model fails a sanity check gets a dagger, and a key says so.
    """
    handles = []
    for loss, weight in shown:
        style = setting_style(loss, weight)
        if not lines:
            style["linestyle"] = "none"
        elif has_failed(of_setting(rows, (loss, weight))).any():
            style |= HOLLOW
        handles.append(Line2D([], [], label=marked_label(rows, (loss, weight)), **style))
    handles += [*extra, *([failed_key()] if has_failed(rows).any() else [])]
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = max(1, int(WIDTH * 14 / (longest + 6)))
    columns = -(-len(handles) // -(-len(handles) // fitting))  # rows of equal length
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=2.2)
