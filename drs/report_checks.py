"""The sections of REPORT.md on sanity checks and on what is left of a gain."""

from typing import Any

import pandas as pd

from drs.figure_style import (
    MARK,
    count,
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
from drs.sanity_checks import CHECKS, Check, unseen_share
from drs.shown_intervals import kind_of_interval, shown_gains

TOO_FEW = "‡"  # after a number of images that can show gross masking only
GROSS = 0.1
"""Where a larger share of all images than this may show what none of the n images does, n is too few for a check."""


def sanity_section(sanity: pd.DataFrame) -> str:
    """Return how many models of each setting pass each check, with the median figure, and what each check means."""
    if sanity.empty:
        return "No sanity check was run: they belong to the `strong` suite."
    kept = included(sanity)
    unmarked = [escape(name) for name, check in CHECKS.items() if not check.marks]
    sections = [
        "Each model goes through these checks at its smallest decisive epsilon, on its first n images. A cell says how "
        "many models pass, out of those for which the check was run, and the median figure in %. *Passes at* is the "
        "threshold in %; where one image of n is more, one image fails the check. *Unseen* is what a pass leaves open: "
        "where none of n images shows something, up to so many % of all images may (the upper end of Wilson's 95 % "
        "interval). A failed check does not make a model fragile: it says that some number about it cannot be trusted. "
        f"Neither {' nor '.join(unmarked)} marks a model where it is named: an attack that gets weaker fails them too, "
        "as on nearly every honest model where logits are rescaled, and what could overstate robustness is a check of "
        "its own. "
        "Which model fails what, by how much, on how many images and with which interval is in tables/sanity.csv."
    ]
    for data, model in groups(kept):
        group = of_group(kept, data, model)
        shown = few_settings(group)
        rows = []
        for name, check in CHECKS.items():
            cells = group[group["check"] == name]
            rows.append([escape(name), *_images(cells), _bound(check), *(_passes(cells, one) for one in shown)])
        headers = ["check", "n images", "unseen (%)", "passes at (%)"]
        headers += [escape(marked_label(group, setting)) for setting in shown]
        sections.append(f"### {group_name(data, model)}\n\n" + table(headers, rows, align="lrrr"))
        sections.append(_too_few(group))
        sections.append(not_shown(group, "sanity"))
    meanings = [[escape(name), escape(check.meaning), _bound(check)] for name, check in CHECKS.items()]
    sections.append("### What is checked\n\n" + table(["check", "figure", "passes at (%)"], meanings, align="llr"))
    return "\n\n".join(filter(None, sections))


def _bound(check: Check) -> str:
    return ("< " if check.below else "≤ " if check.threshold else "") + f"{100 * check.threshold:g}"


def _run(cells: pd.DataFrame) -> pd.DataFrame:
    return cells[cells["passed"].isin(["pass", "fail"])]


def _images(cells: pd.DataFrame) -> tuple[str, str]:
    """Return on how many images a check of some models was run, and what share in % none of them could show."""
    counts = _run(cells)["n"]
    if counts.empty:
        return NONE, NONE
    shares = counts[counts > 0].map(unseen_share)
    mark = f" {TOO_FEW}" if (shares > GROSS).any() else ""
    return _span(counts, 0) + mark, _span(100 * shares, 1)


def _too_few(group: pd.DataFrame) -> str:
    """Say which checks of a group ran on so few images that they can show gross masking only."""
    run = _run(group)
    few = run[(run["n"] > 0) & (run["n"].clip(lower=1).map(unseen_share) > GROSS)]
    if few.empty:
        return ""
    told = [
        f"{escape(name)} on {_span(few.loc[few['check'] == name, 'n'], 0)} images "
        f"({count(few.loc[few['check'] == name, 'run_id'].nunique(), 'model')})"
        for name in CHECKS
        if (few["check"] == name).any()
    ]
    return f"{TOO_FEW} So few images can only show gross masking: {'; '.join(told)}."


def _span(values: pd.Series, digits: int) -> str:
    low, high = fixed(values.min(), digits), fixed(values.max(), digits)
    return low if low == high else f"{low} to {high}"


def _passes(cells: pd.DataFrame, setting: tuple[str, float]) -> str:
    own = of_setting(cells, setting)
    run = _run(own)
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
