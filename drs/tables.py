"""Per-sample arrays of a study -> its tables. A reduction keeps the number of samples beside its result."""

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from drs.cells import Cell, by_run
from drs.config import TrainConfig, procedure_name
from drs.data import training_images
from drs.errors import DamagedFileError, UserError
from drs.files import atomic_write
from drs.landing import mean_matrices
from drs.marks import mark_failed_checks
from drs.model_rows import describe
from drs.run_failures import RunFailure
from drs.runs import RunFolder, iterate_runs
from drs.sanity import failed_checks
from drs.setting_reduction import reduce_settings
from drs.suite_config import SuiteConfig
from drs.verdicts import PRIMARY_LOSS, PRIMARY_WEIGHT


def build_tables(
    cells: list[Cell], suite: SuiteConfig, study: Path, failures: Sequence[RunFailure] = (), workers: int = 1
) -> tuple[dict[str, pd.DataFrame], dict[Path, dict[str, Any]]]:
    """Reduce a study's arrays to its tables, all but the correlations, differences and claims.

    Args:
        cells: Every cell of the study, computed.
        suite: The suite they belong to.
        study: The study's folder, for training metrics and runs without a model.
        failures: Finished runs that could not be evaluated.
        workers: How many processes may read the arrays, where there are many.

    Returns:
        The tables by name, and what each cell says about itself, by its path.

    Raises:
        DamagedFileError: If the file of a cell is not what was written.
    """
    abouts: dict[Path, dict[str, Any]] = {}
    models, accuracy, worst, sanity, landing, samples, norms, training = [], [], [], [], [], [], [], []
    outcomes: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []
    matrices: dict[tuple[Any, ...], list[np.ndarray]] = defaultdict(list)
    named_runs = [(describe(run.run_id, planned[0].train), run, planned) for run, planned in by_run(cells)]
    named_runs.sort(key=lambda item: _group(item[0]))
    settings = [list(members) for _, members in groupby(named_runs, key=lambda item: _group(item[0]))]
    reductions = reduce_settings([[planned for *_, planned in setting] for setting in settings], suite, workers)
    for setting, together in zip(settings, reductions, strict=True):
        profiles += [{**_setting_names(setting[0][0]), **row} for row in together.profile]
        for (named, run, planned), reduced in zip(setting, together.runs, strict=True):
            config = planned[0].train
            abouts |= {cell.path: reduced.abouts[cell.path.name] for cell in planned}
            state = {"excluded": reduced.row["excluded"]}
            failed = {"failed_checks": failed_checks(reduced.sanity)}
            procedure = {"procedure": procedure_name(config)}
            train_seconds = {"train_seconds": run.status().get("train_seconds", math.nan)}
            seen = {"images_seen": config.epochs * training_images(config.data)}
            models.append({**reduced.row, **train_seconds, **seen, **procedure, **failed, **state})
            accuracy += [{**named, **item, **state} for item in reduced.accuracy]
            worst += [{**named, **procedure, **item, **state, **failed} for item in reduced.worst]
            outcomes += [{**named, **item, **state} for item in reduced.outcomes]
            sanity += [{**named, **item, **state} for item in reduced.sanity]
            landing += [{**named, **item, **state} for item in reduced.landing]
            samples += [{**named, **item, **state} for item in reduced.samples]
            norms += [{**named, **item, **state} for item in reduced.norms]
            for attack, label, pair in reduced.matrices:
                matrices[(*_group(named), attack, label)].append(np.array(pair, dtype=float))
            training.append(pd.read_csv(run.path / "metrics.csv").assign(**named, **state))
    missing = pd.DataFrame(_missing_models(study, failures), columns=[*_NAMES, "reason", "epoch"])
    tables = {
        "models": _ordered(pd.DataFrame(models)),
        "accuracy": _ordered(pd.DataFrame(accuracy)),
        "worst_case": _ordered(pd.DataFrame(worst, columns=WORST_COLUMNS)),
        "image_outcomes": _ordered(pd.DataFrame(outcomes, columns=OUTCOME_COLUMNS)),
        "sanity": _ordered(pd.DataFrame(sanity, columns=SANITY_COLUMNS)),
        "sample_correlations": _ordered(pd.DataFrame(samples, columns=None if samples else SAMPLE_COLUMNS)),
        "minimal_norms": _ordered(pd.DataFrame(norms, columns=NORM_COLUMNS)),
        "softmax_profile": pd.DataFrame(profiles),
        "landing": _ordered(pd.DataFrame(landing)),
        "landing_matrices": mean_matrices(_one_weight(matrices)),
        "training": _ordered(pd.concat(training, ignore_index=True)),
        "failures": missing,
    }
    return tables, abouts


_NAMES = ["run_id", "data", "model", "loss", "loss_weight", "seed"]
WORST_COLUMNS = [
    *_NAMES, "procedure", "norm", "epsilon", "epsilon_label", "n", "clean", "pgd", "worst", "excluded",
    "failed_checks",
]  # fmt: skip
OUTCOME_COLUMNS = [*_NAMES, "attack", "n", "n_epsilons", "standing", "excluded"]
SANITY_COLUMNS = [
    *_NAMES, "check", "figure", "ci_low", "ci_high", "threshold", "passed", "n", "epsilon_label", "detail", "excluded",
]  # fmt: skip


NORM_COLUMNS = [
    *_NAMES, "attack", "norm", "epsilon", "epsilon_label", "n", "median", "median_smallest", "n_fixed", "n_missed",
    "missed", "excluded",
]  # fmt: skip
SAMPLE_COLUMNS = [*_NAMES, "attack", "statistic", "n", "n_not_found", "coefficient", "excluded"]
"""Of a study without an attack that looks for the smallest perturbation; others have intervals besides."""


def _setting_names(named: dict[str, Any]) -> dict[str, Any]:
    return {key: named[key] for key in ("data", "model", "loss", "loss_weight")}


def _group(named: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(_setting_names(named).values())


def _one_weight(matrices: dict[tuple[Any, ...], list[np.ndarray]]) -> dict[tuple[Any, ...], list[np.ndarray]]:
    """Keep cross-entropy and, per data set and architecture, the dr_softmax weight nearest to the primary one."""
    chosen = {}
    for data, model in {key[:2] for key in matrices}:
        weights = {key[3] for key in matrices if key[:3] == (data, model, PRIMARY_LOSS) and key[3] > 0}
        if weights:
            chosen[data, model] = min(weights, key=lambda weight: abs(math.log(weight / PRIMARY_WEIGHT)))
    return {
        key: stack
        for key, stack in matrices.items()
        if key[2] == "ce" or (key[2] == PRIMARY_LOSS and key[3] == chosen.get(key[:2]))
    }


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    table = table[[*_NAMES, *(name for name in table.columns if name not in _NAMES)]]
    return table.sort_values(["data", "model", "loss", "loss_weight", "seed"], kind="stable").reset_index(drop=True)


def _missing_models(study: Path, failures: Sequence[RunFailure]) -> list[dict[str, Any]]:
    """Return a row for each run that is no model of any table, with the reason."""
    unevaluated = {failure.run: failure for failure in failures}
    rows = []
    for run in iterate_runs(study):
        if run in unevaluated:
            failure = unevaluated[run]
            rows.append({**_name(run, failure.config), "reason": f"not evaluated: {failure.error}"})
            continue
        status = run.status()
        state, reason = status.get("state"), status.get("reason")
        if state == "failed" and status.get("error"):
            reason = f"{reason}: {str(status['error']).strip().splitlines()[-1]}"
        elif state != "failed":
            reason = f"not finished ({state})"
        if state != "done":
            rows.append({**_name(run, None), "reason": reason, "epoch": status.get("epoch")})
    return rows


def _name(run: RunFolder, config: TrainConfig | None) -> dict[str, Any]:
    """Describe a run without a model; of one whose config cannot be read only the id is known."""
    try:
        return describe(run.run_id, config or run.config())
    except UserError:
        return {"run_id": run.run_id}


def training_times(study: Path) -> list[tuple[float, float]]:
    """Return when each finished run of a study began and ended, in seconds since the epoch."""
    times = []
    for run in iterate_runs(study):
        with suppress(DamagedFileError):  # listed with the runs that are no models
            status = run.status()
            if status.get("state") == "done":
                times.append((status["started"], status["finished"]))
    return times


def attack_times(abouts: dict[Path, dict[str, Any]]) -> list[tuple[float, float]]:
    """Return when each cell began and ended, from the seconds that it recorded and the time of its file."""
    ends = {path: path.stat().st_mtime for path in abouts}
    return [(ended - abouts[path]["seconds"], ended) for path, ended in ends.items()]


def halved_batches(abouts: dict[Path, dict[str, Any]]) -> dict[str, str]:
    """Return which cells were computed in smaller batches because a GPU's memory ran out, with the sizes."""
    return {
        f"{path.parent.parent.name} {about['attack']}@{about['epsilon_label']}":
            f"{about['batch_halved']['from']} to {about['batch_halved']['to']}"
        for path, about in abouts.items()
        if "batch_halved" in about
    }  # fmt: skip


def busy_seconds(times: list[tuple[float, float]]) -> float:
    """Return how long at least one of some intervals ran: side by side they count once, and pauses not at all."""
    total, until = 0.0, -math.inf
    for began, ended in sorted(times):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def write_tables(study: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Write each table to ``tables/<name>.csv`` of the study, whole or not at all.

    A row of one model or of one setting says which sanity checks fail (``drs.marks.mark_failed_checks``).
    """
    for name, table in mark_failed_checks(tables).items():
        with atomic_write(study / "tables" / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
