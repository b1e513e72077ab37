"""The rules that decide the claims, fixed before a study is run: constants, code, and the text that a report prints.

Each function takes the figures of one group (a dataset and an architecture) and returns a verdict with its reason.
Those of the claims about correlations, C1 and C4, are in ``drs.correlation_verdicts``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from drs import evidence
from drs.masking import MASKING_CHECKS, Survival

PRIMARY_STATISTIC = "nonlabel_var_log"  # what the loss restrains
PRIMARY_LOSS = "dr_softmax"
PRIMARY_WEIGHT = 0.005  # the authors' first published value
ALPHA = 0.05
MIN_MODELS = 8
# With k settings the smallest exact two-sided p is 2 / k!: 0.083 for four, 0.017 for five.
MIN_SETTINGS = 5
MIN_PAIRS = 3
MEANINGFUL_GAIN = 0.02
MEANINGFUL_CORRELATION = 0.5
TIME_BUDGET = 1.05
SURVIVING_SHARE = 0.5

WEAK_ATTACKS = ("fgsm@mean", "pgd@mean")
WORST_CASES = ("worst_linf@mean", "worst_l2@mean")
DECISIVE_WEAK = "pgd@mean"
DECISIVE_WORST = "worst_linf@mean"
NAMES = {
    "clean": "clean",
    "fgsm@mean": "FGSM",
    "pgd@mean": "PGD",
    "cw@mean": "CW",
    "worst_linf@mean": "worst case Linf",
    "worst_l2@mean": "worst case L2",
}

SUPPORTED = "supported"
WEAK_ONLY = "supported against weak attacks only"
NOT_SUPPORTED = "not supported"
INCONCLUSIVE = "inconclusive (n too small)"
# From most to least favourable.
CONCLUSIVE = (SUPPORTED, WEAK_ONLY, NOT_SUPPORTED)

STATEMENTS = {
    "C1": "Post-attack results correlate with the non-label softmax distribution.",
    "C2": "DR-softmax improves robustness.",
    "C3": "It costs no significant time.",
    "C4": "Standard accuracy has no significant positive correlation with softmax stochasticity.",
    "C5": "The gain is not gradient masking.",
}

NOT_STRONG = "the strong attacks were not run, so no better verdict was possible"


def _names(attacks: Sequence[str]) -> str:
    return evidence.enumerated([NAMES[attack] for attack in attacks])


_SMALL = f"fewer than {MIN_MODELS} models or {MIN_SETTINGS} settings"
RULES = f"""\
These rules were fixed before the study was run, but for what is called changed. A verdict is
*{SUPPORTED}*, *{WEAK_ONLY}*, *{NOT_SUPPORTED}* or
*{INCONCLUSIVE}*. Each group, a dataset and an architecture, is decided by itself; excluded models never count. Attacks
are read at the mean of their finite epsilons; with the strong attacks, a worst case is read at the mean of the decisive
epsilons, where those attacks ran. The weak attacks are {_names(WEAK_ATTACKS)}; the worst case is per sample over all
attacks of a norm, Linf and L2. Unless the strong attacks were run, no claim about robustness (C1, C2) gets better than
*{WEAK_ONLY}*, and C5 stays open. Correlations (C1, C4) are over models of the standard training procedure, whatever
their loss; adversarial training and TRADES are points of reference for cost. Intervals are 95 %. A set of attacks
passes only if every attack in it passes, so reading several needs no further correction. Seeds of one setting, a loss
and its weight, are replicates: intervals of coefficients leave out whole settings, and permutation p-values move whole
settings, a point per loss and weight that averages its seeds.

- **C1. {STATEMENTS["C1"]}** Spearman's coefficient of the mean `{PRIMARY_STATISTIC}` with robust accuracy. An attack
  passes if three things hold. Over the models, the interval excludes 0 and the Benjamini–Hochberg q over the whole
  table is below {ALPHA:g}. Over the DR-softmax models alone and over their weights, the sign is the same, and the
  permutation p is below {ALPHA:g}; else a cluster of other models beside a cluster of DR-softmax models would be
  enough. Over the settings, the sign is the same and the permutation p is below {ALPHA:g}. A correlation is ruled out
  for an attack if the interval over the models and the coefficient over the settings lie within
  ±{MEANINGFUL_CORRELATION:g}; or if the attack passes over the models, but over at least {MIN_MODELS} DR-softmax models
  of at least {MIN_SETTINGS} weights the interval ends before {MEANINGFUL_CORRELATION:g} in that direction. The weak
  attacks and the worst case have a verdict each: *{SUPPORTED}* if every attack passes, *{NOT_SUPPORTED}* if the
  correlation is ruled out for every attack, else inconclusive. The claim is
  - *{SUPPORTED}*: it is for the weak attacks and for the worst case, and the strong attacks were run.
  - *{WEAK_ONLY}*: otherwise, if it is supported for the weak attacks.
  - *{NOT_SUPPORTED}*: it is neither for the weak attacks nor, where there is one, for the worst case.
  - *{INCONCLUSIVE}*: everything else, and {_SMALL}.
  - Changed after the study was first run: intervals and q took models as independent, though the seeds of a setting are
    alike, and so were too narrow; and PGD alone decided what is *{NOT_SUPPORTED}*, whatever the worst case showed.
- **C2. {STATEMENTS["C2"]}** Difference in robust accuracy between DR-softmax at weight {PRIMARY_WEIGHT:g} (the
  authors' first published value) and cross-entropy, paired by seed. An attack passes if the interval over seeds and
  images, which holds for other seeds and other images, lies above 0, from at least {MIN_PAIRS} pairs.
  - *{SUPPORTED}*: weak attacks and worst cases pass, and the strong attacks were run.
  - *{WEAK_ONLY}*: otherwise, if the weak attacks pass.
  - *{NOT_SUPPORTED}*: neither set passes, and the interval for PGD ends below {100 * MEANINGFUL_GAIN:g} points.
  - *{INCONCLUSIVE}*: everything else, and fewer than {MIN_PAIRS} pairs.
- **C3. {STATEMENTS["C3"]}** Ratio of the time of a training step, DR-softmax at weight {PRIMARY_WEIGHT:g} over
  cross-entropy, steps interleaved, bootstrap interval.
  - *{SUPPORTED}*: the interval lies below {TIME_BUDGET:g}. *{NOT_SUPPORTED}*: it lies above. *{INCONCLUSIVE}*: it
    contains {TIME_BUDGET:g}.
- **C4. {STATEMENTS["C4"]}** Spearman's coefficient of the mean `{PRIMARY_STATISTIC}` with clean accuracy, and over the
  settings a one-sided permutation p against a positive one.
  - *{NOT_SUPPORTED}*: p is below {ALPHA:g}, and the coefficient over the models is positive, too.
  - *{SUPPORTED}*: p is not, and both the interval over the models and the coefficient over the settings end below
    {MEANINGFUL_CORRELATION:g}.
  - *{INCONCLUSIVE}*: everything else, and {_SMALL}.
  - The p asks whether the settings' order could be chance. The interval says how large a coefficient may be; it leaves
    out whole settings, and with few of them it may hold 0 beside a small p. The evidence says where it does.
  - Changed after the study was first run: the interval took models as independent, and a second p, over models, which
    did so, too, had to be below {ALPHA:g} as well.
- **C5. {STATEMENTS["C5"]}** DR-softmax at weight {PRIMARY_WEIGHT:g} and cross-entropy paired by seed, on the decisive
  samples and epsilons in Linf: the gain under PGD, the gain under the worst case, and the share of the first that is
  left in the second, with intervals over seeds and images, Fieller's for the share. A masking check is one that an
  honest model should pass ({", ".join(MASKING_CHECKS)}); it counts where most of the DR-softmax models fail it and most
  of the cross-entropy models do not.
  - *{NOT_SUPPORTED}*: a gain under PGD is shown (its interval lies above 0), and a masking check counts, or the share's
    interval ends below {SURVIVING_SHARE:g}, or the interval of the gain under the worst case ends below
    {SURVIVING_SHARE:g} times the gain under PGD.
  - *{SUPPORTED}*: a gain is shown under PGD and under the worst case, no masking check counts, and the share's interval
    lies above {SURVIVING_SHARE:g}.
  - *{INCONCLUSIVE}*: everything else, no gain under PGD shown (there is nothing to explain), fewer than {MIN_PAIRS}
    pairs, or the strong attacks not run.

Intervals of C2 and C5 were over seeds alone when the study was first run; they were widened to count images
afterwards, which makes every check of an interval harder to pass and none easier. Seeds and images are crossed: the
interval is that of the mean of a two-way layout with both drawn at random, and contains the one over seeds.

Over all groups the verdict is the least favourable that any group came to, from *{SUPPORTED}* over *{WEAK_ONLY}* to
*{NOT_SUPPORTED}*; inconclusive groups have no say unless all are. The effect is the groups' coefficients averaged with
their numbers of models as weights (C1, C4), or the plain mean of the groups' effects, those without a bounded
interval left out (C2, C3, C5)."""


def pairs_of_seeds(count: int) -> str:
    """Write ``1 pair of seeds`` or ``3 pairs of seeds``."""
    return f"{count} pair{'s' * (count != 1)} of seeds"


class Decision(NamedTuple):
    """A verdict and the one sentence that says why; of C1 also the verdicts on weak attacks and on the worst case."""

    verdict: str
    reason: str
    sets: tuple[str, ...] = ()


class Difference(NamedTuple):
    """A paired difference over ``n`` seeds with its interval: over seeds and images, of a norm over seeds alone."""

    n: int
    difference: float
    ci_low: float
    ci_high: float


def decide_robustness(differences: Mapping[str, Difference], *, strong_suite: bool) -> Decision:
    """Decide C2 from the paired difference of each of ``WEAK_ATTACKS`` and ``WORST_CASES`` that exists."""
    missing = [attack for attack in WEAK_ATTACKS if attack not in differences]
    if missing:
        return Decision(INCONCLUSIVE, f"no difference for {_names(missing)}")
    n = min(differences[attack].n for attack in WEAK_ATTACKS)
    if n < MIN_PAIRS:
        return Decision(INCONCLUSIVE, f"{pairs_of_seeds(n)}; {MIN_PAIRS} are needed")
    gains = {
        attack: attack in differences and differences[attack].n >= MIN_PAIRS and differences[attack].ci_low > 0
        for attack in (*WEAK_ATTACKS, *WORST_CASES)
    }
    failures = _names([attack for attack, gain in gains.items() if not gain])
    weak = all(gains[attack] for attack in WEAK_ATTACKS)
    worst = all(gains[attack] for attack in WORST_CASES)
    if weak and worst and strong_suite:
        return Decision(SUPPORTED, f"gains for {_names(WEAK_ATTACKS)} and for both worst cases")
    if weak:
        rest = f"no gain shown for {failures}" if strong_suite else NOT_STRONG
        return Decision(WEAK_ONLY, f"gains for {_names(WEAK_ATTACKS)}; {rest}")
    if worst:
        return Decision(INCONCLUSIVE, f"gains for both worst cases but none shown for {failures}")
    if differences[DECISIVE_WEAK].ci_high < MEANINGFUL_GAIN:
        return Decision(NOT_SUPPORTED, f"the gain under PGD is below {100 * MEANINGFUL_GAIN:g} points")
    return Decision(INCONCLUSIVE, f"no gain shown for {failures}, and a gain under PGD is not ruled out")


def decide_time(ci_low: float, ci_high: float) -> Decision:
    """Decide C3 from the interval of the ratio of training-step times."""
    if ci_high < TIME_BUDGET:
        return Decision(SUPPORTED, f"the interval lies below {TIME_BUDGET:g}")
    if ci_low > TIME_BUDGET:
        return Decision(NOT_SUPPORTED, f"the interval lies above {TIME_BUDGET:g}")
    if math.isnan(ci_low) or math.isnan(ci_high):
        return Decision(INCONCLUSIVE, "the ratio has no interval")
    return Decision(INCONCLUSIVE, f"the interval contains {TIME_BUDGET:g}")


def decide_masking(left: Survival | None, counting: Sequence[str], *, strong_suite: bool) -> Decision:
    """Decide C5 from what is left of the PGD gain and the masking checks that count against it."""
    if not strong_suite:
        return Decision(INCONCLUSIVE, "the strong attacks were not run")
    if left is None or left.pgd.n < MIN_PAIRS:
        return Decision(INCONCLUSIVE, f"{pairs_of_seeds(left.pgd.n if left else 0)}; {MIN_PAIRS} are needed")
    if not left.pgd.ci_low > 0:
        return Decision(INCONCLUSIVE, "no gain under PGD is shown, so there is nothing to explain")
    if counting:
        return Decision(NOT_SUPPORTED, f"most of the models fail {', '.join(counting)} where cross-entropy passes")
    if left.ci_high < SURVIVING_SHARE or left.worst.ci_high < SURVIVING_SHARE * left.pgd.difference:
        return Decision(NOT_SUPPORTED, f"less than {SURVIVING_SHARE:g} of the gain under PGD is left in the worst case")
    if left.ci_low > SURVIVING_SHARE and left.worst.ci_low > 0:
        return Decision(SUPPORTED, f"more than {SURVIVING_SHARE:g} of the gain under PGD is left in the worst case")
    return Decision(INCONCLUSIVE, "how much of the gain under PGD is left in the worst case is not settled")


def least_favourable(verdicts: Sequence[str]) -> str:
    """Return the least favourable of the conclusive verdicts, or inconclusive if there is none."""
    conclusive = [verdict for verdict in verdicts if verdict in CONCLUSIVE]
    return max(conclusive, key=CONCLUSIVE.index) if conclusive else INCONCLUSIVE
