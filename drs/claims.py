"""A study's tables -> the claims table: a verdict, an effect and the evidence for every claim of the paper.

The rules are in ``drs.verdicts``; here their inputs are gathered and put into words.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from drs import evidence
from drs.correlation import Correlation, correlate, correlate_settings, group_models, usable_models
from drs.paired import BASELINE, paired_difference_table
from drs.verdicts import (
    ALPHA,
    DECISIVE_WEAK,
    DECISIVE_WORST,
    INCONCLUSIVE,
    NAMES,
    PRIMARY_LOSS,
    PRIMARY_STATISTIC,
    PRIMARY_WEIGHT,
    RULES,
    STATEMENTS,
    WEAK_ATTACKS,
    WORST_CASES,
    Decision,
    Difference,
    Reading,
    decide_clean,
    decide_correlation,
    decide_robustness,
    decide_time,
    least_favourable,
)

__all__ = ["ALPHA", "COLUMNS", "RULES", "decide_claims", "paired_difference_table"]

COLUMNS = ["claim", "statement", "verdict", "effect", "ci_low", "ci_high", "n", "evidence", "data", "model"]
_STATISTIC = f"stat.{PRIMARY_STATISTIC}"
_NAN = float("nan")


class _Group(NamedTuple):
    """What the claims read of one dataset and architecture."""

    models: pd.DataFrame  # without those excluded
    correlations: pd.DataFrame
    differences: pd.DataFrame
    timing: pd.DataFrame
    landing: pd.DataFrame
    strong_suite: bool


class _Finding(NamedTuple):
    decision: Decision
    effect: float = _NAN
    ci_low: float = _NAN
    ci_high: float = _NAN
    n: int = 0
    details: tuple[str, ...] = ()


def _select(table: pd.DataFrame, **conditions: object) -> pd.DataFrame:
    """Return the rows that meet every condition; none where a column is missing."""
    for column, value in conditions.items():
        if column not in table:
            return table.iloc[:0]
        match = np.isclose(table[column].astype(float), value) if isinstance(value, float) else table[column] == value
        table = table[np.asarray(match, dtype=bool)]
    return table


def _setting(table: pd.DataFrame) -> pd.DataFrame:
    return _select(table, loss=PRIMARY_LOSS, loss_weight=PRIMARY_WEIGHT)


def _spearman(correlations: pd.DataFrame, attack: str, statistic: str = PRIMARY_STATISTIC) -> pd.Series | None:
    rows = _select(correlations, statistic=statistic, attack=attack, method="spearman")
    return None if rows.empty else rows.iloc[0]


def _as_correlation(row: pd.Series, p_greater: float = _NAN) -> Correlation:
    coefficient, low, high, p = (float(row[name]) for name in ("coefficient", "ci_low", "ci_high", "p_value"))
    return Correlation(int(row["n_models"]), coefficient, low, high, p, p_greater)


def _reading(group: _Group, attack: str) -> Reading | None:
    row = _spearman(group.correlations, attack)
    if row is None:
        return None
    column = f"acc.{attack}"
    alone = _select(group.models, loss=PRIMARY_LOSS)
    complete = alone.reindex(columns=["loss_weight", _STATISTIC, column]).dropna()
    return Reading(
        models=_as_correlation(row),
        q_value=float(row["q_value"]),
        alone=correlate(alone, _STATISTIC, column),
        alone_settings=complete["loss_weight"].nunique(),
        settings=correlate_settings(group.models, _STATISTIC, column),
    )


def _landing(landing: pd.DataFrame) -> str:
    rows = usable_models(_select(landing, attack="pgd"))
    needed = ["runner_up_rate", "chance", "matrix_correlation"]
    if rows.empty or not set(needed) <= set(rows.columns):
        return "where attacks land was not measured"
    rate, chance, matrix = (float(rows[name].astype(float).median()) for name in needed)
    return (
        f"under PGD {evidence.number(100 * rate, 0)} % of the flips go to the runner-up class (chance "
        f"{evidence.number(100 * chance, 0)} %), and class-mean softmax and confusion correlate by "
        f"{evidence.number(matrix)} (medians over {len(rows)} cells of model and epsilon)"
    )


def _correlation_claim(group: _Group) -> _Finding:
    candidates = {attack: _reading(group, attack) for attack in (*WEAK_ATTACKS, *WORST_CASES)}
    readings = {attack: reading for attack, reading in candidates.items() if reading is not None}
    decision = decide_correlation(readings, strong_suite=group.strong_suite)
    landing = _landing(group.landing)
    if not readings:
        return _Finding(decision, n=len(group.models), details=(landing,))

    def listed(part: Callable[[Reading], str]) -> str:
        return ", ".join(f"{NAMES[attack]} {part(reading)}" for attack, reading in readings.items())

    first = next(iter(readings.values()))
    details = (
        f"Spearman's coefficient over {first.models.n} models: "
        + listed(lambda r: f"{evidence.coefficient(r.models)} (q {evidence.probability(r.q_value)})"),
        f"over the {first.alone.n} DR-softmax models alone: " + listed(lambda r: evidence.coefficient_with_p(r.alone)),
        f"over the {first.settings.n} settings, seeds averaged: "
        + listed(lambda r: evidence.coefficient_with_p(r.settings)),
        landing,
    )
    effect = readings.get(DECISIVE_WORST if group.strong_suite else DECISIVE_WEAK)
    if effect is None:
        return _Finding(decision, n=first.models.n, details=details)
    shown = effect.models
    return _Finding(decision, shown.coefficient, shown.ci_low, shown.ci_high, shown.n, details)


def _robustness_claim(group: _Group) -> _Finding:
    rows = _setting(group.differences)
    if _select(group.models, loss=BASELINE).empty:
        return _Finding(Decision(INCONCLUSIVE, "no usable model with cross-entropy"))
    if _setting(group.models).empty:
        return _Finding(Decision(INCONCLUSIVE, f"no usable model with DR-softmax at weight {PRIMARY_WEIGHT:g}"))
    if rows.empty:
        return _Finding(Decision(INCONCLUSIVE, "no seed in common with cross-entropy"))
    found = {
        str(row["attack"]): Difference(
            int(row["n_pairs"]), *(float(row[name]) for name in ("difference", "ci_low", "ci_high"))
        )
        for row in rows.to_dict("records")
    }
    decision = decide_robustness(found, strong_suite=group.strong_suite)

    def gain(attack: str) -> str:
        if attack not in found:
            return f"{NAMES[attack]} not measured"
        return f"{NAMES[attack]} {evidence.with_interval(*found[attack][1:], digits=1, scale=100, sign=True)}"

    norm = "not measured"
    if "norm.cw" in found:
        norm = f"{evidence.with_interval(*found['norm.cw'][1:], digits=3, sign=True)} pixel units"
    shown = found.get(DECISIVE_WORST if group.strong_suite else DECISIVE_WEAK)
    n = shown.n if shown else max(difference.n for difference in found.values())
    listed = ", ".join(gain(attack) for attack in (*WEAK_ATTACKS, *WORST_CASES, "cw@mean", "clean"))
    details = (
        f"change in points of accuracy over {n} pairs of seeds: {listed}",
        f"change in the median minimal L2 norm (CW): {norm}",
    )
    return _Finding(decision, *(shown[1:] if shown else (_NAN, _NAN, _NAN)), n, details)


def _time_claim(group: _Group) -> _Finding:
    rows = _select(_setting(group.timing), baseline=BASELINE).dropna(subset="ratio")
    if rows.empty:
        return _Finding(Decision(INCONCLUSIVE, f"no training step was timed at weight {PRIMARY_WEIGHT:g}"))
    row = rows.sort_values("ratio").iloc[-1]
    slowest = f", the slowest of {len(rows)} measurements" if len(rows) > 1 else ""
    details = (
        f"{float(row['loss_ms']):.2f} ms a training step against {float(row['baseline_ms']):.2f} ms, batches of "
        f"{int(row['batch_size'])}, {int(row['n_pairs'])} interleaved pairs on {row['device']}{slowest}",
    )
    low, high = float(row["ci_low"]), float(row["ci_high"])
    return _Finding(decide_time(low, high), float(row["ratio"]), low, high, int(row["n_pairs"]), details)


def _clean_claim(group: _Group) -> _Finding:
    row = _spearman(group.correlations, "clean")
    if row is None:
        return _Finding(Decision(INCONCLUSIVE, "no coefficient with clean accuracy"), n=len(group.models))
    models = _as_correlation(row, correlate(group.models, _STATISTIC, "clean_accuracy").p_greater)
    settings = correlate_settings(group.models, _STATISTIC, "clean_accuracy")
    others = []
    for name in ("nonlabel_cv", "nonlabel_entropy"):
        other = _spearman(group.correlations, "clean", name)
        others.append(f"{name} {evidence.coefficient(None if other is None else _as_correlation(other))}")
    over_settings = "no coefficient" if math.isnan(settings.coefficient) else evidence.number(settings.coefficient)
    details = (
        f"Spearman's coefficient over {models.n} models: {evidence.coefficient(models)}, one-sided p "
        f"{evidence.probability(models.p_greater)}",
        f"over the {settings.n} settings, seeds averaged: {over_settings}, one-sided p "
        f"{evidence.probability(settings.p_greater)}",
        f"other readings of stochasticity: {others[0]}; {others[1]} (high where the distribution is even)",
    )
    return _Finding(
        decide_clean(models, settings), models.coefficient, models.ci_low, models.ci_high, models.n, details
    )


_CLAIMS: dict[str, Callable[[_Group], _Finding]] = {
    "C1": _correlation_claim,
    "C2": _robustness_claim,
    "C3": _time_claim,
    "C4": _clean_claim,
}


def _row(claim: str, finding: _Finding, data: str, model: str) -> dict[str, Any]:
    text = evidence.sentences([finding.decision.reason, *finding.details])
    effect = finding.effect, finding.ci_low, finding.ci_high
    values = (claim, STATEMENTS[claim], finding.decision.verdict, *effect, finding.n, text, data, model)
    return dict(zip(COLUMNS, values, strict=True))


def _overall(claim: str, findings: dict[str, _Finding], correlations: pd.DataFrame, strong_suite: bool) -> _Finding:
    if not findings:
        return _Finding(Decision(INCONCLUSIVE, "no finished model"))
    verdict = least_favourable([finding.decision.verdict for finding in findings.values()])
    if len(findings) == 1:
        ((name, finding),) = findings.items()
        return finding._replace(details=(f"the only group is {name}",))
    decision = Decision(
        verdict, "by group: " + "; ".join(f"{name} {finding.decision.verdict}" for name, finding in findings.items())
    )
    attack = {"C1": DECISIVE_WORST if strong_suite else DECISIVE_WEAK, "C4": "clean"}.get(claim, "")
    pooled = _spearman(_select(correlations, data="pooled", model="pooled"), attack)
    if pooled is not None and not pd.isna(pooled["coefficient"]):
        shown = _as_correlation(pooled)
        details = (f"effect: the groups' coefficients, averaged with their numbers of models ({shown.n}) as weights",)
        return _Finding(decision, shown.coefficient, shown.ci_low, shown.ci_high, shown.n, details)
    known = [finding for finding in findings.values() if not math.isnan(finding.effect)]
    if not known:
        return _Finding(decision)
    effect = sum(finding.effect for finding in known) / len(known)
    details = (f"effect: the mean over {len(known)} group{'s' * (len(known) > 1)}, without an interval",)
    return _Finding(decision, effect, n=sum(finding.n for finding in known), details=details)


def decide_claims(
    models: pd.DataFrame,
    correlations: pd.DataFrame,
    timing: pd.DataFrame,
    landing: pd.DataFrame,
    *,
    strong_suite: bool,
) -> pd.DataFrame:
    """Decide the claims C1 to C4 for every dataset and architecture, and over all of them.

    Args:
        models: models.csv; see ``drs.correlation.correlation_table`` and ``drs.paired.paired_difference_table``.
        correlations: What ``correlation_table`` makes of ``models``.
        timing: timing.csv: ``data, model, loss, loss_weight, baseline, batch_size, n_pairs, baseline_ms, loss_ms,
            ratio, ci_low, ci_high, device``.
        landing: landing.csv: ``data, model, attack, runner_up_rate, chance, matrix_correlation, excluded``.
        strong_suite: Whether the worst case contains the strong suite.

    Returns:
        ``COLUMNS``; the overall rows, with data = model = ``all``, come first. ``effect`` with its 95 % interval is a
        coefficient (C1, C4), a difference in robust accuracy as a share (C2) or a ratio of times (C3); ``n`` counts
        models, pairs of seeds, or timed pairs. A claim whose inputs are missing is inconclusive, and the evidence
        says what is missing.
    """
    differences = paired_difference_table(models)
    findings: dict[str, dict[str, _Finding]] = {claim: {} for claim in STATEMENTS}
    rows: list[dict[str, Any]] = []
    for data, model, every in group_models(models):
        usable = usable_models(every)
        group = _Group(
            usable,
            correlations=_select(correlations, data=data, model=model),
            differences=_select(differences, data=data, model=model),
            timing=_select(timing, data=data, model=model),
            landing=_select(landing, data=data, model=model),
            strong_suite=strong_suite,
        )
        excluded = len(every) - len(usable)
        note = f"{excluded} of {len(every)} models {'is' if excluded == 1 else 'are'} excluded" if excluded else ""
        for claim, decide in _CLAIMS.items():
            finding = decide(group)
            if claim != "C3":
                finding = finding._replace(details=(*finding.details, note))
            findings[claim][f"{data}/{model}"] = finding
            rows.append(_row(claim, finding, data, model))
    overall = [
        _row(claim, _overall(claim, found, correlations, strong_suite), "all", "all")
        for claim, found in findings.items()
    ]
    return pd.DataFrame([*overall, *rows], columns=COLUMNS)
