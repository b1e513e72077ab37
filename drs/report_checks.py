"""The sections of REPORT.md on sanity checks, on what is left of a gain, and on all losses side by side."""

from typing import Any

import pandas as pd

from drs.figure_style import (
    MARK,
    attack_label,
    few_settings,
    groups,
    has_failed,
    included,
    not_shown,
    of_group,
    of_setting,
    setting_label,
)
from drs.markdown import NONE, escape, fixed, group_name, interval, percent, significant, table, whole
from drs.sanity_checks import CHECKS

MARK_NOTE = (
    f"A loss marked {MARK} has a model that fails at least one sanity check, and a hollow marker in a figure is such a "
    "model; the section on sanity checks says which."
)


def sanity_section(sanity: pd.DataFrame) -> str:
    """Return how many models of each setting pass each check, with the median figure, and what each check means."""
    if sanity.empty:
        return "No sanity check was run: they belong to the `strong` suite."
    kept = included(sanity)
    sections = [
        "Each model goes through these checks at its smallest decisive epsilon. A cell says how many models pass, out "
        "of those for which the check was run, and the median figure in %; a single sample never fails a check. A "
        "failed check does not make a model fragile: it says that some number about it cannot be trusted. Which model "
        "fails what, by how much and on how many images is in tables/sanity.csv."
    ]
    for data, model in groups(kept):
        group = of_group(kept, data, model)
        shown = few_settings(group)
        rows = []
        for name, check in CHECKS.items():
            cells = group[group["check"] == name]
            rows.append([escape(name), f"{100 * check.threshold:g}", *(_passes(cells, one) for one in shown)])
        headers = ["check", "at most (%)", *(escape(setting_label(*setting)) for setting in shown)]
        sections.append(f"### {group_name(data, model)}\n\n" + table(headers, rows, align="lr"))
        sections.append(not_shown(group, "sanity"))
    meanings = [[escape(name), escape(check.meaning)] for name, check in CHECKS.items()]
    sections.append("### What is checked\n\n" + table(["check", "figure"], meanings, align="l"))
    return "\n\n".join(filter(None, sections))


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


def _with_sd(row: pd.Series, name: str, scale: float) -> str:
    mean, sd = row.get(f"mean.{name}"), row.get(f"sd.{name}")
    if mean is None or pd.isna(mean):
        return NONE
    if scale == 1:
        return significant(mean) + ("" if pd.isna(sd) else f" ± {significant(sd)}")
    return percent(mean) + ("" if pd.isna(sd) else f" ± {percent(sd)}")


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
        "of the first that is left in the second. Means over pairs with 95 % t intervals; the share with Fieller's. A "
        "share without an interval is unbounded: the gain under PGD cannot be told from 0 with these seeds, or there "
        "is one pair; where PGD shows no gain there is no share. Claim C5 is decided on the row of the published "
        "weight."
    ]
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


def comparator_section(comparators: pd.DataFrame) -> str:
    """Return every loss and procedure in one table per group."""
    if comparators.empty or "mean.clean" not in comparators:
        return "No model was evaluated."
    sections = [
        "Robust accuracy in % at the decisive epsilons, mean ± standard deviation over seeds. Attacks that ran only on "
        "what others had left standing are not listed, since their rows are those of an ensemble; the worst case "
        "contains them. Norms are medians over images in pixel units. AT and TRADES are adversarial training: what "
        "robustness costs where it is trained for."
    ]
    names = ["clean", "fgsm", "pgd", "margin_pgd", "targeted_pgd", "transfer", "noise", "worst_linf", "worst_l2"]
    for data, model in groups(comparators):
        group = of_group(comparators, data, model)
        columns = {attack_label(name): (name, 100.0) for name in names if f"mean.{name}" in group}
        for name in ("fmn_linf", "fmn_l2", "cw"):
            if f"mean.norm.{name}" in group:
                columns[f"norm, {attack_label(name)}"] = (f"norm.{name}", 1.0)
        columns["training (s)"] = ("train_seconds", 1.0)
        columns = {label: own for label, own in columns.items() if group[f"mean.{own[0]}"].notna().any()}
        rows = []
        for index, row in _in_order(group):
            cells = [_with_sd(row, name, scale) for name, scale in columns.values()]
            rows.append([_name(group.loc[[index]], row), whole(row["n_seeds"]), *cells])
        sections.append(f"### {group_name(data, model)}\n\n" + table(["loss", "n seeds", *columns], rows))
        sections.append(not_shown(group, "comparators"))
    return "\n\n".join(filter(None, sections))
