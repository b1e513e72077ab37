"""The prose sections of REPORT.md: claims, failures, limits, provenance. Every number comes from the study's files."""

from typing import Any

import numpy as np
import pandas as pd

from drs.figure_plan import Tables
from drs.figure_style import (
    attack_label,
    attacks,
    count,
    few_settings,
    groups,
    included,
    is_excluded,
    marked_label,
    of_group,
    records,
    setting_label,
    span,
    wilson_interval,
)
from drs.markdown import NONE, escape, fixed, group_name, interval, percent, significant, table, whole
from drs.marks import MARK
from drs.shown_intervals import counts_images

MOST_RUNS = 50
"""How many single runs a list in the report has at most."""

_SCORING = """\
Robust accuracy is the share of **all** attacked samples that are still classified right after the attack; a sample
that is wrong when clean counts as a failure. Every adversarial batch is checked to be finite, inside the pixel range
and within epsilon. An exception inside an attack fails its cell; it is never scored as robust. The worst case is per
sample over the attacks of the same norm: a sample counts only if it withstands all of them. Minimal norms are in pixel
units; where an attack minimises a norm, robust accuracy at epsilon is the share of samples whose norm exceeds it."""

STRENGTHENED = (
    "The rules were fixed; what they are applied to was strengthened. After a first run of the reference studies had "
    "shown attacks to disagree or to end too early, settings of attacks were made stronger and a margin attack in L2 "
    "was added; later the sanity checks were made stricter, so that an image is no longer let off where n is small. "
    "One check was made easier to pass: `objective_gap` had set a climb on each of the other classes beside a single "
    "one on cross-entropy, so that even adversarially trained models failed it; now all objectives have equally many. "
    "And whether twice the steps or restarts find more was seen on a hundred images, where a single one fails the "
    "check, and is now seen on up to a thousand: models that had failed by one image may pass, and others fail."
)

_NO_TWIN = (
    "a transfer attack takes its perturbations from the cross-entropy model of the same data, architecture and seed, "
    "or for cross-entropy itself from one of another seed, and this study has none"
)
_POINTS, _RATIO, _COEFFICIENT, _SHARE = "points", "ratio", "ρ", "share"
_EFFECTS = {"C1": _COEFFICIENT, "C2": _POINTS, "C3": _RATIO, "C4": _COEFFICIENT, "C5": _SHARE}


def effect_text(claim: pd.Series) -> str:
    """Write a claim's effect in its unit with its 95 % interval: coefficient, percentage points or ratio."""
    kind = _EFFECTS.get(str(claim["claim"]), "")
    if pd.isna(claim["effect"]):
        return NONE
    values = claim["effect"], claim["ci_low"], claim["ci_high"]
    if kind == _POINTS:
        effect, low, high = (percent(value, sign=True) for value in values)
        return f"{effect}{interval(low, high)} points"
    if kind == _RATIO:
        effect, low, high = (fixed(value, 3) for value in values)
        return f"× {effect}{interval(low, high)}"
    effect, low, high = (fixed(value) for value in values)
    return f"{kind} = {effect}{interval(low, high)}" if kind else f"{effect}{interval(low, high)}"


def _more_images(tables: Tables) -> str:
    """Return in words that some checks saw more images than any attack of the suite."""
    most = tables["accuracy"].query("attack != 'clean'")["n"].max()
    more = tables["sanity"][tables["sanity"]["n"] > most] if "sanity" in tables else pd.DataFrame()
    if more.empty:
        return ""
    return f"; whether PGD has converged was checked on {int(more['n'].max())}"


def summary(tables: Tables, strong_suite: bool) -> str:
    """Return the opening paragraph: what was trained and attacked, and what became of each claim."""
    models, claims, attacked = tables["models"], tables["claims"], tables["accuracy"].query("attack != 'clean'")
    parts = [f"{group_name(d, m)} ({count(len(of_group(models, d, m)), 'model')})" for d, m in groups(models)]
    text = [
        f"This study compares {count(len(models), 'trained model')} on {' and '.join(parts)}, each attacked on "
        f"{int(attacked['n'].max())} test images or fewer{_more_images(tables)}."
    ]
    overall = claims[claims["data"] == "all"]
    for _, claim in overall.iterrows():
        single = claims[(claims["claim"] == claim["claim"]) & (claims["data"] != "all")]
        differ = single["verdict"].nunique() > 1
        each = "; ".join(f"{group_name(r.data, r.model)}: {escape(r.verdict)}" for r in records(single))
        effect = effect_text(claim)
        known = f" ({effect}, n = {whole(claim['n'])})" if effect != NONE else ""
        text.append(
            f"*{escape(claim['statement'])}* **{escape(str(claim['verdict']).capitalize())}**{known}"
            + (f" – {each}." if differ else ".")
        )
    if overall.empty:
        text.append("No claim was decided: the study has no claims table.")
    if not strong_suite:
        text.append(
            "The strong attacks were not run, so nothing here can show robustness: a gain may be gradient masking."
        )
    return " ".join(text)


def claims_section(claims: pd.DataFrame) -> str:
    """Return the claims table (overall rows), then one for each dataset and architecture."""
    if claims.empty:
        return "No claim was decided: the study has no claims table."
    headers = ["claim", "statement", "verdict", "effect [95 % interval]", "n", "evidence"]
    sections = []
    for data, model in sorted(groups(claims), key=lambda pair: pair[0] != "all"):
        rows = [
            [
                escape(row["claim"]),
                escape(row["statement"]),
                f"**{escape(row['verdict'])}**",
                effect_text(row),
                whole(row["n"]),
                escape(row["evidence"]),
            ]
            for _, row in of_group(claims, data, model).iterrows()
        ]
        title = "" if data == "all" else f"### {group_name(data, model)}\n\n"
        sections.append(title + table(headers, rows, align="llllrl"))
    return "\n\n".join(sections)


def failures_section(failures: pd.DataFrame, models: pd.DataFrame) -> str:
    """Return which runs failed and which models were kept out of correlations and claims, also when there are none."""
    out = models[is_excluded(models)]
    headers = ["group", "loss", "seed", "reason"]
    failed_rows = [
        [*_who(r), escape(r.reason) + ("" if pd.isna(r.epoch) else f" (epoch {whole(r.epoch)})")]
        for r in records(failures.iloc[:MOST_RUNS])
    ]
    out_rows = [
        [*_who(r), f"{escape(r.excluded)} (clean {percent(r.clean_accuracy)} %)"] for r in records(out.iloc[:MOST_RUNS])
    ]
    failed = (
        f"{count(len(failures), 'run')} failed, or {'has' if len(failures) == 1 else 'have'} no whole evaluation, and "
        f"enter{'s' if len(failures) == 1 else ''} no table as a model."
    )
    kept_out = (
        f"{len(out)} of {count(len(models), 'finished model')} {'is' if len(out) == 1 else 'are'} excluded from "
        "correlations, claims and means, and listed here."
    )
    return "\n\n".join(
        [
            failed if failed_rows else "No run failed.",
            *([table(headers, failed_rows, align="llrl")] if failed_rows else []),
            *_others(len(failures), "failures"),
            kept_out if out_rows else f"None of the {count(len(models), 'finished model')} is excluded.",
            *([table(headers, out_rows, align="llrl")] if out_rows else []),
            *_others(len(out), "models"),
        ]
    )


def _others(number: int, name: str) -> list[str]:
    """Say that a list of runs goes on in a table."""
    return [f"The other {number - MOST_RUNS} are in tables/{name}.csv."] if number > MOST_RUNS else []


def _who(row: Any) -> list[str]:
    """Return group, loss and seed of a run, or its id where its config cannot be read."""
    if pd.isna(row.data):
        return [f"run {escape(str(row.run_id))}", NONE, NONE]
    failed = str(getattr(row, "failed_checks", ""))
    label = setting_label(str(row.loss), float(row.loss_weight)) + (f" {MARK}" if failed else "")
    return [group_name(row.data, row.model), escape(label), whole(row.seed)]


def limits_section(tables: Tables, strong_suite: bool) -> str:
    """Return what the size of this study does not allow to say, computed from its tables."""
    models = tables["models"]
    both = "seeds and images" if counts_images(tables["paired_differences"]) else "the seeds"
    lines = []
    for data, model in groups(models):
        group = included(of_group(models, data, model))
        if group.empty:
            continue
        seeds = group.groupby(["loss", "loss_weight"])["seed"].nunique()
        cells = included(of_group(tables["accuracy"], data, model)).query("attack != 'clean'")
        bounds = [
            f"± {percent(np.ptp(wilson_interval([0.5], [n])) / 2)} points on {n} images "
            f"({', '.join(attack_label(name) for name in attacks(cells.loc[cells['n'] == n, 'attack']))})"
            for n in sorted((int(n) for n in cells["n"].unique()), reverse=True)
        ]
        lines.append(
            f"- {group_name(data, model)}: {count(len(group), 'model')}, {span(seeds)} seeds per loss and weight. At "
            f"worst, near 50 %, the images alone leave a single robust accuracy uncertain by {'; '.join(bounds)} "
            f"(Wilson 95 %). The interval of a difference between losses comes from {both}; few seeds make it wide."
        )
    lines.append(
        "- Correlations are over models that differ mostly in one weight: they show that two things move together "
        "along it, not that one makes the other."
    )
    if strong_suite:
        counts = included(tables["accuracy"]).groupby("attack")["n"].min()
        small = [f"{attack_label(str(name))} {n}" for name, n in counts.items() if n < counts.get("worst_linf", 0)]
        if small:
            lines.append(
                f"- Some attacks of the strong suite saw only the first images ({', '.join(sorted(small))}); beyond "
                "them the worst case is that of the others, so it can only be too high."
            )
    else:
        lines.append(
            "- Only the attacks of the `paper` suite were run. They cannot show robustness: a loss that flattens "
            "gradients passes them too. No verdict about robustness here can be better than “supported against weak "
            "attacks only”."
        )
    lines.append(
        "- CW (torchattacks) is listed because the paper's users run it. It masks the label by multiplying with zero "
        "and cannot move pixels that are exactly 0 or 1, so it overstates robustness; read it beside CW."
    )
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(inner) for inner in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rows(values: dict[str, Any]) -> list[list[str]]:
    return [[escape(key), escape(_value(value))] for key, value in values.items()]


def scoring_section(provenance: dict[str, Any], tables: Tables) -> str:
    """Return how robust accuracy is scored, the parameters of every attack, and which did not run for which models.

    Args:
        provenance: What provenance.json holds.
        tables: models.csv and accuracy.csv, for what ran.
    """
    parts = [_SCORING]
    if suites := provenance.get("suites"):
        parts.append(f"Suites: {escape(_value(suites))}.")
    if attacks := provenance.get("attacks"):
        rows = [[escape(attack_label(name)), escape(_value(values))] for name, values in attacks.items()]
        parts.append(table(["attack", "parameters"], rows, align="l"))
        parts += _not_run(attacks, tables)
    if epsilons := provenance.get("epsilons"):
        parts.append(table(["data", "epsilons (pixel range 0 to 1)"], _rows(epsilons), align="l"))
    if decisive := provenance.get("decisive_epsilons"):
        parts.append(table(["data", "decisive epsilons"], _rows(decisive), align="l"))
    if n_attacked := provenance.get("n_attacked"):
        parts.append(f"Attacked samples: {escape(_value(n_attacked))}.")
    if n_decisive := provenance.get("n_decisive"):
        parts.append(f"Samples of the attacks at the decisive epsilons: {escape(_value(n_decisive))}.")
    if halved := provenance.get("batches_halved"):
        rows = [[escape(cell), escape(sizes)] for cell, sizes in list(halved.items())[:MOST_RUNS]]
        parts.append(
            "A GPU's memory ran out under these attacks, and they went on in smaller batches. Random starts are drawn "
            "batch by batch and CW (torchattacks) stops on the total over a batch, so that these figures need not "
            "repeat exactly on another machine.\n\n" + table(["run and attack", "samples per batch"], rows, align="l")
        )
        if len(halved) > MOST_RUNS:
            parts.append(f"The other {len(halved) - MOST_RUNS} are in provenance.json.")
    if provenance.get("fast_search"):
        parts.append(
            "Attacks searched on copies of the models with batch normalisation, where there is any, folded into the "
            "convolutions, and on a card in float16 between the first layer and the last (in TF32 where that is not "
            "like the model). What they found was judged on the models themselves in float32; images that still stood "
            "there, but not clearly on the copy, were attacked again on the model. An attack that returns the clean "
            "image where it fooled nothing (APGD, Square) does not show how near it came, so that an image at the edge "
            "may fall by one search and not by the other. What ended on a copy's decision boundary (CW with binary "
            "search, FMN, FAB) was brought to the model's. HopSkipJump was on the models, in float32, and so were the "
            "sanity checks that rescale logits or look at each iterate."
        )
    if sanity := provenance.get("sanity"):
        parts.append(f"Sanity checks: {escape(_value(sanity))}.")
    return "\n\n".join(parts)


def _not_run(attacks: dict[str, dict[str, Any]], tables: Tables) -> list[str]:
    """Return a list of the attacks of a suite that did not run for some models, with the reason where it is known."""
    models, accuracy = tables["models"], tables["accuracy"]
    lines = []
    for name, values in attacks.items():
        seen = set(accuracy.loc[accuracy["attack"] == name, "run_id"])
        for data, model in groups(models):
            group = of_group(models, data, model)
            without = group[~group["run_id"].isin(seen)]
            if without.empty:
                continue
            which = ", ".join(escape(marked_label(without, setting)) for setting in few_settings(without))
            why = f": {_NO_TWIN}" if values.get("kind") == "transfer" else ""
            lines.append(
                f"- {escape(attack_label(name))} did not run for {len(without)} of {count(len(group), 'model')} of "
                f"{group_name(data, model)} ({which}){why}."
            )
    return ["Not every attack ran for every model:\n\n" + "\n".join(lines)] if lines else []


def provenance_section(provenance: dict[str, Any]) -> str:
    """Return commit, date, versions, hardware, wall time and data digests, as far as they are known."""
    if not provenance:
        return "Not recorded: the study has no provenance.json."
    facts: dict[str, Any] = {}
    if commit := provenance.get("commit"):
        facts["commit"] = f"{commit}, with uncommitted changes" if provenance.get("dirty") else commit
    for key in ("created", "versions", "hardware"):
        if key in provenance:
            facts[key] = provenance[key]
    for stage, seconds in (provenance.get("wall_seconds") or {}).items():
        known = isinstance(seconds, int | float)
        facts[f"wall time, {stage}"] = f"{significant(seconds)} s" if known else seconds
    parts = [table(["what", "value"], _rows(facts), align="l")]
    keys = ("images", "labels")
    digests = [
        [escape(name), escape(split), *(escape(content.get(key, "")) for key in keys)]
        for name, splits in (provenance.get("data") or {}).items()
        for split, content in splits.items()
    ]
    if digests:
        parts.append(table(["data", "split", *(f"SHA-256 of the {key}" for key in keys)], digests, align="l"))
    return "\n\n".join(parts)
