"""Rows of a benchmark -> bench.csv and REPORT.md."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd

from drs.benchmarks.harness import Row
from drs.errors import UserError
from drs.files import atomic_write
from drs.markdown import escape, significant, table

TITLES = {
    "loss": "The loss",
    "training": "Training",
    "attacks": "Attacks",
    "strong": "The strong suite",
    "sweeps": "Sweeps",
    "startup": "Start-up",
    "memory": "Memory",
    "growth": "Growth with images, classes and models",
    "gpu_loss": "The loss on a GPU",
    "gpu_attacks": "Attacks on a GPU",
    "gpu_step": "A training step on a GPU",
    "gpu_packing": "A few small trainings on a GPU",
    "gpu_lenets": "Many small trainings on a GPU",
    "gpu_strong": "The strong suite on a GPU",
    "gpu_speedrun": "CIFAR-10 to 94 % on a GPU",
    "gpu_sharing": "Several trainings on one GPU",
    "gpu_studies": "Whole studies on a GPU",
}
COLUMNS = [item.name for item in fields(Row)]
REQUIRED = [item.name for item in fields(Row) if item.default is MISSING]


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of ``bench.csv``, none where there is no such file.

    Raises:
        UserError: If it has other columns.
    """
    path = folder / "bench.csv"
    if not path.exists():
        return []
    frame = pd.read_csv(path, keep_default_na=True)
    if set(REQUIRED) - set(frame.columns):
        raise UserError(f"{path}: has not the columns {', '.join(REQUIRED)}; delete it, or move it away")
    numbers = ("ours_median", "theirs_median", "ratio", "low", "high", "least")
    rows = []
    for record in frame.to_dict("records"):
        values: dict[str, Any] = {name: record[name] for name in COLUMNS if name in frame.columns}
        for name, value in values.items():
            if pd.isna(value):
                values[name] = None if name in numbers else ""
        values["tried"], values["held"] = bool(values.get("tried")), bool(values.get("held", True))
        rows.append(Row(**values))
    return rows


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return where and when each section was measured, by its name; nothing where there is no such file.

    Raises:
        UserError: If the file is not a JSON object.
    """
    path = folder / "provenance.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and {folder / 'bench.csv'}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; delete it and {folder / 'bench.csv'}")
    return content


def write_rows(folder: Path, rows: Sequence[Row], provenance: dict[str, Any]) -> None:
    """Write ``bench.csv``, ``provenance.json`` (by section) and ``REPORT.md``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame([{**asdict(row), "verdict": row.verdict} for row in rows], columns=[*COLUMNS, "verdict"])
    with atomic_write(folder / "bench.csv") as temporary:
        frame.to_csv(temporary, index=False)
    with atomic_write(folder / "provenance.json") as temporary:
        temporary.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    with atomic_write(folder / "REPORT.md") as temporary:
        temporary.write_text(report_text(rows, provenance), encoding="utf-8")


def report_text(rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    """Return the report: per section where it was measured, a table of ratios, then floors and notes."""
    counts = pd.Series([row.verdict for row in rows if row.target]).value_counts()
    lines = [
        "# Benchmarks",
        "",
        "A ratio is one of medians over repeats that are run in turn; in brackets its 95 % bootstrap interval over the "
        "repeats. The floor is what no implementation can do without on this machine, in the unit of the medians: for "
        "a time the least, for a rate the most. Made by `make bench`; `make bench ONLY=loss` makes one section anew "
        "and keeps the others.",
        "",
        "Targets: " + (", ".join(f"{number} {verdict}" for verdict, number in counts.items()) or "none") + ".",
    ]
    for section, title in TITLES.items():
        chosen = [row for row in rows if row.section == section]
        if chosen:
            lines += ["", f"## {title}", "", _measured_on(provenance.get(section))]
            for heading, part in (
                ("", [row for row in chosen if not row.tried]),
                ("What was tried", [row for row in chosen if row.tried]),
            ):
                if part:
                    lines += ["", *([f"### {heading}", ""] if heading else []), _table(part), *_notes(part)]
            missed = [row for row in chosen if row.verdict == "missed"]
            if missed:
                lines += ["", "### Missed, and why", ""]
                lines += dict.fromkeys(
                    f"- {escape(row.case)}, {escape(row.ours)}: {significant(row.ratio)} where "  # type: ignore[arg-type]
                    f"{escape(row.target)} is wanted. {escape(row.reason) or 'The reason is not known.'}"
                    for row in missed
                )
    return "\n".join(lines) + "\n"


def _measured_on(content: dict[str, Any] | None) -> str:
    if content is None:
        return "It is not recorded where this was measured."
    hardware, machine = content["hardware"], content["machine"]
    cuda = f" with CUDA {hardware['cuda']}" if "cuda" in hardware else ""
    where = " on the card" if cuda else ""
    return (
        f"Measured on {content['created'][:10]} at commit `{content['commit'][:12]}`"
        f"{' with changes' if content['dirty'] else ''}: {hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['memory_gib']} GiB, GPU: {hardware['gpu']}{cuda}; {machine['gigaflops']:.3g} GFLOP/s multiplying "
        f"float32 matrices, {machine['gigabytes']:.3g} GB/s copying{where}; "
        + ", ".join(f"{name} {version}" for name, version in content["versions"].items())
        + "."
        + ("" if content.get("finished", True) else " **Stopped before its last row.**")
    )


def _table(rows: Sequence[Row]) -> str:
    headers = [
        "case", "measured", "against", "unit", "median", "median of the other", "floor", "median / floor", "ratio",
        "target", "verdict", "repeats", "on",
    ]  # fmt: skip
    cells = []
    for row in rows:
        ratio = "not measured"
        if row.ratio is not None and row.low is not None and row.high is not None:
            ratio = significant(row.ratio)
            if row.low != row.high:
                ratio += f" ({significant(row.low)} to {significant(row.high)})"
        device = f"{row.device}, {row.threads} threads" if row.device == "cpu" and row.threads > 1 else row.device
        cells.append([
            escape(row.case), escape(row.ours), escape(row.theirs), row.unit, _number(row.ours_median),
            _number(row.theirs_median), _number(row.least), _number(_distance(row)), ratio, escape(row.target),
            _verdict(row), str(row.repeats), device,
        ])  # fmt: skip
    return table(headers, cells, align="llllrrrrrllrl")


def _verdict(row: Row) -> str:
    return row.verdict if row.verdict != "met" or row.is_certain else "met, but not by the whole interval"


def _distance(row: Row) -> float | None:
    """Return how many times the floor the median is; below 1 for a rate, whose floor is the most that can be."""
    return row.ours_median / row.least if row.ours_median is not None and row.least else None


def _number(value: float | None) -> str:
    return "" if value is None else significant(value)


def _notes(rows: Sequence[Row]) -> list[str]:
    lines = [f"- {escape(row.case)}, {escape(row.ours)}: {escape(text)}." for row in rows for text in _told(row)]
    return ["", *dict.fromkeys(lines)] if lines else []


def _told(row: Row) -> list[str]:
    return [text for text in (f"floor: {row.floor}" if row.floor else "", row.note) if text]
