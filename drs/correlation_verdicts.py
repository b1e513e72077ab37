"""The rules of ``drs.verdicts`` for the claims about correlations: C1, with robust accuracy, and C4, with clean."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from drs import evidence
from drs.correlation import Correlation
from drs.verdicts import (
    ALPHA,
    DECISIVE_WEAK,
    INCONCLUSIVE,
    MEANINGFUL_CORRELATION,
    MIN_MODELS,
    MIN_SETTINGS,
    NAMES,
    NOT_STRONG,
    NOT_SUPPORTED,
    SUPPORTED,
    WEAK_ATTACKS,
    WEAK_ONLY,
    WORST_CASES,
    Decision,
)

SETS = ("weak attacks", "worst case")


def short(verdict: str) -> str:
    """Return a verdict without what it says of n, for one that stands beside others."""
    return "inconclusive" if verdict == INCONCLUSIVE else verdict


def _names(attacks: Sequence[str]) -> str:
    return evidence.enumerated([NAMES[attack] for attack in attacks])


@dataclass(frozen=True)
class Reading:
    """The coefficient of one attack: over all models, over the DR-softmax models, over the settings of either.

    Attributes:
        models: All usable models.
        q_value: Benjamini-Hochberg q of ``models`` in the whole table.
        alone: The DR-softmax models.
        alone_settings: A point per weight of those.
        settings: A point per loss and weight.
    """

    models: Correlation
    q_value: float
    alone: Correlation
    alone_settings: Correlation
    settings: Correlation


def _passes_over_models(reading: Reading) -> bool:
    interval = reading.models
    return (interval.ci_low > 0 or interval.ci_high < 0) and reading.q_value < ALPHA


def _failed_check(reading: Reading | None) -> str:
    """Name the first check that the coefficient of an attack fails, or nothing."""
    if reading is None or math.isnan(reading.models.coefficient):
        return "(no coefficient)"
    if not _passes_over_models(reading):
        return "over all models"
    sign = math.copysign(1, reading.models.coefficient)
    alone = sign * reading.alone.coefficient > 0
    for name, part in (("DR-softmax models alone", reading.alone_settings), ("settings", reading.settings)):
        if not (alone and sign * part.coefficient > 0 and part.p_value < ALPHA):
            return f"over the {name}"
    return ""


def _failures(failed: Mapping[str, str]) -> str:
    """Say what fails for which attacks: ``not shown over all models for FGSM and PGD, ...``."""
    checks = dict.fromkeys(check for check in failed.values() if check)
    return ", ".join(
        f"not shown {check} for {_names([attack for attack, own in failed.items() if own == check])}"
        for check in checks
    )


def _too_few(n_models: int, n_settings: int) -> str:
    if n_models < MIN_MODELS:
        return f"{n_models} usable models; {MIN_MODELS} are needed"
    if n_settings < MIN_SETTINGS:
        return f"{n_settings} settings of loss and weight; {MIN_SETTINGS} are needed, seeds do not replace them"
    return ""


def _ruled_out(reading: Reading) -> str:
    """Say why no meaningful correlation is left for an attack, or nothing."""
    models, alone = reading.models, reading.alone
    largest = max(-models.ci_low, models.ci_high)
    if largest < MEANINGFUL_CORRELATION and abs(reading.settings.coefficient) < MEANINGFUL_CORRELATION:
        return f"the interval lies within ±{MEANINGFUL_CORRELATION:g}"
    limit = alone.ci_high if models.coefficient > 0 else -alone.ci_low
    enough = alone.n >= MIN_MODELS and reading.alone_settings.n >= MIN_SETTINGS
    if _passes_over_models(reading) and enough and limit < MEANINGFUL_CORRELATION:
        return (
            "no meaningful coefficient of that sign is left among the DR-softmax models alone, so that the difference "
            "between losses makes it"
        )
    return ""


def _decide_attacks(attacks: Sequence[str], readings: Mapping[str, Reading]) -> Decision:
    """Decide C1 for the weak attacks, or for the worst case."""
    known = {attack: readings[attack] for attack in attacks if attack in readings}
    if not known:
        return Decision(INCONCLUSIVE, "not measured")
    for reading in known.values():
        if reason := _too_few(reading.models.n, reading.settings.n):
            return Decision(INCONCLUSIVE, reason)
    shown = ", ".join(f"{NAMES[a]} {evidence.number(reading.models.coefficient)}" for a, reading in known.items())
    failed = {attack: _failed_check(known.get(attack)) for attack in attacks}
    if not any(failed.values()):
        return Decision(SUPPORTED, f"{shown}: holds for {_names(attacks)}")
    excluded = {attack: _ruled_out(reading) for attack, reading in known.items()}
    if all(excluded.values()):
        whys = dict.fromkeys(excluded.values())
        parts = [f"{why} for {_names([a for a, own in excluded.items() if own == why])}" for why in whys]
        return Decision(NOT_SUPPORTED, f"{shown}: {', '.join(parts)}")
    return Decision(INCONCLUSIVE, f"{shown}: {_failures(failed)}, and not ruled out")


def decide_correlation(readings: Mapping[str, Reading], *, strong_suite: bool) -> Decision:
    """Decide C1 from the coefficient of each of ``WEAK_ATTACKS`` and ``WORST_CASES`` that exists."""
    missing = [attack for attack in WEAK_ATTACKS if attack not in readings]
    if missing:
        return Decision(INCONCLUSIVE, f"no coefficient for {_names(missing)}")
    pgd = readings[DECISIVE_WEAK]
    if reason := _too_few(pgd.models.n, pgd.settings.n):
        return Decision(INCONCLUSIVE, reason)
    if math.isnan(pgd.models.coefficient):
        return Decision(INCONCLUSIVE, "no coefficient for PGD: a column is constant")
    weak, worst = (_decide_attacks(attacks, readings) for attacks in (WEAK_ATTACKS, WORST_CASES))
    has_worst = any(attack in readings for attack in WORST_CASES)
    if weak.verdict == worst.verdict == SUPPORTED and strong_suite:
        verdict = SUPPORTED
    elif weak.verdict == SUPPORTED:
        verdict = WEAK_ONLY
    else:
        ruled_out = weak.verdict == NOT_SUPPORTED and (worst.verdict == NOT_SUPPORTED or not has_worst)
        verdict = NOT_SUPPORTED if ruled_out else INCONCLUSIVE
    each = [f"{name} {short(part.verdict)} ({part.reason})" for name, part in zip(SETS, (weak, worst), strict=True)]
    note = f"; {NOT_STRONG}" if verdict == WEAK_ONLY and not strong_suite else ""
    return Decision(verdict, ", ".join(each) + note, (weak.verdict, worst.verdict))


def decide_clean(models: Correlation, settings: Correlation) -> Decision:
    """Decide C4 from the coefficient with clean accuracy over models and over settings."""
    if reason := _too_few(models.n, settings.n):
        return Decision(INCONCLUSIVE, reason)
    if math.isnan(models.coefficient):
        return Decision(INCONCLUSIVE, "no coefficient: a column is constant")
    if settings.p_greater < ALPHA:
        if models.coefficient > 0:
            apart = "" if models.ci_low > 0 else " by the order of the settings, though its interval holds 0"
            return Decision(NOT_SUPPORTED, f"the correlation is significantly positive{apart}")
        return Decision(INCONCLUSIVE, "significantly positive over settings, but not positive over models")
    if models.ci_high < MEANINGFUL_CORRELATION and settings.coefficient < MEANINGFUL_CORRELATION:
        return Decision(
            SUPPORTED, f"not significantly positive, and the interval ends below {MEANINGFUL_CORRELATION:g}"
        )
    return Decision(INCONCLUSIVE, f"not significantly positive, but {MEANINGFUL_CORRELATION:g} is not ruled out")
