"""The section of REPORT.md with all losses and procedures side by side, under every attack that decides."""

from typing import Any

import pandas as pd

from drs.figure_style import (
    attack_label,
    attacks,
    few_settings,
    groups,
    included,
    marked_label,
    not_shown,
    of_group,
    of_setting,
)
from drs.markdown import NONE, escape, group_name, percent, significant, table, whole
from drs.report_images import INTERVALS, MEDIANS, ImageCounts

INTRO = (
    "Robust accuracy in % at the decisive epsilons, mean ± standard deviation over seeds, under every attack that the "
    "worst cases are taken over. Of attacks that run one after another, each sees only what those of its norm before "
    "it, the ones on their own included, have left standing: its column is what is left after all of them, and the "
    f"worst case contains them. {INTERVALS} Norms are medians over images in pixel units. {MEDIANS} AT and TRADES are "
    "adversarial training: what robustness costs where it is trained for. Losses may be trained on different numbers "
    "of images, so the last column has the time for 10 000 of them."
)


TIMES = {"train_seconds": "training (s)", "seconds_10k": "training, for 10 000 images (s)"}
"""Columns of training times, with their titles."""


def comparator_section(comparators: pd.DataFrame, accuracy: pd.DataFrame) -> str:
    """Return every loss and procedure, in tables by norm and kind of attack, for each dataset and architecture.

    Args:
        comparators: comparators.csv.
        accuracy: accuracy.csv, for each attack's norm, its number of images and whether it ran on its own.
    """
    if comparators.empty or "mean.clean" not in comparators:
        return "No model was evaluated."
    sections = [INTRO]
    for data, model in groups(comparators):
        group = of_group(comparators, data, model)
        group = group.loc[:, group.notna().any()]
        cells = included(of_group(accuracy, data, model))
        sections.append(f"### {group_name(data, model)}")
        for title, columns in _columns(group, cells).items():
            sections.append(f"#### {title}\n\n{_table(group, columns, ImageCounts.of(cells))}")
        sections.append(not_shown(group, "comparators"))
    return "\n\n".join(filter(None, sections))


def _columns(group: pd.DataFrame, cells: pd.DataFrame) -> dict[str, list[str]]:
    """Return what each table of a group shows, ``x`` of ``mean.<x>``, under the title of the table."""
    known = [name.removeprefix("mean.") for name in map(str, group) if name.startswith("mean.")]
    every = attacks(name for name in known if name not in ("clean", *TIMES) and not name.startswith("norm."))
    in_l2 = set(cells.loc[cells["norm"] == "l2", "attack"])
    after = set(cells.loc[cells["cumulative"].astype(str) == "True", "attack"])
    tables: dict[str, list[str]] = {}
    for norm, own in (("L∞", [n for n in every if n not in in_l2]), ("L2", [n for n in every if n in in_l2])):
        alone = [name for name in own if name not in after]
        tables[f"{norm}, each attack on its own"] = ["clean", *alone]
        if len(alone) < len(own):
            worst = [name for name in alone if name.startswith("worst")]
            tables[f"{norm}, one attack after another"] = [*(name for name in own if name in after), *worst]
    norms = [name for name in known if name.startswith("norm.")]
    tables["Minimal norms and time"] = [*norms, *(name for name in known if name in TIMES)]
    return {title: columns for title, columns in tables.items() if columns != ["clean"]}


def _table(group: pd.DataFrame, columns: list[str], images: ImageCounts) -> str:
    heads = [_head(name, images) for name in columns]
    rows = []
    for setting in few_settings(group):
        row = of_setting(group, setting).iloc[0]
        cells = [_cell(row, name, images) for name in columns]
        rows.append([escape(marked_label(group, setting)), whole(row["n_seeds"]), *cells])
    return table(["loss", "n seeds", *heads], rows)


def _head(name: str, images: ImageCounts) -> str:
    if name in TIMES:
        return TIMES[name]
    attack = name.removeprefix("norm.")
    return images.title(f"norm, {attack_label(attack)}" if name != attack else attack_label(attack), attack)


def _cell(row: "pd.Series[Any]", name: str, images: ImageCounts) -> str:
    attack = name.removeprefix("norm.")
    if name != attack and (instead := images.too_few(attack)):
        return instead
    mean, sd = row[f"mean.{name}"], row[f"sd.{name}"] if f"sd.{name}" in row else float("nan")
    if pd.isna(mean):
        return NONE
    if name in TIMES or name != attack:
        return significant(mean) + ("" if pd.isna(sd) else f" ± {significant(sd)}")
    return percent(mean) + ("" if pd.isna(sd) else f" ± {percent(sd)}") + images.bounds(mean, attack)
