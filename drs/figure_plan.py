"""Which figures a study's tables allow, with the caption of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from drs import figure_cost, figure_summary, figures
from drs.figure_style import count, groups, included, of_group, settings
from drs.marks import correlated_note
from drs.shown_intervals import kind_of_interval
from drs.verdicts import PRIMARY_STATISTIC

Tables = dict[str, pd.DataFrame]
FIGURE_STATISTICS = (PRIMARY_STATISTIC, "nonlabel_entropy")  # the others are in the heat map and the tables
# kind: its title in the report
KINDS = {
    "summary": "The study at a glance",
    "statistic_vs_accuracy": "Statistic against robust accuracy",
    "epsilon_curves": "Robust accuracy against epsilon",
    "nonlabel_distribution": "Non-label softmax values",
    "correlation_heatmap": "Correlations of statistics with accuracy",
    "masking_gap": "Gain under PGD and under the worst case",
    "robustness_against_time": "Robustness against training time",
    "where_attacks_land": "Where attacks land",
    "training_curves": "Training curves",
}


@dataclass(frozen=True)
class PlannedFigure:
    """One figure of a study: file name without ending, kind (a key of ``KINDS``), title, caption, how to draw it."""

    name: str
    kind: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def _planned(kind: str, suffix: str, where: str, caption: str, draw: Callable[[], Figure]) -> PlannedFigure:
    name = "-".join(part for part in (kind, suffix) if part)
    title = ": ".join(part for part in (where, KINDS[kind]) if part)
    return PlannedFigure(name, kind, title, f"{title}. {caption}", draw)


def _chance(tables: Tables, data: str, model: str) -> float | None:
    ranks = of_group(tables["softmax_profile"], data, model)["rank"]
    return None if ranks.empty else 1 / (int(ranks.max()) + 1)


def _families(rows: pd.DataFrame, tag: str, where: str) -> list[tuple[str, str, pd.DataFrame]]:
    """Share out the losses of a group where their bands would hide each other: DR-softmax here, the others there.

    Returns:
        File name tag, title and rows of each figure; cross-entropy is in all of them. There is none of excluded models
        only.
    """
    dr, ce = rows["loss"] == "dr_softmax", rows["loss"] == "ce"
    families = [
        (tag, f"{where}, DR-softmax", rows[dr | ce]),
        (f"{tag}-others", f"{where}, other losses and procedures", rows[~dr]),
    ]
    if len(settings(rows)) <= figures.MOST_BANDS or not (~dr & ~ce).any():
        families = [(tag, where, rows)]
    return [family for family in families if len(included(family[2]))]


def _of_one_group(tables: Tables, data: str, model: str) -> Iterator[PlannedFigure]:
    models, accuracy = tables["models"], tables["accuracy"]
    where, tag = f"{data}, {model}", f"{data}-{model}"
    group = of_group(models, data, model)
    usable = count(len(included(group)), "model")
    attacked = of_group(included(accuracy), data, model)
    if (attacked["attack"] != "clean").any():
        for statistic in FIGURE_STATISTICS:
            if f"stat.{statistic}" not in group or group[f"stat.{statistic}"].isna().all():
                continue
            caption = (
                f"A point per model ({usable}): mean {statistic} on clean samples against robust accuracy, mean over "
                "the epsilons of each attack. Bars: Wilson's 95 % interval over the attacked images; ρ: Spearman's "
                "coefficient with a 95 % interval over models."
            )
            draw = partial(
                figures.statistic_vs_accuracy, models, accuracy, tables["correlations"], statistic, data, model
            )
            yield _planned("statistic_vs_accuracy", f"{statistic}-{tag}", where, caption, draw)
        for own_tag, title, rows in _families(of_group(accuracy, data, model), tag, where):
            shown = count(included(rows)["run_id"].nunique(), "model")
            caption = (
                f"Mean over seeds, bands of one standard deviation ({shown}); ε = 0 is before the attack, on the same "
                "images. Accuracy below chance is to be expected: an attack picks the wrong class on purpose."
            )
            draw = partial(figures.epsilon_curves, rows, data, model, chance=_chance(tables, data, model))
            yield _planned("epsilon_curves", own_tag, title, caption, draw)
    landed = of_group(included(tables["landing"]), data, model)
    if len(landed):
        caption = (
            "Top: share of flips that go to the runner-up of the clean softmax, a point per model "
            f"({count(landed['run_id'].nunique(), 'model')}). Bottom: class-mean softmax beside the confusion after "
            "the attack, rows normalised without the diagonal; r: correlation of their cells, mean over models."
        )
        draw = partial(figures.where_attacks_land, tables["landing"], tables["landing_matrices"], data, model)
        yield _planned("where_attacks_land", tag, where, caption, draw)
    trained = of_group(tables["training"], data, model)
    for own_tag, title, rows in _families(trained, tag, where):
        caption = (
            f"Mean over seeds, bands of one standard deviation ({count(rows['run_id'].nunique(), 'run')}). "
            "Each training minimises its own loss, so training losses of different colours do not compare; validation "
            "loss is cross-entropy for all."
        )
        draw = partial(figures.training_curves, rows, data, model)
        yield _planned("training_curves", own_tag, title, caption, draw)


def plan_figures(tables: Tables) -> list[PlannedFigure]:
    """List the figures that these tables allow, kind by kind in the order of ``KINDS``."""
    plan = [figure for data, model in groups(tables["models"]) for figure in _of_one_group(tables, data, model)]
    if len(profile := tables["softmax_profile"]):
        caption = (
            "Softmax values of the classes that are not the label, on clean test samples, sorted from the largest: "
            "median over samples and seeds, band between the quartiles. A flat line is a uniform distribution."
        )
        plan.append(_planned("nonlabel_distribution", "", "", caption, partial(figures.nonlabel_distribution, profile)))
    if len(correlations := tables["correlations"]):
        caption = (
            "Spearman's coefficient over models, statistics on clean samples against clean and robust accuracy (mean "
            "over epsilons). Hatched: not significant after Benjamini–Hochberg over the table. "
        ) + correlated_note(tables["models"])
        draw = partial(figures.correlation_heatmap, correlations)
        plan.append(_planned("correlation_heatmap", "", "", caption.strip(), draw))
    worst = included(tables["worst_case"])
    if (worst["norm"] == "linf").any():
        caption = (
            f"A point per model ({count(worst['run_id'].nunique(), 'model')}): robust accuracy at the decisive "
            "epsilons under the worst case over all attacks (Wilson's 95 % interval over images) and, as a dash, under "
            "PGD alone on the same images, against the time of training for 10 000 images, since losses may be trained "
            "on different numbers of them. Trainings run side by side and may have shared the machine with other work: "
            "for what a step costs, see C3."
        )
        draw = partial(figure_cost.robustness_against_time, tables["models"], worst)
        plan.append(_planned("robustness_against_time", "", "", caption, draw))
    gains = tables["comparators"]
    if "gain_pgd" in gains and gains["gain_pgd"].notna().any():
        caption = (
            "Each loss against cross-entropy at the same seed, on the same images: gain under PGD (pale squares) and "
            f"under the worst case over all attacks (circles), with {kind_of_interval(gains)}; a diamond "
            "has one pair and no interval, a hollow point is a loss of which a model fails a sanity check. What lies "
            "between square and circle is lost to stronger attacks."
        )
        plan.append(_planned("masking_gap", "", "", caption, partial(figure_cost.masking_gap, gains)))
    if figure_summary.summary_rows(gains, tables["timing"]):
        caption = (
            "DR-softmax at the published weight, and trainings that are known to make models robust: gain over "
            "cross-entropy at the same seed under PGD (left) and under the worst case over all attacks (middle), on "
            f"the same images, with {kind_of_interval(gains)}; time of a training step against "
            "cross-entropy's (right), with 95 % intervals. A diamond has one pair of seeds and no interval; a hollow "
            "point is a loss of which a model fails a sanity check; bars are cut at the edges."
        )
        draw = partial(figure_summary.summary, gains, tables["timing"])
        plan.append(_planned("summary", "", "", caption, draw))
    order = list(KINDS)
    return sorted(plan, key=lambda figure: order.index(figure.kind))
