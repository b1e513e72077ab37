"""What the cells of an evaluation are expected to cost, to tell how much of it is done and how long the rest takes."""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from drs.array_files import load_arrays_file
from drs.attack_config import ConvergenceConfig, SanityConfig
from drs.cells import LOGIT_BATCH, Cell
from drs.data_cache import DATASETS
from drs.errors import DamagedFileError

FORWARD = 0.4
"""Cost of a forward pass as a share of one with its gradient."""
AROUND = 3 * FORWARD
"""Cost of what an attack is wrapped in: predictions before and after it, and the checks of its images."""
CALL_IMAGES = {"cpu": 20}
"""A call of a model costs as much again as so many images, measured on MNIST's LeNet with one thread."""
CALL_IMAGES_DEFAULT = 500
"""The same on an accelerator, which computes a small batch in the time of one image."""
SEARCHES = 10
"""Balls in which FMN looks for its start, about."""
FALLING = 0.7
"""Share of its steps that an attack takes that leaves alone what has fallen, on all images."""
STANDING = 0.5
"""Share of its images that an attack on what is left standing is expected to see, until that is known."""
MOST_MEASURED = 5
"""Cells of one attack, data set and architecture whose seconds are read; more would tell no more."""

Kind = tuple[str, str, str]


def kind_of(cell: Cell) -> Kind:
    """Return what the cells share whose seconds stand for each other: attack and bound, data set, architecture."""
    return cell.title, cell.train.data.name, str(cell.train.model)


def images_of(cell: Cell) -> int:
    """Return how many images a cell is about."""
    return DATASETS[cell.train.data.name].n_test if cell.n is None else cell.n


def model_calls(cell: Cell) -> float:
    """Return how often a cell calls the model with each of its batches, in passes with gradient, by its config."""
    config = cell.config
    if config is None:
        return FORWARD
    others = cell.train.data.num_classes - 1
    if isinstance(config, SanityConfig):
        # See drs.attacks.probes: a climb on each target and as many on each of two objectives, ten others of which one
        # has twice the steps and one twice the restarts, and one without restarts.
        return FALLING * config.steps * (config.restarts * (3 * others + 12) + 1)
    if isinstance(config, ConvergenceConfig):
        return FALLING * config.steps * config.restarts * 5
    if config.kind == "noise":
        return FORWARD * _product(config, "draws")
    if config.kind == "square":
        return FORWARD * _product(config, "n_queries", "restarts")
    if config.kind == "hop_skip_jump":
        return FORWARD * _hop_skip_jump_queries(config)
    if config.kind in ("fmn", "fmn_from_start"):
        # The starts of later targets leave out the small balls, and count as none.
        return _product(config, "steps", "targets") + SEARCHES * float(getattr(config, "start_steps", 0))
    climbs = others if config.kind in ("apgd_t", "fab_t", "fab") else 1.0
    if config.kind == "projected":
        climbs = sum(others if name.startswith("targeted") else 1 for name in cell.objectives)
        climbs *= 1.0 if cell.after else FALLING
    searches = len(getattr(config, "step_sizes", "1"))
    return climbs * searches * _product(config, "steps", "restarts", "binary_search_steps", "targets")


def _product(config: Any, *names: str) -> float:
    return math.prod(getattr(config, name, 1) for name in names)


def _hop_skip_jump_queries(config: Any) -> float:
    """Return queries per image: at each step those for a gradient, which grow with its root, and a bisection."""
    first, most = config.initial_gradient_eval_steps, config.max_gradient_eval_steps
    return sum(min(first * math.sqrt(step + 1), most) + 25 for step in range(config.steps))


def plain_cost(cell: Cell, device: str, attacked: int = 0) -> float:
    """Return a cell's cost by its config alone, in passes with gradient of one image.

    Args:
        cell: The cell.
        device: Type of the device, ``cpu`` say.
        attacked: How many of its images are attacked, 0 where that is not known yet.
    """
    expected = images_of(cell)
    if cell.after:
        expected = round(STANDING * expected)
    images = attacked or expected
    batches = math.ceil(images / (LOGIT_BATCH if cell.config is None else cell.batch_size))
    calls = model_calls(cell) + (AROUND if cell.is_attack else 0.0)
    return calls * (images + batches * CALL_IMAGES.get(device, CALL_IMAGES_DEFAULT))


def recorded_seconds(path: Path) -> float | None:
    """Return how long a cell's computation took by its own file; None where that cannot be read."""
    with suppress(DamagedFileError, ValueError, KeyError, TypeError):
        seconds = float(json.loads(str(load_arrays_file(path)["about"]))["seconds"])
        return seconds if math.isfinite(seconds) and seconds > 0 else None
    return None


class CellCosts:
    """The expected costs of some cells, in seconds as soon as one of their kinds was measured.

    A cell costs the mean of what was measured of its kind. Of a kind that was not, it costs ``plain_cost``, at the
    seconds per unit of what was measured.

    Args:
        cells: The cells.
        device: Type of the device that computes them.
    """

    def __init__(self, cells: Sequence[Cell], device: str) -> None:
        self.cells = cells
        self.device = device
        kinds = [kind_of(cell) for cell in cells]
        self._places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
        self._kind = np.array([self._places[kind] for kind in kinds], dtype=np.int64)
        self._count = np.zeros(len(self._places))
        self._seconds = np.zeros(len(self._places))
        self._plain = np.array([plain_cost(cell, device) for cell in cells])
        self._attacked = np.zeros(len(cells), dtype=np.int64)

    @property
    def in_seconds(self) -> bool:
        """Whether anything was measured."""
        return bool(self._count.any())

    def learn(self, cells: Iterable[Cell]) -> None:
        """Read the seconds of finished cells, as far as they say something about these."""
        for cell in cells:
            place = self._places.get(kind_of(cell))
            if place is not None and self._count[place] < MOST_MEASURED:
                seconds = recorded_seconds(cell.path)
                if seconds is not None:
                    self._count[place] += 1
                    self._seconds[place] += seconds

    def expected(self, attacked: np.ndarray) -> np.ndarray:
        """Return the cost ``[C]`` of each cell, with ``attacked`` ``[C]`` of its images (0: not known yet)."""
        for place in np.flatnonzero(attacked != self._attacked).tolist():
            self._plain[place] = plain_cost(self.cells[place], self.device, int(attacked[place]))
        self._attacked = attacked.astype(np.int64)
        known = self._count[self._kind] > 0
        if not known.any():
            return self._plain.copy()
        mean = (self._seconds / np.maximum(self._count, 1))[self._kind]
        return np.where(known, mean, self._plain * (mean[known].sum() / self._plain[known].sum()))
