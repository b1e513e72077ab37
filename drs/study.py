"""A study's cells -> all its tables and its provenance."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from drs.cells import by_run
from drs.claiming import ClaimedElsewhere, claim
from drs.claims import decide_claims
from drs.comparators import comparator_table
from drs.config import EvaluateConfig, fingerprint
from drs.correlation import correlation_table
from drs.device import choose_device
from drs.errors import DamagedFileError, UserError
from drs.evaluation import POLL_SECONDS, StudyEvaluation, redo_damaged
from drs.evaluation_workers import MAX_WORKERS, available_cores, worker_pool
from drs.files import remove_leftovers
from drs.granulated import granulated_table
from drs.paired import paired_difference_table
from drs.partial import partial_correlation_table
from drs.provenance import describe_study
from drs.reduction import code_fingerprint
from drs.runs import iterate_runs, write_json
from drs.tables import attack_times, build_tables, busy_seconds, halved_batches, training_times, write_tables
from drs.timing import COLUMNS as TIMING_COLUMNS
from drs.timing import update_timing

STAMP = "tables/.made-from.json"
COEFFICIENTS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "granulated": granulated_table,
    "correlations": correlation_table,
    "partial_correlations": partial_correlation_table,
}
"""How each table of coefficients is made, the longest first."""
SPREAD_MODELS = 400  # more than these are worth starting processes for


@contextmanager
def only_writer(study: Path) -> Iterator[None]:
    """Hold the claim on a study's tables, figures and report; wait while another evaluation writes them."""
    said = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(claim(study / "tables" / ".claim", f"the tables of {study.name}"))
                break
            except ClaimedElsewhere as error:
                if not said:
                    print(f"waiting: {error}", flush=True)
                said = True
                time.sleep(POLL_SECONDS)
        for folder in (study, study / "tables", study / "figures"):
            remove_leftovers(folder)
        yield


def _made_from(evaluation: StudyEvaluation, config: EvaluateConfig) -> dict[str, str]:
    """Return what decides a study's tables: its cells, the states of its runs, the suite and this package's code."""
    failures = {failure.run.run_id: failure.error for failure in evaluation.failures}
    states = {
        run.run_id: failures.get(run.run_id) or run.status() for run in iterate_runs(evaluation.folder)
    }  # fmt: skip
    # A file's size and time stand for its content here; the content itself is checked when it is read.
    cells = [(str(cell.path), cell.path.stat().st_size, cell.path.stat().st_mtime_ns) for cell in evaluation.cells]
    return {
        "cells": fingerprint(cells),
        "runs": fingerprint(states),
        "suite": fingerprint(asdict(config.suite)),
        "code": code_fingerprint(),
        "timing": str(config.timing),
    }


def is_current(evaluation: StudyEvaluation, config: EvaluateConfig) -> bool:
    """Return whether tables and report were made from just these cells, settings and code."""
    stamp = evaluation.folder / STAMP
    if not all((evaluation.folder / name).exists() for name in (STAMP, "REPORT.md", "report.html")):
        return False
    try:
        recorded = json.loads(stamp.read_bytes())
    except ValueError:  # damaged, so it vouches for nothing
        return False
    return bool(recorded == _made_from(evaluation, config))


def mark_current(evaluation: StudyEvaluation, config: EvaluateConfig) -> None:
    """Record what tables and report were made from; the last thing that an evaluation writes."""
    write_json(evaluation.folder / STAMP, _made_from(evaluation, config))


def _coefficients(models: pd.DataFrame, workers: int) -> dict[str, pd.DataFrame]:
    """Return the tables of coefficients over models, which for many models are made in several processes."""
    if workers == 1 or len(models) <= SPREAD_MODELS:
        return {name: make(models) for name, make in COEFFICIENTS.items()}
    with worker_pool(min(workers, len(COEFFICIENTS))) as pool:
        made = {name: pool.submit(make, models) for name, make in COEFFICIENTS.items()}
        return {name: table.result() for name, table in made.items()}


def write_study(evaluation: StudyEvaluation, config: EvaluateConfig) -> StudyEvaluation:
    """Write every table of a study and its ``provenance.json``.

    Returns:
        The evaluation, or the one that followed where cells were damaged and had to be computed again.

    Raises:
        UserError: If a file is damaged again after that, or cannot be written.
    """
    workers = config.workers or min(available_cores(), MAX_WORKERS)

    def reduced(found: StudyEvaluation) -> tuple[dict[str, pd.DataFrame], dict[Path, dict[str, Any]]]:
        return build_tables(found.cells, config.suite, found.folder, found.failures, workers)

    try:
        tables, abouts = reduced(evaluation)
    except DamagedFileError:
        evaluation = redo_damaged(evaluation, config)
        if not evaluation.cells:
            raise UserError(
                f"study={config.study}: no run could be evaluated: {evaluation.failures[0].error}"
            ) from None
        tables, abouts = reduced(evaluation)
    study = evaluation.folder
    (study / STAMP).unlink(missing_ok=True)
    device = choose_device(config.device)
    trained = [planned[0].train for _, planned in by_run(evaluation.cells)]
    path = study / "tables" / "timing.csv"
    known = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=TIMING_COLUMNS)
    if config.timing:
        print("timing training steps of each loss and procedure against cross-entropy's", flush=True)
    tables["timing"] = update_timing(trained, known, device, measure=config.timing)
    print("correlations over models, and the claims", flush=True)
    models, outcomes = tables["models"], tables["image_outcomes"]
    tables |= _coefficients(models, workers)
    tables["paired_differences"] = paired_difference_table(models, outcomes)
    tables["comparators"] = comparator_table(models, tables["accuracy"], tables["worst_case"], outcomes)
    tables["claims"] = decide_claims(
        models,
        tables["correlations"],
        tables["timing"],
        tables["landing"],
        strong_suite=config.suite.strong,
        worst_case=tables["worst_case"],
        sanity=tables["sanity"],
        minimal_norms=tables["minimal_norms"],
        outcomes=outcomes,
    )
    write_tables(study, tables)
    train_seconds = busy_seconds(training_times(study))
    provenance = describe_study(config, trained, train_seconds, busy_seconds(attack_times(abouts)), device)
    if halved := halved_batches(abouts):
        provenance["batches_halved"] = halved
    write_json(study / "provenance.json", provenance)
    return evaluation
