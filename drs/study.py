"""A study's cells -> all its tables and its provenance."""

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from drs.cells import by_run
from drs.claims import decide_claims
from drs.comparators import comparator_table
from drs.config import EvaluateConfig, fingerprint
from drs.correlation import correlation_table
from drs.device import choose_device
from drs.evaluation import StudyEvaluation
from drs.files import sha256_of
from drs.granulated import granulated_table
from drs.paired import paired_difference_table
from drs.partial import partial_correlation_table
from drs.provenance import describe_study
from drs.runs import iterate_runs, write_json
from drs.tables import attack_times, build_tables, busy_seconds, training_times, write_tables
from drs.timing import COLUMNS as TIMING_COLUMNS
from drs.timing import update_timing

STAMP = "tables/.made-from.json"


def _made_from(evaluation: StudyEvaluation, config: EvaluateConfig) -> dict[str, str]:
    """Return what decides a study's tables: its cells, the states of its runs, the suite and this package's code."""
    code = {path.name: sha256_of(path) for path in sorted(Path(__file__).parent.rglob("*.py"))}
    states = {run.run_id: run.status() for run in iterate_runs(evaluation.folder)}
    # A file's size and time stand for its content here; the content itself is checked when it is read.
    cells = [(str(cell.path), cell.path.stat().st_size, cell.path.stat().st_mtime_ns) for cell in evaluation.cells]
    return {
        "cells": fingerprint(cells),
        "runs": fingerprint(states),
        "suite": fingerprint(asdict(config.suite)),
        "code": fingerprint(code),
        "timing": str(config.timing),
    }


def is_current(evaluation: StudyEvaluation, config: EvaluateConfig) -> bool:
    """Return whether tables and report were made from just these cells, settings and code."""
    stamp = evaluation.folder / STAMP
    if evaluation.computed or not stamp.exists() or not (evaluation.folder / "REPORT.md").exists():
        return False
    return bool(json.loads(stamp.read_text()) == _made_from(evaluation, config))


def mark_current(evaluation: StudyEvaluation, config: EvaluateConfig) -> None:
    """Record what tables and report were made from; the last thing that an evaluation writes."""
    write_json(evaluation.folder / STAMP, _made_from(evaluation, config))


def write_study(evaluation: StudyEvaluation, config: EvaluateConfig) -> None:
    """Write every table of a study and its ``provenance.json``.

    Raises:
        UserError: If an array file of a cell is damaged.
    """
    study = evaluation.folder
    (study / STAMP).unlink(missing_ok=True)
    device = choose_device(config.device)
    tables = build_tables(evaluation.cells, config.suite, study)
    trained = [planned[0].train for _, planned in by_run(evaluation.cells)]
    path = study / "tables" / "timing.csv"
    known = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=TIMING_COLUMNS)
    if config.timing:
        print("timing training steps of dr_softmax against cross-entropy", flush=True)
    tables["timing"] = update_timing(trained, known, device, measure=config.timing)
    print("correlations over models, and the claims", flush=True)
    models = tables["models"]
    tables["correlations"] = correlation_table(models)
    tables["partial_correlations"] = partial_correlation_table(models)
    tables["granulated"] = granulated_table(models)
    tables["paired_differences"] = paired_difference_table(models)
    tables["comparators"] = comparator_table(models, tables["accuracy"], tables["worst_case"])
    tables["claims"] = decide_claims(
        models,
        tables["correlations"],
        tables["timing"],
        tables["landing"],
        strong_suite=config.suite.strong,
        worst_case=tables["worst_case"],
        sanity=tables["sanity"],
    )
    write_tables(study, tables)
    train_seconds = busy_seconds(training_times(study))
    write_json(
        study / "provenance.json",
        describe_study(config, trained, train_seconds, busy_seconds(attack_times(evaluation.cells)), device),
    )
