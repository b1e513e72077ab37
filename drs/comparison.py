"""A study beside the reference study of the same name: do the verdicts and the numbers agree? Reads tables alone.

A cell is the mean over seeds of one accuracy of one (data, model, loss, loss weight). Two cells agree when their
difference lies within the 95 % interval of a difference between two such means (Welch 1947): t times the standard
error, with the Welch-Satterthwaite degrees of freedom. Each mean's squared error is at least the binomial sampling
error of its models, so that seeds which agree by luck do not make every difference significant. Nothing is paired:
the same seed on another machine is another draw.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from drs.config import PROJECT_ROOT
from drs.errors import UserError
from drs.report import read_provenance

LEVEL = 0.95
REFERENCE = PROJECT_ROOT / "results" / "reference"
MACHINE_CLAIMS = ("C3",)  # decided by timing, which belongs to the machine
_KEYS = ["data", "model", "loss", "loss_weight"]
_TABLES = ("models", "accuracy", "claims", "timing")
_TEXT = ("run_id", "data", "model", "loss", "attack", "epsilon_label", "excluded", "claim", "verdict", "device")


@dataclass(frozen=True)
class SeedMean:
    """The mean of an accuracy over seeds.

    Attributes:
        mean: A fraction.
        variance: Sample variance between seeds (n - 1), NaN for one seed.
        n_seeds: How many models, at least 1.
        n_samples: How many samples each model was scored on.
    """

    mean: float
    variance: float
    n_seeds: int
    n_samples: int


class Setting(NamedTuple):
    """What the seeds of a mean have in common."""

    data: str
    model: str
    loss: str
    loss_weight: float

    def __str__(self) -> str:
        weight = f" {self.loss_weight:g}" if self.loss_weight > 0 else ""
        return f"{self.data}/{self.model} {self.loss}{weight}"


class Claim(NamedTuple):
    """A row of the claims table; data and model are ``all`` in the overall one."""

    claim: str
    data: str
    model: str

    def __str__(self) -> str:
        return f"{self.claim} {self.data}" + ("" if self.data == self.model else f"/{self.model}")


@dataclass(frozen=True)
class Cell:
    """One accuracy (a column of models.csv) in both studies; ``half_width`` is of the interval of the difference."""

    setting: Setting
    column: str
    own: SeedMean
    reference: SeedMean
    half_width: float

    @property
    def difference(self) -> float:
        """Own mean less the reference's, a fraction."""
        return self.own.mean - self.reference.mean

    @property
    def agrees(self) -> bool:
        """Whether the difference lies within its interval."""
        return abs(self.difference) <= self.half_width


@dataclass
class Comparison:
    """What two studies have in common, and in words what they have not.

    Attributes:
        verdicts: Both verdicts of each claim, own first.
        cells: The accuracies that both have.
        ratios: Training-step time over cross-entropy's as (ratio, ci_low, ci_high), own first.
        only_own, only_reference: What the other lacks.
        not_comparable: Accuracies that average over other epsilons.
    """

    verdicts: dict[Claim, tuple[str, str]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    ratios: dict[Setting, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    only_own: list[str] = field(default_factory=list)
    only_reference: list[str] = field(default_factory=list)
    not_comparable: list[str] = field(default_factory=list)

    @property
    def disagreements(self) -> list[Cell]:
        """Cells that do not agree, the largest difference first."""
        return sorted((cell for cell in self.cells if not cell.agrees), key=lambda cell: -abs(cell.difference))


def half_width(own: SeedMean, reference: SeedMean, level: float = LEVEL) -> float:
    """Return the half-width of the interval of a difference of two independent seed means, a fraction.

    A study with one seed borrows the other's variance between seeds; with one seed each, only the binomial error is
    known and the interval is a normal one.
    """
    squares, seed_errors = [], []
    for side, other in ((own, reference), (reference, own)):
        source = side if side.n_seeds > 1 else other
        between = source.variance / side.n_seeds if source.n_seeds > 1 else 0.0
        # One success and one failure more keep the error of 0 % and 100 % above zero (Agresti and Caffo 2000).
        share = (side.mean * side.n_samples + 1) / (side.n_samples + 2)
        binomial = share * (1 - share) / (side.n_samples * side.n_seeds)
        squares.append(max(between, binomial))
        if between > binomial:
            seed_errors.append((between, source.n_seeds - 1))
    if 1 in (own.n_seeds, reference.n_seeds) and len(seed_errors) == 2:  # one estimate, used twice
        seed_errors = [(sum(error for error, _ in seed_errors), seed_errors[0][1])]
    total = sum(squares)
    freedom = total**2 / sum(error**2 / n for error, n in seed_errors) if seed_errors else math.inf
    return float(stats.t.ppf((1 + level) / 2, freedom) * math.sqrt(total))


def compare(own: Path, reference: Path) -> Comparison:
    """Compare two study folders that hold ``tables/``.

    Raises:
        UserError: If one of them has no table of models, or a table cannot be read.
    """
    result = Comparison()
    mine, theirs = ({name: _read(folder, name) for name in _TABLES} for folder in (own, reference))
    _compare_verdicts(result, mine["claims"], theirs["claims"])
    _compare_cells(result, mine, theirs)
    own_ratios, their_ratios = _ratios(mine["timing"]), _ratios(theirs["timing"])
    result.ratios = {key: (own_ratios[key], their_ratios[key]) for key in own_ratios if key in their_ratios}
    return result


def _read(folder: Path, name: str) -> pd.DataFrame:
    path = folder / "tables" / f"{name}.csv"
    if not path.is_file() or path.stat().st_size == 0:
        if name == "models":
            raise UserError(f"{path} is missing or empty; evaluate the study first")
        return pd.DataFrame()
    try:
        return pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str))
    except (pd.errors.ParserError, ValueError) as error:
        raise UserError(f"{path}: not a table ({error}); evaluate the study again to rebuild it") from None


def _compare_verdicts(result: Comparison, own: pd.DataFrame, reference: pd.DataFrame) -> None:
    mine, theirs = (
        {Claim(row["claim"], row["data"], row["model"]): str(row["verdict"]) for row in table.to_dict("records")}
        for table in (own, reference)
    )
    for claim in _common(result, mine, theirs, "claim "):
        result.verdicts[claim] = (mine[claim], theirs[claim])


def _compare_cells(result: Comparison, own: dict[str, pd.DataFrame], reference: dict[str, pd.DataFrame]) -> None:
    mine, theirs = (_seed_means(tables["models"], tables["accuracy"]) for tables in (own, reference))
    for setting in _common(result, mine, theirs):
        for column in _common(result, mine[setting], theirs[setting], f"{setting} "):
            (epsilons, mean), (other_epsilons, other_mean) = mine[setting][column], theirs[setting][column]
            if epsilons == other_epsilons or not (epsilons and other_epsilons):
                result.cells.append(Cell(setting, column, mean, other_mean, half_width(mean, other_mean)))
            else:
                result.not_comparable.append(f"{setting} {column}: {epsilons} here, {other_epsilons} there")


def _seed_means(models: pd.DataFrame, accuracy: pd.DataFrame) -> dict[Setting, dict[str, tuple[str, SeedMean]]]:
    """Return setting -> column -> (its epsilons where accuracy.csv tells, its seed mean), without excluded models."""
    attacks = {name: name[4:-5] for name in map(str, models) if name.startswith("acc.") and name.endswith("@mean")}
    scored: dict[Any, pd.DataFrame] = {}
    if len(accuracy):
        finite = accuracy[np.isfinite(accuracy["epsilon"])]
        scored = dict(iter(finite.groupby(["data", "model", "attack"])))
    result: dict[Setting, dict[str, tuple[str, SeedMean]]] = {}
    groups: dict[Any, pd.DataFrame] = dict(iter(models[models["excluded"].isna()].groupby(_KEYS, sort=False)))
    for key, group in groups.items():
        setting = Setting(*key)
        means = result.setdefault(setting, {})
        for column, attack in {"clean_accuracy": "clean", **attacks}.items():
            values = group[column].dropna()
            if values.empty:
                continue
            epsilons, n_samples = "", int(group["n_clean" if attack == "clean" else "n_attacked"].min())
            cells = scored.get((setting.data, setting.model, attack))
            if cells is not None:
                epsilons = ", ".join(cells.sort_values("epsilon")["epsilon_label"].unique())
                n_samples = int(cells["n"].min())  # an attack may have run on fewer samples than the others
            variance = float(values.var(ddof=1)) if len(values) > 1 else math.nan
            means[column] = (epsilons, SeedMean(float(values.mean()), variance, len(values), n_samples))
    return result


def _ratios(timing: pd.DataFrame) -> dict[Setting, tuple[float, ...]]:
    return {
        Setting(*(row[key] for key in _KEYS)): (row["ratio"], row["ci_low"], row["ci_high"])
        for row in timing.to_dict("records")
    }


def _common(result: Comparison, own: Mapping[Any, Any], reference: Mapping[Any, Any], prefix: str = "") -> list[Any]:
    """Return the keys that both have, in the study's order, and note those that one lacks."""
    result.only_own += [f"{prefix}{key}" for key in own if key not in reference]
    result.only_reference += [f"{prefix}{key}" for key in reference if key not in own]
    return [key for key in own if key in reference]


def compare_with_reference(study_dir: Path, reference_root: Path = REFERENCE, limit: int = 15) -> str:
    """Tell in plain text how a study agrees with the reference study of its name.

    Args:
        study_dir: ``results/<study>``; ``reference_root`` holds the reference studies.
        limit: List at most so many lines of one kind and count the rest.

    Raises:
        UserError: If the tables of one of them cannot be read.
    """
    reference = reference_root / study_dir.name
    if not (reference / "tables" / "models.csv").is_file():
        return f"There is no reference study named {study_dir.name}, so nothing to compare with."
    result = compare(study_dir, reference)
    lines = [f"{study_dir.name} beside the reference study ({_origin(reference)})"]
    lines += _verdict_lines(result) + _cell_lines(result, limit) + _ratio_lines(result)
    lines += _listed("Not comparable, averaged over different epsilons:", result.not_comparable, limit)
    lines += _listed("Only in this study:", result.only_own, limit)
    lines += _listed("Only in the reference study:", result.only_reference, limit)
    return "\n".join(lines)


def _origin(reference: Path) -> str:
    content = read_provenance(reference)
    hardware = content.get("hardware") or {}
    machine = hardware.get("gpu") or hardware.get("cpu") or "machine unknown"
    return f"commit {str(content.get('commit', 'unknown'))[:10]}, {machine}"


def _verdict_lines(result: Comparison) -> list[str]:
    counted = {claim: sides for claim, sides in result.verdicts.items() if claim.claim not in MACHINE_CLAIMS}
    same = sum(own == reference for own, reference in counted.values())
    if not counted:
        return ["Verdicts: the two have none in common."]
    lines = [f"Verdicts: {same} of {len(counted)} are the same."]
    for claim, (own, reference) in result.verdicts.items():
        if own != reference:
            note = "" if claim in counted else " (depends on the machine, not counted)"
            lines.append(f"  {claim}: {own} here, {reference} there{note}")
    return lines


def _cell_lines(result: Comparison, limit: int) -> list[str]:
    if not result.cells:
        return ["Accuracies: the two have no cell in common."]
    wrong = result.disagreements
    expected = (1 - LEVEL) * len(result.cells)
    text = (
        f"Accuracies: {len(result.cells) - len(wrong)} of {len(result.cells)} means over seeds agree within the "
        f"{LEVEL:.0%} interval of their difference; about {1 - LEVEL:.0%} ({expected:.1f}) would disagree by chance"
    )
    items = [
        f"{cell.setting} {cell.column.removeprefix('acc.')}: {cell.own.mean:.1%} here (n={cell.own.n_seeds}), "
        f"{cell.reference.mean:.1%} there (n={cell.reference.n_seeds}), difference {100 * cell.difference:+.1f} "
        f"points, expected within {100 * cell.half_width:.1f}"
        for cell in wrong
    ]
    return _listed(f"{text}; these disagree:", items, limit) or [f"{text}."]


def _ratio_lines(result: Comparison) -> list[str]:
    lines = ["Training-step time over cross-entropy's, for information:"] if result.ratios else []
    for setting, sides in result.ratios.items():
        own, reference = (f"{ratio:.3f} [{low:.3f}, {high:.3f}]" for ratio, low, high in sides)
        lines.append(f"  {setting}: {own} here, {reference} there")
    return lines


def _listed(title: str, items: list[str], limit: int) -> list[str]:
    rest = [f"  and {len(items) - limit} more"] if len(items) > limit else []
    return [title, *(f"  {item}" for item in items[:limit]), *rest] if items else []
