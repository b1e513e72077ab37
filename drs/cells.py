"""The cells of an evaluation: one run under one attack at one epsilon, and the file that holds its arrays.

An attack without a bound has one cell. A cell's file name carries a fingerprint of all that decides its content, so a
changed setting makes a new cell and an unchanged one is kept.
"""

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from drs.array_files import load_arrays_file
from drs.attack_config import (
    SLACK,
    AttackConfig,
    ConvergenceConfig,
    HopSkipJumpConfig,
    ProjectedConfig,
    SanityConfig,
    TransferConfig,
    is_bounded,
)
from drs.config import TrainConfig, fingerprint, identity, loss_label
from drs.data_cache import DATASETS
from drs.errors import DamagedFileError
from drs.integrity import CHECKPOINT
from drs.runs import RunFolder
from drs.suite_config import (
    UNBOUNDED,
    Epsilon,
    SuiteConfig,
    check_enough_clean,
    decisive_epsilons,
    decisive_samples,
    suite_epsilons,
    suite_samples,
)

CLEAN = "clean"
SANITY = "sanity"
CONVERGENCE = "convergence"
LOGIT_BATCH = 1000


@dataclass(frozen=True)
class Cell:
    """One evaluation of one run.

    Attributes:
        attack: The name that tables show; ``clean`` for no attack, ``sanity`` and ``convergence`` for the checks.
        config: None for ``clean``.
        epsilon: Infinite for an attack without a bound.
        n: Test samples, the first n of the fixed order; None for all.
        path: Where its arrays are.
        objectives: What an adaptive attack climbs on this run.
        source: The run that a transfer attack is made on.
        after: The cells before it whose fallen samples it leaves alone.
        fast_search: Whether its attack searches on the model's stand-in.
        replay: Whether its attack replays passes of the model on a card.
    """

    run: RunFolder
    train: TrainConfig
    attack: str
    config: AttackConfig | SanityConfig | ConvergenceConfig | None
    epsilon: Epsilon
    n: int | None
    batch_size: int
    path: Path
    objectives: tuple[str, ...] = ()
    source: RunFolder | None = None
    after: "tuple[Cell, ...]" = ()
    fast_search: bool = False
    replay: bool = False

    @property
    def title(self) -> str:
        """The cell's attack and bound, for progress output."""
        bounded = self.config is not None and math.isfinite(self.epsilon.value)
        return f"{self.attack}@{self.epsilon.label}" if bounded else self.attack

    @property
    def is_attack(self) -> bool:
        """Whether this is an attack, rather than the clean images or the sanity checks."""
        return isinstance(self.config, AttackConfig)

    @property
    def is_divisible(self) -> bool:
        """Whether its batches may be computed apart from each other; the clean images and most checks are one."""
        return isinstance(self.config, AttackConfig | ConvergenceConfig)


def standing_at(arrays: dict[str, np.ndarray], epsilon: float) -> np.ndarray:
    """Return which samples ``[n]`` a cell's attack leaves standing at ``epsilon`` (pixel units; infinite for any).

    A sample stands if it is classified right, or if the perturbation that fools the model is larger than epsilon.
    """
    right = arrays["logits"].argmax(1) == arrays["labels"]
    standing: np.ndarray = right | (arrays["distance"] > epsilon + SLACK)
    return standing


def plan_study(suite: SuiteConfig, configs: Mapping[RunFolder, TrainConfig]) -> dict[RunFolder, list[Cell]]:
    """Return the cells of every run of a study, as ``plan_cells`` does; each run is compared with those it may need."""
    sources = {run: config for run, config in configs.items() if loss_label(config) == "ce"}
    return {run: plan_cells(run, suite, {**sources, run: config}) for run, config in configs.items()}


def plan_cells(run: RunFolder, suite: SuiteConfig, configs: Mapping[RunFolder, TrainConfig]) -> list[Cell]:
    """Return the cells of one run: clean, then each attack at each of its epsilons, then the sanity checks.

    Args:
        run: A finished run.
        suite: The attacks.
        configs: All finished runs of the study with their configs, this one included. Among them a transfer attack
            looks for its source; a run without a source has no such cell.

    Raises:
        UserError: If the suite has no epsilons for the run's data.
    """
    train = configs[run]
    data = train.data.name
    check_enough_clean(suite, data)
    # A network is a function of its weights alone here, so the run's id stands for it.
    cells = [_cell(run, train, CLEAN, None, UNBOUNDED, suite.n_clean, LOGIT_BATCH)]
    for name, attack in suite.attacks.items():
        source = None
        if isinstance(attack, TransferConfig):
            source = find_twin(run, configs)
            if source is None:
                continue
        wanted = decisive_samples(suite, data) if attack.decisive else suite_samples(suite, data)
        n = min(wanted, attack.n_samples or wanted)
        bounds = (decisive_epsilons if attack.decisive else suite_epsilons)(suite, data, attack.norm)
        for epsilon in bounds if is_bounded(attack) else [UNBOUNDED]:
            after = tuple(cell for cell in cells if _precedes(cell, attack, epsilon)) if attack.standing_only else ()
            cells.append(
                _cell(
                    run, train, name, attack, epsilon, n, suite.batch_size, source=source, after=after,
                    # An attack that sees labels only is to see the model's.
                    fast_search=suite.fast_search and not isinstance(attack, HopSkipJumpConfig),
                    replay=suite.fast_search,
                )
            )  # fmt: skip
    if suite.sanity is not None:
        epsilon = decisive_epsilons(suite, data, "linf")[0]
        n = min(suite.sanity.n_samples, suite_samples(suite, data))
        cells.append(
            _cell(run, train, SANITY, suite.sanity, epsilon, n, suite.sanity.batch_size, fast_search=suite.fast_search)
        )
        if suite.sanity.n_convergence is not None:
            n = min(suite.sanity.n_convergence, DATASETS[data].n_test)
            shared = {item.name: getattr(suite.sanity, item.name) for item in fields(ConvergenceConfig)}
            config = ConvergenceConfig(**shared)
            cells.append(
                _cell(run, train, CONVERGENCE, config, epsilon, n, config.batch_size, fast_search=suite.fast_search)
            )
    return cells


def _precedes(cell: Cell, attack: AttackConfig, epsilon: Epsilon) -> bool:
    return (
        isinstance(cell.config, AttackConfig)
        and cell.config.norm == attack.norm
        and cell.epsilon in (epsilon, UNBOUNDED)
    )


def find_twin(run: RunFolder, configs: Mapping[RunFolder, TrainConfig]) -> RunFolder | None:
    """Return the cross-entropy run of standard training whose gradients a transfer attack on a run follows.

    It has the same data set, architecture and seed; for a cross-entropy run, another seed, the next in turn. Where that
    leaves several, which differ in their training samples, optimiser, epochs, batch size or precision, it is the one
    that is most like the run: alike in everything but the loss, if there is one.
    """
    train = configs[run]
    twins = [
        (other, config)
        for other, config in configs.items()
        if other.run_id != run.run_id
        and loss_label(config) == "ce"
        and (config.data.name, config.model) == (train.data.name, train.model)
    ]
    if loss_label(train) != "ce":
        twins = [(other, config) for other, config in twins if config.seed == train.seed]

    def rank(twin: tuple[RunFolder, TrainConfig]) -> tuple[int, bool, int, str]:
        other, config = twin
        return _count_differences(config, train), config.seed <= train.seed, config.seed, other.run_id

    return min(twins, key=rank)[0] if twins else None


def _count_differences(first: TrainConfig, second: TrainConfig) -> int:
    """Return in how many parts of their identity two runs differ, loss, procedure and seed aside."""
    ours, theirs = identity(first), identity(second)
    apart = ("loss", "procedure", "seed")
    return sum(ours.get(key) != theirs.get(key) for key in {*ours, *theirs} if key not in apart)


def _cell(
    run: RunFolder,
    train: TrainConfig,
    name: str,
    config: AttackConfig | SanityConfig | ConvergenceConfig | None,
    epsilon: Epsilon,
    n: int | None,
    batch_size: int,
    *,
    source: RunFolder | None = None,
    after: tuple[Cell, ...] = (),
    fast_search: bool = False,
    replay: bool = False,
) -> Cell:
    content: dict[str, Any] = {"data": train.data.name, "n": n}
    objectives: tuple[str, ...] = ()
    if config is not None:
        # Where and on what an attack runs is in n, epsilon and after; the rest is what it does.
        selection = ("n_samples", "n_convergence", "decisive", "standing_only")
        settings = {key: value for key, value in asdict(config).items() if key not in selection}
        if isinstance(config, ProjectedConfig):
            objectives = tuple(config.objectives) or _adaptive_objectives(train.loss.name)
            settings["objectives"] = list(objectives)
        content |= {"attack": settings, "epsilon": str(epsilon.value), "batch_size": batch_size}
    if isinstance(config, HopSkipJumpConfig):
        content["noise"] = "per image"  # once its radius was that of a batch, which left each image a share of it
    if isinstance(config, SanityConfig):
        content["compared"] = "climbs"  # objectives were once compared by restarts: nine climbs on targets to one
    if source is not None:
        content["source"] = source.run_id
    if after:
        content["after"] = [cell.path.name for cell in after]
    if fast_search:  # not named where it is off, so that cells from before there was a choice keep their names
        content["fast_search"] = "float16"  # on a card; it was TF32 once
    label = "" if math.isinf(epsilon.value) else "@" + epsilon.label.replace("/", "_")
    path = run.path / "eval" / f"{name}{label}-{fingerprint(content, 8)}.npz"
    return Cell(run, train, name, config, epsilon, n, batch_size, path, objectives, source, after, fast_search, replay)


@functools.cache
def _adaptive_objectives(loss: str) -> tuple[str, ...]:
    from drs.losses import LOSSES  # takes torch with it, which a suite without such attacks need not import

    return LOSSES[loss].adaptive_objectives


def recorded_weights(run: RunFolder) -> str | None:
    """Return the SHA-256 of a run's checkpoint as its status has it, or None where it has none."""
    digest = run.status().get("files", {}).get(CHECKPOINT, {}).get("sha256")
    return None if digest is None else str(digest)


def read_cells(run: RunFolder, cells: Sequence[Cell]) -> dict[Path, dict[str, np.ndarray]]:
    """Return the arrays of some cells of a run, by path.

    Raises:
        DamagedFileError: If one is not what was written, or was made from other weights than the run has now: those
            of a training that was done again, on another machine perhaps.
    """
    weights = recorded_weights(run)
    result = {}
    for cell in cells:
        arrays = result[cell.path] = load_arrays_file(cell.path)
        used = json.loads(str(arrays["about"])).get("weights")
        if None not in (used, weights) and used != weights:
            raise DamagedFileError(cell.path, "was made from other weights than the run has now; computing it again")
    return result


def by_run(cells: list[Cell]) -> Iterator[tuple[RunFolder, list[Cell]]]:
    """Group the cells of a study by run, in order."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.run.run_id, []).append(cell)
    for planned in groups.values():
        yield planned[0].run, planned
