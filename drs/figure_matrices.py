"""The figures made of matrices: the correlation heat map, and where attacks land."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from drs.figure_legends import failed_key, point_face
from drs.figure_style import (
    CHANCE_COLOUR,
    IN_PANELS,
    STATISTICS,
    WIDTH,
    Setting,
    attack_label,
    attacks,
    groups,
    included,
    marked_label,
    of_group,
    of_setting,
    panels,
    records,
    setting_style,
    settings,
    span,
    styled,
)
from drs.marks import has_failed
from drs.verdicts import ALPHA

LANDING_PANELS = ("fgsm", "pgd", "cw_torchattacks", "cw")
"""Attacks whose landing is drawn; the others are in landing.csv."""


def _heat_panel(axis: Axes, rows: pd.DataFrame, statistics: list[str], columns: list[str]) -> None:
    table = {(row.statistic, row.attack): row for row in records(rows)}
    axis.set_xlim(0, len(columns))
    axis.set_ylim(len(statistics), 0)
    axis.grid(False)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    colours, scale = colormaps["RdBu_r"], Normalize(-1, 1)
    for i, statistic in enumerate(statistics):
        for j, column in enumerate(columns):
            row = table.get((statistic, column))
            if row is None or pd.isna(row.coefficient):
                axis.add_patch(Rectangle((j, i), 1, 1, facecolor="0.93", edgecolor="white"))
                axis.text(j + 0.5, i + 0.5, "–", ha="center", va="center", color="0.5", fontsize=6.5)
                continue
            sure = row.q_value < ALPHA
            axis.add_patch(Rectangle((j, i), 1, 1, facecolor=colours(scale(row.coefficient)), edgecolor="white"))
            if not sure:
                axis.add_patch(Rectangle((j, i), 1, 1, fill=False, hatch="////", edgecolor="white", linewidth=0))
            dark = abs(row.coefficient) > 0.65
            axis.text(
                j + 0.5,
                i + 0.5,
                f"{row.coefficient:.2f}".replace("-", "−").replace("0.", "."),
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if dark and sure else "black",
                bbox=None if sure else {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
            )


@styled
def correlation_heatmap(correlations: pd.DataFrame) -> Figure:
    """Draw Spearman's coefficient of every statistic with clean accuracy and each attack's mean over epsilons.

    Args:
        correlations: correlations.csv.

    Returns:
        The figure: one panel per (data, model) and one for the pooled models, colours symmetric over -1..1, cells
        with q >= 0.05 (Benjamini-Hochberg) hatched, cells without a coefficient grey.
    """
    rows = correlations[correlations["method"] == "spearman"]
    rows = rows[(rows["attack"] == "clean") | rows["attack"].str.endswith("@mean")]
    columns = [name for name in attacks(rows["attack"]) if name.partition("@")[0] in ("clean", *IN_PANELS)]
    known = [name for name in STATISTICS if name in set(rows["statistic"])]
    statistics = known + sorted(set(rows["statistic"]) - set(known))
    pairs = groups(rows)
    per_row = max(1, min(len(pairs), int((WIDTH - 1.5) / (0.265 * len(columns)))))
    full = len(pairs) % per_row == 0  # else some panel above the last row would have nothing below to name its columns
    names = [attack_label(name.removesuffix("@mean")) for name in columns]
    height = 0.2 * len(statistics) + (0.3 if full else 1.2)
    figure, axes = panels(len(pairs), columns=per_row, height=height, extra=1.6 if full else 0.7)
    for index, (axis, (data, model)) in enumerate(zip(axes, pairs, strict=True)):
        panel = of_group(rows, data, model)
        _heat_panel(axis, panel, statistics, columns)
        axis.set_yticks(np.arange(len(statistics)) + 0.5, statistics if index % per_row == 0 else [])
        named = not full or index >= len(pairs) - per_row
        axis.set_xticks(np.arange(len(columns)) + 0.5, names if named else [], rotation=90)
        title = "pooled (ranks within groups)" if data == "pooled" else f"{data}, {model}"
        axis.set_title(f"{title}\nn = {span(panel['n_models'])} models", linespacing=1.35)
    bar = figure.colorbar(ScalarMappable(Normalize(-1, 1), "RdBu_r"), ax=axes, fraction=0.02, pad=0.01, aspect=25)
    bar.set_label("Spearman's ρ over models")
    bar.outline.set_visible(False)
    figure.suptitle("Mean statistic on clean samples against accuracy (attacks: mean over ε)")
    hatch = Patch(facecolor="0.75", hatch="////", edgecolor="white", label=f"q ≥ {ALPHA:g} (Benjamini–Hochberg)")
    none = Patch(facecolor="0.93", label="no coefficient (a column is constant)")
    figure.legend(handles=[hatch, none], loc="outside lower center", ncols=2)
    return figure


def landing_rows(landing: pd.DataFrame, landing_matrices: pd.DataFrame) -> pd.DataFrame:
    """Keep one epsilon per (data, model, attack): that of the matrices if the attack has it, else the middle one.

    Returns:
        The rows of ``landing`` at that epsilon, excluded models left out.
    """
    kept = []
    for (data, model, _), rows in included(landing).groupby(["data", "model", "attack"], sort=False):
        labels = list(dict.fromkeys(rows["epsilon_label"].astype(str)))
        stored = of_group(landing_matrices, str(data), str(model))
        shown = [label for label in stored["epsilon_label"].astype(str).unique() if label in labels]
        finite = [label for label in labels if label != "inf"] or labels
        label = shown[0] if shown else finite[len(finite) // 2]
        kept.append(rows[rows["epsilon_label"].astype(str) == label])
    return pd.concat(kept) if kept else landing.iloc[:0]


def _runner_up(axis: Axes, rows: pd.DataFrame, shown: list[Setting]) -> None:
    for position, setting in enumerate(shown):
        cells = of_setting(rows, setting)
        style = {**setting_style(*setting), "linestyle": "none"}
        offsets = np.linspace(-0.3, 0.3, len(cells)) if len(cells) > 1 else np.zeros(len(cells))
        failed = has_failed(cells).to_numpy(bool)
        for hollow in sorted(set(failed.tolist())):
            share, where = 100 * cells["runner_up_rate"][failed == hollow], position + offsets[failed == hollow]
            axis.plot(share, where, **{**style, **point_face(hollow, style["color"]), "markersize": 4})
        mean = 100 * cells["runner_up_rate"].mean()
        axis.vlines(mean, position - 0.45, position + 0.45, color="0.2", linewidth=1, zorder=3)  # over the points
    axis.axvline(100 * rows["chance"].mean(), color=CHANCE_COLOUR, linestyle=":", linewidth=1)
    axis.set_xlim(0, 105)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    flips = rows["n_flips"].dropna()
    name = attack_label(f"{rows['attack'].iloc[0]}@{rows['epsilon_label'].iloc[0]}")
    counted = f"{span(flips)} flips a model" if len(flips) else "no flips"
    axis.set_title(f"{name}\n{rows['run_id'].nunique()} models\n{counted}", linespacing=1.35)


def _matrix(cells: pd.DataFrame) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    return 100 * cells.pivot(index="true_class", columns="other_class", values="value").sort_index().to_numpy(float)


@styled
def where_attacks_land(landing: pd.DataFrame, landing_matrices: pd.DataFrame, data: str, model: str) -> Figure:
    """Draw how often a successful attack ends in the runner-up class, and the two matrices behind it.

    Args:
        landing: landing.csv.
        landing_matrices: landing_matrices.csv; rows are shares of the off-diagonal mass, 0..1.
        data: Dataset.
        model: Architecture.

    Returns:
        The figure. Top: share of flips (%) that go to the runner-up of the clean softmax, a row per loss and weight, a
        point per model (hollow: it fails a sanity check), a bar for the mean over seeds, the chance level dotted.
        Bottom: class-mean softmax and post-attack confusion, for CE and one DR weight, with the mean over seeds of the
        correlation between their off-diagonal cells.
    """
    rows = of_group(landing_rows(landing, landing_matrices), data, model)
    stored = of_group(landing_matrices, data, model)
    shown, names = settings(rows), [name for name in attacks(rows["attack"]) if name in LANDING_PANELS]
    kept = settings(stored)
    heights = [1.3 + 0.2 * len(shown), 2.3][: 2 if kept else 1]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = upper.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, attack in zip(axes, names, strict=True):
        _runner_up(axis, rows[rows["attack"] == attack], shown)
    axes[0].set_yticks(range(len(shown)), [marked_label(rows, setting) for setting in shown])
    for axis in axes:
        axis.set_xlabel("to the runner-up (%)")
    chance = Line2D([], [], color=CHANCE_COLOUR, linestyle=":", linewidth=1, label="chance, 1/(K−1)")
    mean = Line2D([], [], color="0.2", label="mean over seeds")
    keys = [mean, chance, *([failed_key()] if has_failed(rows).any() else [])]
    upper.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    figure.suptitle(f"{data}, {model}: where successful attacks land")
    if not lower:
        return figure
    attack = attacks(stored["attack"])[0]
    stored = stored[stored["attack"] == attack]
    matrices = [
        (setting, kind, _matrix(of_setting(stored[stored["kind"] == kind], setting)))
        for setting in kept
        for kind in ("softmax", "confusion")
    ]
    top = max(np.nanmax(values) for _, _, values in matrices)
    axes = lower[0].subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    for axis, (setting, kind, values) in zip(axes, matrices, strict=True):
        image = axis.imshow(values, cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
        axis.grid(False)
        ticks = range(len(values)) if len(values) <= 10 else range(0, len(values), 10)
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
        axis.tick_params(labelsize=6, length=2)
        axis.set_xlabel("other class" if kind == "softmax" else "class after the attack")
        agreement = of_setting(rows[rows["attack"] == attack], setting)["matrix_correlation"].dropna()
        second = "class-mean softmax" if kind == "softmax" else f"after {attack_label(attack)}"
        if kind == "confusion" and len(agreement):
            second += f", r = {agreement.mean():.2f} (n = {len(agreement)})"
        axis.set_title(f"{marked_label(rows, setting)}\n{second}", linespacing=1.35)
    axes[0].set_ylabel("true class")
    bar = lower[0].colorbar(image, ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("share of the row (%)")
    bar.outline.set_visible(False)
    return figure
