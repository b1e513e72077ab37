"""Figures of what robustness costs and of how much of a gain is masking; see ``drs.figures`` for the conventions."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from drs.comparators import seconds_for_10000
from drs.figure_legends import HOLLOW, ONE_PAIR, failed_key, legend_below, one_pair_key, point_face
from drs.figure_style import (
    WIDTH,
    groups,
    included,
    marked_label,
    of_group,
    of_setting,
    panels,
    setting_style,
    settings,
    span,
    styled,
    wilson_interval,
)
from drs.marks import has_failed
from drs.shown_intervals import counts_images, shown_gains

_PALE: dict[str, Any] = {"alpha": 0.45}
_GAINS: list[tuple[str, str, float, dict[str, Any]]] = [
    ("gain_pgd", "s", -0.17, _PALE), ("gain_worst", "o", 0.17, {})
]  # fmt: skip


@styled
def robustness_against_time(models: pd.DataFrame, worst_case: pd.DataFrame) -> Figure:
    """Draw robust accuracy against training time: a point per model, a panel per dataset and architecture.

    Args:
        models: models.csv, for ``train_seconds`` and ``images_seen``.
        worst_case: worst_case.csv; Linf, the mean over the decisive epsilons.

    Returns:
        The figure: worst-case accuracy in % with Wilson's 95 % interval over images, the PGD accuracy of the same
        model on the same images as a dash above it; seconds for 10 000 training images on a log axis. Models that fail
        a sanity check are hollow.
    """
    rows = included(worst_case)
    rows = rows[rows["norm"] == "linf"]
    pairs = groups(rows)
    figure, axes = panels(len(pairs), columns=2, height=2.9, extra=0.9)
    seconds = seconds_for_10000(models.set_index("run_id"))
    for axis, (data, model) in zip(axes, pairs, strict=True):
        group = of_group(rows, data, model)
        means = group.groupby("run_id")[["pgd", "worst", "n"]].mean()
        failed = set(group.loc[has_failed(group), "run_id"])
        for setting in settings(group):
            style = {**setting_style(*setting), "linestyle": "none"}
            own = of_setting(group, setting)["run_id"].unique()
            for hollow in (False, True):
                same = [run_id for run_id in own if (run_id in failed) == hollow]
                if not same:
                    continue
                time, (pgd, worst, n) = seconds.loc[same], means.loc[same, ["pgd", "worst", "n"]].to_numpy().T
                low, high = 100 * wilson_interval(worst, n)
                axis.vlines(time, low, high, color=style["color"], linewidth=0.8, alpha=0.5)
                dash = {"color": style["color"], "marker": "_", "linestyle": "none"}
                axis.plot(time, 100 * pgd, **dash, markersize=7, markeredgewidth=1.4)
                axis.plot(time, 100 * worst, **{**style, **point_face(hollow, style["color"])})
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(5))
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.12)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.set_xlabel("training time for 10 000 images (s, log scale)")
        labels = ", ".join(dict.fromkeys(group["epsilon_label"].astype(str)))
        title = f"{data}, {model}: ε {labels} (L∞)\n{len(means)} models × {span(group['n'])} images"
        axis.set_title(title, linespacing=1.35)
    figure.supylabel("robust accuracy (%)")
    figure.suptitle("Worst case per sample (markers; bars: Wilson 95 % over images) and PGD alone (dashes)")
    legend_below(figure, settings(rows), lines=False, rows=rows)
    return figure


@styled
def masking_gap(comparators: pd.DataFrame) -> Figure:
    """Draw each loss's gain over cross-entropy under PGD and under the worst case, a panel per group.

    Args:
        comparators: comparators.csv; gains are means over pairs of seeds, with the 95 % intervals of
            ``drs.shown_intervals`` where there are two pairs or more.

    Returns:
        The figure: gains in percentage points at the decisive epsilons, on the same images. Losses of which a model
        fails a sanity check are hollow; a gain over one pair, which has no interval, is a diamond.
    """
    rows = shown_gains(comparators[comparators["gain_pgd"].notna()])
    pairs = groups(rows)
    counts = [len(of_group(rows, data, model)) for data, model in pairs]
    columns = min(2, len(pairs))
    heights = [0.26 * max(counts[start : start + columns]) + 0.9 for start in range(0, len(counts), columns)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.7), layout="constrained")
    axes = figure.subplots(len(heights), columns, height_ratios=heights, squeeze=False).ravel()
    for axis in axes[len(pairs) :]:
        axis.set_axis_off()
    for axis, (data, model) in zip(axes[: len(pairs)], pairs, strict=True):
        group = of_group(rows, data, model)
        shown = settings(group)
        names = []
        for position, setting in enumerate(shown):
            row = of_setting(group, setting).iloc[0]
            style = {"color": setting_style(*setting)["color"], "linestyle": "none"}
            style |= HOLLOW if has_failed(of_setting(group, setting)).any() else {}
            for name, marker, offset, face in _GAINS:
                y = position + offset
                axis.hlines(y, 100 * row[f"{name}_low"], 100 * row[f"{name}_high"], color=style["color"], linewidth=1)
                axis.plot(100 * row[name], y, marker=ONE_PAIR if row["n_pairs"] < 2 else marker, **{**style, **face})
            names.append(f"{marked_label(group, setting)} (n = {int(row['n_pairs'])})")
        axis.axvline(0, color="0.35", linewidth=0.8)
        axis.set_yticks(range(len(shown)), names)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        # An interval over two pairs can be a hundred points wide: it has no say in what is shown.
        ends = [f"gain_{name}_{end}" for name in ("pgd", "worst") for end in ("low", "high")]
        gains = group[["gain_pgd", "gain_worst"]].join(group.loc[group["n_pairs"] > 2, ends])
        low, high = (float(100 * value) for value in (np.nanmin(gains), np.nanmax(gains)))
        low, high = min(0.0, low), max(0.0, high)
        room = max(2.0, 0.08 * (high - low))
        axis.set_xlim(low - room, high + room)
        axis.set_xlabel("gain over CE (percentage points)")
        axis.set_title(f"{data}, {model}\n{span(group['n_images'].astype(int))} images", linespacing=1.35)
    figure.suptitle(
        "Gain at the same seed and decisive ε: mean over n pairs of seeds, 95 % interval over "
        f"{'seeds and images' if counts_images(rows) else 'seeds'}"
        + ("\nintervals of two pairs are cut at the edges" if (rows["n_pairs"] == 2).any() else "")
    )
    handles = [
        Line2D([], [], color="0.3", marker="s", linestyle="none", label="PGD", alpha=0.45),
        Line2D([], [], color="0.3", marker="o", linestyle="none", label="worst case L∞"),
        *([one_pair_key()] if (rows["n_pairs"] < 2).any() else []),
        *([failed_key()] if has_failed(rows).any() else []),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure
