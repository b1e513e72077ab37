"""One look for all figures: which loss has which colour, what a statistic, an attack and an epsilon are called.

Colours are Okabe and Ito's (2008), which people with any of the common colour deficiencies can tell apart; markers and
line styles say the same again for a grey print. DR-softmax is one hue, darker for a larger weight.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from statistics import NormalDist
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from drs.marks import MARK, has_failed
from drs.verdicts import PRIMARY_WEIGHT

Setting = tuple[str, float]  # (loss, loss_weight): what is repeated over seeds

WIDTH = 7.2  # inches: the text width of a two-column page
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.labelsize": 8,
    "figure.titlesize": 8.5,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "savefig.dpi": 180,
}

# loss: (name in figures, colour, marker, line style)
_LOSSES: dict[str, tuple[str, str, str, str]] = {
    "ce": ("CE", "#D55E00", "s", "--"),
    "dr_softmax": ("DR", "", "o", "-"),
    "label_smoothing": ("label smoothing", "#009E73", "^", "-."),
    "gce": ("GCE", "#CC79A7", "D", "-."),
    "cot": ("COT", "#E69F00", "v", "-."),
    "logit_squeezing": ("logit squeezing", "#000000", "P", ":"),
    "confidence_penalty": ("confidence penalty", "#7F7F7F", "X", ":"),
    "adversarial": ("AT", "#882255", "*", "-"),
    "adversarial+dr_softmax": ("AT + DR", "#332288", "*", "-"),
    "trades": ("TRADES", "#B8860B", "p", "-"),
    "trades+dr_softmax": ("TRADES + DR", "#117733", "p", "-"),
}
_OTHER = ("", "#8C564B", "<", ":")
_LIGHTEST_WEIGHT, _DARKEST_WEIGHT = 1e-4, 1e-1  # fixed, so that a weight has the same blue in every figure

EXCLUDED_COLOUR = "0.6"
CHANCE_COLOUR = "0.35"

_ATTACKS = {
    "clean": "clean",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "cw_torchattacks": "CW (torchattacks)",
    "cw": "CW",
    "margin_pgd": "margin PGD",
    "targeted_pgd": "targeted PGD",
    "margin_pgd_l2": "margin PGD L2",
    "apgd_ce": "APGD-CE",
    "fmn_linf": "FMN L∞",
    "fmn_l2": "FMN L2",
    "adaptive": "adaptive",
    "apgd_t": "APGD-T",
    "fab_t": "FAB-T",
    "square": "Square",
    "transfer": "transfer",
    "noise": "random noise",
    "hop_skip_jump": "HopSkipJump",
    "smallest_linf": "smallest L∞ found",
    "smallest_l2": "smallest L2 found",
    "worst_linf": "worst case L∞",
    "worst_l2": "worst case L2",
}
IN_PANELS = ("fgsm", "pgd", "cw_torchattacks", "cw", "margin_pgd", "targeted_pgd", "worst_linf", "worst_l2")
"""Attacks that get a panel where a figure has one per attack; the others are in the tables."""
MOST_SETTINGS = 20
"""How many losses and weights of a group a report lists; a sweep may have a hundred."""
STATISTICS = {
    "nonlabel_var_log": "variance of log p over the non-label classes (nat²)",
    "nonlabel_std": "standard deviation of p over the non-label classes (probability)",
    "nonlabel_cv": "coefficient of variation of p over the non-label classes",
    "nonlabel_entropy": "entropy of the non-label softmax (share of its maximum)",
    "nonlabel_max": "largest non-label p (probability)",
    "nonlabel_gap": "largest minus second largest non-label p (probability)",
    "label_prob": "p of the label (probability)",
    "margin": "label logit minus the largest other logit (logits)",
    "logit_norm": "norm of the centred logits (logits)",
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Give a drawing function the house style without touching matplotlib's global settings."""

    @wraps(draw)
    def with_style(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return with_style


def setting_label(loss: str, weight: float) -> str:
    """Name a loss and its weight as the figures and the report do: ``CE``, ``DR 0.005``."""
    name = _LOSSES.get(loss, _OTHER)[0] or loss.replace("_", " ")
    return name if not weight > 0 else f"{name} {weight:.3g}"


def marked_label(rows: pd.DataFrame, setting: Setting) -> str:
    """Name a setting, with a dagger if one of its models in ``rows`` fails a sanity check (``failed_checks``)."""
    own = of_setting(rows, setting)
    return setting_label(*setting) + (f" {MARK}" if has_failed(own).any() else "")


def setting_style(loss: str, weight: float) -> dict[str, Any]:
    """Return the colour, marker and line style of a loss and its weight (matplotlib keywords)."""
    _, colour, marker, line = _LOSSES.get(loss, _OTHER)
    if loss == "dr_softmax":
        span = np.log10(_DARKEST_WEIGHT / _LIGHTEST_WEIGHT)
        position = np.log10(max(weight, _LIGHTEST_WEIGHT) / _LIGHTEST_WEIGHT) / span
        colour = to_hex(colormaps["Blues"](0.32 + 0.68 * float(np.clip(position, 0, 1))))
    return {"color": colour, "marker": marker, "linestyle": line}


def settings(table: pd.DataFrame) -> list[Setting]:
    """Return the (loss, loss_weight) pairs of a table: CE, DR by weight, then the other losses."""
    order = {name: position for position, name in enumerate(_LOSSES)}
    pairs = {(str(row.loss), float(row.loss_weight)) for row in records(table[["loss", "loss_weight"]])}
    return sorted(pairs, key=lambda pair: (order.get(pair[0], len(order)), pair))


def shown_setting(table: pd.DataFrame, loss: str = "dr_softmax") -> Setting | None:
    """Return the weight of ``loss`` closest (in ratio) to the published one, or None if the loss is absent."""
    weights = sorted(weight for name, weight in settings(table) if name == loss)
    if not weights:
        return None
    return loss, min(weights, key=lambda weight: abs(np.log(max(weight, 1e-12) / PRIMARY_WEIGHT)))


def few_settings(table: pd.DataFrame) -> list[Setting]:
    """Return the settings of a table, of more than ``MOST_SETTINGS`` that many: the first and the last, the one closest
    to the published weight, and others at even distances between."""
    every = settings(table)
    if len(every) <= MOST_SETTINGS:
        return every
    picked = {round(position) for position in np.linspace(0, len(every) - 1, MOST_SETTINGS - 1)}
    published = shown_setting(table)
    return [own for position, own in enumerate(every) if position in picked or own == published]


def not_shown(table: pd.DataFrame, name: str) -> str:
    """Say how many settings of a table ``few_settings`` shows and which csv has all; nothing where it shows all."""
    every, few = len(settings(table)), len(few_settings(table))
    return f"{few} of {every} losses and weights are shown; all are in tables/{name}.csv." if few < every else ""


def of_setting(table: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Return the rows of one loss and weight."""
    return table[(table["loss"] == setting[0]) & np.isclose(table["loss_weight"], setting[1])]


def groups(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the (data, model) pairs of a table in order of appearance, ``pooled`` last."""
    pairs = [
        (str(data), str(model)) for data, model in table[["data", "model"]].drop_duplicates().itertuples(index=False)
    ]
    return sorted(pairs, key=lambda pair: pair[0] == "pooled")


def of_group(table: pd.DataFrame, data: str, model: str) -> pd.DataFrame:
    """Return the rows of one dataset and architecture."""
    return table[(table["data"] == data) & (table["model"] == model)]


def included(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose model was not excluded; the column holds the reason, or nothing."""
    return table[~is_excluded(table)]


def is_excluded(table: pd.DataFrame) -> "pd.Series[bool]":
    """Say for every row whether its model was excluded from correlations and claims."""
    reasons = table["excluded"].astype(object)
    return reasons.notna() & (reasons.astype(str).str.strip() != "")


def attack_label(attack: str) -> str:
    """Name an attack, or a column such as ``pgd@mean`` or ``pgd@8/255``, for a reader."""
    name, _, epsilon = attack.partition("@")
    label = _ATTACKS.get(name, name.replace("_", " "))
    if epsilon == "inf":
        return f"{label}, no bound"
    return f"{label}, {'mean over ε' if epsilon == 'mean' else f'ε {epsilon}'}" if epsilon else label


def attacks(names: Iterable[str]) -> list[str]:
    """Return attack names in reading order: clean, the attacks as listed, the worst cases last."""
    known = list(_ATTACKS)
    unique = dict.fromkeys(names)

    def position(name: str) -> tuple[bool, int]:
        base = name.partition("@")[0]
        return base.startswith("worst"), known.index(base) if base in known else len(known)

    return sorted(unique, key=position)


def statistic_label(statistic: str) -> str:
    """Say what a statistic is, with its unit; an unknown one keeps its own name."""
    return STATISTICS.get(statistic, statistic.replace("_", " "))


def wilson_interval(proportion: ArrayLike, n: ArrayLike, confidence: float = 0.95) -> NDArray[np.float64]:
    """Return Wilson's score interval of a binomial proportion.

    Args:
        proportion: Shares in 0..1, shape [m]. For a mean of several shares of the same ``n`` samples the interval is
            conservative, since a mean of 0/1 values varies no more than one 0/1 value of that probability.
        n: Number of samples, shape [m] or scalar.
        confidence: Coverage of the two-sided interval.

    Returns:
        Lower and upper bounds, shape [2, m].

    Source: Wilson 1927; Brown, Cai and DasGupta 2001.
    """
    p, count = np.asarray(proportion, float), np.asarray(n, float)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    # At 0 and 1 the bounds are 0 and 1 exactly; rounding would leave 1e-18.
    return np.stack([np.clip(np.minimum(centre - half, p), 0, 1), np.clip(np.maximum(centre + half, p), 0, 1)])


def span(values: Sequence[int] | pd.Series) -> str:
    """Write a set of counts as ``4`` or ``3–4``; none at all as ``0``."""
    if not len(values):
        return "0"
    low, high = int(min(values)), int(max(values))
    return f"{low}" if low == high else f"{low}–{high}"


def records(table: pd.DataFrame) -> list[Any]:
    """Return the rows of a table, each with its columns as attributes."""
    return list(table.itertuples(index=False))


def count(number: int, noun: str) -> str:
    """Write a number with its noun: ``1 model``, ``23 models``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def panels(number: int, *, columns: int = 3, height: float = 2.1, extra: float = 0.6) -> tuple[Figure, list[Any]]:
    """Make a figure of the text width with ``number`` panels of ``height`` inches, ``columns`` at most in a row."""
    columns = min(columns, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(WIDTH, rows * height + extra), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[number:]:
        axis.set_axis_off()
    return figure, list(axes[:number])
