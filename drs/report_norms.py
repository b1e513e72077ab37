"""The section of REPORT.md on minimal norms: what each search found, and whether it converged."""

import pandas as pd

from drs.convergence import UNCONVERGED, is_unconverged, missed_share
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
    span,
)
from drs.markdown import escape, group_name, mean_sd, percent, table
from drs.report_images import FEWEST_FOR_A_MEDIAN, MEDIANS

INTRO = (
    "FMN and CW look for the smallest perturbation of each image. A search that stops early makes a model look robust. "
    "*Smallest found* is the smallest over all attacks of the norm on the same images, those at a fixed radius and "
    "subsets included, transfer left out, since not every model has a twin; it decides where a search and another "
    "attack contradict each other. *Missed* is the share of images that an attack at the fixed radius ε fells, but "
    f"that the search says need more, over all models of a loss; above {percent(UNCONVERGED, 0)} % (bold) the search "
    f"did not converge. Norms are medians over images in pixel units, mean ± standard deviation over models. {MEDIANS}"
)


def norms_section(minimal_norms: pd.DataFrame) -> str:
    """Return what each search for the smallest perturbation found, and how many images it misses.

    Args:
        minimal_norms: minimal_norms.csv: a row per model, search and epsilon, see ``drs.minimal_norms.norm_rows``.
    """
    kept = included(minimal_norms)
    if kept.empty:
        return "No attack looked for minimal perturbations."
    sections = [INTRO]
    for data, model in groups(kept):
        group = of_group(kept, data, model)
        rows, missing = [], []
        for attack in attacks(group["attack"]):
            at = group[group["attack"] == attack]
            for setting in few_settings(at):
                for label, cells in of_setting(at, setting).groupby("epsilon_label", sort=False):
                    rows.append(_row(attack, escape(marked_label(at, setting)), str(label), cells))
                    if is_unconverged(cells):
                        where = f"{attack_label(attack)} on {marked_label(at, setting)} at ε = {label}"
                        missing.append(escape(f"{where} ({percent(missed_share(cells))} %)"))
        headers = ["search", "ε", "loss", "n models", "images", "median norm", "smallest found", "missed (%)"]
        sections.append(f"### {group_name(data, model)}\n\n" + table(headers, rows, align="lllr"))
        sections.append(_sentence(missing))
        sections.append(not_shown(group, "minimal_norms"))
    return "\n\n".join(filter(None, sections))


def _row(attack: str, setting: str, epsilon: str, cells: pd.DataFrame) -> list[str]:
    share = percent(missed_share(cells))
    few = cells["n"].min() < FEWEST_FOR_A_MEDIAN
    medians = [f"n = {span(cells['n'])}"] * 2 if few else [mean_sd(cells[x], digits=None) for x in _MEDIANS]
    missed = f"**{share}**" if is_unconverged(cells) else share
    return [attack_label(attack), escape(epsilon), setting, str(len(cells)), span(cells["n"]), *medians, missed]


_MEDIANS = ("median", "median_smallest")


def _sentence(missing: list[str]) -> str:
    if not missing:
        return f"Every search agrees with the attacks at a fixed radius to within {percent(UNCONVERGED, 0)} points."
    return (
        f"Not converged: {'; '.join(missing)}. These norms are too large; read the smallest found instead, which an "
        "attack at a fixed radius bounds."
    )
