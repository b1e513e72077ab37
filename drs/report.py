"""A study's tables -> its figures and REPORT.md. Reads ``tables/*.csv`` and ``provenance.json``; computes no result."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from drs import report_checks, report_losses, report_norms, report_statistics, report_tables, report_text
from drs.errors import UserError
from drs.figure_plan import KINDS, PlannedFigure, Tables, plan_figures
from drs.figure_style import STYLE
from drs.files import atomic_write
from drs.markdown import escape
from drs.marks import MARK_NOTE, correlated_note, has_failed, mark_failed_checks
from drs.verdicts import RULES

_KEYS = ["data", "model", "loss", "loss_weight"]
_RUN = ["run_id", *_KEYS, "seed"]
# The columns that drawing and writing rely on, so that a missing or empty table still has them.
COLUMNS = {
    "models": [*_RUN, "clean_accuracy", "train_seconds", "images_seen", "n_clean", "n_attacked", "excluded"],
    "accuracy": [
        *_RUN, "attack", "norm", "epsilon", "epsilon_label", "n", "robust_accuracy", "excluded", "cumulative",
        "clean",
    ],
    "softmax_profile": [*_KEYS, "rank", "q25", "median", "q75", "n"],
    "landing": [
        *_RUN, "attack", "epsilon_label", "n_flips", "runner_up_rate", "chance", "matrix_correlation", "excluded",
    ],
    "landing_matrices": [*_KEYS, "attack", "epsilon_label", "kind", "true_class", "other_class", "value"],
    "training": [*_RUN, "epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "excluded"],
    "failures": [*_RUN, "reason", "epoch"],
    "timing": [
        *_KEYS, "baseline", "batch_size", "n_pairs", "baseline_ms", "loss_ms", "ratio", "ci_low", "ci_high", "device",
    ],
    "paired_differences": [*_KEYS, "baseline", "attack", "n_pairs", "difference", "ci_low", "ci_high"],
    "correlations": [
        "data", "model", "statistic", "attack", "method", "n_models", "coefficient", "ci_low", "ci_high", "p_value",
        "q_value",
    ],
    "worst_case": [*_RUN, "norm", "epsilon", "epsilon_label", "n", "clean", "pgd", "worst", "excluded"],
    "sanity": [*_RUN, "check", "figure", "threshold", "passed", "n", "excluded"],
    "comparators": [*_KEYS, "n_seeds"],
    "partial_correlations": ["data", "model", "statistic", "attack", "controls", "n_models", "coefficient"],
    "granulated": ["data", "model", "statistic", "attack", "axis", "n_models", "n_pairs", "coefficient"],
    "sample_correlations": [*_RUN, "attack", "statistic", "n", "n_not_found", "coefficient", "excluded"],
    "minimal_norms": [
        *_RUN, "attack", "epsilon_label", "n", "median", "median_smallest", "n_fixed", "n_missed", "excluded",
    ],
    "claims": ["claim", "statement", "verdict", "effect", "ci_low", "ci_high", "n", "evidence", "data", "model"],
}  # fmt: skip
FIGURES_A_WORKER = 6
"""Fewer are drawn before another process has started."""
_TEXT = ("run_id", "data", "model", "loss", "attack", "norm", "epsilon_label", "excluded", "reason", "device")


def read_tables(study_dir: str | Path) -> Tables:
    """Read every table of a study; a missing or empty one (except ``models``) comes back with no rows.

    Raises:
        UserError: If the study has no table of models, or a table lacks a column that this module relies on.
    """
    folder = Path(study_dir) / "tables"
    if not (folder / "models.csv").is_file():
        raise UserError(f"{study_dir} has no tables/models.csv; evaluate a study first: scripts/evaluate.py study=NAME")
    tables: Tables = {}
    for name, columns in COLUMNS.items():
        path = folder / f"{name}.csv"
        if not path.is_file() or path.stat().st_size == 0:
            tables[name] = pd.DataFrame({column: [] for column in columns})
            continue
        # An epsilon label 0.1 or a run_id 12e4 is a name, not a number.
        table = pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str))
        missing = [column for column in columns if column not in table]
        if missing:
            raise UserError(f"{path} lacks the column {missing[0]!r}; evaluate the study again to rebuild its tables")
        if table.empty and name == "models":
            raise UserError(f"{path} holds no model; train and evaluate one first")
        tables[name] = table
    return mark_failed_checks(tables)


def draw_figures(study_dir: str | Path, kind: str | None = None, workers: int = 1) -> list[Path]:
    """Draw a study's figures as PNG and PDF into ``<study_dir>/figures`` and remove those of earlier runs.

    Args:
        study_dir: Folder that holds ``tables/``; nothing else is read.
        kind: One of ``KINDS`` to draw (and clean up) only that kind.
        workers: How many processes draw, at most: one starts for every ``FIGURES_A_WORKER`` figures.

    Returns:
        The files written, PNG before PDF, in the order of the report.

    Raises:
        UserError: If the study has no tables.
        ValueError: If ``kind`` is not one of ``KINDS``.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    folder = Path(study_dir) / "figures"
    names = [figure.name for figure in plan_figures(read_tables(study_dir)) if kind in (None, figure.kind)]
    workers = min(workers, max(1, len(names) // FIGURES_A_WORKER))
    # Neighbours take about as long as each other: every worker gets some of each kind.
    parts = [names[index::workers] for index in range(workers)]
    if workers == 1:
        drawn = [_draw_named(Path(study_dir), names)]
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            drawn = list(pool.map(_draw_named, repeat(Path(study_dir)), parts))
    # A file's name ends before its last point; a figure's own name may hold points.
    order = {name: position for position, name in enumerate(names)}
    written = sorted((path for paths in drawn for path in paths), key=lambda path: order[path.stem])
    for path in sorted(folder.glob("*.p[nd][gf]")):
        if path.stem.split("-")[0] in (KINDS if kind is None else (kind,)) and path not in written:
            path.unlink()
    return written


def _draw_named(study_dir: Path, names: list[str]) -> list[Path]:
    plan = [figure for figure in plan_figures(read_tables(study_dir)) if figure.name in names]
    return [path for figure in plan for path in save_figure(figure.draw(), study_dir / "figures", figure.name)]


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and as PDF, in the house style; return the two files."""
    # The canvases are called directly: Figure.savefig draws a figure with a layout engine once more for each file.
    figure.dpi = STYLE["savefig.dpi"]
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    with matplotlib.rc_context(STYLE), atomic_write(png) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
    figure.set_layout_engine("none")  # the layout found for the PNG serves the PDF
    with matplotlib.rc_context(STYLE), atomic_write(pdf) as temporary:
        # A date in the file would make every redraw a change.
        FigureCanvasPdf(figure).print_pdf(temporary, metadata={"CreationDate": None})
    return [png, pdf]


def read_provenance(study_dir: str | Path) -> dict[str, Any]:
    """Read ``provenance.json``, or return nothing if there is none.

    Raises:
        UserError: If the file is not a JSON object.
    """
    path = Path(study_dir) / "provenance.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); evaluate the study again to rebuild it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _embedded(study_dir: Path, plan: list[PlannedFigure], kinds: tuple[str, ...]) -> list[str]:
    parts = []
    for number, figure in enumerate(plan, start=1):
        if figure.kind in kinds and (study_dir / "figures" / f"{figure.name}.png").is_file():
            image = f"![{escape(figure.title)}](figures/{quote(figure.name)}.png)"
            parts.append(f"{image}\n\n*Figure {number}. {escape(figure.caption)}*")
    return parts


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Its heading.
        body: Its text and tables, in Markdown.
        kinds: The kinds of figures that follow, of ``KINDS``.
    """

    title: str
    body: str
    kinds: tuple[str, ...] = ()


def _with_note(body: str, note: str) -> str:
    """Return a section with a note under its tables, where it has any."""
    return f"{body}\n\n{note}" if note and "|" in body else body


def report_sections(tables: Tables, provenance: dict[str, Any]) -> list[Section]:
    """Return the parts of a study's report, in order."""
    strong = "strong" in provenance.get("suites", [])
    note = escape(correlated_note(tables["models"]))
    return [
        Section("Claims", report_text.claims_section(tables["claims"]), ("summary",)),
        Section("How the verdicts are decided", f"{RULES.strip()}\n\n{report_text.STRENGTHENED}"),
        Section("Models", report_tables.models_section(tables["models"], tables["accuracy"])),
        Section("Failed and excluded models", report_text.failures_section(tables["failures"], tables["models"])),
        Section(
            "Correlations",
            _with_note(report_tables.correlations_section(tables["correlations"]), note),
            ("statistic_vs_accuracy", "correlation_heatmap", "nonlabel_distribution"),
        ),
        Section(
            "Partial correlations",
            _with_note(report_statistics.partial_section(tables["partial_correlations"]), note),
        ),
        Section(
            "Granulated coefficients",
            _with_note(report_statistics.granulated_section(tables["granulated"]), note),
        ),
        Section(
            "Statistics and minimal perturbations, sample by sample",
            report_statistics.sample_correlation_section(tables["sample_correlations"]),
        ),
        Section("Minimal norms, and whether they converged", report_norms.norms_section(tables["minimal_norms"])),
        Section("Robust accuracy", report_tables.accuracy_section(tables["accuracy"]), ("epsilon_curves",)),
        Section("Sanity checks", report_checks.sanity_section(tables["sanity"])),
        Section(
            "How much of the gain is masking",
            report_checks.masking_section(tables["comparators"]),
            ("masking_gap",),
        ),
        Section(
            "All losses and procedures",
            report_losses.comparator_section(tables["comparators"], tables["accuracy"]),
            ("robustness_against_time",),
        ),
        Section(
            "Differences to cross-entropy",
            report_tables.differences_section(tables["paired_differences"], tables["accuracy"]),
        ),
        Section(
            "Where attacks land",
            report_tables.landing_section(tables["landing"], tables["landing_matrices"]),
            ("where_attacks_land",),
        ),
        Section("Training and its time", report_tables.timing_section(tables["timing"]), ("training_curves",)),
        Section("Attacks and how they are scored", report_text.scoring_section(provenance, tables)),
        Section("Limits of this study", report_text.limits_section(tables, strong)),
        Section("Provenance", report_text.provenance_section(provenance)),
    ]


def write_report(study_dir: str | Path, sections: list[Section] | None = None) -> Path:
    """Write ``<study_dir>/REPORT.md`` from the study's tables, its figures and its provenance.

    Args:
        study_dir: The study's folder.
        sections: What ``report_sections`` returns for it, where that is at hand: it takes seconds for a large study.

    Returns:
        The path of the report.

    Raises:
        UserError: If the study has no tables or its provenance cannot be read.
    """
    study_dir = Path(study_dir)
    tables, provenance = read_tables(study_dir), read_provenance(study_dir)
    strong = "strong" in provenance.get("suites", [])
    name = provenance.get("study") or study_dir.resolve().name
    plan = plan_figures(tables)
    text = [f"# {escape(name)}: does the softmax distribution explain robustness?", report_text.summary(tables, strong)]
    if has_failed(tables["models"]).any():
        text.append(MARK_NOTE)
    for section in sections or report_sections(tables, provenance):
        text += [f"## {section.title}", section.body, *_embedded(study_dir, plan, section.kinds)]
    path = study_dir / "REPORT.md"
    with atomic_write(path) as temporary:
        temporary.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return path
