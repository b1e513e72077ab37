"""The tables of claims in README.md: what each claim comes to, over all groups and in every one."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from drs.correlation_verdicts import SETS, short
from drs.findings import select, spearman
from drs.markdown import NONE, escape, fixed, group_name, interval, table, whole
from drs.report import read_tables
from drs.report_text import effect_text
from drs.verdicts import DECISIVE_WEAK, INCONCLUSIVE, NAMES, WORST_CASES

PAIRS_STUDY = "pairs"
"""The study beside it of cross-entropy and the published weight alone, on more images."""
WEIGHTS_STUDY = "weights"
"""The one of many weights of DR-softmax, each with few seeds."""
OVERALL = "all"
_OPEN_TWICE = ", ".join(f"{name} {short(INCONCLUSIVE)}" for name in SETS)
"""What C1's evidence begins with where neither set of attacks decides anything; it says no more than the verdict."""
PAPER = {"C1": "yes", "C2": "yes", "C3": "yes", "C4": "yes", "C5": "not examined"}
"""Whether the paper says so (arXiv 2303.12363)."""
EVIDENCE = {
    "C1": ("Correlations", "Partial correlations", "Granulated coefficients"),
    "C2": ("Differences to cross-entropy", "Robust accuracy"),
    "C3": ("Training and its time",),
    "C4": ("Correlations",),
    "C5": ("How much of the gain is masking", "Sanity checks"),
}
"""Sections of the report that each claim rests on."""


def claims_block(study_dir: Path) -> str:
    """Return the claims table of a study: each claim in the paper and here, over all groups and, a line for each, in
    every one, and where to look."""
    claims = read_tables(study_dir)["claims"]
    rows = []
    for _, overall in claims[claims["data"] == OVERALL].iterrows():
        name = str(overall["claim"])
        here = [f"**{overall['verdict']}**"]
        for _, row in claims[(claims["claim"] == name) & (claims["data"] != OVERALL)].iterrows():
            where = group_name(str(row["data"]), str(row["model"]))
            told = f"{where}: {row['verdict']}; {effect_text(row)}, n = {int(row['n'])}"
            here.append("; ".join(filter(None, [told, why_open(row)])))
        links = ", ".join(section_link(study_dir, title) for title in EVIDENCE[name])
        rows.append([f"{name}. {escape(overall['statement'])}", PAPER[name], "<br>".join(here), links])
    return table(["claim", "paper", "here", "evidence"], rows, align="l")


def why_open(claim: pd.Series) -> str:
    """Return why a group is inconclusive; nothing where it is not.

    The number that is too small can be that of the settings or of the images: the evidence begins with what.
    """
    why, inside = str(claim["evidence"]) if claim["verdict"] == INCONCLUSIVE else "", 1
    while inside:  # coefficients, which are for the report, with what is in brackets beside them
        why, inside = re.subn(r" \([^()]*\)", "", why)
    why = re.split("[.;] ", why)[0]
    if why.lower() == _OPEN_TWICE:
        return ""
    return escape(why[:1].lower() + why[1:])


def pairs_block(study_dir: Path) -> str | None:
    """Return what C2 and C5 come to in the study of the same pairs on more images, or None where it is not there.

    Args:
        study_dir: A study beside it.
    """
    folder = study_dir.parent / PAIRS_STUDY
    if not _is_decided(folder):
        return None
    rows = []
    for (data, model), group in _by_group(read_tables(folder)["claims"]):
        both = [group[group["claim"] == name].iloc[0] for name in ("C2", "C5")]
        cells = ["<br>".join(filter(None, [f"{row['verdict']}; {effect_text(row)}", why_open(row)])) for row in both]
        rows.append([group_name(str(data), str(model)), *cells, whole(both[0]["n"]), whole(both[0]["n_images"])])
    headers = ["", "C2: gain in the worst case", "C5: share of the gain under PGD that is left", "seeds", "images"]
    links = ", ".join(section_link(folder, title) for title in (EVIDENCE["C2"][0], EVIDENCE["C5"][0]))
    return f"{table(headers, rows, align='lllrr')}\n\nEvidence: {links}."


def weights_block(study_dir: Path) -> str | None:
    """Return what C1 and C4 come to in the study of many weights, or None where it is not there.

    Args:
        study_dir: A study beside it.
    """
    folder = study_dir.parent / WEIGHTS_STUDY
    if not _is_decided(folder):
        return None
    tables = read_tables(folder)
    rows = []
    for (data, model), group in _by_group(tables["claims"]):
        first, fourth = (group[group["claim"] == name].iloc[0] for name in ("C1", "C4"))
        own = select(tables["correlations"], data=data, model=model)
        read = {attack: spearman(own, attack) for attack in (DECISIVE_WEAK, *WORST_CASES, "clean")}
        shown = {attack: NONE if row is None else _coefficient(row) for attack, row in read.items()}
        verdict = "<br>".join(filter(None, [str(first["verdict"]), why_open(first)]))
        clean = f"{fourth['verdict']}; ρ = {shown.pop('clean')}"
        settings = NONE if read["clean"] is None else whole(read["clean"]["n_settings"])
        rows.append([group_name(data, model), verdict, *shown.values(), clean, whole(first["n"]), settings])
    names = (f"ρ, {NAMES[attack]}" for attack in (DECISIVE_WEAK, *WORST_CASES))
    headers = ["", "C1", *names, "C4", "models", "settings"]
    links = section_link(folder, EVIDENCE["C4"][0])
    return f"{table(headers, rows, align='llllllrr')}\n\nEvidence: {links}."


def _is_decided(study_dir: Path) -> bool:
    return (study_dir / "tables" / "claims.csv").is_file()


def _by_group(claims: pd.DataFrame) -> Iterable[tuple[Any, pd.DataFrame]]:
    """Return the claims of each dataset and architecture, without those over all of them."""
    return claims[claims["data"] != OVERALL].groupby(["data", "model"], sort=False)


def _coefficient(row: pd.Series) -> str:
    return fixed(row["coefficient"]) + interval(fixed(row["ci_low"]), fixed(row["ci_high"]))


def section_link(study_dir: Path, title: str) -> str:
    """Link to a section of the study's report, from the folder that holds README.md."""
    anchor = title.lower().replace(" ", "-")
    return f"[{title[0].lower()}{title[1:]}](results/reference/{study_dir.name}/REPORT.md#{anchor})"
