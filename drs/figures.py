"""Tables of a study -> figures; no computing beyond means and spreads over seeds, no files, no torch.

Every function takes whole tables (the columns of ``results/<study>/tables/*.csv``) and returns a
``matplotlib.figure.Figure`` that no global state knows of. Rows of excluded models are left out, or crossed out where
single models are shown; every panel says how many models, seeds or samples stand behind it.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from drs.figure_axes import legible, scale_statistic, statistic_scale
from drs.figure_legends import HOLLOW, legend_below, point_face
from drs.figure_matrices import correlation_heatmap, where_attacks_land
from drs.figure_style import (
    CHANCE_COLOUR,
    EXCLUDED_COLOUR,
    IN_PANELS,
    WIDTH,
    Setting,
    attack_label,
    attacks,
    count,
    groups,
    has_failed,
    included,
    is_excluded,
    of_group,
    of_setting,
    panels,
    setting_style,
    settings,
    shown_setting,
    span,
    statistic_label,
    styled,
    wilson_interval,
)

MOST_BANDS = 16
"""Losses and weights of a panel that get a band of spread; those of more would lie over each other."""

__all__ = [
    "correlation_heatmap",
    "epsilon_curves",
    "nonlabel_distribution",
    "statistic_vs_accuracy",
    "training_curves",
    "where_attacks_land",
]


def coefficient_line(correlations: pd.DataFrame, data: str, model: str, statistic: str, attack: str) -> str:
    """Write Spearman's coefficient with its interval and n for a panel title, or why there is none."""
    rows = of_group(correlations, data, model)
    rows = rows[(rows["statistic"] == statistic) & (rows["attack"] == attack) & (rows["method"] == "spearman")]
    if rows.empty or pd.isna(rows.iloc[0]["coefficient"]):
        return "no coefficient (too few models or constant)"
    row = rows.iloc[0]
    numbers = f"ρ = {row.coefficient:.2f} [{row.ci_low:.2f}, {row.ci_high:.2f}]"
    return f"{numbers}, n = {int(row.n_models)}".replace("-", "−")


@styled
def statistic_vs_accuracy(
    models: pd.DataFrame, accuracy: pd.DataFrame, correlations: pd.DataFrame, statistic: str, data: str, model: str
) -> Figure:
    """Draw a statistic of the clean softmax against robust accuracy: a point per model, a panel per attack.

    Args:
        models: models.csv; robust accuracy is the mean over the finite epsilons of an attack (``acc.<attack>@mean``).
        accuracy: accuracy.csv, for the epsilons and the number of attacked samples.
        correlations: correlations.csv, for Spearman's coefficient in the panel titles, with its interval.
        statistic: Name without ``stat.``.
        data: Dataset of the models drawn.
        model: Architecture of the models drawn.

    Returns:
        The figure: accuracy in % with Wilson's 95 % interval, excluded models as grey crosses, models that fail a
        sanity check hollow.
    """
    rows = of_group(models, data, model)
    columns = [name for name in rows.filter(regex=r"^acc\..*@mean$").columns if rows[name].notna().any()]
    shown = [a for a in attacks(name.removeprefix("acc.").removesuffix("@mean") for name in columns) if a in IN_PANELS]
    cells = of_group(accuracy, data, model)
    bounded = cells[np.isfinite(cells["epsilon"]) & (cells["attack"] != "clean")]
    counts = bounded.groupby(["run_id", "attack"])["n"].min().to_dict()
    figure, axes = panels(len(shown), height=1.95, extra=0.75)
    out = is_excluded(rows)
    values = rows[f"stat.{statistic}"]
    scale = statistic_scale(values.dropna())
    failed = has_failed(rows)
    for axis, attack in zip(axes, shown, strict=True):
        share = rows[f"acc.{attack}@mean"]
        attacked = pd.Series([counts.get((run_id, attack)) for run_id in rows["run_id"]], rows.index, dtype=float)
        points = pd.DataFrame({
            "value": values, "share": share, "n": attacked.fillna(rows["n_attacked"]), "loss": rows["loss"],
            "loss_weight": rows["loss_weight"], "crossed": out, "failed": failed,
        }).dropna(subset=["value", "share"])  # fmt: skip
        # All points of one look at once: an artist for each of thousands of models takes minutes to draw.
        looks = points.groupby(["loss", "loss_weight", "crossed", "failed"], sort=False, dropna=False)
        for (*_, crossed, hollow), same in looks:
            setting = str(same["loss"].iloc[0]), float(same["loss_weight"].iloc[0])
            style = {"color": EXCLUDED_COLOUR, "marker": "x"} if crossed else setting_style(*setting)
            low, high = 100 * wilson_interval(same["share"], same["n"])
            axis.vlines(same["value"], low, high, color=style["color"], linewidth=0.8, alpha=0.7)
            face = {} if crossed else point_face(bool(hollow), style["color"])
            axis.plot(same["value"], 100 * same["share"], **{**style, **face, "linestyle": "none"})
        axis.margins(x=0.08)
        scale_statistic(axis, scale, values)
        images = span([n for (_, name), n in counts.items() if name == attack])
        coefficient = coefficient_line(correlations, data, model, statistic, f"{attack}@mean")
        axis.set_title(f"{attack_label(attack)}, {images} images\n{coefficient}", linespacing=1.35)
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    for axis in axes[-3:]:
        axis.set_xlabel(f"mean {statistic}")
    figure.suptitle(
        f"{data}, {model}: {count(int((~out).sum()), 'model')}\n"
        f"{statistic}: {statistic_label(statistic)}\n"
        "bars: Wilson 95 % interval over images; ρ: Spearman with 95 % interval over models",
        linespacing=1.3,
    )
    figure.supylabel("robust accuracy, mean over ε (%)")
    cross = Line2D([], [], color=EXCLUDED_COLOUR, marker="x", linestyle="none", label=f"excluded ({int(out.sum())})")
    legend_below(figure, settings(rows[~out]), [cross] if out.any() else [], lines=False, rows=rows[~out])
    return figure


def _epsilon_unit(cells: pd.DataFrame) -> tuple[float, str]:
    """Return what to multiply epsilons by, and the axis label: 1/255 steps where the config wrote them so."""
    written = cells.loc[np.isfinite(cells["epsilon"]) & (cells["epsilon"] > 0), "epsilon_label"].astype(str)
    if len(written) and written.str.endswith("/255").all():
        return 255.0, "ε (1/255 of the pixel range)"
    return 1.0, "ε (pixel range 0 to 1)"


def _band_alpha(n_settings: int) -> float:
    """Return how opaque a band is: many over each other must leave the lines visible; 0 where there are too many."""
    return 0.0 if n_settings > MOST_BANDS else 0.15 * min(1.0, 5 / max(n_settings, 1))


def _order(setting: Setting) -> float:
    """Return the matplotlib zorder of a line: cross-entropy lies above what it is compared with."""
    return 2.5 if setting[0] == "ce" else 2.0


def _curve(axis: Axes, cells: pd.DataFrame, setting: Setting, scale: float, unbounded_at: float, alpha: float) -> None:
    spread = cells.groupby("epsilon")["robust_accuracy"].agg(["mean", "std", "size"]) * [100, 100, 1]
    style = setting_style(*setting) | (HOLLOW if has_failed(cells).any() else {})
    finite = spread[np.isfinite(spread.index)]
    x = finite.index.to_numpy(float) * scale
    axis.plot(x, finite["mean"], **style, markersize=3.5, zorder=_order(setting))
    if alpha:
        low, high = finite["mean"] - finite["std"].fillna(0), finite["mean"] + finite["std"].fillna(0)
        axis.fill_between(x, low, high, color=style["color"], alpha=alpha, linewidth=0)
    for _, row in spread[~np.isfinite(spread.index)].iterrows():
        error = 0.0 if np.isnan(row["std"]) else row["std"]
        axis.errorbar(
            unbounded_at, row["mean"], error, **{**style, "linestyle": "none"}, markersize=3.5, elinewidth=0.8,
            zorder=_order(setting),
        )  # fmt: skip


def _spread(banded: bool) -> str:
    return "band ± 1 standard deviation over seeds" if banded else "too many losses for bands of spread"


def _left_out(models: int) -> str:
    return f"; {count(models, 'excluded model')} left out" if models else ""


@styled
def epsilon_curves(accuracy: pd.DataFrame, data: str, model: str, *, chance: float | None = None) -> Figure:
    """Draw robust accuracy against epsilon: a line per loss and weight (mean over seeds), a panel per attack.

    Args:
        accuracy: accuracy.csv. Column ``clean`` gives the point at epsilon 0, on the images of the attack; an unbounded
            attack (epsilon inf) stands apart at the right end.
        data: Dataset.
        model: Architecture.
        chance: Accuracy of guessing, 1/K, drawn as a dotted line; none if not given.

    Returns:
        The figure: accuracy in %, band of one standard deviation over seeds unless more than ``MOST_BANDS`` losses and
        weights would lay theirs over each other.
    """
    rows = included(of_group(accuracy, data, model))
    shown = [name for name in attacks(rows["attack"]) if name in IN_PANELS]
    alpha = _band_alpha(len(settings(rows)))
    figure, axes = panels(len(shown), height=1.95, extra=0.7)
    for axis, attack in zip(axes, shown, strict=True):
        cells = rows[rows["attack"] == attack]
        scale, unit = _epsilon_unit(cells)
        epsilons = cells["epsilon"].unique()
        ticks = np.concatenate([[0.0], np.sort(epsilons[np.isfinite(epsilons)])]) * scale
        unbounded_at = 1.22 * (ticks[-1] or 1.0)
        for setting in settings(cells):
            own = of_setting(cells, setting)
            before = own.drop_duplicates("run_id").assign(epsilon=0.0, robust_accuracy=lambda first: first["clean"])
            _curve(axis, pd.concat([before, own]), setting, scale, unbounded_at, alpha)
        names = [f"{tick:.4g}" for tick in ticks]
        if np.isinf(epsilons).any():
            ticks, names = np.append(ticks, unbounded_at), [*names, "∞"]
        axis.set_xticks(ticks, legible(ticks.tolist(), names))
        if chance is not None:
            axis.axhline(100 * chance, color=CHANCE_COLOUR, linestyle=":", linewidth=1)
        axis.set_ylim(-3, 103)
        axis.set_xlabel(unit)
        bound = {"linf": " (L∞)", "l2": " (L2)"}.get(str(cells["norm"].iloc[0]), "")
        name = attack_label(attack) if attack.startswith("worst") else attack_label(attack) + bound
        seeds = span(cells.groupby(["loss", "loss_weight"])["seed"].nunique())
        axis.set_title(f"{name}\n{seeds} seeds × {span(cells['n'])} images", linespacing=1.35)
    figure.supylabel("robust accuracy (%)")
    left_out = of_group(accuracy, data, model)["run_id"].nunique() - rows["run_id"].nunique()
    figure.suptitle(f"{data}, {model}: mean over seeds, {_spread(alpha > 0)}{_left_out(left_out)}")
    line = Line2D([], [], color=CHANCE_COLOUR, linestyle=":", linewidth=1, label="chance")
    legend_below(figure, settings(rows), [line] if chance is not None else [], lines=True, rows=rows)
    return figure


@styled
def nonlabel_distribution(softmax_profile: pd.DataFrame) -> Figure:
    """Draw the sorted non-label softmax values, CE against DR: median by rank, log scale, a panel per (data, model).

    Args:
        softmax_profile: softmax_profile.csv (quartiles over clean test samples and seeds at each rank).

    Returns:
        The figure. The band (CE and the DR weight closest to the published one) spans the quartiles; the other
        settings are thin lines without one.
    """
    pairs = groups(softmax_profile)
    figure, axes = panels(len(pairs), columns=2, height=2.3, extra=0.6)
    for axis, (data, model) in zip(axes, pairs, strict=True):
        rows = of_group(softmax_profile, data, model)
        main = [("ce", 0.0), shown_setting(rows)]
        for setting in settings(rows):
            line = of_setting(rows, setting).sort_values("rank")
            style = setting_style(*setting) | (HOLLOW if has_failed(line).any() else {})
            wide = setting in main
            axis.plot(
                line["rank"],
                line["median"],
                **style,
                linewidth=1.6 if wide else 0.8,
                markersize=0 if len(line) > 20 else 4 if wide else 2,
            )
            if wide:
                axis.fill_between(line["rank"], line["q25"], line["q75"], color=style["color"], alpha=0.18, linewidth=0)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("rank among the non-label classes (1 = largest)")
        axis.set_title(f"{data}, {model}\nn = {span(rows['n'])} (clean samples × seeds) a line", linespacing=1.35)
    figure.supylabel("softmax value (log scale)")
    figure.suptitle("Median over clean test samples; band: quartiles, for the bold lines")
    legend_below(figure, settings(softmax_profile), lines=True, rows=softmax_profile)
    return figure


@styled
def training_curves(training: pd.DataFrame, data: str, model: str) -> Figure:
    """Draw loss and accuracy per epoch, in training and on validation data, a line per loss and weight.

    Args:
        training: training.csv.
        data: Dataset.
        model: Architecture.

    Returns:
        The figure: mean over the seeds that are not excluded, bands as in ``epsilon_curves``. A training loss includes
        its own penalty and does not compare between losses; the validation loss is cross-entropy for all.
    """
    rows = included(of_group(training, data, model))
    left_out = of_group(training, data, model)["run_id"].nunique() - rows["run_id"].nunique()
    kinds = [
        ("train_loss", "training loss (each its own)", 1),
        ("val_loss", "validation CE (nat)", 1),
        ("train_accuracy", "training accuracy (%)", 100),
        ("val_accuracy", "validation accuracy (%)", 100),
    ]
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).ravel()
    alpha = _band_alpha(len(settings(rows)))
    for axis, (column, label, scale) in zip(axes, kinds, strict=True):
        for setting in settings(rows):
            own = of_setting(rows, setting)
            epochs = own.groupby("epoch")[column].agg(["mean", "std"]) * scale
            style = setting_style(*setting) | (HOLLOW if has_failed(own).any() else {})
            axis.plot(
                epochs.index, epochs["mean"], **style, markersize=3 if len(epochs) <= 20 else 0, zorder=_order(setting)
            )
            if alpha:
                error = epochs["std"].fillna(0)
                low, high = epochs["mean"] - error, epochs["mean"] + error
                axis.fill_between(epochs.index, low, high, color=style["color"], alpha=alpha, linewidth=0)
        axis.set_ylabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        losses = rows[column].dropna()
        if scale == 1 and (losses > 0).all() and losses.max() > 20 * losses.min():
            axis.set_yscale("log")
    for axis in axes[2:]:
        axis.set_xlabel("epoch")
    seeds = span(rows.groupby(["loss", "loss_weight"])["seed"].nunique())
    figure.suptitle(f"{data}, {model}: mean over n = {seeds} seeds a line, {_spread(alpha > 0)}{_left_out(left_out)}")
    legend_below(figure, settings(rows), lines=True, rows=rows)
    return figure
