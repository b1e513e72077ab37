"""The tables of REPORT.md: a study's tables -> Markdown, reduced to means and spreads over seeds."""

from typing import Any

import pandas as pd

from drs.figure_matrices import landing_rows
from drs.figure_style import (
    IN_PANELS,
    Setting,
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
    setting_label,
    span,
)
from drs.markdown import (
    NONE,
    escape,
    fixed,
    group_name,
    interval,
    mean_sd,
    model_count,
    percent,
    probability,
    significant,
    table,
    whole,
)
from drs.paired import BASELINE
from drs.report_images import INTERVALS, MEDIANS, ImageCounts
from drs.shown_intervals import counts_images, kind_of_interval, shown_differences
from drs.verdicts import PRIMARY_STATISTIC


def models_section(models: pd.DataFrame, accuracy: pd.DataFrame) -> str:
    """Return, per dataset and architecture, mean ± sd over seeds of each loss and weight: accuracies, norms and time.

    Args:
        models: models.csv.
        accuracy: accuracy.csv, for the number of images of each attack.
    """
    sections = [
        "Mean ± standard deviation over seeds, excluded models left out; attacks: mean over their epsilons. "
        f"{INTERVALS} {MEDIANS}"
    ]
    for data, model in groups(models):
        group = included(of_group(models, data, model))
        images = ImageCounts.of(included(of_group(accuracy, data, model)))
        names = [str(name) for name in group.columns if group[name].notna().any()]
        shares = [name.removeprefix("acc.") for name in names if name.startswith("acc.") and name.endswith("@mean")]
        shown = [name for name in map(_without_mean, attacks(shares)) if name in IN_PANELS]
        norms = [name.removeprefix("norm.") for name in names if name.startswith("norm.")]
        rows = []
        for setting in few_settings(group):
            seeds = of_setting(group, setting)
            cells = [mean_sd(seeds["clean_accuracy"], scale=100.0)]
            cells += [images.share(seeds[f"acc.{name}@mean"], name) for name in shown]
            cells += [images.norm(seeds[f"norm.{name}"], name) for name in norms]
            cells.append(mean_sd(seeds["train_seconds"], digits=None))
            rows.append([escape(marked_label(group, setting)), str(seeds["seed"].nunique()), *cells])
        heads = ["clean (%)", *(images.title(f"{attack_label(name)} (%)", name) for name in shown)]
        heads += [images.title(f"median norm, {attack_label(name)}", name) for name in norms]
        body = table(["loss", "n seeds", *heads, "training (s)"], rows) if rows else "Every model is excluded."
        sections += [f"### {group_name(data, model)}\n\n{body}", not_shown(group, "models")]
    return "\n\n".join(filter(None, sections))


def _without_mean(column: str) -> str:
    return column.removesuffix("@mean")


def accuracy_section(accuracy: pd.DataFrame) -> str:
    """Return robust accuracy in % by attack and epsilon (rows) and loss (columns), mean ± sd over seeds."""
    sections = [
        "Robust accuracy in %, mean ± standard deviation over seeds; a clean error counts as a failure. An attack "
        "marked “and all above” ran on what the attacks of its norm above it had left standing, so its row is what is "
        f"left after all of them. {INTERVALS}"
    ]
    for data, model in groups(accuracy):
        group = included(of_group(accuracy, data, model))
        images = ImageCounts.of(group)
        shown = few_settings(group)
        rows = []
        cumulative = set(group.loc[group["cumulative"].astype(str) == "True", "attack"])
        for attack in attacks(group["attack"]):
            cells = group[group["attack"] == attack]
            name = attack_label(attack) + (" (and all above)" if attack in cumulative else "")
            for label in cells.sort_values("epsilon")["epsilon_label"].drop_duplicates():
                at = cells[cells["epsilon_label"] == label]
                values = [images.share(of_setting(at, setting)["robust_accuracy"], attack) for setting in shown]
                epsilon = "" if attack == "clean" else "∞" if label == "inf" else escape(label)
                rows.append([name, epsilon, *values, span(at["n"])])
        headers = ["attack", "ε", *(escape(marked_label(group, setting)) for setting in shown), "n images"]
        sections += [f"### {group_name(data, model)}\n\n" + table(headers, rows), not_shown(group, "accuracy")]
    return "\n\n".join(filter(None, sections))


def differences_section(differences: pd.DataFrame, accuracy: pd.DataFrame) -> str:
    """Return the differences to CE, paired by seed: percentage points, and pixel units for a minimal norm.

    Args:
        differences: paired_differences.csv.
        accuracy: accuracy.csv, for the number of images of each attack.
    """
    short = differences[~differences["attack"].astype(str).str.contains(r"@(?!mean$)", regex=True)]
    if short.empty:
        return "No pair of models shares a seed with cross-entropy, so there is no paired difference."
    alone = ", but of clean accuracy and norms over seeds alone" if counts_images(short) else ""
    short = shown_differences(short)
    sections = [
        "Difference to cross-entropy at the same seed, mean over n pairs: percentage points of accuracy, pixel units "
        "for a median minimal norm. A loss under adversarial training is compared with that as well. In brackets are "
        f"{kind_of_interval(short)}{alone}; there is none where all seeds differ by the same. An attack that saw fewer "
        f"images than the worst case has their number n beside it. {MEDIANS} Single epsilons, and all intervals over "
        "seeds alone, are in tables/paired_differences.csv."
    ]
    for data, model in groups(short):
        group = of_group(short, data, model)
        images = ImageCounts.of(included(of_group(accuracy, data, model)))
        kept = ("clean", "norm", *IN_PANELS)
        columns = [
            name for name in attacks(group["attack"].astype(str)) if name.partition("@")[0].partition(".")[0] in kept
        ]
        rows = []
        for setting, baseline in _compared(group):
            cells = of_setting(group, setting)
            cells = cells[cells["baseline"] == baseline].set_index("attack")
            against = "" if baseline == BASELINE else f", against {setting_label(baseline, 0.0)}"
            row = [escape(marked_label(group, setting) + against), span(cells["n_pairs"])]
            for name in columns:
                if name not in cells.index:
                    row.append(NONE)
                    continue
                if name.startswith("norm.") and (instead := images.too_few(name.removeprefix("norm."))):
                    row.append(instead)
                    continue
                values = [float(cells[key][name]) for key in ("difference", "ci_low", "ci_high")]
                if name.startswith("norm."):
                    effect, low, high = (fixed(value, 3, sign=True) for value in values)
                else:
                    effect, low, high = (percent(value, sign=True) for value in values)
                row.append(effect + interval(low, high))
            rows.append(row)
        names = [
            images.title(f"median norm, {attack_label(attack)}", attack)
            if name.startswith("norm.")
            else images.title(attack_label(attack), attack)
            for name, attack in ((name, name.removeprefix("norm.").removesuffix("@mean")) for name in columns)
        ]
        sections.append(f"### {group_name(data, model)}\n\n" + table(["loss", "n pairs", *names], rows))
        sections.append(not_shown(group, "paired_differences"))
    return "\n\n".join(filter(None, sections))


def _compared(group: pd.DataFrame) -> list[tuple[Setting, str]]:
    """Return what is shown of a group's differences: settings with their baselines, cross-entropy first."""
    shown = few_settings(group)
    pairs = [(setting, baseline) for setting in shown for baseline in of_setting(group, setting)["baseline"].unique()]
    return sorted(pairs, key=lambda pair: pair[1] != BASELINE)


def _coefficient(row: Any) -> str:
    if row is None or pd.isna(row.coefficient):
        return NONE
    return fixed(row.coefficient) + interval(fixed(row.ci_low), fixed(row.ci_high))


def correlations_section(correlations: pd.DataFrame) -> str:
    """Return the primary statistic with all three coefficients, and the strongest other statistic for each attack."""
    rows = correlations[(correlations["attack"] == "clean") | correlations["attack"].astype(str).str.endswith("@mean")]
    if rows.empty:
        return "Too few models for a correlation in any group."
    primary, strongest = [], []
    for data, model in groups(rows):
        group = of_group(rows, data, model)
        for attack in attacks(group["attack"]):
            cells = group[group["attack"] == attack]
            own = {row.method: row for row in records(cells[cells["statistic"] == PRIMARY_STATISTIC])}
            spearman = own.get("spearman")
            if spearman is not None:
                primary.append(
                    [group_name(data, model), attack_label(attack.removesuffix("@mean")), model_count(spearman)]
                    + [_coefficient(own.get(method)) for method in ("spearman", "pearson", "kendall")]
                    + [probability(spearman.p_value), probability(spearman.q_value)]
                )
            others = cells[(cells["statistic"] != PRIMARY_STATISTIC) & (cells["method"] == "spearman")]
            others = others.dropna(subset=["coefficient"])
            if len(others):
                best = records(others.loc[[others["coefficient"].abs().idxmax()]])[0]
                strongest.append(
                    [group_name(data, model), attack_label(attack.removesuffix("@mean")), escape(best.statistic)]
                    + [model_count(best), _coefficient(best), probability(best.q_value)]
                )
    intro = (
        "Over models, not samples: mean statistic on clean samples against accuracy (attacks: mean over epsilons), "
        "with 95 % intervals, permutation p, and Benjamini–Hochberg q over the table (p and q: Spearman). Seeds of a "
        "setting are replicates: intervals leave out one setting at a time, by a jackknife, and p permutes the "
        "settings' means; only where every setting has one model they are a bootstrap over models. All statistics and "
        "epsilons are in tables/correlations.csv."
    )
    headers = ["group", "accuracy", "n", "Spearman", "Pearson", "Kendall", "p", "q"]
    other_headers = ["group", "accuracy", "strongest other", "n", "Spearman", "q"]
    return "\n\n".join(
        [
            intro,
            f"### The primary statistic, {escape(PRIMARY_STATISTIC)}",
            table(headers, primary, align="llr") if primary else "The primary statistic is missing.",
            "### The strongest other statistic",
            table(other_headers, strongest, align="lllr") if strongest else "No other statistic has a coefficient.",
        ]
    )


def landing_section(landing: pd.DataFrame, landing_matrices: pd.DataFrame) -> str:
    """Return the runner-up rate against chance and the matrix correlation, at the epsilon of the figure."""
    rows = []
    kept = landing_rows(landing, landing_matrices)
    if kept.empty:
        return "No attack was examined for where it lands."
    notes = []
    for data, model in groups(kept):
        group = of_group(kept, data, model)
        notes.append(not_shown(group, "landing"))
        for attack in [name for name in attacks(group["attack"]) if name in IN_PANELS]:
            at = group[group["attack"] == attack]
            for setting in few_settings(at):
                cells = of_setting(at, setting)
                rows.append(
                    [
                        group_name(data, model),
                        escape(attack_label(f"{attack}@{cells['epsilon_label'].iloc[0]}")),
                        escape(marked_label(at, setting)),
                        str(len(cells)),
                        whole(cells["n_flips"].sum()),
                        mean_sd(cells["runner_up_rate"], scale=100.0),
                        percent(cells["chance"].mean()),
                        mean_sd(cells["matrix_correlation"], digits=2),
                    ]
                )
    headers = ["group", "attack", "loss", "n models", "flips", "to the runner-up (%)", "chance (%)", "matrix r"]
    intro = (
        "Flips that go to the class second by clean softmax, and the correlation between the class-mean softmax and "
        "the confusion after the attack (off-diagonal cells); mean ± standard deviation over models. The other "
        "epsilons are in tables/landing.csv."
    )
    return "\n\n".join(filter(None, [intro, table(headers, rows, align="lllr"), *dict.fromkeys(notes)]))


def timing_section(timing: pd.DataFrame) -> str:
    """Return the training-step times of a loss and its baseline, interleaved, with the ratio's interval."""
    if timing.empty:
        return "No training step was timed."
    rows = [
        [
            group_name(row.data, row.model),
            escape(marked_label(of_group(timing, row.data, row.model), (str(row.loss), float(row.loss_weight)))),
            escape(setting_label(str(row.baseline), 0.0)),
            escape(row.device),
            whole(row.batch_size),
            whole(row.n_pairs),
            significant(row.baseline_ms),
            significant(row.loss_ms),
            fixed(row.ratio, 3) + interval(fixed(row.ci_low, 3), fixed(row.ci_high, 3)),
        ]
        for row in records(timing)
    ]
    headers = ["group", "loss", "baseline", "device", "batch", "n pairs", "baseline (ms)", "loss (ms)", "ratio"]
    return (
        "Median time of a whole training step, loss and baseline in turn; ratio with a bootstrap 95 % interval.\n\n"
        + table(headers, rows, align="llllr")
    )
