"""The sanity checks by name: what the figure of each means and what it must not exceed. Imports no torch.

Thresholds were fixed before a study was run. A share over n samples moves in steps of 1/n, and one sample never fails
a check that has a threshold above 0: up to ``allowed_figure`` it passes. Where 1/n is above the threshold, n is too
small to tell the two apart, and a pass says less than the threshold would.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A check: what its figure must not exceed, and what it means in words."""

    threshold: float
    meaning: str


def allowed_figure(threshold: float, n: int) -> float:
    """Return the largest figure with which a check passes over n samples: the threshold, or one sample if more."""
    return max(threshold, 1 / n) if threshold and n else threshold


CHECKS = {
    "eps0_equals_clean": Check(0.0, "share of predictions that an attack with epsilon 0 changes"),
    "pgd_beats_fgsm": Check(0.01, "share of samples that FGSM fools and PGD does not"),
    "falls_with_epsilon": Check(0.005, "largest rise of PGD's robust accuracy from one epsilon to the next, or what is "
                                       "left above chance at a large epsilon"),
    "unbounded_succeeds": Check(0.01, "robust accuracy where every pixel may take any value"),
    "more_steps": Check(0.005, "change of robust accuracy when margin PGD takes twice the steps"),
    "more_restarts": Check(0.005, "change of robust accuracy when margin PGD restarts twice as often"),
    "objective_gap": Check(0.02, "how much lower PGD gets on the margin, or on the margin to each target, than on "
                                  "cross-entropy"),
    "logit_shift_and_scale": Check(0.02, "how much lower PGD on cross-entropy gets when logits are shifted or "
                                          "rescaled"),
    "zero_gradient": Check(0.01, "share of correct samples whose gradient of cross-entropy is exactly 0"),
    "square_not_stronger": Check(0.005, "share of samples that Square fools after every gradient attack has failed"),
    "transfer_not_stronger": Check(0.005, "share of samples that a transfer fools and no gradient attack does"),
    "noise_weaker": Check(0.005, "share of samples that random noise fools and PGD does not"),
    "best_iterate": Check(0.005, "share of samples whose last PGD iterate is right though an earlier one was wrong"),
}  # fmt: skip
