"""What the claims table reads of one group's gains over cross-entropy, paired by seed: the figures of C2 and C5."""

import math
from collections.abc import Callable, Hashable
from typing import Any

import pandas as pd

from drs import evidence
from drs.convergence import is_unconverged, missed_share
from drs.findings import Finding, Group, published_setting, select
from drs.masking import (
    MASKING_CHECKS,
    Gain,
    Survival,
    crossed_survival,
    failing_share,
    masked_checks,
    paired_gains,
    survival,
)
from drs.paired import BASELINE
from drs.selection import usable_models
from drs.verdicts import (
    DECISIVE_WEAK,
    DECISIVE_WORST,
    INCONCLUSIVE,
    NAMES,
    PRIMARY_LOSS,
    PRIMARY_WEIGHT,
    WEAK_ATTACKS,
    WORST_CASES,
    Decision,
    Difference,
    decide_masking,
    decide_robustness,
    pairs_of_seeds,
)

_NAN = float("nan")
_NORMS = {
    "norm.smallest_l2": "smallest L2 found by any attack",
    "norm.smallest_linf": "smallest Linf found by any attack",
    "norm.cw": "L2 by CW",
    "norm.fmn_l2": "L2 by FMN",
    "norm.fmn_linf": "Linf by FMN",
}
"""The median minimal norms of paired_differences.csv, the ones that decide first."""
_NO_OUTCOMES = "there are no outcomes of single images, and so no interval that holds for other images"


def _norms(found: dict[str, Difference], searches: pd.DataFrame) -> str:
    """Return the changes in the median minimal norms; a search that saw fewer images than another says how many."""
    most = searches["n"].max() if len(searches) else _NAN
    parts = []
    for column, name in _NORMS.items():
        if column not in found:
            continue
        own = select(searches, attack=column.removeprefix("norm."))
        subset = f" ({int(own['n'].min())} images)" if len(own) and own["n"].min() < most else ""
        parts.append(f"{name}{subset} {evidence.with_interval(*found[column][1:], digits=4, sign=True)}")
    if not parts:
        return "not measured"
    clash = [found[column] for column in ("norm.cw", "norm.fmn_l2") if column in found]
    opposed = any(one.ci_low > 0 for one in clash) and any(one.ci_high < 0 for one in clash)
    note = "; CW and FMN contradict each other, so that only the smallest norm found counts" if opposed else ""
    return f"{', '.join(parts)} pixel units{note}"


def _unconverged(searches: pd.DataFrame) -> str:
    """Return which searches of cross-entropy and of the published weight miss images that another attack fells."""
    kept = usable_models(searches) if len(searches) else searches
    parts = []
    for column, name in _NORMS.items():
        for rows, loss in ((select(kept, loss=BASELINE), "cross-entropy"), (published_setting(kept), "DR-softmax")):
            own = select(rows, attack=column.removeprefix("norm."))
            if len(own) and is_unconverged(own):
                parts.append(f"{name} on {loss} ({evidence.number(100 * missed_share(own), 1)} % of the images)")
    if not parts:
        return ""
    return f"not converged, an attack at a fixed radius fells images that it says need more: {', '.join(parts)}"


def _robustness_claim(group: Group) -> Finding:
    rows = published_setting(group.differences)
    if select(group.models, loss=BASELINE).empty:
        return Finding(Decision(INCONCLUSIVE, "no usable model with cross-entropy"))
    if published_setting(group.models).empty:
        return Finding(Decision(INCONCLUSIVE, f"no usable model with DR-softmax at weight {PRIMARY_WEIGHT:g}"))
    if rows.empty:
        return Finding(Decision(INCONCLUSIVE, "no seed in common with cross-entropy"))
    by_attack = {str(row["attack"]): row for row in rows.to_dict("records")}
    found = {attack: _difference(row) for attack, row in by_attack.items()}
    decision = decide_robustness(found, strong_suite=group.strong_suite)
    if rows["n_images"].isna().all():
        decision = Decision(INCONCLUSIVE, _NO_OUTCOMES)

    def gain(attack: str) -> str:
        if attack not in found:
            return f"{NAMES[attack]} not measured"
        return f"{NAMES[attack]} {_points(found[attack], *(by_attack[attack][end] for end in ('ci_low', 'ci_high')))}"

    shown = found.get(DECISIVE_WORST if group.strong_suite else DECISIVE_WEAK)
    n = shown.n if shown else max(difference.n for difference in found.values())
    every = (*WEAK_ATTACKS, *WORST_CASES, "cw@mean")
    images = [
        f"{NAMES[attack]} {int(by_attack[attack]['n_images'])}"
        for attack in every
        if attack in by_attack and not math.isnan(by_attack[attack]["n_images"])
    ]
    where = "; worst cases at the decisive epsilons, the other attacks at all of theirs" if group.strong_suite else ""
    details = (
        f"change in points of accuracy over {pairs_of_seeds(n)}: {', '.join(map(gain, (*every, 'clean')))}{where}",
        f"these intervals hold for other seeds and other images (here {', '.join(images)}), those of clean accuracy "
        "and of norms for other seeds alone" if images else "",
        f"change in the median minimal norm: {_norms(found, group.norms)}",
        _unconverged(group.norms),
    )  # fmt: skip
    n_images = by_attack[DECISIVE_WORST if group.strong_suite else DECISIVE_WEAK]["n_images"] if shown else _NAN
    return Finding(decision, *(shown[1:] if shown else (_NAN, _NAN, _NAN)), n, details, n_images)


def _difference(row: dict[Hashable, Any]) -> Difference:
    """Read a row of paired_differences.csv: with the interval over seeds and images, where an accuracy has one.

    The median of a norm and clean accuracy have no outcomes of single images, only an interval over seeds.
    """
    attack = str(row["attack"])
    ends = ("ci_low", "ci_high") if attack == "clean" or attack.startswith("norm.") else ("crossed_low", "crossed_high")
    return Difference(int(row["n_pairs"]), float(row["difference"]), *(float(row[end]) for end in ends))


def _points(gain: Difference | Gain, low: float, high: float) -> str:
    """Write a gain in points, and beside its interval that over seeds alone where it is another one."""
    text, alone = (
        evidence.with_interval(gain.difference, *ends, digits=1, scale=100, sign=True)
        for ends in ((gain.ci_low, gain.ci_high), (low, high))
    )
    return text if text == alone else f"{text} (over seeds alone {alone.partition(' ')[2]})"


def _masking_claim(group: Group) -> Finding:
    alone = survival(paired_gains(group.worst_case, PRIMARY_LOSS, PRIMARY_WEIGHT))
    left, n_images = crossed_survival(group.outcomes, PRIMARY_LOSS, PRIMARY_WEIGHT)
    sanity = usable_models(group.sanity)
    own = select(sanity, loss=PRIMARY_LOSS, loss_weight=PRIMARY_WEIGHT)
    baseline = select(sanity, loss=BASELINE)
    decision = decide_masking(left, masked_checks(own, baseline), strong_suite=group.strong_suite)
    if not group.strong_suite or not alone.pgd.n:
        return Finding(decision, n=alone.pgd.n)
    if not left.pgd.n:
        return Finding(Decision(INCONCLUSIVE, _NO_OUTCOMES), alone.share, n=alone.pgd.n)
    gains = [
        f"{name} {_points(gain, over_seeds.ci_low, over_seeds.ci_high)}"
        for name, gain, over_seeds in (("PGD", left.pgd, alone.pgd), ("worst case Linf", left.worst, alone.worst))
    ]
    failing = [
        f"{check} {evidence.number(100 * share, 0)} %"
        for check in MASKING_CHECKS
        if (share := failing_share(own, check)) > 0
    ]
    details = (
        f"gain over cross-entropy in points on the same {n_images} images over {left.pgd.n} pairs, with intervals for "
        f"other seeds and other images: {', '.join(gains)}",
        _share_left(left, alone),
        f"masking checks that its models fail: {', '.join(failing) or 'none'}",
    )
    return Finding(decision, left.share, left.ci_low, left.ci_high, left.pgd.n, details, n_images)


def _share_left(left: Survival, alone: Survival) -> str:
    """Say that the share has no bounded interval, or what its interval is over seeds alone, if another one."""
    over_seeds = evidence.with_interval(alone.share, alone.ci_low, alone.ci_high)
    if math.isnan(left.share) or evidence.with_interval(left.share, left.ci_low, left.ci_high) == over_seeds:
        text = ""
    else:
        text = f"; over seeds alone it is {over_seeds}"
    if math.isnan(left.ci_low):
        return f"the share has no bounded interval, because the gain under PGD cannot be told from 0{text}"
    return f"the share that is left is {evidence.with_interval(left.share, left.ci_low, left.ci_high)}{text}"


CLAIMS: dict[str, Callable[[Group], Finding]] = {"C2": _robustness_claim, "C5": _masking_claim}
