"""Figures -> the words in which the claims table gives its evidence."""

import math
from collections.abc import Iterable, Sequence

from drs.correlation import Correlation


def number(value: float, digits: int = 2) -> str:
    """Write a number with a fixed number of decimals, and zero without a sign."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def enumerated(names: Sequence[str]) -> str:
    """Write names as a list: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def probability(value: float) -> str:
    """Write a p or q with its relation: ``= 0.012``, ``< 0.001``."""
    return "unknown" if math.isnan(value) else "< 0.001" if value < 0.001 else f"= {value:.3f}"


def with_interval(
    effect: float, low: float, high: float, *, digits: int = 2, scale: float = 1.0, sign: bool = False
) -> str:
    """Write an effect with its interval, all times ``scale``; ``sign`` puts a plus before a positive effect."""
    text = number(effect * scale, digits)
    if sign and float(text) > 0:
        text = f"+{text}"
    if math.isnan(low) or math.isnan(high):
        return f"{text} (no interval)"
    return f"{text} [{number(low * scale, digits)}, {number(high * scale, digits)}]"


def coefficient(correlation: Correlation | None) -> str:
    """Write a coefficient with its interval."""
    if correlation is None or math.isnan(correlation.coefficient):
        return "no coefficient"
    return with_interval(correlation.coefficient, correlation.ci_low, correlation.ci_high)


def coefficient_with_p(correlation: Correlation) -> str:
    """Write a coefficient with its two-sided p."""
    if math.isnan(correlation.coefficient):
        return "no coefficient"
    return f"{number(correlation.coefficient)} (p {probability(correlation.p_value)})"


def sentences(parts: Iterable[str]) -> str:
    """Join the parts that are not empty, each as a sentence."""
    return " ".join(part[0].upper() + part[1:] + "." for part in parts if part)
