"""The arrays of one model -> its accuracies: under every attack at every epsilon, and the worst case per sample."""

import functools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from drs.attack_config import NORMS, AttackConfig
from drs.attacks import is_bounded
from drs.cells import CLEAN, Cell, standing_at
from drs.config import TrainConfig, loss_label, loss_weight
from drs.image_outcomes import COMPARED, DECISIVE_PGD, outcome_rows
from drs.minimal_norms import median_norm, smallest_name, smallest_outcome
from drs.statistics import STATISTICS, softmax_statistics
from drs.suite_config import UNBOUNDED, Epsilon, SuiteConfig, decisive_epsilons, decisive_samples, suite_epsilons

CHANCE_FACTOR = 2.0
"""A model whose clean accuracy is below this multiple of chance has learned nothing and is kept out of claims."""
SMALL_PERTURBATION = ("cw", "fmn_linf", "fmn_l2", "hop_skip_jump")
"""Attacks that succeed at any size on all but broken models, so that their rows without a bound say nothing."""


@dataclass(frozen=True)
class ModelReading:
    """What one model's arrays say.

    Attributes:
        row: Its row of models.csv.
        accuracy: Rows of accuracy.csv.
        worst: Rows of worst_case.csv, one per norm and decisive epsilon.
        outcomes: Rows of image_outcomes.csv.
    """

    row: dict[str, Any]
    accuracy: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    outcomes: list[dict[str, Any]]


def describe(run_id: str, config: TrainConfig) -> dict[str, Any]:
    """Return the columns that name a model in every table."""
    return {
        "run_id": run_id,
        "data": config.data.name,
        "model": config.model.name,
        "loss": loss_label(config),
        "loss_weight": loss_weight(config.loss),
        "seed": config.seed,
    }


def read_model(
    named: dict[str, Any], planned: list[Cell], arrays: dict[Path, dict[str, np.ndarray]], suite: SuiteConfig
) -> ModelReading:
    """Reduce one model's arrays.

    Args:
        named: The columns that name the model.
        planned: Its cells, the clean one first.
        arrays: What they hold.
        suite: The suite they belong to.
    """
    clean = arrays[planned[0].path]
    data = planned[0].train.data.name
    correct = clean["logits"].argmax(1) == clean["labels"]
    rows = [_accuracy_row(CLEAN, "linf", Epsilon(0.0, "0"), correct, correct)]
    norms: dict[str, float] = {}
    standing: dict[tuple[str, Epsilon], dict[str, np.ndarray]] = defaultdict(dict)
    by_attack: dict[str, list[np.ndarray]] = defaultdict(list)
    for cell in planned[1:]:
        if not isinstance(cell.config, AttackConfig):
            continue
        found, norm = arrays[cell.path], cell.config.norm
        bounds = [cell.epsilon]
        if not is_bounded(cell.config):
            norms[cell.attack] = median_norm(found)
            choose = decisive_epsilons if cell.config.decisive else suite_epsilons
            bounds = [*choose(suite, data, norm), UNBOUNDED]
        for epsilon in bounds:
            stands = standing_at(found, epsilon.value)
            if not (math.isinf(epsilon.value) and cell.attack in SMALL_PERTURBATION):
                rows.append(_accuracy_row(cell.attack, norm, epsilon, stands, correct, cumulative=bool(cell.after)))
            if math.isfinite(epsilon.value):
                standing[norm, epsilon][cell.attack] = stands
                by_attack[f"{cell.attack}@mean"].append(stands)
    worst = []
    for norm in NORMS:
        smallest = smallest_outcome(planned, arrays, norm)
        if smallest is not None:
            norms[smallest_name(norm)] = median_norm(smallest)
        for epsilon in decisive_epsilons(suite, data, norm):
            found_standing = standing.get((norm, epsilon), {})
            if not found_standing:
                continue
            n = _shared(found_standing, decisive_samples(suite, data), strong=suite.strong)
            least = worst_case(list(found_standing.values()), n)
            rows.append(_accuracy_row(f"worst_{norm}", norm, epsilon, least, correct))
            by_attack[f"worst_{norm}@mean"].append(least)
            pgd = math.nan
            if "pgd" in found_standing:
                pgd = float(found_standing["pgd"][:n].mean())
                by_attack[DECISIVE_PGD].append(found_standing["pgd"][:n])  # PGD is in Linf
            worst.append({
                "norm": norm, "epsilon": epsilon.value, "epsilon_label": epsilon.label, "n": n,
                "clean": float(correct[:n].mean()), "pgd": pgd, "worst": float(least.mean()),
            })  # fmt: skip
    compared = {name: by_attack[name] for name in (*COMPARED, DECISIVE_PGD) if name in by_attack}
    return ModelReading(_model_row(named, clean, correct, rows, norms), rows, worst, outcome_rows(compared))


def _shared(standing: dict[str, np.ndarray], wanted: int, *, strong: bool) -> int:
    """Return over how many samples a worst case is taken.

    Without the strong suite: those that every attack saw. With it: all decisive samples; an attack on a subset adds
    what it finds there, so a worst case can only be too high, never too low.
    """
    lengths = [len(item) for item in standing.values()]
    return min(wanted, max(lengths)) if strong else min(lengths)


def worst_case(lists: list[np.ndarray], n: int) -> np.ndarray:
    """Return which of the first n samples stand against every attack that saw them.

    Attacks on a subset take the first samples of the same fixed order.
    """
    result = np.ones(n, dtype=bool)
    for item in lists:
        count = min(n, len(item))
        result[:count] &= item[:count]
    return result


def _model_row(
    named: dict[str, Any],
    clean: dict[str, np.ndarray],
    correct: np.ndarray,
    rows: list[dict[str, Any]],
    norms: dict[str, float],
) -> dict[str, Any]:
    clean_accuracy = float(correct.mean())
    chance = 1 / clean["logits"].shape[1]
    row: dict[str, Any] = {**named, "clean_accuracy": clean_accuracy, "train_seconds": math.nan}
    row |= {"n_clean": len(correct), "n_attacked": max((item["n"] for item in rows[1:]), default=0)}
    statistics = softmax_statistics(torch.from_numpy(clean["logits"]), torch.from_numpy(clean["labels"]).long())
    row |= {f"stat.{name}": float(statistics[name].mean()) for name in STATISTICS}
    means: dict[str, list[float]] = defaultdict(list)
    for item in rows[1:]:
        row[f"acc.{item['attack']}@{item['epsilon_label']}"] = item["robust_accuracy"]
        if math.isfinite(item["epsilon"]):
            means[item["attack"]].append(item["robust_accuracy"])
    row |= {f"acc.{attack}@mean": float(np.mean(values)) for attack, values in means.items()}
    row |= {f"norm.{attack}": value for attack, value in norms.items()}
    row["excluded"] = "near chance on clean data" if clean_accuracy < CHANCE_FACTOR * chance else ""
    return row


@functools.lru_cache(maxsize=65536)
def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share; scipy tests a hypothesis besides, which took half the time of a study."""
    interval = binomtest(right, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _accuracy_row(
    attack: str, norm: str, epsilon: Epsilon, robust: np.ndarray, correct: np.ndarray, *, cumulative: bool = False
) -> dict[str, Any]:
    """Return a row of accuracy.csv of the first n samples, of which ``correct`` says how the model has them clean."""
    same = correct[: len(robust)]
    low, high = wilson(int(robust.sum()), len(robust))
    return {
        "attack": attack,
        "norm": norm,
        "epsilon": epsilon.value,
        "epsilon_label": epsilon.label,
        "n": len(robust),
        "robust_accuracy": float(robust.mean()),
        "ci_low": low,  # over images, Wilson 1927
        "ci_high": high,
        "cumulative": cumulative,
        "clean": float(same.mean()) if len(same) == len(robust) else math.nan,
    }
