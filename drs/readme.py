"""The parts of README.md that come from a study's tables, between markers, so that no number is typed by hand."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from drs.config import PROJECT_ROOT
from drs.errors import UserError
from drs.figure_style import included, marked_label, of_group, of_setting, settings, span
from drs.files import atomic_write
from drs.markdown import NONE, fixed, group_name, interval, percent, table, whole
from drs.marks import MARK, has_failed
from drs.paired import BASELINE
from drs.readme_claims import claims_block, pairs_block, section_link, weights_block
from drs.report import read_provenance, read_tables
from drs.selection import best_weight
from drs.shown_intervals import shown_gains
from drs.verdicts import PRIMARY_LOSS, PRIMARY_WEIGHT

README_STUDY = "desktop"
"""The study of results/reference that README.md is filled from."""
BENCH = PROJECT_ROOT / "results" / "bench" / "bench.csv"


def studies_block(study_dir: Path) -> str:
    """Return a table of the reference studies, or of another study alone: its models, machine, date and times."""
    rows = []
    reference = study_dir.parent.name == "reference"
    for folder in sorted(path.parent for path in study_dir.parent.glob("*/provenance.json")):
        if not reference and folder.name != study_dir.name:
            continue  # someone's other studies may be unfinished
        content = read_provenance(folder)
        models = read_tables(folder)["models"]
        counts = models.groupby(["data", "model"], sort=False).size()
        machine, seconds, versions = content["hardware"], content.get("wall_seconds") or {}, content["versions"]
        gpu = "no GPU" if machine["gpu"] == "none" else machine["gpu"]
        rows.append(
            [
                f"[{folder.name}](results/reference/{folder.name}/REPORT.md)",
                "<br>".join(f"{group_name(*names)}: {count}" for names, count in counts.items()),  # type: ignore[misc]
                f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {gpu}",
                *(fixed(seconds[step] / 60, 1) if step in seconds else NONE for step in ("train", "attack")),
                f"{content['created'][:10]}, torch {versions['torch']}, commit `{content['commit'][:10]}`",
            ]
        )
    headers = ["study", "models", "ran on", "training (min)", "attacks (min)", "when, with what"]
    return table(headers, rows, align="lllrrl")


def accuracy_block(study_dir: Path) -> str:
    """Return mean accuracies over seeds of cross-entropy and of DR-softmax at the primary weight, per group."""
    tables = read_tables(study_dir)
    usable = included(tables["models"])
    wanted = {
        "clean": "clean_accuracy",
        "FGSM": "acc.fgsm@mean",
        "PGD": "acc.pgd@mean",
        "CW (torchattacks), no bound": "acc.cw_torchattacks@inf",
        "CW (torchattacks)": "acc.cw_torchattacks@mean",
        "CW (correct)": "acc.cw@mean",
    }
    rows = []
    for (data, model), group in usable.groupby(["data", "model"], sort=False):
        cells_of = of_group(tables["accuracy"], str(data), str(model))
        counts = [group["n_clean"].min() if "n_clean" in group else float("nan")]
        counts += [cells_of.loc[cells_of["attack"] == name, "n"].min() for name in ("pgd", "cw_torchattacks", "cw")]
        images = " / ".join(whole(number) for number in counts)
        primary = (group["loss"] == PRIMARY_LOSS) & (group["loss_weight"] == PRIMARY_WEIGHT)
        for name, part in (("CE", group[group["loss"] == "ce"]), (f"DR {PRIMARY_WEIGHT:g}", group[primary])):
            mark = f" {MARK}" if has_failed(part).any() else ""
            cells = [group_name(data, model), name + mark, str(len(part))]
            rows.append([*cells, images] + [_mean(part, column) for column in wanted.values()])
    text = table(["", "loss", "models", "images", *wanted], rows, align="llrl" + "r" * len(wanted))
    return text + _mark_note(text, study_dir)


def _mark_note(text: str, study_dir: Path) -> str:
    """Say below a table what a dagger in it means, with a link to the checks."""
    if MARK not in text:
        return ""
    link = section_link(study_dir, "Sanity checks")
    return (
        f"\n\n{MARK} A model of this loss fails at least one of the {link}: some number about it is in doubt, if only "
        "by an image or two."
    )


def survival_block(study_dir: Path) -> str:
    """Return, per group, the losses under PGD and under the worst case on the same images, and the time of a step.

    Of DR-softmax two weights: the published one and the best one (``best_weight``). The report has all of them.
    """
    tables = read_tables(study_dir)
    summary, worst = shown_gains(tables["comparators"]), included(tables["worst_case"])
    rows = []
    for (data, model), group in summary.groupby(["data", "model"], sort=False):
        mine = worst[(worst["data"] == data) & (worst["model"] == model) & (worst["norm"] == "linf")]
        bounds = ", ".join(dict.fromkeys(mine["epsilon_label"].astype(str)))
        ours, kept = mine[mine["loss"] == PRIMARY_LOSS], {PRIMARY_WEIGHT}
        if len(ours):
            baseline_clean = float(mine.loc[mine["loss"] == BASELINE, "clean"].mean())
            kept.add(best_weight(ours, baseline_clean, PRIMARY_WEIGHT))
        for setting in settings(group):
            if setting[0] == PRIMARY_LOSS and setting[1] not in kept:
                continue
            row = of_setting(group, setting).iloc[0]
            own = of_setting(mine, setting)
            means = [float(own[name].mean()) for name in ("clean", "pgd", "worst")]
            gains = [
                NONE if pd.isna(row.get(name)) else percent(float(row[name]), sign=True) + _bounds(row, name)
                for name in ("gain_pgd", "gain_worst")
            ]
            rows.append(
                [f"{group_name(data, model)}, ε {bounds}, {span(mine['n'].astype(int))} images"]
                + [marked_label(group, setting), str(int(row["n_seeds"]))]
                + [f"{percent(value)} %" for value in means]
                + [*gains, _step(of_group(tables["timing"], str(data), str(model)), setting[0])]
            )
    headers = ["", "loss", "models", "clean", "PGD", "worst case", "gain, PGD", "gain, worst case", "step"]
    text = table(headers, rows, align="llr")
    return text + _mark_note(text, study_dir)


def _step(timing: pd.DataFrame, loss: str) -> str:
    """Write the time of a training step with a loss, at any weight, over cross-entropy's."""
    if loss == BASELINE:
        return "× 1"
    rows = timing[(timing["loss"] == loss) & (timing["baseline"] == BASELINE)]
    return f"× {fixed(float(rows['ratio'].max()), 2)}" if rows["ratio"].notna().any() else NONE


def questions_block(study_dir: Path) -> str:
    """Return what was measured here on questions that the paper leaves open."""
    carried, combined = [], []
    summary = shown_gains(read_tables(study_dir)["comparators"])
    for (data, model), group in summary.groupby(["data", "model"], sort=False):
        where = group_name(str(data), str(model))
        mark = f" {MARK}" if has_failed(of_setting(group, (PRIMARY_LOSS, PRIMARY_WEIGHT))).any() else ""
        for _, row in of_setting(group, (PRIMARY_LOSS, PRIMARY_WEIGHT)).iterrows():
            gains = [percent(row[name], sign=True) + _bounds(row, name) for name in ("gain_pgd", "gain_worst")]
            pairs = int(row["n_pairs"]) if pd.notna(row["n_pairs"]) else 0
            carried.append(f"{where}{mark}: {gains[0]} points under PGD, {gains[1]} in the worst case, n = {pairs}")
        trained = [group[group["loss"] == name] for name in ("adversarial", f"adversarial+{PRIMARY_LOSS}")]
        if all(map(len, trained)):
            combined.append(f"{where}: {'; '.join(_standing(rows) for rows in trained)}")
    masking, everything = "How much of the gain is masking", "All losses and procedures"
    answers = [
        ("Other data and architectures: gain at the published weight", carried, section_link(study_dir, masking)),
        ("Together with adversarial training (AT)", combined, section_link(study_dir, everything)),
        (
            "Large label sets: time of the loss, forward and backward, against cross-entropy's",
            _label_sets(),
            "[benchmark](results/bench/REPORT.md)",
        ),
    ]
    cells = [[question, "<br>".join(lines) or NONE, link] for question, lines, link in answers]
    text = table(["question", "measured here", "evidence"], cells, align="l")
    return text + _mark_note(text, study_dir)


def _bounds(row: "pd.Series[Any]", name: str) -> str:
    return interval(*(percent(row[f"{name}_{end}"], sign=True) for end in ("low", "high")))


def _standing(rows: pd.DataFrame) -> str:
    row = rows.iloc[0]
    return (
        f"{marked_label(rows, (str(row['loss']), float(row['loss_weight'])))} {percent(row['mean.clean'])} % clean and "
        f"{percent(row['mean.worst_linf'])} % in the worst case (n = {int(row['n_seeds'])})"
    )


def _label_sets() -> list[str]:
    """Write the ratio of times for each size of the logits, as the benchmark measured it, on a CPU and on a GPU."""
    rows = pd.read_csv(BENCH)
    loss = rows["section"].isin(["loss", "gpu_loss"])
    wanted = rows[loss & rows["case"].str.startswith("forward and backward") & ~rows["tried"]]
    places = json.loads((BENCH.parent / "provenance.json").read_text(encoding="utf-8"))
    gpu = places.get("gpu_loss", {}).get("hardware", {}).get("gpu", "none")
    lines = []
    for case, sizes in wanted.groupby("case", sort=False):
        size = str(case).partition(", ")[2].replace(" x ", " × ")
        on_cpu = [
            f"{_ratio(row)} on {int(row['threads'])} thread{'s' if row['threads'] > 1 else ''}"
            for _, row in sizes[sizes["device"] == "cpu"].iterrows()
            if pd.notna(row["ratio"])
        ]
        on_gpu = [_ratio(row) for _, row in sizes[sizes["device"] == "cuda"].iterrows() if pd.notna(row["ratio"])]
        card = f"; {gpu}: {', '.join(on_gpu)}" if on_gpu else "; GPU: not measured"
        lines.append(f"{size} logits, CPU: {', '.join(on_cpu) or 'not measured'}{card}")
    return lines


def _ratio(row: pd.Series) -> str:
    return f"× {fixed(row['ratio'], 2)}{interval(fixed(row['low'], 2), fixed(row['high'], 2))}"


def _mean(models: pd.DataFrame, column: str) -> str:
    return percent(float(models[column].mean())) + " %" if column in models and len(models) else "–"


BLOCKS = {
    "claims": claims_block,
    "studies": studies_block,
    "accuracy": accuracy_block,
    "survival": survival_block,
    "questions": questions_block,
}
BESIDE = {"pairs": pairs_block, "weights": weights_block}
"""Blocks about another study than that which README.md is filled from."""


def fill(text: str, study_dir: Path) -> str:
    """Return ``text`` with what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` made from the study's tables.

    A block that there is nothing to make of stays as it is.

    Raises:
        UserError: If a pair of markers is missing.
    """
    blocks: dict[str, Callable[[Path], str | None]] = {**BLOCKS, **BESIDE}
    for name, make in blocks.items():
        pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise UserError(f"README.md: the markers <!-- {name} --> and <!-- /{name} --> must stand there once")
        made = make(study_dir)
        if made is not None:
            replacement = f"<!-- {name} -->\n{made}\n<!-- /{name} -->"
            # A function, because a backslash in a replacement string would be read as an escape.
            text = pattern.sub(partial(_constant, replacement), text)
    return text


def _constant(text: str, _: re.Match[str]) -> str:
    return text


def update_readme(readme: Path, study_dir: Path) -> bool:
    """Bring README.md up to date with a study; return whether it changed."""
    before = readme.read_text(encoding="utf-8")
    after = fill(before, study_dir)
    if after != before:
        with atomic_write(readme) as temporary:
            temporary.write_text(after, encoding="utf-8")
    return after != before
