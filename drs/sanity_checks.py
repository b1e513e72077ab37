"""The sanity checks by name: what the figure of each means and what it must not exceed. Imports no torch.

A share of n images moves in steps of 1/n. No image is let off for that: where 1/n is above a threshold, one image fails
the check. What a pass is worth depends on n too, and ``unseen_share`` says how much.
"""

import math
from dataclasses import dataclass

ROUNDING = 1e-9
"""Of a difference of two shares in float64; far below one image."""


@dataclass(frozen=True)
class Check:
    """A check of one model.

    Attributes:
        threshold: What the figure must not exceed.
        meaning: The figure in words.
        below: Whether the figure must stay below the threshold, and not only up to it.
        share: Whether the figure is the share of n images that show something, and so has a binomial interval; else it
            is a difference of two accuracies.
        marks: Whether a failure marks the model wherever it is named. It does not where an attack that gets weaker
            fails the check as well: what could overstate robustness is then a check of its own, which marks.
    """

    threshold: float
    meaning: str
    below: bool = False
    share: bool = True
    marks: bool = True

    def passes(self, figure: float) -> bool:
        """Say whether a figure passes."""
        return figure < self.threshold - ROUNDING if self.below else figure <= self.threshold + ROUNDING


def unseen_share(n: int) -> float:
    """Return how large a share of all images may show what none of n does: the upper end of Wilson's 95 % interval."""
    square = _NORMAL_QUANTILE**2
    return square / (n + square) if n else math.nan


_NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %

CHECKS = {
    "eps0_equals_clean": Check(0.0, "share of predictions that an attack with epsilon 0 changes"),
    "pgd_beats_fgsm": Check(0.0, "share of images that FGSM fools and PGD does not"),
    "falls_with_epsilon": Check(0.0, "largest rise of PGD's robust accuracy from one epsilon to the next, or what is "
                                     "left above chance at a large epsilon", share=False),
    "unbounded_succeeds": Check(0.01, "robust accuracy where every pixel may take any value"),
    "more_steps": Check(0.005, "change of robust accuracy, either way, when margin PGD takes twice the steps",
                        below=True, share=False),
    "more_restarts": Check(0.005, "change of robust accuracy, either way, when margin PGD restarts twice as often",
                           below=True, share=False),
    "objective_spread": Check(0.02, "largest less smallest robust accuracy under PGD on cross-entropy, on the margin, "
                                    "and on the margin to each target, with equally many climbs", share=False,
                              marks=False),
    "objective_gap": Check(0.02, "how much lower PGD gets on the margin, or on the margin to each target, than on "
                                  "cross-entropy, with equally many climbs", share=False),
    "logit_shift": Check(0.0, "share of images for which PGD on cross-entropy ends otherwise when a constant is added "
                              "to all logits"),
    "logit_rescaling": Check(0.0, "largest change of robust accuracy, either way, when PGD on cross-entropy sees the "
                                  "logits times a factor", share=False, marks=False),
    "logit_shift_and_scale": Check(0.02, "how much lower PGD on cross-entropy gets when logits are shifted or "
                                          "rescaled", share=False),
    "zero_gradient": Check(0.01, "share of correct images whose gradient of cross-entropy is exactly 0"),
    "square_not_stronger": Check(0.005, "share of images that Square fools after every gradient attack has failed"),
    "transfer_not_stronger": Check(0.005, "share of images that a transfer fools and no gradient attack does"),
    "noise_weaker": Check(0.005, "share of images that random noise fools and PGD does not"),
    "best_iterate": Check(0.0, "share of images whose last PGD iterate is right though an earlier one was wrong"),
}  # fmt: skip
