"""How many images stand behind a number of REPORT.md, said beside it where they are few."""

from dataclasses import dataclass

import pandas as pd

from drs.figure_style import wilson_interval
from drs.markdown import fixed, interval, mean_sd

FEWEST_FOR_A_MEDIAN = 10
"""A median norm over fewer images is not printed."""
SEARCHES = ("cw", "fmn_linf", "fmn_l2")
"""Attacks that look for the smallest perturbation."""
INTERVALS = (
    "An attack that saw fewer images than the worst case has their number n beside it, and its shares have the 95 % "
    "interval over those images in brackets (Wilson's, of the mean over seeds; every model is attacked on the same "
    "images)."
)
MEDIANS = (
    f"A median norm over fewer than {FEWEST_FOR_A_MEDIAN} images is not printed; their number stands in its place."
)


@dataclass(frozen=True)
class ImageCounts:
    """How many images each attack saw in one group of models.

    Attributes:
        suite: How many the worst case in Linf is taken over; without one, the most that any attack saw.
        of_attack: The fewest that an attack saw, at any epsilon and on any model. The smallest norm over all attacks
            is taken over the images of the search with the most of them (``drs.minimal_norms.smallest_outcome``).
    """

    suite: int
    of_attack: dict[str, int]

    @classmethod
    def of(cls, accuracy: pd.DataFrame) -> "ImageCounts":
        """Count the images of a group's rows of accuracy.csv."""
        counts = accuracy[accuracy["attack"] != "clean"].groupby("attack")["n"].min()
        least = {str(attack): int(n) for attack, n in counts.items()}
        for norm, rows in accuracy[accuracy["attack"].isin(SEARCHES)].groupby("norm"):
            least[f"smallest_{norm}"] = int(rows["n"].max())
        return cls(least.get("worst_linf", max(least.values(), default=0)), least)

    def is_subset(self, attack: str) -> bool:
        """Say whether an attack saw fewer images than the suite."""
        return self.of_attack.get(attack, self.suite) < self.suite

    def title(self, text: str, attack: str) -> str:
        """Write the head of an attack's column: with n, where it saw fewer images than the suite."""
        return f"{text}, n = {self.of_attack[attack]}" if self.is_subset(attack) else text

    def bounds(self, mean: float, attack: str) -> str:
        """Write the interval in % of a mean share in 0..1 over the images of an attack that saw a subset."""
        if pd.isna(mean) or not self.is_subset(attack):
            return ""
        low, high = 100 * wilson_interval([mean], self.of_attack[attack])[:, 0]
        return interval(fixed(low, 0), fixed(high, 0)).replace(", ", ",\N{NO-BREAK SPACE}")

    def share(self, values: "pd.Series[float]", attack: str) -> str:
        """Write the mean ± sd in % of some models' shares, with the interval of a subset."""
        return mean_sd(values, scale=100.0) + self.bounds(float(values.mean()), attack)

    def too_few(self, attack: str) -> str:
        """Return what to print in place of a median norm over too few images; nothing where there are enough."""
        n = self.of_attack.get(attack, FEWEST_FOR_A_MEDIAN)
        return f"n = {n}" if n < FEWEST_FOR_A_MEDIAN else ""

    def norm(self, values: "pd.Series[float]", attack: str) -> str:
        """Write the mean ± sd of some models' median norms, or how few images there were."""
        return self.too_few(attack) or mean_sd(values, digits=None)
