"""Numbers and tables as Markdown that renders right."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

NONE = "–"


def escape(text: object) -> str:
    """Write any text as one line that Markdown shows as it is, inside a table cell too; nothing is an empty string."""
    if text is None or (isinstance(text, float) and np.isnan(text)):
        return ""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\|*`]|\](?=[\[(:])|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)  # elsewhere [ ] and _ are harmless
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, align: str = "lr") -> str:
    """Return a Markdown table.

    Args:
        headers: Column names.
        rows: Cells that are Markdown already (see ``escape``).
        align: ``l`` or ``r`` for each column; the last letter serves all further columns.

    Raises:
        ValueError: If a row has another number of cells than the header.
    """
    letters = align.ljust(len(headers), align[-1])
    rules = ["---" if letters[i] == "l" else "---:" for i in range(len(headers))]
    lines = [headers, rules, *rows]
    if any(len(line) != len(headers) for line in lines):
        raise ValueError("a row has another number of cells than the header")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fixed(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """Write a number with a fixed number of decimals and a real minus sign; a dash for NaN."""
    if pd.isna(value):
        return NONE
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(share: float, digits: int = 1, *, sign: bool = False) -> str:
    """Write a share in 0..1 as a number of per cent, without the sign %."""
    return fixed(100 * share, digits, sign=sign)


def significant(value: float, digits: int = 3) -> str:
    """Write a number with significant digits, never in exponent notation; a dash for NaN."""
    if pd.isna(value):
        return NONE
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    return fixed(value, max(0, digits - 1 - int(np.floor(np.log10(abs(value))))))


def probability(value: float) -> str:
    """Write a p- or q-value with three decimals, ``< 0.001`` below that."""
    if pd.isna(value):
        return NONE
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def interval(low: str, high: str) -> str:
    """Write an interval of two numbers that are already text; nothing if one is missing."""
    return "" if NONE in (low, high) else f" [{low}, {high}]"


def mean_sd(values: "pd.Series[float]", *, scale: float = 1.0, digits: int | None = 1) -> str:
    """Write ``mean ± sd`` (n - 1) of the values there are; the mean alone for one value, a dash for none.

    Args:
        values: Any number of values, NaN left out; an infinite one is counted instead of averaged.
        scale: Factor, 100 for per cent.
        digits: Decimals; None for three significant digits.
    """
    present = values.dropna() * scale
    if present.empty:
        return NONE
    if np.isinf(present).any():  # a minimal norm that an attack did not find has no mean
        return f"∞ in {int(np.isinf(present).sum())} of {len(present)}"
    write = significant if digits is None else lambda value: fixed(value, digits)
    mean = write(float(present.mean()))
    if len(present) == 1:
        return mean
    if digits is None:  # the spread is written to the decimals of the mean
        decimals = len(mean.partition(".")[2])
        return f"{mean} ± {fixed(float(present.std()), decimals)}"
    return f"{mean} ± {write(float(present.std()))}"


def whole(value: float) -> str:
    """Write a count; a dash for NaN."""
    return NONE if pd.isna(value) else f"{int(value)}"


def group_name(data: object, model: object) -> str:
    """Write a (data, model) pair as ``mnist/lenet``; ``pooled`` and ``all`` stand for themselves."""
    return escape(data if data == model else f"{data}/{model}")


def model_count(row: Any) -> str:
    """Write how many models a coefficient is of, and of how many settings; tables of before did not count these."""
    settings = getattr(row, "n_settings", row.n_models)
    return f"{row.n_models}" + (f" in {int(settings)} settings" if settings != row.n_models else "")
