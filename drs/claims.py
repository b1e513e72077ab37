"""A study's tables -> the claims table: a verdict, an effect and the evidence for every claim of the paper.

The rules are in ``drs.verdicts``, what they read of each group in ``drs.findings``.
"""

import math
from typing import Any

import pandas as pd

from drs import findings as other_findings
from drs import gain_findings
from drs.correlation_verdicts import SETS, short
from drs.evidence import sentences
from drs.findings import Finding, Group, as_correlation, select, spearman
from drs.image_outcomes import GroupOutcomes
from drs.paired import paired_difference_table
from drs.selection import group_models, usable_models
from drs.verdicts import DECISIVE_WEAK, DECISIVE_WORST, INCONCLUSIVE, RULES, STATEMENTS, Decision, least_favourable

__all__ = ["COLUMNS", "RULES", "decide_claims", "paired_difference_table"]

SANITY = ["data", "model", "loss", "loss_weight", "check", "passed", "excluded"]
COLUMNS = ["claim", "statement", "verdict", "effect", "ci_low", "ci_high", "n", "evidence", "data", "model", "n_images"]

CLAIMS = other_findings.CLAIMS | gain_findings.CLAIMS


def _row(claim: str, finding: Finding, data: str, model: str) -> dict[str, Any]:
    text = sentences([finding.decision.reason, *finding.details])
    effect = finding.effect, finding.ci_low, finding.ci_high
    values = (claim, STATEMENTS[claim], finding.decision.verdict, *effect, finding.n, text, data, model)
    return dict(zip(COLUMNS, (*values, finding.n_images), strict=True))


def _sets(decisions: list[Decision]) -> str:
    """Say the verdicts on weak attacks and on the worst case that the decisions have, over all of them."""
    own = [decision.sets for decision in decisions if decision.sets]
    each = [
        f"{name} {short(least_favourable(found))}" for name, found in zip(SETS, zip(*own, strict=True), strict=False)
    ]
    return ", ".join(each)


def _overall(claim: str, findings: dict[str, Finding], correlations: pd.DataFrame, strong_suite: bool) -> Finding:
    if not findings:
        return Finding(Decision(INCONCLUSIVE, "no finished model"))
    verdict = least_favourable([finding.decision.verdict for finding in findings.values()])
    if len(findings) == 1:
        ((name, finding),) = findings.items()
        return finding._replace(details=(f"the only group is {name}",))
    decisions = {name: finding.decision for name, finding in findings.items()}
    by_group = [f"{name} {own.verdict}" + (f": {_sets([own])}" if own.sets else "") for name, own in decisions.items()]
    reason = sentences([_sets(list(decisions.values())), "by group: " + "; ".join(by_group)])
    decision = Decision(verdict, reason.removesuffix("."))
    attack = {"C1": DECISIVE_WORST if strong_suite else DECISIVE_WEAK, "C4": "clean"}.get(claim, "")
    pooled = spearman(select(correlations, data="pooled", model="pooled"), attack)
    if pooled is not None and not pd.isna(pooled["coefficient"]):
        shown = as_correlation(pooled)
        details = (f"effect: the groups' coefficients, averaged with their numbers of models ({shown.n}) as weights",)
        return Finding(decision, shown.coefficient, shown.ci_low, shown.ci_high, shown.n, details)
    found = [finding for finding in findings.values() if not math.isnan(finding.effect)]
    # An effect without a bounded interval, such as a share of no gain, can be any number.
    known = [finding for finding in found if math.isfinite(finding.ci_low + finding.ci_high)]
    if not known:
        return Finding(decision)
    effect = sum(finding.effect for finding in known) / len(known)
    which = f"{len(known)} group{'s' * (len(known) > 1)}"
    if len(known) < len(found):
        which = f"the {which} of {len(found)} where it has a bounded interval"
    details = (f"effect: the mean over {which}, itself without an interval",)
    return Finding(decision, effect, n=sum(finding.n for finding in known), details=details)


def decide_claims(
    models: pd.DataFrame,
    correlations: pd.DataFrame,
    timing: pd.DataFrame,
    landing: pd.DataFrame,
    *,
    strong_suite: bool,
    worst_case: pd.DataFrame | None = None,
    sanity: pd.DataFrame | None = None,
    minimal_norms: pd.DataFrame | None = None,
    outcomes: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Decide the claims C1 to C5 for every dataset and architecture, and over all of them.

    Args:
        models: models.csv; see ``drs.correlation.correlation_table`` and ``drs.paired.paired_difference_table``.
        correlations: What ``correlation_table`` makes of ``models``.
        timing: timing.csv: ``data, model, loss, loss_weight, baseline, batch_size, n_pairs, baseline_ms, loss_ms,
            ratio, ci_low, ci_high, device``.
        landing: landing.csv: ``data, model, attack, runner_up_rate, chance, matrix_correlation, excluded``.
        strong_suite: Whether the worst case contains the strong suite.
        worst_case: worst_case.csv, see ``drs.masking.paired_gains``; C5 is open without it.
        sanity: sanity.csv: ``data, model, loss, loss_weight, check, passed, excluded``.
        minimal_norms: minimal_norms.csv, see ``drs.minimal_norms.norm_rows``: the evidence of C2 says from it which
            norms are not converged.
        outcomes: image_outcomes.csv, see ``drs.image_outcomes``; C2 and C5 are open without it, because their intervals
            are to hold for other images too.

    Returns:
        ``COLUMNS``; the overall rows, with data = model = ``all``, come first. ``effect`` with its 95 % interval is a
        coefficient (C1, C4), a difference in robust accuracy as a share (C2), a ratio of times (C3) or of
        gains (C5); ``n`` counts models, pairs of seeds, or timed pairs, and ``n_images`` the images of the interval
        (C2, C5). A claim whose inputs are missing is inconclusive, and the evidence says what is missing.
    """
    differences = paired_difference_table(models, outcomes)
    findings: dict[str, dict[str, Finding]] = {claim: {} for claim in STATEMENTS}
    rows: list[dict[str, Any]] = []
    for data, model, every in group_models(models):
        usable = usable_models(every)
        group = Group(
            usable,
            correlations=select(correlations, data=data, model=model),
            differences=select(differences, data=data, model=model),
            timing=select(timing, data=data, model=model),
            landing=select(landing, data=data, model=model),
            worst_case=select(pd.DataFrame() if worst_case is None else worst_case, data=data, model=model),
            sanity=select(pd.DataFrame(columns=SANITY) if sanity is None else sanity, data=data, model=model),
            norms=select(pd.DataFrame() if minimal_norms is None else minimal_norms, data=data, model=model),
            outcomes=GroupOutcomes(outcomes, data, model),
            strong_suite=strong_suite,
        )
        excluded = len(every) - len(usable)
        note = f"{excluded} of {len(every)} models {'is' if excluded == 1 else 'are'} excluded" if excluded else ""
        for claim in STATEMENTS:
            finding = CLAIMS[claim](group)
            if claim != "C3":
                finding = finding._replace(details=(*finding.details, note))
            findings[claim][f"{data}/{model}"] = finding
            rows.append(_row(claim, finding, data, model))
    overall = [
        _row(claim, _overall(claim, found, correlations, strong_suite), "all", "all")
        for claim, found in findings.items()
    ]
    return pd.DataFrame([*overall, *rows], columns=COLUMNS)
