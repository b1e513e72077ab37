"""A study beside the reference study of the same name: do the verdicts and the numbers agree? Reads tables alone.

A figure is the mean over seeds of one accuracy of one (data, model, loss, loss weight). Two figures agree when their
difference lies within the 95 % interval of a difference between two such means (Welch 1947): t times the standard
error, with the Welch-Satterthwaite degrees of freedom. Each mean's squared error is at least the binomial sampling
error of its models, so that seeds which agree by luck do not make every difference significant. Both studies attack
the same images, so this floor errs towards agreement. Nothing is paired: the same seed elsewhere is another draw.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from drs.config import PROJECT_ROOT
from drs.errors import UserError
from drs.report import read_provenance

LEVEL = 0.95
REFERENCE = PROJECT_ROOT / "results" / "reference"
MACHINE_CLAIMS = ("C3",)  # decided by timing, which belongs to the machine
COLUMNS = [
    "kind", "claim", "data", "model", "loss", "loss_weight", "measure", "status", "here", "there", "low_here",
    "high_here", "low_there", "high_there", "n_here", "n_there", "difference", "half_width", "verdict_here",
    "verdict_there", "epsilons_here", "epsilons_there",
]  # fmt: skip
_SETTING = ["data", "model", "loss", "loss_weight"]
_TEXT = ("run_id", "data", "model", "loss", "attack", "epsilon_label", "excluded", "claim", "verdict", "device")
_NAMES = {"effect": "value", "ratio": "value", "ci_low": "low", "ci_high": "high", "n_pairs": "n"}
_SIDES = {"left_only": "only here", "right_only": "only there", "both": "both"}


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


def compare_with_reference(study_dir: Path, reference_dir: Path) -> pd.DataFrame:
    """Compare two study folders that hold ``tables/``.

    Returns:
        A row for each claim and group (``kind`` verdict: effects, intervals and both verdicts), accuracy (``kind``
        accuracy: seed means as fractions, their difference and the half-width of its interval) and training-step
        time over cross-entropy's (``kind`` time: ratios with intervals), with the columns ``COLUMNS``. ``status`` is
        ``agrees`` or ``differs``; ``only here`` or ``only there`` where one study lacks it; ``other epsilons``
        for accuracies that average over different ones; ``information`` for times.

    Raises:
        UserError: If one of them has no table of models, or a table cannot be read.
    """
    parts = [_verdicts, _accuracies, _times]
    rows = [row for part in parts for row in part(study_dir, reference_dir).to_dict("records")]
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


def _read(folder: Path, name: str, columns: list[str]) -> pd.DataFrame:
    """Read a table; one that is not there (``models`` apart) has no rows."""
    path = folder / "tables" / f"{name}.csv"
    if not path.is_file() or path.stat().st_size == 0:
        if name == "models":
            raise UserError(f"{path} is missing or empty; evaluate the study first")
        return pd.DataFrame({column: [] for column in columns})
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str))
    except (pd.errors.ParserError, ValueError) as error:
        raise UserError(f"{path}: not a table ({error}); evaluate the study again to rebuild it") from None
    if missing := [column for column in columns if column not in table]:
        raise UserError(f"{path}: no column {', '.join(missing)}; evaluate the study again to rebuild it")
    return table


def _merged(kind: str, own: pd.DataFrame, reference: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Join both studies' rows on ``keys``; what only one has stays, with that as its status."""
    table = own.merge(reference, on=keys, how="outer", suffixes=("_here", "_there"), indicator="status")
    table = table.rename(columns={"value_here": "here", "value_there": "there"})
    return table.assign(kind=kind, status=table["status"].astype(str).map(_SIDES))


def _verdicts(own: Path, reference: Path) -> pd.DataFrame:
    keys, values = ["claim", "data", "model"], ["verdict", "effect", "ci_low", "ci_high", "n"]
    mine, theirs = (_read(folder, "claims", keys + values)[keys + values] for folder in (own, reference))
    table = _merged("verdict", mine.rename(columns=_NAMES), theirs.rename(columns=_NAMES), keys)
    both = table["status"] == "both"
    same = table["verdict_here"] == table["verdict_there"]
    return table.assign(status=table["status"].mask(both & same, "agrees").mask(both & ~same, "differs"))


def _times(own: Path, reference: Path) -> pd.DataFrame:
    columns = [*_SETTING, "ratio", "ci_low", "ci_high", "n_pairs"]
    mine, theirs = (_read(folder, "timing", columns)[columns] for folder in (own, reference))
    table = _merged("time", mine.rename(columns=_NAMES), theirs.rename(columns=_NAMES), _SETTING)
    return table.assign(measure="step time", status=table["status"].replace("both", "information"))


def _accuracies(own: Path, reference: Path) -> pd.DataFrame:
    table = _merged("accuracy", _seed_means(own), _seed_means(reference), [*_SETTING, "measure"])
    rows = []
    for row in table.to_dict("records"):
        here, there = (
            SeedMean(row[side], row[f"variance_{side}"], row[f"n_{side}"], row[f"n_samples_{side}"])
            for side in ("here", "there")
        )
        known = bool(row["epsilons_here"] and row["epsilons_there"])
        if row["status"] == "both" and known and row["epsilons_here"] != row["epsilons_there"]:
            row["status"] = "other epsilons"
        elif row["status"] == "both":
            difference, width = here.mean - there.mean, half_width(here, there)
            status = "agrees" if abs(difference) <= width else "differs"
            row |= {"difference": difference, "half_width": width, "status": status}
        rows.append(row)
    return pd.DataFrame(rows)


def _seed_means(folder: Path) -> pd.DataFrame:
    """Return a row per setting and measure: its seed mean without excluded models, and its epsilons if known."""
    columns = [*_SETTING, "clean_accuracy", "n_clean", "n_attacked", "excluded"]
    models = _read(folder, "models", columns)
    accuracy = _read(folder, "accuracy", ["data", "model", "attack", "epsilon", "epsilon_label", "n"])
    finite = accuracy[np.isfinite(accuracy["epsilon"].astype(float))]
    scored: dict[Any, pd.DataFrame] = dict(iter(finite.groupby(["data", "model", "attack"])))
    measures = ["clean_accuracy", *(name for name in map(str, models) if name[:4] == "acc." and name[-5:] == "@mean")]
    groups: dict[Any, pd.DataFrame] = dict(iter(models[models["excluded"].isna()].groupby(_SETTING)))
    rows = []
    for key, group in groups.items():
        for measure in measures:
            values = group[measure].dropna()
            if values.empty:
                continue
            attack = "clean" if measure == "clean_accuracy" else measure[4:-5]
            epsilons, n_samples = "", group["n_clean" if attack == "clean" else "n_attacked"].min()
            cells = scored.get((key[0], key[1], attack))
            if cells is not None:
                epsilons = ", ".join(cells.sort_values("epsilon")["epsilon_label"].unique())
                n_samples = cells["n"].min()  # an attack may have run on fewer samples than the others
            rows.append((*key, measure, values.mean(), values.var(ddof=1), len(values), n_samples, epsilons))
    names = [*_SETTING, "measure", "value", "variance", "n", "n_samples", "epsilons"]
    return pd.DataFrame(rows, columns=pd.Index(names))


def comparison_text(study_dir: Path, reference_root: Path = REFERENCE, limit: int = 15) -> str:
    """Tell in plain text how a study agrees with the reference study of its name; the last line sums it up.

    Args:
        study_dir: ``results/<study>``; ``reference_root`` holds the reference studies.
        limit: List at most so many lines of one kind and count the rest.

    Raises:
        UserError: If the tables of one of them cannot be read.
    """
    reference = reference_root / study_dir.name
    if not (reference / "tables" / "models.csv").is_file():
        return f"There is no reference study named {study_dir.name}, so nothing to compare with."
    name = str(reference).removeprefix(f"{PROJECT_ROOT}/")
    provenance = read_provenance(reference)
    commit = str(provenance.get("commit") or "unknown")[:10]
    table = compare_with_reference(study_dir, reference)
    lines = [f"{study_dir.name} beside {name} (commit {commit}, {machine_name(provenance)})"]
    lines += _verdict_lines(table) + _figure_lines(table, limit) + _time_lines(table)
    other = table[table["status"] == "other epsilons"].to_dict("records")
    items = [f"{_label(row)}: {row['epsilons_here']} here, {row['epsilons_there']} there" for row in other]
    lines += _listed("Not comparable, averaged over different epsilons:", items, limit)
    for status, place in (("only here", "this study"), ("only there", "the reference study")):
        lines += _listed(f"Only in {place}:", _lacking(table, status), limit)
    return "\n".join([*lines, _summary(table, name)])


def machine_name(provenance: dict[str, Any]) -> str:
    """Return the GPU that a study ran on, or its processor and cores where it used none."""
    hardware = provenance.get("hardware") or {}
    gpu, cpu, cores = hardware.get("gpu"), hardware.get("cpu"), hardware.get("cores")
    if gpu and gpu != "none":
        return str(gpu)
    return f"{cpu or 'an unnamed processor'}" + (f", {cores} cores" if cores else "")


def _label(row: dict[Any, Any]) -> str:
    if row["kind"] == "verdict":
        return f"{row['claim']} {row['data']}" + ("" if row["data"] == row["model"] else f"/{row['model']}")
    weight = f" {row['loss_weight']:g}" if row["loss_weight"] > 0 else ""
    return f"{row['data']}/{row['model']} {row['loss']}{weight} {str(row['measure']).removeprefix('acc.')}"


def _verdict_lines(table: pd.DataFrame) -> list[str]:
    shared = table[(table["kind"] == "verdict") & table["status"].isin(["agrees", "differs"])]
    counted = shared[~shared["claim"].isin(MACHINE_CLAIMS)]
    if counted.empty:
        return ["Verdicts: the two have none in common."]
    lines = [f"Verdicts: {(counted['status'] == 'agrees').sum()} of {len(counted)} are the same."]
    for row in shared[shared["status"] == "differs"].to_dict("records"):
        note = " (depends on the machine, not counted)" if row["claim"] in MACHINE_CLAIMS else ""
        lines.append(f"  {_label(row)}: {row['verdict_here']} here, {row['verdict_there']} there{note}")
    return lines


def _figures(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["kind"] == "accuracy") & table["status"].isin(["agrees", "differs"])]


def _figure_lines(table: pd.DataFrame, limit: int) -> list[str]:
    figures = _figures(table)
    if figures.empty:
        return ["Figures: the two have none in common."]
    wrong = figures[figures["status"] == "differs"].sort_values("difference", key=abs, ascending=False)
    text = (
        f"Figures (mean accuracies over seeds): {len(figures) - len(wrong)} of {len(figures)} agree within the "
        f"{LEVEL:.0%} interval of their difference (Welch's t, with the sampling error of the test images as a floor, "
        f"which alone counts where both have one seed). Of independent intervals at most about {1 - LEVEL:.0%} "
        f"({(1 - LEVEL) * len(figures):.1f}) disagree by chance"
    )
    items = [
        f"{_label(row)}: {row['here']:.1%} here (n={row['n_here']:.0f}), {row['there']:.1%} there "
        f"(n={row['n_there']:.0f}), difference {100 * row['difference']:+.1f} points, expected within "
        f"{100 * row['half_width']:.1f}"
        for row in wrong.to_dict("records")
    ]
    return _listed(f"{text}; these disagree, the largest difference first:", items, limit) or [f"{text}."]


def _time_lines(table: pd.DataFrame) -> list[str]:
    rows = table[(table["kind"] == "time") & (table["status"] == "information")].to_dict("records")
    lines = ["Training-step time over cross-entropy's, for information:"] if rows else []
    for row in rows:
        sides = (f"{row[side]:.3f} [{row[f'low_{side}']:.3f}, {row[f'high_{side}']:.3f}]" for side in ("here", "there"))
        lines.append(f"  {_label(row).removesuffix(' step time')}: {' here, '.join(sides)} there")
    return lines


def _lacking(table: pd.DataFrame, status: str) -> list[str]:
    """Name what one study lacks; a setting of which it has nothing is named once."""
    accuracies = table[table["kind"] == "accuracy"]
    whole = accuracies.groupby(_SETTING)["status"].transform(lambda statuses: (statuses == status).all())
    names = []
    for index, row in zip(table.index, table.to_dict("records"), strict=True):
        if row["status"] == status:
            label = _label(row)
            names.append(label.rpartition(" ")[0] if whole.get(index, False) else label)
    return list(dict.fromkeys(names))


def _summary(table: pd.DataFrame, name: str) -> str:
    figures = _figures(table)
    agree = (figures["status"] == "agrees").sum()
    verdicts = [
        f"{row['claim']} {'same' if row['status'] == 'agrees' else 'differs'}"
        + (" (for information)" if row["claim"] in MACHINE_CLAIMS else "")
        for row in table[table["kind"] == "verdict"].to_dict("records")
        if row["data"] == "all" and row["status"] in ("agrees", "differs")
    ]
    return (
        f"{agree} of {len(figures)} figures agree with {name} within their intervals; "
        f"verdicts: {', '.join(verdicts) or 'none in common'}."
    )


def _listed(title: str, items: list[str], limit: int) -> list[str]:
    rest = [f"  and {len(items) - limit} more"] if len(items) > limit else []
    return [title, *(f"  {item}" for item in items[:limit]), *rest] if items else []
