"""The published comparisons of library attacks with second implementations: a table of figures, and a page made of it.

``results/reference/agreement.csv`` has a row for each comparison, with the commit and the versions that made it.
``agreement.md`` is laid out from that and from the sanity checks in the tables of the studies, so that a model's mark
follows its study.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from drs.agreement import INSIDE, PAIRS, SECOND, SHIFT, SOUND_CW, Agreement, agreement_table
from drs.benchmarks.peers import MODULES, is_installed
from drs.config import run_id
from drs.errors import UserError
from drs.files import atomic_write
from drs.markdown import escape
from drs.marks import MARK, failed_checks_of
from drs.provenance import describe_machine, package_version
from drs.runs import RunFolder

TABLE, PAGE = "agreement.csv", "agreement.md"
KEY = ["study", "model", "attack", "second", "norm", "epsilon"]
COLUMNS = [
    *KEY, "required", "n", "standing", "standing_second", "median", "median_second", "created", "commit", "dirty",
    "versions",
]  # fmt: skip
TITLE = (
    "# Agreement of library attacks with a second implementation\n\n"
    "Robust accuracy under an attack of a library, as the strong suite has it, and under one of this project or of "
    "another library on the same problem. Rows for agreement are held to one point: they tell whether the library's "
    "attack is run right. Rows for strength are not: they show what an attack misses of another kind of attack, or of "
    "one without its defects. Where an attack is a random search, the difference stands with half of its 95 % interval "
    "over the seeds."
)
NOTES = {
    "square": (
        "square: both make 500 queries rather than the suite's 5000, and the same draws, as all images of a batch get "
        "the same squares in either library and the share that stands depends on them by several points; the shares "
        "are means over the seeds."
    ),
    "hop_skip_jump": (
        "hop_skip_jump: each library makes its own draws, so that shares and median norms are means over the "
        "seeds. Both get the same starts, 16 steps rather than the suite's 32, the same queries and the same threshold "
        "of the binary search, and ART's last step is followed by a search for the boundary, as foolbox's is. As ART "
        "runs it, it solves another problem: its starts are of noise alone, its threshold is 0.01/d rather than 1/d² "
        "for d pixel values, it measures the radius of its noise off the boundary, and it ends there. As foolbox runs "
        "it, it does too: the more images in a batch, the shorter the noise on each."
    ),
    "cw_torchattacks": (
        f"cw_torchattacks, sound: on images drawn to [{INSIDE:g}, {1 - INSIDE:g}], with logits raised by {SHIFT:g} and "
        "without the early stop, so that neither the pixels at 0 and 1, nor the label's mask, nor the total over the "
        "batch does harm. There foolbox's attack has the same objective and the same steps. The rows for strength are "
        "the attack as the suite runs it, beside foolbox's with the same constant, steps and step size, in the wider "
        "pixel range in which the suite's own CW runs it, so that it moves pixels at 0 and 1."
    ),
}
"""What is to be known of how some of the attacks were compared."""


@dataclass(frozen=True)
class Comparison:
    """What ``make agreement`` compares on some models of a study.

    Attributes:
        study: A study of ``results/reference``.
        models: Names of its published models.
        images: Test images.
        attacks: Keys of ``drs.agreement.PAIRS``.
    """

    study: str
    models: tuple[str, ...]
    images: int
    attacks: tuple[str, ...]


PUBLISHED = (
    Comparison(
        "laptop", ("mnist-lenet-ce", "mnist-lenet-dr_softmax"), 300,
        ("apgd_ce", "apgd_t", "fab_t", "fmn_linf", "fmn_l2", "cw"),
    ),
    Comparison("laptop", ("mnist-lenet-ce", "mnist-lenet-dr_softmax"), 250, ("square", "cw_torchattacks")),
    Comparison("pairs", ("mnist-mlp-ce",), 250, ("square", "cw_torchattacks")),
    Comparison("desktop", ("cifar10-smallcnn-ce",), 100, ("apgd_ce", "cw_torchattacks")),
    Comparison("desktop", ("mnist-lenet-ce",), 200, ("hop_skip_jump",)),
)  # fmt: skip
"""The published comparisons, on models that are in the repository."""


def title(run: RunFolder) -> str:
    """Return the name of a published model, or what a trained one is and its id."""
    config = run.config()
    what = f"{config.data.name}-{config.model.name}-{config.loss.name}"
    return run.run_id if run.run_id.startswith(what) else f"{what} {run.run_id}"


def marked_title(run: RunFolder) -> str:
    """Return a model's name, with a dagger if it fails a sanity check."""
    return title(run) + (f" {MARK}" if failed_checks(run) else "")


def failed_checks(run: RunFolder) -> list[str] | None:
    """Return the sanity checks that a model fails by the tables of its study, or None where these do not have it."""
    path = run.path.parent.parent / "tables" / "models.csv"
    if not path.is_file():
        return None
    return failed_checks_of(pd.read_csv(path, dtype={"run_id": str}), run_id(run.config()))


def keys(runs: Iterable[RunFolder]) -> list[str]:
    """Return the key of the mark, with the sanity checks that each model fails, and a line on models not checked."""
    failed = {title(run): failed_checks(run) for run in runs}
    said = [f"{escape(name)}: {', '.join(map(escape, checks))}" for name, checks in failed.items() if checks]
    unknown = [escape(name) for name, checks in failed.items() if checks is None]
    lines = [f"{MARK} fails sanity checks of its study. {'; '.join(said)}."] if said else []
    return lines + ([f"Its study's tables say nothing of sanity checks of: {', '.join(unknown)}."] if unknown else [])


def notes(attacks: Iterable[str]) -> list[str]:
    """Return what is to be known of how some of the attacks were compared, each once."""
    there = {"cw_torchattacks" if attack == SOUND_CW else attack for attack in attacks}
    return [NOTES[attack] for attack in NOTES if attack in there]


def made_now() -> dict[str, Any]:
    """Return when a comparison is made, by which commit and versions; columns of ``COLUMNS``."""
    place = describe_machine(torch.device("cpu"))
    versions = [f"{name} {place['versions'][name]}" for name in ("torch", "torchattacks", "foolbox")]
    if is_installed(MODULES["ART"]):
        versions.append(f"ART {package_version('adversarial-robustness-toolbox')}")
    return {
        "created": place["created"][:10], "commit": place["commit"][:12], "dirty": place["dirty"],
        "versions": ", ".join(versions),
    }  # fmt: skip


def made_by(made: dict[str, Any]) -> str:
    """Return when something was made, by which commit and versions, in words."""
    changes = " with changes" if made["dirty"] else ""
    return f"on {made['created']} at commit `{made['commit']}`{changes}: {made['versions']}"


def record(study: str, row: Agreement, made: dict[str, Any]) -> dict[str, Any]:
    """Return an agreement as a row of ``COLUMNS``; shares over seeds are joined by spaces."""
    medians = row.medians or (None, None)
    return {
        "study": study, "model": row.model.removesuffix(f" {MARK}"), "attack": row.attack, "second": row.second,
        "norm": row.norm, "epsilon": row.epsilon, "required": row.required, "n": row.n,
        "standing": _joined(row.standing), "standing_second": _joined(row.standing_second), "median": medians[0],
        "median_second": medians[1], **made,
    }  # fmt: skip


def _joined(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.6g}" for share in shares)


def read_records(reference: Path) -> pd.DataFrame:
    """Return the published comparisons, none where there is no table.

    Raises:
        UserError: If the table lacks a column.
    """
    path = reference / TABLE
    if not path.is_file():
        return pd.DataFrame(columns=COLUMNS)
    found = pd.read_csv(path, dtype={name: str for name in (*KEY, "standing", "standing_second", "commit")})
    if missing := [column for column in COLUMNS if column not in found]:
        raise UserError(f"{path} lacks the column {missing[0]!r}; make it anew: make agreement")
    return found


def put_records(reference: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into the table, each in the place of an earlier one of the same comparison, in the order of the page."""
    both = pd.concat([read_records(reference).astype(object), pd.DataFrame(rows, columns=COLUMNS).astype(object)])
    latest = both.drop_duplicates(KEY, keep="last")
    with atomic_write(reference / TABLE) as temporary:
        _in_order(latest).to_csv(temporary, index=False)


def _in_order(records: pd.DataFrame) -> pd.DataFrame:
    """Return records study by study and model by model, their attacks in the order of ``PAIRS``; radii as they came."""
    attacks, models = list(PAIRS), [(each.study, model) for each in PUBLISHED for model in each.models]

    def place(row: Any) -> tuple[int, str, str, int]:
        attack = "cw_torchattacks" if row.attack == SOUND_CW else row.attack
        model = row.study, row.model
        return models.index(model) if model in models else len(models), *model, attacks.index(attack)

    places = [place(row) for row in records.itertuples()]
    return records.iloc[sorted(range(len(records)), key=lambda number: places[number])]


def write_page(reference: Path) -> Path:
    """Lay the published comparisons out, with the marks that the tables of their studies give now; return the page.

    Raises:
        UserError: If there is no comparison, or one is of an attack or a model that is not there.
    """
    text = page(reference)
    with atomic_write(reference / PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return reference / PAGE


def page(reference: Path) -> str:
    """Return the page of the published comparisons; see ``write_page``."""
    records = read_records(reference)
    if records.empty:
        raise UserError(f"{reference / TABLE} has no comparison; make it: make agreement")
    parts = [TITLE]
    for study, own in records.groupby("study", sort=False):
        runs = {name: _published_run(reference, str(study), name) for name in own["model"].unique()}
        rows = [_agreement(row, marked_title(runs[row.model])) for row in own.itertuples()]
        parts += [f"## Models of the {study} study", agreement_table(rows), *keys(runs.values())]
    parts += ["## How they were compared", *notes(records["attack"])]
    made = records[["created", "commit", "dirty", "versions"]].drop_duplicates().to_dict("records")
    for one in made:
        chosen = records[(records["commit"] == one["commit"]) & (records["created"] == one["created"])]
        which = "" if len(made) == 1 else f", {', '.join(map(escape, chosen['attack'].unique()))}"
        parts.append(f"Made by `make agreement`{which} {made_by({str(key): value for key, value in one.items()})}.")
    return "\n\n".join(parts) + "\n"


def _published_run(reference: Path, study: str, name: str) -> RunFolder:
    run = RunFolder(reference / study / "models" / name)
    if not (run.path / "config.yaml").is_file():
        raise UserError(f"{reference / TABLE}: {study} has no published model {name}; compare it anew: make agreement")
    return run


def _agreement(row: Any, name: str) -> Agreement:
    if row.second not in SECOND:
        raise UserError(f"{TABLE}: {row.second!r} is no second implementation here; compare anew: make agreement")
    medians = None if pd.isna(row.median) else (float(row.median), float(row.median_second))
    shares, second = ([float(share) for share in text.split()] for text in (row.standing, row.standing_second))
    return Agreement(
        name, row.norm, row.epsilon, row.attack, row.second, shares, second, bool(row.required), int(row.n), medians
    )
