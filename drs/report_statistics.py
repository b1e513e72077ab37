"""The sections of REPORT.md on partial, granulated and per-sample correlations: their tables -> Markdown."""

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
    records,
    span,
)
from drs.markdown import NONE, escape, fixed, group_name, interval, mean_sd, model_count, probability, table, whole
from drs.partial import ALL_CONTROLS, CONTROLS
from drs.verdicts import PRIMARY_STATISTIC

MARGIN = "margin"


def _coefficient(row: Any, *, bounds: bool = True) -> str:
    if row is None or pd.isna(row.coefficient):
        return NONE
    return fixed(row.coefficient) + (interval(fixed(row.ci_low), fixed(row.ci_high)) if bounds else "")


def _accuracy(attack: str) -> str:
    return attack_label(attack.removesuffix("@mean"))


def _by(cells: pd.DataFrame, key: str) -> dict[str, Any]:
    return {str(getattr(row, key)): row for row in records(cells)}


def _strongest_other(cells: pd.DataFrame) -> Any:
    """Return the row of the largest absolute coefficient of a statistic other than the primary one, or None."""
    others = cells[cells["statistic"] != PRIMARY_STATISTIC].dropna(subset=["coefficient"])
    return records(others.loc[[others["coefficient"].abs().idxmax()]])[0] if len(others) else None


def _two_tables(primary: list[list[str]], headers: list[str], others: list[list[str]], other_headers: list[str]) -> str:
    """Return the primary statistic's table, and below it that of the strongest other statistic."""
    first = table(headers, primary, align="llr") if primary else "The primary statistic has no coefficient."
    second = table(other_headers, others, align="lllr") if others else "No other statistic has a coefficient."
    return "\n\n".join(
        [f"### The primary statistic, {escape(PRIMARY_STATISTIC)}", first, "### The strongest other statistic", second]
    )


def partial_section(partial: pd.DataFrame) -> str:
    """Return the primary statistic's partial correlations, and the strongest other statistic's, for each attack.

    Args:
        partial: The table of ``drs.partial.partial_correlation_table``.
    """
    known = partial[partial["coefficient"].notna()]
    if known.empty:
        return "Too few models for a partial correlation in any group."
    primary, others = [], []
    for data, model in groups(known):
        group = of_group(partial, data, model)
        for attack in attacks(group["attack"]):
            cells = group[group["attack"] == attack]
            named = [group_name(data, model), _accuracy(attack)]
            own = _by(cells[cells["statistic"] == PRIMARY_STATISTIC], "controls")
            whole_set = own.get(ALL_CONTROLS)
            if own:
                primary.append(
                    [*named, model_count(next(iter(own.values()))), _coefficient(whole_set)]
                    + [probability(whole_set.p_value if whole_set else float("nan"))]
                    + [probability(whole_set.q_value if whole_set else float("nan"))]
                    + [_coefficient(own.get(name), bounds=False) for name in CONTROLS]
                )
            best = _strongest_other(cells[cells["controls"] == ALL_CONTROLS])
            if best is not None:
                others.append(
                    [*named, escape(best.statistic), model_count(best), _coefficient(best), probability(best.q_value)]
                )
    intro = (
        "Does the statistic say more about robustness than clean accuracy, margin and logit norm say already? "
        "Spearman's partial correlation over models: near 0, what the controls leave over is unrelated. Like those of "
        "the plain ones, 95 % intervals and Freedman–Lane permutation p are over settings, which seeds only repeat; "
        "Benjamini–Hochberg q over tables/partial_correlations.csv. With few settings and many controls there is no p."
    )
    headers = ["group", "accuracy", "n", "given all three", "p", "q", "given clean accuracy", "given margin"]
    other_headers = ["group", "accuracy", "strongest other", "n", "given all three", "q"]
    return intro + "\n\n" + _two_tables(primary, [*headers, "given logit norm"], others, other_headers)


def granulated_section(granulated: pd.DataFrame) -> str:
    """Return the primary statistic's granulated coefficients by axis, and the strongest other's, for each accuracy.

    Args:
        granulated: The table of ``drs.granulated.granulated_table``.
    """
    known = granulated[granulated["coefficient"].notna()]
    if known.empty:
        return "No two models of a group differ in one hyper-parameter only."
    primary, others = [], []
    for data, model in groups(known):
        group = of_group(granulated, data, model)
        for attack in attacks(group["attack"]):
            cells = group[group["attack"] == attack]
            named = [group_name(data, model), _accuracy(attack)]
            own = _by(cells[cells["statistic"] == PRIMARY_STATISTIC], "axis")
            mean = own.get("granulated")
            if mean is not None:
                primary.append(
                    [*named, str(mean.n_models), _coefficient(mean), probability(mean.p_value)]
                    + [_with_p(own.get(axis)) for axis in ("weight", "seed", "loss")]
                )
            best = _strongest_other(cells[cells["axis"] == "granulated"])
            if best is not None:
                others.append(
                    [*named, escape(best.statistic), str(best.n_models), _coefficient(best), probability(best.p_value)]
                )
    intro = (
        "Kendall's coefficient over pairs of models that differ in one thing only: the loss's weight, or the seed; "
        "the granulated one is the mean of the two. Cross-entropy against another loss is shown beside them and does "
        "not enter: two clusters alone make that one ±1. Intervals (jackknife over seeds) speak of new seeds at these "
        "settings; p permutes weights and seeds as wholes, so it cannot be small where there are few."
    )
    headers = ["group", "accuracy", "n", "granulated", "p", "between weights", "between seeds", "CE against others"]
    other_headers = ["group", "accuracy", "strongest other", "n", "granulated", "p, not corrected for the choice"]
    return intro + "\n\n" + _two_tables(primary, headers, others, other_headers)


def _with_p(row: Any) -> str:
    if row is None or pd.isna(row.coefficient):
        return NONE
    return f"{fixed(row.coefficient)} (p {probability(row.p_value)})"


def sample_correlation_section(sample_correlations: pd.DataFrame) -> str:
    """Return the per-sample correlations of the primary statistic and the margin, mean ± sd over a setting's models.

    Args:
        sample_correlations: A row per model, attack and statistic: the columns that name a model, ``attack``, the
            keys of ``drs.sample_correlation.sample_correlation_rows``, and ``excluded``.
    """
    shown = [PRIMARY_STATISTIC, MARGIN]
    kept = included(sample_correlations)
    kept = kept[kept["statistic"].isin(shown)]
    if kept.empty:
        return "No attack looked for minimal perturbations."
    rows, notes = [], []
    for data, model in groups(kept):
        group = of_group(kept, data, model)
        notes.append(not_shown(group, "sample_correlations"))
        for attack in attacks(group["attack"]):
            at = group[group["attack"] == attack]
            for setting in few_settings(at):
                cells = of_setting(at, setting)
                one = cells[cells["statistic"] == cells["statistic"].iloc[0]]  # counts are the same for every one
                rows.append(
                    [group_name(data, model), attack_label(attack), escape(marked_label(at, setting)), str(len(one))]
                    + [span(one["n"]), whole(one["n_not_found"].sum())]
                    + [mean_sd(cells.loc[cells["statistic"] == name, "coefficient"], digits=2) for name in shown]
                )
    intro = (
        "Inside one model: Spearman's correlation over test images of the clean statistic with the norm of the "
        "smallest perturbation found, mean ± standard deviation over models. Near 0, the statistic does not tell "
        "which images are easy to attack; the margin is the yardstick. Images that are wrong already, and "
        "those on which the attack found nothing, are left out; the latter are counted (not found, over all models)."
    )
    headers = ["group", "attack", "loss", "n models", "images each", "not found", escape(PRIMARY_STATISTIC), MARGIN]
    return "\n\n".join(filter(None, [intro, table(headers, rows, align="lllr"), *dict.fromkeys(notes)]))
