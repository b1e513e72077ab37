"""What the claims table reads of one dataset and architecture: the figures of each claim, and the words for them.

Here are correlations and times (C1, C3, C4); what is paired with cross-entropy is in ``drs.gain_findings``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from drs import evidence
from drs.correlation import Correlation, correlate, correlate_settings
from drs.correlation_verdicts import Reading, decide_clean, decide_correlation
from drs.image_outcomes import GroupOutcomes
from drs.paired import BASELINE
from drs.selection import usable_models
from drs.verdicts import (
    DECISIVE_WEAK,
    DECISIVE_WORST,
    INCONCLUSIVE,
    NAMES,
    PRIMARY_LOSS,
    PRIMARY_STATISTIC,
    PRIMARY_WEIGHT,
    WEAK_ATTACKS,
    WORST_CASES,
    Decision,
    decide_time,
)

_STATISTIC = f"stat.{PRIMARY_STATISTIC}"
_NAN = float("nan")
_TIMING = ("ratio", "ci_low", "ci_high", "n_pairs", "baseline_ms", "loss_ms", "batch_size", "device")


class Group(NamedTuple):
    """One dataset and architecture: its rows of every table, and whether the worst case contains the strong suite."""

    models: pd.DataFrame  # without those excluded
    correlations: pd.DataFrame
    differences: pd.DataFrame
    timing: pd.DataFrame
    landing: pd.DataFrame
    worst_case: pd.DataFrame
    sanity: pd.DataFrame
    norms: pd.DataFrame
    outcomes: GroupOutcomes
    strong_suite: bool


class Finding(NamedTuple):
    """A decision with its effect, 95 % interval, n, further sentences of evidence, and the images of the interval."""

    decision: Decision
    effect: float = _NAN
    ci_low: float = _NAN
    ci_high: float = _NAN
    n: int = 0
    details: tuple[str, ...] = ()
    n_images: float = _NAN


def select(table: pd.DataFrame, **conditions: object) -> pd.DataFrame:
    """Return the rows that meet every condition; none where a column is missing."""
    for column, value in conditions.items():
        if column not in table:
            return table.iloc[:0]
        match = np.isclose(table[column].astype(float), value) if isinstance(value, float) else table[column] == value
        table = table[np.asarray(match, dtype=bool)]
    return table


def published_setting(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of DR-softmax at the published weight."""
    return select(table, loss=PRIMARY_LOSS, loss_weight=PRIMARY_WEIGHT)


def spearman(correlations: pd.DataFrame, attack: str, statistic: str = PRIMARY_STATISTIC) -> pd.Series | None:
    """Return the row of Spearman's coefficient, if the table has one."""
    rows = select(correlations, statistic=statistic, attack=attack, method="spearman")
    return None if rows.empty else rows.iloc[0]


def as_correlation(row: pd.Series) -> Correlation:
    """Read a row of correlations.csv, which has no one-sided p."""
    coefficient, low, high, p = (float(row[name]) for name in ("coefficient", "ci_low", "ci_high", "p_value"))
    return Correlation(int(row["n_models"]), coefficient, low, high, p, _NAN)


def _reading(group: Group, attack: str) -> Reading | None:
    row = spearman(group.correlations, attack)
    if row is None:
        return None
    column = f"acc.{attack}"
    alone = select(group.models, loss=PRIMARY_LOSS)
    return Reading(
        models=as_correlation(row),
        q_value=float(row["q_value"]),
        alone=correlate(alone, _STATISTIC, column),
        alone_settings=correlate_settings(alone, _STATISTIC, column),
        settings=correlate_settings(group.models, _STATISTIC, column),
    )


def _landing(landing: pd.DataFrame) -> str:
    rows = usable_models(select(landing, attack="pgd"))
    needed = ["runner_up_rate", "chance", "matrix_correlation"]
    if rows.empty or not set(needed) <= set(rows.columns):
        return "where attacks land was not measured"
    rate, chance, matrix = (float(rows[name].astype(float).median()) for name in needed)
    return (
        f"under PGD {evidence.number(100 * rate, 0)} % of the flips go to the runner-up class (chance "
        f"{evidence.number(100 * chance, 0)} %), and class-mean softmax and confusion correlate by "
        f"{evidence.number(matrix)} (medians over {len(rows)} cells of model and epsilon)"
    )


def _correlation_claim(group: Group) -> Finding:
    candidates = {attack: _reading(group, attack) for attack in (*WEAK_ATTACKS, *WORST_CASES)}
    readings = {attack: reading for attack, reading in candidates.items() if reading is not None}
    decision = decide_correlation(readings, strong_suite=group.strong_suite)
    landing = _landing(group.landing)
    if not readings:
        return Finding(decision, n=len(group.models), details=(landing,))

    def listed(part: Callable[[Reading], str]) -> str:
        return ", ".join(f"{NAMES[attack]} {part(reading)}" for attack, reading in readings.items())

    first = next(iter(readings.values()))
    details = (
        f"Spearman's coefficient over {first.models.n} models: "
        + listed(lambda r: f"{evidence.coefficient(r.models)} (q {evidence.probability(r.q_value)})"),
        f"over the {first.alone.n} DR-softmax models alone: " + listed(lambda r: evidence.coefficient(r.alone)),
        f"over their {first.alone_settings.n} weights, seeds averaged: "
        + listed(lambda r: evidence.coefficient_with_p(r.alone_settings)),
        f"over the {first.settings.n} settings, seeds averaged: "
        + listed(lambda r: evidence.coefficient_with_p(r.settings)),
        landing,
    )
    effect = readings.get(DECISIVE_WORST if group.strong_suite else DECISIVE_WEAK)
    if effect is None:
        return Finding(decision, n=first.models.n, details=details)
    shown = effect.models
    return Finding(decision, shown.coefficient, shown.ci_low, shown.ci_high, shown.n, details)


def _time_claim(group: Group) -> Finding:
    rows = select(published_setting(group.timing), baseline=BASELINE)
    missing = [column for column in _TIMING if column not in rows]
    if missing and not rows.empty:
        return Finding(Decision(INCONCLUSIVE, f"the timing table lacks {', '.join(missing)}"))
    rows = rows if rows.empty else rows.dropna(subset="ratio")
    if rows.empty:
        return Finding(Decision(INCONCLUSIVE, f"no training step was timed at weight {PRIMARY_WEIGHT:g}"))
    row = rows.sort_values("ratio").iloc[-1]
    slowest = f", the slowest of {len(rows)} measurements" if len(rows) > 1 else ""
    details: tuple[str, ...] = (
        f"{float(row['loss_ms']):.2f} ms a training step against {float(row['baseline_ms']):.2f} ms, batches of "
        f"{int(row['batch_size'])}, {int(row['n_pairs'])} interleaved pairs on {row['device']}{slowest}",
    )
    low, high = float(row["ci_low"]), float(row["ci_high"])
    references = [
        f"{name} {evidence.with_interval(*(float(found[0][key]) for key in ('ratio', 'ci_low', 'ci_high')))}"
        for label, name in (("adversarial", "adversarial training"), ("trades", "TRADES"))
        if (found := select(group.timing, loss=label, baseline=BASELINE).to_dict("records"))
    ]
    if references:
        details = (*details, f"for comparison, the same ratio: {', '.join(references)}")
    return Finding(decide_time(low, high), float(row["ratio"]), low, high, int(row["n_pairs"]), details)


def _clean_claim(group: Group) -> Finding:
    row = spearman(group.correlations, "clean")
    if row is None:
        return Finding(Decision(INCONCLUSIVE, "no coefficient with clean accuracy"), n=len(group.models))
    models = as_correlation(row)
    settings = correlate_settings(group.models, _STATISTIC, "clean_accuracy")
    others = []
    for name in ("nonlabel_cv", "nonlabel_entropy"):
        other = spearman(group.correlations, "clean", name)
        others.append(f"{name} {evidence.coefficient(None if other is None else as_correlation(other))}")
    over_settings = "no coefficient" if math.isnan(settings.coefficient) else evidence.number(settings.coefficient)
    details = (
        f"Spearman's coefficient over {models.n} models: {evidence.coefficient(models)}",
        f"over the {settings.n} settings, seeds averaged: {over_settings}, one-sided p "
        f"{evidence.probability(settings.p_greater)}",
        f"other readings of stochasticity: {others[0]}; {others[1]} (high where the distribution is even)",
    )
    return Finding(decide_clean(models, settings), models.coefficient, models.ci_low, models.ci_high, models.n, details)


# Claim -> what one group says about it; C2 and C5 are in drs.gain_findings.
CLAIMS: dict[str, Callable[[Group], Finding]] = {
    "C1": _correlation_claim,
    "C3": _time_claim,
    "C4": _clean_claim,
}
