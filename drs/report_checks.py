"""The sections of REPORT.md on sanity checks and on what is left of a gain."""

from typing import Any

import pandas as pd

from drs.figure_style import (
    MARK,
    few_settings,
    groups,
    has_failed,
    included,
    marked_label,
    not_shown,
    of_group,
    of_setting,
    setting_label,
)
from drs.markdown import NONE, escape, fixed, group_name, interval, percent, table, whole
from drs.sanity_checks import CHECKS
from drs.shown_intervals import kind_of_interval, shown_gains

TOO_FEW = "‡"  # after a figure that is one image, above the threshold


def sanity_section(sanity: pd.DataFrame) -> str:
    """Return how many models of each setting pass each check, with the median figure, and what each check means."""
    if sanity.empty:
        return "No sanity check was run: they belong to the `strong` suite."
    kept = included(sanity)
    sections = [
        "Each model goes through these checks at its smallest decisive epsilon, on its first n images. A cell says how "
        "many models pass, out of those for which the check was run, and the median figure in %. A check passes up to "
        "its threshold, or with one image where that is more and the threshold is not 0: *at most* says which at this "
        f"n. Where it is one image (marked {TOO_FEW}), n is too small to tell the threshold from one image, and a pass "
        "says only that no more than one image was found. A failed check does not make a model fragile: it says that "
        "some number about it cannot be trusted. Which model fails what, by how much and on how many images is in "
        "tables/sanity.csv."
    ]
    for data, model in groups(kept):
        group = of_group(kept, data, model)
        shown = few_settings(group)
        rows = []
        for name in CHECKS:
            cells = group[group["check"] == name]
            rows.append([escape(name), *_allowed(cells), *(_passes(cells, one) for one in shown)])
        headers = ["check", "n", "at most (%)", *(escape(marked_label(group, setting)) for setting in shown)]
        sections.append(f"### {group_name(data, model)}\n\n" + table(headers, rows, align="lrr"))
        sections.append(not_shown(group, "sanity"))
    meanings = [[escape(name), escape(check.meaning), f"{100 * check.threshold:g}"] for name, check in CHECKS.items()]
    sections.append("### What is checked\n\n" + table(["check", "figure", "threshold (%)"], meanings, align="llr"))
    return "\n\n".join(filter(None, sections))


def _allowed(cells: pd.DataFrame) -> tuple[str, str]:
    """Return on how many images a check of some models was run, and up to which figure in % it passes there."""
    run = cells[cells["passed"].isin(["pass", "fail"])]
    if run.empty:
        return NONE, NONE
    mark = f" {TOO_FEW}" if (run["allowed"] > run["threshold"]).any() else ""
    return _span(run["n"], 0), _span(100 * run["allowed"], 1) + mark


def _span(values: pd.Series, digits: int) -> str:
    low, high = fixed(values.min(), digits), fixed(values.max(), digits)
    return low if low == high else f"{low} to {high}"


def _passes(cells: pd.DataFrame, setting: tuple[str, float]) -> str:
    own = of_setting(cells, setting)
    run = own[own["passed"].isin(["pass", "fail"])]
    if run.empty:
        return "not run"
    passed = int((run["passed"] == "pass").sum())
    text = f"{passed}/{len(run)} ({100 * float(run['figure'].median()):.1f})"
    return text if passed == len(run) else f"**{text}**"


def _name(rows: pd.DataFrame, row: Any) -> str:
    mark = f" {MARK}" if has_failed(rows[rows.index == row.name]).any() else ""
    return escape(setting_label(str(row["loss"]), float(row["loss_weight"])) + mark)


def _in_order(group: pd.DataFrame) -> list[tuple[Any, pd.Series]]:
    """Return the rows of a group, of many some, in the order in which figures list their settings."""
    return [item for setting in few_settings(group) for item in of_setting(group, setting).iterrows()]


def _points(row: pd.Series, name: str) -> str:
    if pd.isna(row.get(name)):
        return NONE
    low, high = (percent(row[f"{name}_{end}"], sign=True) for end in ("low", "high"))
    return percent(row[name], sign=True) + interval(low, high)


def masking_section(comparators: pd.DataFrame) -> str:
    """Return, for every loss against cross-entropy, the PGD gain, the worst-case gain and the share that is left."""
    if comparators.empty or "gain_pgd" not in comparators:
        return "Nothing was paired with cross-entropy."
    sections = [
        "Gain over cross-entropy at the same seed, in percentage points, on the same images and at the decisive "
        "epsilons: under the PGD of the `paper` suite, under the worst case per sample of all attacks, and the share "
        f"of the first that is left in the second. Means over pairs with {kind_of_interval(comparators)}; the share "
        "with Fieller's of that kind. A share without an interval is unbounded: the gain under PGD cannot be told from "
        "0, or there is one pair; where PGD shows no gain there is no share. Claim C5 is decided on the row of the "
        "published weight. Intervals over seeds alone are in tables/comparators.csv."
    ]
    comparators = shown_gains(comparators)
    for data, model in groups(comparators):
        group = of_group(comparators, data, model)
        rows = []
        for index, row in _in_order(group):
            if pd.isna(row["n_pairs"]) or not row["n_pairs"]:
                continue
            share = NONE
            if row["gain_pgd"] > 0:
                share = fixed(row["share"]) + interval(fixed(row["share_low"]), fixed(row["share_high"]))
            failed = "" if pd.isna(row["failed_checks"]) else str(row["failed_checks"])
            named = _name(group.loc[[index]], row)
            rows.append(
                [named, whole(row["n_pairs"]), whole(row["n_images"]), _points(row, "gain_pgd")]
                + [_points(row, "gain_worst"), share, escape(failed) or "none"]
            )
        headers = ["loss", "n pairs", "images", "PGD", "worst case L∞", "share left", "failed checks (models)"]
        sections.append(f"### {group_name(data, model)}\n\n" + table(headers, rows, align="lrrrrrl"))
        sections.append(not_shown(group, "comparators"))
    return "\n\n".join(filter(None, sections))
