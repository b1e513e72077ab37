"""One run's cells -> its rows of a study's tables, kept beside the cells, so that thousands are not read every time.

What is kept is used only while the cells, the weights, the suite and this package's code are what it was made from. A
cell's size and time stand for its content; its digest is checked whenever it is read.
"""

import functools
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drs.attack_config import NORMS, AttackConfig
from drs.cells import Cell, read_cells, recorded_weights
from drs.config import fingerprint
from drs.files import atomic_write, sha256_of
from drs.landing import class_means, landing_row
from drs.minimal_norms import norm_rows, smallest_name, smallest_outcome
from drs.model_rows import describe, read_model
from drs.runs import RunFolder
from drs.sample_correlation import sample_correlation_rows
from drs.sanity import sanity_rows
from drs.softmax_profile import profile_rows
from drs.suite_config import SuiteConfig, suite_epsilons

MINIMAL_NORM = ("cw", "fmn_linf", "fmn_l2")
"""Attacks whose perturbation sizes are read as minimal norms, sample by sample."""


@dataclass(frozen=True)
class Reduction:
    """What one run adds to a study's tables.

    Attributes:
        row: Of models.csv, without what comes from its training.
        accuracy: Of accuracy.csv.
        worst: Of worst_case.csv.
        outcomes: Of image_outcomes.csv.
        sanity: Of sanity.csv.
        landing: Of landing.csv.
        samples: Of sample_correlations.csv.
        norms: Of minimal_norms.csv.
        matrices: Attack, epsilon label and the pair ``[2, K, K]`` of ``drs.landing.landing_row``, as lists.
        abouts: What each cell says about itself, by the name of its file.
    """

    row: dict[str, Any]
    accuracy: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    outcomes: list[dict[str, Any]]
    sanity: list[dict[str, Any]]
    landing: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    norms: list[dict[str, Any]]
    matrices: list[tuple[str, str, Any]]
    abouts: dict[str, dict[str, Any]]


def reduce_run(run: RunFolder, planned: list[Cell], suite: SuiteConfig) -> Reduction:
    """Return what a run adds to the tables, from its cells; what was kept of it if that is of just these.

    Raises:
        DamagedFileError: If the file of a cell is not what was written.
    """
    key = _key([planned], suite)  # before the cells are read: one that is written meanwhile must not count as read
    kept = find_reduction(run, planned, suite)
    if kept is None:
        kept = Reduction(**_keep(_place(run, "reduction", suite), key, asdict(_reduce(run, planned, suite))))
    return kept


def find_reduction(run: RunFolder, planned: list[Cell], suite: SuiteConfig) -> Reduction | None:
    """Return what was kept of a run, if that is of just these cells."""
    content = _find(_place(run, "reduction", suite), _key([planned], suite))
    with suppress(TypeError):  # damaged
        return Reduction(**content)
    return None


def reduce_profile(cells: list[Cell], suite: SuiteConfig) -> list[dict[str, Any]]:
    """Return the softmax profile of a setting from the clean cells of its runs, or what was kept of just these.

    Raises:
        DamagedFileError: If the file of a cell is not what was written.
    """
    key = _key([[cell] for cell in cells], suite)
    kept = find_profile(cells, suite)
    if kept is None:
        kept = _keep(_place(cells[0].run, "profile", suite), key, profile_rows(cells))
    return kept


def find_profile(cells: list[Cell], suite: SuiteConfig) -> list[dict[str, Any]] | None:
    """Return what was kept of a setting's softmax profile, if that is of just these clean cells."""
    content: list[dict[str, Any]] | None = _find(
        _place(cells[0].run, "profile", suite), _key([[cell] for cell in cells], suite)
    )
    return content


def _place(run: RunFolder, what: str, suite: SuiteConfig) -> Path:
    return run.path / "eval" / f".{what}-{suite.name}.json"


def _find(path: Path, key: str) -> Any:
    with suppress(OSError, ValueError, KeyError, TypeError):  # absent, or damaged: then it is made anew
        recorded = json.loads(path.read_bytes())
        if recorded["key"] == key:
            return recorded["content"]
    return None


def _keep(path: Path, key: str, made: Any) -> Any:
    # The way through JSON is taken in any case, so that what is kept and what is new cannot differ.
    content = json.dumps({"key": key, "content": made}, default=_plain)
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return json.loads(content)["content"]


def _key(runs: list[list[Cell]], suite: SuiteConfig) -> str:
    """Return what tells some cells of some runs from others."""
    found = []
    for cells in runs:
        states = [(cell.path.name, cell.path.stat()) for cell in cells]
        files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
        found.append([cells[0].run.run_id, files, recorded_weights(cells[0].run)])
    return fingerprint([found, asdict(suite), code_fingerprint()], 24)


@functools.cache
def code_fingerprint() -> str:
    """Return a digest of this package's code."""
    package = Path(__file__).parent
    return fingerprint({str(path.relative_to(package)): sha256_of(path) for path in package.rglob("*.py")}, 24)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a reduction")


def _reduce(run: RunFolder, planned: list[Cell], suite: SuiteConfig) -> Reduction:
    arrays = read_cells(run, planned)
    clean = arrays[planned[0].path]
    softmax = class_means(clean)
    reading = read_model(describe(run.run_id, planned[0].train), planned, arrays, suite)
    landing: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    matrices: list[tuple[str, str, Any]] = []
    for cell in planned[1:]:
        if not isinstance(cell.config, AttackConfig):
            continue
        found = arrays[cell.path]
        item, pair = landing_row(clean, found, softmax)
        label = cell.epsilon.label
        landing.append({"attack": cell.attack, "epsilon_label": label, **item})
        if not reading.row["excluded"] and _has_matrices(cell, suite):
            matrices.append((cell.attack, label, pair))
        if cell.attack in MINIMAL_NORM:
            samples += [{"attack": cell.attack, **row} for row in sample_correlation_rows(clean, found)]
    for norm in NORMS:
        smallest = smallest_outcome(planned, arrays, norm)
        if smallest is not None:
            samples += [{"attack": smallest_name(norm), **row} for row in sample_correlation_rows(clean, smallest)]
    norms = norm_rows(planned, arrays, suite)
    abouts = {path.name: json.loads(str(found["about"])) for path, found in arrays.items()}
    judged = sanity_rows(planned, arrays)
    read = reading.row, reading.accuracy, reading.worst, reading.outcomes
    return Reduction(*read, judged, landing, samples, norms, matrices, abouts)


def _has_matrices(cell: Cell, suite: SuiteConfig) -> bool:
    """Whole matrices are kept for one attack, PGD at the middle epsilon: many flips, and not yet all."""
    if not isinstance(cell.config, AttackConfig) or cell.config.kind != "pgd":
        return False
    bounds = suite_epsilons(suite, cell.train.data.name, cell.config.norm)
    return cell.epsilon == bounds[len(bounds) // 2]
