"""Every clause of the verdict rules, one at a time, on figures given by hand."""

import inspect
import math
import re
import sys
from types import ModuleType

import pytest

from drs import verdicts
from drs.correlation import Correlation
from drs.correlation_verdicts import Reading, decide_clean, decide_correlation
from drs.verdicts import (
    INCONCLUSIVE,
    NOT_SUPPORTED,
    RULES,
    SUPPORTED,
    WEAK_ONLY,
    Difference,
    decide_robustness,
    decide_time,
    least_favourable,
)

NAN = math.nan
WEAK, WORST = ("fgsm@mean", "pgd@mean"), ("worst_linf@mean", "worst_l2@mean")


def _reading(
    models: tuple[float, float, float] = (-0.8, -0.9, -0.6),
    alone: tuple[float, float, float] = (-0.7, -0.9, -0.4),
    settings: float = -0.9,
    *,
    q: float = 0.01,
    weights: float | None = None,
    alone_p: float = 0.01,
    settings_p: float = 0.01,
    n: int = 24,
    n_alone: int = 20,
    n_weights: int = 5,
    n_settings: int = 6,
) -> Reading:
    """An attack that passes, unless told otherwise."""
    return Reading(
        models=Correlation(n, *models, q / 2, NAN),
        q_value=q,
        alone=Correlation(n_alone, *alone, NAN, NAN),
        alone_settings=Correlation(n_weights, alone[0] if weights is None else weights, NAN, NAN, alone_p, NAN),
        settings=Correlation(n_settings, settings, NAN, NAN, settings_p, NAN),
    )


def _correlation(weak: Reading, worst: Reading | None = None, *, strong: bool = True) -> str:
    readings = dict.fromkeys(WEAK, weak) | (dict.fromkeys(WORST, worst) if worst else {})
    return decide_correlation(readings, strong_suite=strong).verdict


PASSES = _reading()
NOTHING = _reading((0.05, -0.4, 0.4), (0.0, -0.45, 0.45), 0.1, q=0.8, alone_p=0.9, settings_p=0.9)


@pytest.mark.parametrize(
    "change",
    [
        {"models": (-0.8, -0.9, 0.01)},
        {"q": 0.05},
        {"alone": (0.7, 0.4, 0.9)},
        {"alone": (NAN, NAN, NAN)},
        {"alone_p": 0.05},
        {"weights": 0.7},
        {"settings": 0.9},
        {"settings": NAN},
        {"settings_p": 0.05},
    ],
)
def test_an_attack_passes_only_if_every_check_does(change: dict[str, object]) -> None:
    assert _correlation(PASSES, PASSES) == SUPPORTED
    broken = _reading(**change)  # type: ignore[arg-type]
    assert _correlation(PASSES, broken) == WEAK_ONLY
    for attack in WEAK:
        readings = dict.fromkeys([*WEAK, *WORST], PASSES) | {attack: broken}
        assert decide_correlation(readings, strong_suite=True).verdict not in (SUPPORTED, WEAK_ONLY)


def test_a_positive_correlation_passes_too() -> None:
    up = _reading((0.8, 0.6, 0.9), (0.7, 0.4, 0.9), 0.9)
    assert _correlation(up, up) == SUPPORTED


def test_nothing_is_better_than_weak_without_the_strong_suite() -> None:
    assert _correlation(PASSES, PASSES, strong=False) == WEAK_ONLY
    assert _correlation(PASSES) == WEAK_ONLY


def test_no_correlation() -> None:
    assert _correlation(NOTHING, NOTHING) == _correlation(NOTHING) == NOT_SUPPORTED
    assert _correlation(NOTHING, PASSES) == INCONCLUSIVE
    for change in ((0.05, -0.5, 0.4), (0.05, -0.4, 0.5)):
        assert _correlation(_reading(change, q=0.8)) == INCONCLUSIVE
    for settings in (0.5, -0.5, NAN):
        assert _correlation(_reading((0.05, -0.4, 0.4), settings=settings, q=0.8)) == INCONCLUSIVE


UNSETTLED = _reading((-0.66, -0.9, 0.1), (-0.5, -0.9, 0.3), -0.8, q=0.2, alone_p=0.1, settings_p=0.06)


@pytest.mark.parametrize(
    ("weak", "worst", "each", "verdict"),
    [
        (NOTHING, UNSETTLED, (NOT_SUPPORTED, INCONCLUSIVE), INCONCLUSIVE),
        (NOTHING, PASSES, (NOT_SUPPORTED, SUPPORTED), INCONCLUSIVE),
        (NOTHING, NOTHING, (NOT_SUPPORTED, NOT_SUPPORTED), NOT_SUPPORTED),
        (UNSETTLED, NOTHING, (INCONCLUSIVE, NOT_SUPPORTED), INCONCLUSIVE),
        (UNSETTLED, PASSES, (INCONCLUSIVE, SUPPORTED), INCONCLUSIVE),
        (PASSES, UNSETTLED, (SUPPORTED, INCONCLUSIVE), WEAK_ONLY),
        (PASSES, NOTHING, (SUPPORTED, NOT_SUPPORTED), WEAK_ONLY),
        (PASSES, PASSES, (SUPPORTED, SUPPORTED), SUPPORTED),
    ],
)
def test_weak_attacks_and_the_worst_case_are_decided_apart(
    weak: Reading, worst: Reading, each: tuple[str, str], verdict: str
) -> None:
    decision = decide_correlation(dict.fromkeys(WEAK, weak) | dict.fromkeys(WORST, worst), strong_suite=True)
    assert decision.sets == each
    assert decision.verdict == verdict
    first, second = (name.removesuffix(" (n too small)") for name in each)
    shown = (
        f"weak attacks {first} \\(FGSM .*, PGD .*\\), worst case {second} \\(worst case Linf .*, worst case L2 .*\\)"
    )
    assert re.fullmatch(shown, decision.reason)
    assert "; " not in decision.reason, "README.md shows an inconclusive group's reason up to there"


@pytest.mark.parametrize("attacks", [WEAK, WORST])
def test_a_set_is_not_supported_only_if_every_attack_of_it_is_ruled_out(attacks: tuple[str, str]) -> None:
    for attack in attacks:
        readings = dict.fromkeys([*WEAK, *WORST], NOTHING) | {attack: UNSETTLED}
        assert decide_correlation(readings, strong_suite=True).verdict == INCONCLUSIVE


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("beyond", "change", "verdict"),
    [
        (0.49, {}, NOT_SUPPORTED),
        (0.5, {}, INCONCLUSIVE),
        (-0.2, {}, NOT_SUPPORTED),
        (0.49, {"n_alone": 7}, INCONCLUSIVE),
        (0.49, {"n_weights": 4}, INCONCLUSIVE),
        (0.49, {"q": 0.05}, INCONCLUSIVE),
    ],
)
def test_a_correlation_that_only_the_difference_between_losses_makes(
    sign: int, beyond: float, change: dict[str, object], verdict: str
) -> None:
    def signed(value: float, inner: float, outer: float) -> tuple[float, float, float]:
        return (value, inner, outer) if sign > 0 else (-value, -outer, -inner)

    cluster = _reading(
        signed(0.8, 0.6, 0.9), signed(beyond - 0.3, beyond - 0.6, beyond), sign * 0.6, alone_p=0.6, **change
    )  # type: ignore[arg-type]
    assert _correlation(cluster, cluster) == verdict


@pytest.mark.parametrize(("change", "reason"), [({"n": 7}, "7 usable models"), ({"n_settings": 4}, "4 settings")])
def test_too_little_to_correlate(change: dict[str, int], reason: str) -> None:
    few = _reading(**change)  # type: ignore[arg-type]
    decision = decide_correlation(dict.fromkeys([*WEAK, *WORST], few), strong_suite=True)
    assert decision.verdict == INCONCLUSIVE
    assert reason in decision.reason
    assert _correlation(_reading(n=8, n_settings=5), PASSES) == SUPPORTED


def test_missing_coefficients() -> None:
    for attack in WEAK:
        decision = decide_correlation({attack: PASSES}, strong_suite=True)
        assert decision.verdict == INCONCLUSIVE
        assert decision.reason.startswith("no coefficient for ")
    assert _correlation(_reading((NAN, NAN, NAN), q=NAN), PASSES) == INCONCLUSIVE


def _gain(low: float, high: float, n: int = 4) -> Difference:
    return Difference(n, (low + high) / 2, low, high)


def _robustness(weak: Difference, worst: Difference | None = None, *, strong: bool = True) -> str:
    differences = dict.fromkeys(WEAK, weak) | (dict.fromkeys(WORST, worst) if worst else {})
    return decide_robustness(differences, strong_suite=strong).verdict


def test_robustness() -> None:
    gain, none, unknown = _gain(0.001, 0.01), _gain(-0.01, 0.019), _gain(-0.1, 0.1)
    assert _robustness(gain, gain) == SUPPORTED
    assert _robustness(gain, gain, strong=False) == _robustness(gain, none) == _robustness(gain) == WEAK_ONLY
    assert _robustness(none, none) == _robustness(none) == NOT_SUPPORTED
    assert _robustness(_gain(-0.01, 0.02)) == _robustness(unknown, none) == INCONCLUSIVE
    assert _robustness(none, gain) == INCONCLUSIVE
    assert _robustness(_gain(0.0, 0.1), gain) == INCONCLUSIVE


def test_robustness_with_few_pairs() -> None:
    gain = _gain(0.01, 0.02, n=3)
    assert _robustness(gain, gain) == SUPPORTED
    assert _robustness(_gain(0.01, 0.02, n=2), gain) == INCONCLUSIVE
    assert _robustness(gain, _gain(0.01, 0.02, n=2)) == WEAK_ONLY
    assert _robustness(_gain(NAN, NAN, n=1), gain) == INCONCLUSIVE


@pytest.mark.parametrize("attack", WEAK)
def test_robustness_needs_both_weak_attacks(attack: str) -> None:
    gain = _gain(0.01, 0.02)
    assert decide_robustness({attack: gain}, strong_suite=True).verdict == INCONCLUSIVE
    mixed = {**dict.fromkeys([*WEAK, *WORST], gain), attack: _gain(-0.01, 0.1)}
    assert decide_robustness(mixed, strong_suite=True).verdict == INCONCLUSIVE


def test_time() -> None:
    assert decide_time(0.9, 1.049).verdict == SUPPORTED
    assert decide_time(1.051, 1.2).verdict == NOT_SUPPORTED
    for interval in ((0.9, 1.05), (1.05, 1.2), (0.9, 1.2), (NAN, NAN)):
        assert decide_time(*interval).verdict == INCONCLUSIVE


@pytest.mark.parametrize(
    ("high", "settings", "p", "verdict"),
    [
        (0.49, 0.49, 0.05, SUPPORTED),
        (0.5, 0.0, 0.5, INCONCLUSIVE),
        (NAN, 0.0, 0.5, INCONCLUSIVE),
        (0.4, 0.5, 0.1, INCONCLUSIVE),
        (0.4, NAN, NAN, INCONCLUSIVE),
        (0.9, 0.8, 0.049, NOT_SUPPORTED),
        (0.6, 0.8, 0.049, NOT_SUPPORTED),  # the interval begins at 0
        (0.2, 0.8, 0.049, INCONCLUSIVE),  # over models the coefficient is negative
    ],
)
def test_clean_accuracy(high: float, settings: float, p: float, verdict: str) -> None:
    models = Correlation(24, 0.1 if math.isnan(high) else high - 0.3, high - 0.6, high, NAN, NAN)
    over_settings = Correlation(6, settings, NAN, NAN, NAN, p)
    decided = decide_clean(models, over_settings)
    assert decided.verdict == verdict
    holds_0 = "significantly positive by the order of the settings, though its interval holds 0"
    assert (holds_0 in decided.reason) == (verdict == NOT_SUPPORTED and high - 0.6 <= 0)
    assert decide_clean(Correlation(7, 0.1, -0.2, 0.4, 0.5, p), over_settings).verdict == INCONCLUSIVE
    assert decide_clean(models, Correlation(4, settings, NAN, NAN, NAN, p)).verdict == INCONCLUSIVE
    assert decide_clean(Correlation(24, NAN, NAN, NAN, NAN, NAN), over_settings).verdict == INCONCLUSIVE


def test_least_favourable() -> None:
    assert least_favourable([SUPPORTED, INCONCLUSIVE]) == SUPPORTED
    assert least_favourable([NOT_SUPPORTED, SUPPORTED, WEAK_ONLY]) == NOT_SUPPORTED
    assert least_favourable([WEAK_ONLY, SUPPORTED]) == WEAK_ONLY
    assert least_favourable([INCONCLUSIVE]) == least_favourable([]) == INCONCLUSIVE


@pytest.mark.parametrize(
    ("name", "before", "after", "words"),
    [
        ("PRIMARY_STATISTIC", '"nonlabel_var_log"', '"margin"', ["`margin`"]),
        ("PRIMARY_WEIGHT", "0.005", "0.007", ["weight 0.007"]),
        ("ALPHA", "0.05", "0.013", ["below 0.013"]),
        ("MIN_MODELS", "8", "88", ["88 models", "88 DR-softmax models"]),
        ("MIN_SETTINGS", "5", "55", ["55 settings", "55 weights"]),
        ("MIN_PAIRS", "3", "33", ["at least 33 pairs", "fewer than 33 pairs"]),
        ("MEANINGFUL_GAIN", "0.02", "0.09", ["below 9 points"]),
        ("MEANINGFUL_CORRELATION", "0.5", "0.61", ["±0.61", "before 0.61", "below 0.61"]),
        ("TIME_BUDGET", "1.05", "1.31", ["below 1.31", "contains 1.31"]),
    ],
)
def test_rules_follow_the_constants(
    name: str, before: str, after: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect.getsource(verdicts)
    assert source.count(f"\n{name} = {before}") == 1
    changed = ModuleType("drs.changed_verdicts")
    monkeypatch.setitem(sys.modules, changed.__name__, changed)
    exec(compile(source.replace(f"\n{name} = {before}", f"\n{name} = {after}"), "verdicts", "exec"), changed.__dict__)
    for part in words:
        assert part in " ".join(changed.RULES.split())
        assert part not in " ".join(RULES.split())
