"""Per-sample arrays of a study -> its tables. A reduction keeps the number of samples beside its result."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from drs.attack_config import UNBOUNDED, Epsilon, SuiteConfig, suite_epsilons
from drs.config import TrainConfig, loss_weight
from drs.evaluation import CLEAN, Cell, by_run, is_bounded
from drs.files import atomic_write
from drs.landing import landing_row, mean_matrices
from drs.runs import iterate_runs, load_arrays_file
from drs.statistics import STATISTICS, softmax_statistics
from drs.verdicts import PRIMARY_LOSS, PRIMARY_WEIGHT

CHANCE_FACTOR = 2.0
"""A model whose clean accuracy is below this multiple of chance has learned nothing and is kept out of claims."""


def describe(run_id: str, config: TrainConfig) -> dict[str, Any]:
    """Return the columns that name a model in every table."""
    return {
        "run_id": run_id,
        "data": config.data.name,
        "model": config.model.name,
        "loss": config.loss.name,
        "loss_weight": loss_weight(config.loss),
        "seed": config.seed,
    }


def column(attack: str, epsilon: Epsilon) -> str:
    """Return the name of an accuracy column without its ``acc.`` prefix, ``pgd@8/255`` say."""
    return f"{attack}@{epsilon.label}"


def build_tables(cells: list[Cell], suite: SuiteConfig, study: Path) -> dict[str, pd.DataFrame]:
    """Reduce a study's arrays to its tables, all but the correlations, differences and claims.

    Args:
        cells: Every cell of the study, computed.
        suite: The suite they belong to.
        study: The study's folder, for training metrics and failed runs.
    """
    models, accuracy, landing, training = [], [], [], []
    profiles: dict[tuple[Any, ...], list[np.ndarray]] = defaultdict(list)
    matrices: dict[tuple[Any, ...], list[np.ndarray]] = defaultdict(list)
    for run, planned in by_run(cells):
        config = planned[0].train
        arrays = {cell.path: load_arrays_file(cell.path) for cell in planned}
        named = describe(run.run_id, config)
        clean = arrays[planned[0].path]
        row, rows = _model_rows(named, planned, arrays, suite)
        row["train_seconds"] = run.status().get("train_seconds", math.nan)
        models.append(row)
        accuracy += [{**named, **item, "excluded": row["excluded"]} for item in rows]
        profiles[_group(named)].append(_nonlabel_sorted(clean))
        for cell in planned[1:]:
            item, pair = landing_row(clean, arrays[cell.path])
            label = cell.epsilon.label
            landing.append(
                {**named, "attack": cell.attack, "epsilon_label": label, **item, "excluded": row["excluded"]}
            )
            if not row["excluded"] and _has_matrices(cell, suite):
                matrices[(*_group(named), cell.attack, label)].append(pair)
        metrics = pd.read_csv(run.path / "metrics.csv")
        training.append(metrics.assign(**named))
    failures = pd.DataFrame(_failures(study), columns=[*_NAMES, "reason", "epoch"])
    return {
        "models": _ordered(pd.DataFrame(models)),
        "accuracy": _ordered(pd.DataFrame(accuracy)),
        "softmax_profile": pd.DataFrame(_profile_rows(profiles)),
        "landing": _ordered(pd.DataFrame(landing)),
        "landing_matrices": mean_matrices(_one_weight(matrices)),
        "training": _ordered(pd.concat(training, ignore_index=True)),
        "failures": failures,
    }


_NAMES = ["run_id", "data", "model", "loss", "loss_weight", "seed"]


def _group(named: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(named[key] for key in ("data", "model", "loss", "loss_weight"))


def _has_matrices(cell: Cell, suite: SuiteConfig) -> bool:
    """Whole matrices are kept for one attack, PGD at the middle epsilon: many flips, and not yet all."""
    if cell.config is None or cell.config.kind != "pgd":
        return False
    bounds = suite_epsilons(suite, cell.train.data.name, cell.config.norm)
    return cell.epsilon == bounds[len(bounds) // 2]


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


def _model_rows(
    named: dict[str, Any], planned: list[Cell], arrays: dict[Path, dict[str, np.ndarray]], suite: SuiteConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    clean = arrays[planned[0].path]
    correct = clean["logits"].argmax(1) == clean["labels"]
    clean_accuracy = float(correct.mean())
    chance = 1 / clean["logits"].shape[1]
    excluded = "near chance on clean data" if clean_accuracy < CHANCE_FACTOR * chance else ""
    rows = [_accuracy_row(CLEAN, "linf", Epsilon(0.0, "0"), correct)]
    norms: dict[str, float] = {}
    standing: dict[tuple[str, Epsilon], list[np.ndarray]] = defaultdict(list)
    data = planned[0].train.data.name
    for cell in planned[1:]:
        assert cell.config is not None
        found = arrays[cell.path]
        right = found["logits"].argmax(1) == found["labels"]
        if is_bounded(cell.config):
            verdicts = {cell.epsilon: right}
        else:
            # Samples that the model gets wrong already need no perturbation: their distance is 0.
            minimal = np.where(right, math.inf, found["distance"])
            norms[cell.attack] = float(np.median(minimal))
            bounds = suite_epsilons(suite, data, cell.config.norm)
            verdicts = {epsilon: minimal > epsilon.value for epsilon in bounds} | {UNBOUNDED: right}
        for epsilon, robust in verdicts.items():
            if not (math.isinf(epsilon.value) and cell.attack == "cw"):
                rows.append(_accuracy_row(cell.attack, cell.config.norm, epsilon, robust))
            standing[(cell.config.norm, epsilon)].append(robust)
    for (norm, epsilon), lists in standing.items():
        if math.isfinite(epsilon.value):
            rows.append(_accuracy_row(f"worst_{norm}", norm, epsilon, _worst(lists)))
    means: dict[str, list[float]] = defaultdict(list)
    row: dict[str, Any] = {**named, "clean_accuracy": clean_accuracy, "train_seconds": math.nan}
    row |= {"n_clean": len(correct), "n_attacked": max((item["n"] for item in rows[1:]), default=0)}
    statistics = softmax_statistics(torch.from_numpy(clean["logits"]), torch.from_numpy(clean["labels"]).long())
    row |= {f"stat.{name}": float(statistics[name].mean()) for name in STATISTICS}
    for item in rows[1:]:
        row[f"acc.{item['attack']}@{item['epsilon_label']}"] = item["robust_accuracy"]
        if math.isfinite(item["epsilon"]):
            means[item["attack"]].append(item["robust_accuracy"])
    row |= {f"acc.{attack}@mean": float(np.mean(values)) for attack, values in means.items()}
    row |= {f"norm.{attack}": value for attack, value in norms.items()}
    row["excluded"] = excluded
    return row, rows


def _worst(lists: list[np.ndarray]) -> np.ndarray:
    """Standing against every attack, sample by sample, over the samples that all of them attacked.

    Attacks on a subset take the first samples of the same fixed order, so the shortest list is common to all.
    """
    shared = min(len(item) for item in lists)
    return np.logical_and.reduce([item[:shared] for item in lists])


def _accuracy_row(attack: str, norm: str, epsilon: Epsilon, robust: np.ndarray) -> dict[str, Any]:
    return {
        "attack": attack,
        "norm": norm,
        "epsilon": epsilon.value,
        "epsilon_label": epsilon.label,
        "n": len(robust),
        "robust_accuracy": float(robust.mean()),
    }


def _nonlabel_sorted(clean: dict[str, np.ndarray]) -> np.ndarray:
    """Return the non-label softmax values of each sample, largest first, ``[N, K-1]``."""
    probabilities = torch.from_numpy(clean["logits"]).double().softmax(1).numpy()
    count, classes = probabilities.shape
    others = probabilities[np.arange(classes) != clean["labels"][:, None]].reshape(count, classes - 1)
    return -np.sort(-others, axis=1)


def _profile_rows(profiles: dict[tuple[Any, ...], list[np.ndarray]]) -> list[dict[str, Any]]:
    rows = []
    for key, parts in sorted(profiles.items()):
        low, median, high = np.quantile(np.concatenate(parts), [0.25, 0.5, 0.75], axis=0)
        count = sum(len(part) for part in parts)
        for rank in range(len(median)):
            named = dict(zip(("data", "model", "loss", "loss_weight"), key, strict=True))
            rows.append(
                {**named, "rank": rank + 1, "q25": low[rank], "median": median[rank], "q75": high[rank], "n": count}
            )
    return rows


def _failures(study: Path) -> list[dict[str, Any]]:
    rows = []
    for run in iterate_runs(study):
        status = run.status()
        if status.get("state") == "failed":
            rows.append(
                {**describe(run.run_id, run.config()), "reason": status.get("reason"), "epoch": status.get("epoch")}
            )
    return rows


def attack_seconds(cells: list[Cell]) -> float:
    """Return the seconds that the attacks of a study took, as recorded in its cells."""
    total = 0.0
    for cell in cells:
        total += json.loads(str(load_arrays_file(cell.path)["about"]))["seconds"]
    return total


def write_tables(study: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Write each table to ``tables/<name>.csv`` of the study, whole or not at all."""
    for name, table in tables.items():
        with atomic_write(study / "tables" / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
