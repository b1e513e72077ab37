"""The whole study in one figure: what PGD shows, what is left under the worst case, and what it costs."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from drs.figure_legends import HOLLOW, ONE_PAIR, failed_key, one_pair_key
from drs.figure_style import (
    WIDTH,
    Setting,
    count,
    groups,
    marked_label,
    of_group,
    of_setting,
    setting_style,
    settings,
    shown_setting,
    styled,
)
from drs.marks import has_failed
from drs.shown_intervals import shown_gains

REFERENCE_TRAININGS = ("adversarial", "trades")
ROW_HEIGHT = 0.3  # inches
WIDEST = 50.0  # points: the end of an interval that lies further out is cut off
GAINS = {"gain_pgd": "What PGD shows", "gain_worst": "What survives"}


def summary_rows(comparators: pd.DataFrame, timing: pd.DataFrame) -> list[tuple[str, str, Setting]]:
    """Return what the figure shows, group by group: DR-softmax at the published weight, then trainings to compare.

    A group without timings, or without DR-softmax beside cross-entropy, has no row.
    """
    rows: list[tuple[str, str, Setting]] = []
    known = comparators[comparators["gain_pgd"].notna()] if "gain_pgd" in comparators else comparators.iloc[:0]
    for data, model in groups(known):
        group, times = of_group(known, data, model), of_group(timing, data, model)
        ours = shown_setting(group)
        if ours is None:
            continue
        shown = [ours, *(setting for setting in settings(group) if setting[0] in REFERENCE_TRAININGS)]
        rows += [(data, model, setting) for setting in shown if len(of_setting(times, setting))]
    return rows


@styled
def summary(comparators: pd.DataFrame, timing: pd.DataFrame) -> Figure:
    """Draw gains over cross-entropy and the time of a training step, a row per group and setting.

    Args:
        comparators: comparators.csv; gains are means over pairs of seeds, with the 95 % intervals of
            ``drs.shown_intervals`` where there are two pairs or more.
        timing: timing.csv; ratios of medians to cross-entropy's, with 95 % intervals.

    Returns:
        The figure: gains in percentage points under PGD and under the worst case, on one scale, and the time of a
        training step as a multiple of cross-entropy's. Losses of which a model fails a sanity check are hollow; a gain
        over one pair of seeds, which has no interval, is a diamond.
    """
    comparators = shown_gains(comparators)
    rows = summary_rows(comparators, timing)
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(rows) + 1.25), layout="constrained")
    pgd, worst, cost = figure.subplots(1, 3, sharey=True, width_ratios=[1, 1, 0.8])
    names, gains = [], []
    keys: dict[str, Line2D] = {}
    for position, (data, model, setting) in enumerate(rows):
        own = of_setting(of_group(comparators, data, model), setting)
        row, failed = own.iloc[0], bool(has_failed(own).any())
        time = of_setting(of_group(timing, data, model), setting).iloc[0]
        colour = setting_style(*setting)["color"]
        for axis, name in zip((pgd, worst), GAINS, strict=True):
            values = [100 * float(row[column]) for column in (name, f"{name}_low", f"{name}_high")]
            text = f"{values[0] + 0.0:+.1f}".replace("-", "−").replace("+0.0", "0.0")
            single = not np.isfinite(values).all()
            _point(axis, position, values, colour, text, failed=failed)
            keys |= ({"one": one_pair_key()} if single else {}) | ({"failed": failed_key()} if failed else {})
            gains += [value for value in values if abs(value) <= WIDEST]
        ratio = [float(time[name]) for name in ("ratio", "ci_low", "ci_high")]
        # A label in the middle of a short one would lie on the axis.
        side: Literal["left", "center"] = "left" if ratio[0] < 0.3 * timing["ratio"].max() else "center"
        _point(cost, position, ratio, colour, f"× {ratio[0]:.2f}", failed=failed, side=side)
        names.append(
            f"{data}, {model}: {marked_label(of_group(comparators, data, model), setting)} "
            f"({count(int(row['n_pairs']), 'seed')})"
        )
    pgd.set_yticks(range(len(rows)), names)
    pgd.set_ylim(len(rows) - 0.5, -0.6)
    low, high = min(0.0, *gains), max(0.0, *gains)
    room = max(4.0, 0.12 * (high - low))
    for axis, title, where in zip((pgd, worst), GAINS.values(), ("PGD", "worst case"), strict=True):
        axis.set_xlim(low - room, high + room)
        axis.axvline(0, color="0.35", linewidth=0.8)
        axis.set_xlabel(f"gain over CE, {where} (points)")
        axis.set_title(title, weight="bold")
    cost.set_xlim(0, 1.3 * float(max(cost.get_xlim()[1], 1.5)))
    cost.axvline(1, color="0.35", linewidth=0.8)
    cost.set_xlabel("time of a step (× CE)")
    cost.set_title("What it costs", weight="bold")
    for axis in (pgd, worst, cost):
        axis.grid(visible=False, axis="y")
    if keys:
        figure.legend(handles=list(keys.values()), loc="outside lower center", ncols=len(keys))
    return figure


def _point(
    axis: Axes,
    position: int,
    values: Sequence[float],
    colour: str,
    text: str,
    *,
    failed: bool,
    side: Literal["left", "center"] = "center",
) -> None:
    value, low, high = values
    bounded = np.isfinite(low) and np.isfinite(high)
    if bounded:
        axis.hlines(position, low, high, color=colour, linewidth=1.6)
    face = {**HOLLOW, "markeredgewidth": 1.4} if failed else {}
    axis.plot(value, position, "o" if bounded else ONE_PAIR, color=colour, markersize=6, zorder=4, **face)
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # of the line at no gain
    shift = -5 if side == "left" else 0
    axis.annotate(text, (value, position), (shift, 7), textcoords="offset points", ha=side, fontsize=7, bbox=clear)
