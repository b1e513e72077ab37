"""Every finished run of a study x every attack of a suite -> per-sample arrays, one file a cell.

A cell is one run under one attack at one epsilon (an attack without a bound has one cell). Its file name carries a
fingerprint of all that decides its content, so a changed setting makes a new cell and an unchanged one is kept.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from drs.attack_config import UNBOUNDED, AttackConfig, Epsilon, SuiteConfig, suite_epsilons, suite_samples
from drs.attacks import build_attack, run_attack
from drs.attacks.contract import predict
from drs.config import DataConfig, EvaluateConfig, TrainConfig, fingerprint, identity, project_path
from drs.data import LabelledImages, load_test_split
from drs.device import choose_device
from drs.errors import UserError
from drs.runs import RunFolder, finished_runs, save_arrays, study_folder

CLEAN = "clean"
LOGIT_BATCH = 1000


@dataclass(frozen=True)
class Cell:
    """One evaluation of one run.

    Attributes:
        attack: The name that tables show; ``clean`` for no attack.
        config: None for ``clean``.
        epsilon: Infinite for an attack without a bound.
        n: Test samples, the first n of the fixed order; None for all.
        path: Where its arrays are.
    """

    run: RunFolder
    train: TrainConfig
    attack: str
    config: AttackConfig | None
    epsilon: Epsilon
    n: int | None
    batch_size: int
    path: Path

    @property
    def title(self) -> str:
        """The cell's attack and bound, for progress output."""
        return (
            self.attack
            if math.isinf(self.epsilon.value) or self.config is None
            else f"{self.attack}@{self.epsilon.label}"
        )


def is_bounded(config: AttackConfig) -> bool:
    """Return whether an attack takes an epsilon, so that each epsilon is a cell of its own."""
    return build_attack(config).bounded


def plan_cells(run: RunFolder, suite: SuiteConfig) -> list[Cell]:
    """Return the cells of one run: clean first, then each attack of the suite at each epsilon of its norm.

    Raises:
        UserError: If the suite has no epsilons for the run's data.
    """
    config = run.config()
    # A network is a function of its weights alone here, so the run's id stands for it.
    cells = [_cell(run, config, CLEAN, None, UNBOUNDED, suite.n_clean, LOGIT_BATCH)]
    for name, attack in suite.attacks.items():
        epsilons = suite_epsilons(suite, config.data.name, attack.norm)
        wanted = suite_samples(suite, config.data.name)
        n = min(wanted, attack.n_samples or wanted)
        for epsilon in epsilons if is_bounded(attack) else [UNBOUNDED]:
            cells.append(_cell(run, config, name, attack, epsilon, n, suite.batch_size))
    return cells


def _cell(
    run: RunFolder,
    train: TrainConfig,
    name: str,
    attack: AttackConfig | None,
    epsilon: Epsilon,
    n: int | None,
    batch_size: int,
) -> Cell:
    content: dict[str, Any] = {"data": identity(train)["data"]["name"], "n": n}
    if attack is not None:
        settings = {key: value for key, value in asdict(attack).items() if key != "n_samples"}
        content |= {"attack": settings, "epsilon": str(epsilon.value), "batch_size": batch_size}
    label = "" if math.isinf(epsilon.value) else "@" + epsilon.label.replace("/", "_")
    path = run.path / "eval" / f"{name}{label}-{fingerprint(content, 8)}.npz"
    return Cell(run, train, name, attack, epsilon, n, batch_size, path)


@functools.lru_cache(maxsize=2)
def _cached_test_split(
    name: str, n: int | None, root: str | None, cache: str, device: torch.device
) -> tuple[LabelledImages, np.ndarray]:
    return load_test_split(name, n=n, root=root, cache=cache, device=device)


def load_test(config: DataConfig, n: int | None, device: torch.device) -> tuple[LabelledImages, np.ndarray]:
    """Return the first ``n`` test samples of a data config in the fixed order, and their sample ids."""
    data, indices = _cached_test_split(config.name, None, config.root, str(project_path(config.cache)), device)
    if n is None:
        return data, indices
    if n > len(data):
        raise UserError(f"suite.n_samples.{config.name}={n}: the test set has {len(data)} samples")
    return LabelledImages(data.images[:n], data.labels[:n]), indices[:n]


@torch.no_grad()
def clean_logits(model: nn.Module, data: LabelledImages, source: str) -> torch.Tensor:
    """Return float32 logits ``[N, K]`` on the CPU; ``UserError`` where one is not finite."""
    parts = [predict(model, data.pixels(part), source).cpu() for part in torch.arange(len(data)).split(LOGIT_BATCH)]
    return torch.cat(parts)


def fill_cell(
    cell: Cell, model: nn.Module, device: torch.device, on_batch: Callable[[int], None] | None = None
) -> float:
    """Compute a cell and write its arrays; return the seconds it took.

    The arrays: ``indices`` (sample ids), ``labels``, ``logits`` (of the adversarial images; of the clean one where
    the model is wrong already), ``distance`` (norm of the perturbation, pixel units) and ``about`` (JSON).
    """
    data, indices = load_test(cell.train.data, cell.n, device)
    source = f"run {cell.run.run_id}"
    began = time.perf_counter()
    if cell.config is None:
        logits, distance = clean_logits(model, data, source), torch.zeros(len(data), dtype=torch.float64)
    else:
        try:
            outcome = run_attack(
                build_attack(cell.config), model, data.pixels(), data.labels, epsilon=cell.epsilon.value,
                batch_size=cell.batch_size, seed=cell.config.seed, on_batch=on_batch,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"{source}, {cell.title}: {error}") from None
        logits, distance = outcome.logits, outcome.distance
    seconds = time.perf_counter() - began
    about = {
        "attack": cell.attack,
        "config": asdict(cell.config) if cell.config is not None else None,
        "epsilon_label": cell.epsilon.label,
        "seconds": seconds,
        "device": device.type,
        "torch": torch.__version__,
    }
    save_arrays(
        cell.path,
        indices=indices.astype(np.int32),
        labels=data.labels.cpu().numpy().astype(np.int16),
        logits=logits.numpy(),
        distance=distance.numpy(),
        about=np.array(json.dumps(about)),
    )
    return seconds


@dataclass(frozen=True)
class StudyEvaluation:
    """What ``evaluate_study`` did: all cells of the study, and how many of them were computed now."""

    folder: Path
    cells: list[Cell]
    computed: int


def evaluate_study(config: EvaluateConfig) -> StudyEvaluation:
    """Attack every finished run of a study with every attack of the suite; only missing cells are computed.

    Raises:
        UserError: For a study without finished runs, a damaged checkpoint, a broken model or a broken attack. What
            was finished before it stays.
    """
    study = study_folder(config.results_dir, config.study)
    runs = finished_runs(study)
    device = choose_device(config.device)
    cells = {run.run_id: plan_cells(run, config.suite) for run in runs}
    missing = {name: [cell for cell in planned if not cell.path.exists()] for name, planned in cells.items()}
    total = sum(len(planned) for planned in missing.values())
    print(
        f"{config.study}: {len(runs)} finished runs, {sum(map(len, cells.values()))} cells, {total} to compute",
        flush=True,
    )
    began = time.perf_counter()
    todo = [(run, missing[run.run_id]) for run in runs if missing[run.run_id]]
    with _bar(total, config.progress) as bar:
        for position, (run, planned) in enumerate(todo, 1):
            started = time.perf_counter()
            model = run.load_model(device)
            for cell in planned:
                bar.set_postfix_str(
                    f"run {position}/{len(todo)} {cell.train.data.name} {cell.train.loss.name} {cell.title}"
                )
                fill_cell(cell, model, device)
                bar.update()
            if config.progress and bar.disable:
                now = time.perf_counter()
                left = (now - began) / position * (len(todo) - position)
                print(
                    f"evaluated run {position}/{len(todo)} ({now - started:.0f} s), about {left:.0f} s left", flush=True
                )
    return StudyEvaluation(study, [cell for planned in cells.values() for cell in planned], total)


def _bar(total: int, enabled: bool) -> "tqdm[Any]":
    terminal = enabled and sys.stderr.isatty()
    layout = "attacks {percentage:3.0f}%|{bar}| {n}/{total} {elapsed}<{remaining}{postfix}"
    return tqdm(total=total, disable=not terminal, dynamic_ncols=True, leave=False, bar_format=layout)


def by_run(cells: list[Cell]) -> Iterator[tuple[RunFolder, list[Cell]]]:
    """Group the cells of a study by run, in order."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.run.run_id, []).append(cell)
    for planned in groups.values():
        yield planned[0].run, planned
