"""The schema of suites: which attacks, on how many samples, at which epsilons in pixel units. Imports no torch."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

from drs.attack_config import NORMS, check_attack
from drs.data_cache import DATASETS
from drs.errors import UserError

RESERVED_ATTACKS = (
    "clean", "sanity", "convergence", *(f"{kind}_{norm}" for kind in ("worst", "smallest") for norm in NORMS),
)  # fmt: skip
"""What tables and files name otherwise: no attack can be called so."""


@dataclass
class SuiteConfig:
    """A set of attacks, and the samples and epsilons they run with.

    Attributes:
        name: The suite's name.
        strong: Whether its worst case may decide a claim about robustness; the ``paper`` suite's may not.
        attacks: Attack configs by the name that tables show.
        epsilons: Data set name -> norm -> list of epsilons in pixel units, numbers or fractions such as "8/255".
        n_samples: Data set name -> how many test samples are attacked; ``default`` for the others.
        n_clean: How many test samples the clean accuracy and the statistics use; null for all.
        batch_size: Samples per batch of an attack. Part of a result's identity: torchattacks' CW stops on the
            total over its batch.
        decisive_epsilons: Like ``epsilons``, where the costly attacks run and the worst case is taken; those that
            are not named are decided at all of ``epsilons``.
        n_decisive: Like ``n_samples``, for the attacks at the decisive epsilons and for the worst case; a data set
            without one uses ``n_samples``.
        sanity: The checks that every model goes through, or null for none.
        fast_search: Whether attacks search on a copy of the model with its batch normalisations folded, on a card in
            float16. What they find is judged on the model in float32, and what stands there, but not clearly on the
            copy, is attacked again; what ends on the copy's decision boundary is first brought to the model's. The
            hard-label attack is on the model altogether. On a card passes over small batches are
            recorded and replayed. Part of a result's identity.
    """

    name: str
    attacks: dict[str, Any]
    epsilons: dict[str, Any]
    n_samples: dict[str, int]
    strong: bool = False
    n_clean: int | None = None
    batch_size: int = 500
    decisive_epsilons: dict[str, Any] = field(default_factory=dict)
    n_decisive: dict[str, int] = field(default_factory=dict)
    sanity: Any = None
    fast_search: bool = False


@dataclass(frozen=True)
class Epsilon:
    """A perturbation bound: its value in pixel units and the label that tables show."""

    value: float
    label: str = field(compare=False)


UNBOUNDED = Epsilon(math.inf, "inf")


def parse_epsilon(text: object, norm: str, key: str, data: str | None = None) -> Epsilon:
    """Return the epsilon that a config writes as a number or a fraction such as ``8/255``.

    Raises:
        UserError: Naming ``key`` and the value, unless it is above 0 and at most what two images can be apart: 1 in
            ``linf``; in ``l2`` sqrt(C*H*W), for which ``data`` must name a known data set.
    """
    try:
        value = float(Fraction(str(text).strip()))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{key}={text}: must be a number or a fraction such as 8/255, in pixel units") from None
    if value <= 0:
        raise UserError(f"{key}={text}: must be above 0")
    if norm == "linf" and value > 1:
        raise UserError(f"{key}={text}: must be at most 1; pixels lie in [0,1], so 8 of 255 grey levels is 8/255")
    if norm == "l2" and data in DATASETS:
        shape = (DATASETS[data].channels, DATASETS[data].size, DATASETS[data].size)
        if value > math.sqrt(math.prod(shape)):
            sides = "*".join(str(side) for side in shape)
            raise UserError(
                f"{key}={text}: must be at most sqrt({sides}) = {math.sqrt(math.prod(shape)):.4g}; no two images of "
                f"{data}, with pixels in [0,1], are further apart in l2"
            )
    return Epsilon(value, str(text).strip())


def suite_epsilons(suite: SuiteConfig, data: str, norm: str) -> list[Epsilon]:
    """Return the suite's epsilons for a data set and norm, ascending.

    Raises:
        UserError: If the suite names none.
    """
    return _listed_epsilons(suite.epsilons, suite, data, norm, f"suite.epsilons.{data}.{norm}")


def decisive_epsilons(suite: SuiteConfig, data: str, norm: str) -> list[Epsilon]:
    """Return the epsilons at which the worst case is taken, ascending; all of the suite's where none are named.

    Raises:
        UserError: If the suite names no epsilon for the data set and norm.
    """
    if not (suite.decisive_epsilons.get(data) or {}).get(norm):
        return suite_epsilons(suite, data, norm)
    return _listed_epsilons(suite.decisive_epsilons, suite, data, norm, f"suite.decisive_epsilons.{data}.{norm}")


def _listed_epsilons(table: dict[str, Any], suite: SuiteConfig, data: str, norm: str, key: str) -> list[Epsilon]:
    listed = (table.get(data) or {}).get(norm)
    if isinstance(listed, str | int | float):
        raise UserError(f"{key}={listed}: must be a list of epsilons; write [{listed}]")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{key} is missing; list the epsilons that the {suite.name} suite uses on {data}")
    found = sorted((parse_epsilon(item, norm, key, data) for item in listed), key=lambda epsilon: epsilon.value)
    for one, other in pairwise(found):
        if one == other:
            raise UserError(f"{key}: {one.label} and {other.label} are the same; list each epsilon once")
    return found


def suite_samples(suite: SuiteConfig, data: str) -> int:
    """Return how many test samples of a data set the suite attacks."""
    return suite.n_samples.get(data, suite.n_samples["default"])


def decisive_samples(suite: SuiteConfig, data: str) -> int:
    """Return how many test samples of a data set the attacks at the decisive epsilons use."""
    return min(suite.n_decisive.get(data, suite_samples(suite, data)), suite_samples(suite, data))


def check_enough_clean(suite: SuiteConfig, data: str) -> None:
    """Raise ``UserError`` if the suite attacks images of a data set of which it does not take the clean accuracy."""
    if suite.n_clean is not None and suite.n_clean < suite_samples(suite, data):
        raise UserError(
            f"suite.n_clean={suite.n_clean}: must be null or at least the {suite_samples(suite, data)} images of "
            f"{data} that are attacked (suite.n_samples)"
        )


def check_suite(suite: SuiteConfig) -> None:
    """Raise ``UserError`` for a value out of range, naming its key and what is allowed."""
    if not suite.attacks:
        raise UserError(f"suite.attacks: the {suite.name} suite has no attack")
    if "default" not in suite.n_samples:
        raise UserError("suite.n_samples.default is missing; it serves the data sets that have no number of their own")
    for data, count in suite.n_samples.items():
        if count < 1:
            raise UserError(f"suite.n_samples.{data}={count}: must be at least 1")
        if data in DATASETS and count > DATASETS[data].n_test:
            raise UserError(f"suite.n_samples.{data}={count}: the test set has {DATASETS[data].n_test} samples")
    if suite.batch_size < 1:
        raise UserError(f"suite.batch_size={suite.batch_size}: must be at least 1")
    if suite.n_clean is not None and suite.n_clean < 1:
        raise UserError(f"suite.n_clean={suite.n_clean}: must be null or at least 1")
    for data, count in suite.n_decisive.items():
        if count < 1:
            raise UserError(f"suite.n_decisive.{data}={count}: must be at least 1")
    for table, read in (("epsilons", suite_epsilons), ("decisive_epsilons", decisive_epsilons)):
        for data, norms in getattr(suite, table).items():
            if not isinstance(norms, dict | None):
                raise UserError(f"suite.{table}.{data}={norms}: must name norms, such as {{linf: [8/255]}}")
            for norm in norms or {}:
                if norm not in NORMS:
                    raise UserError(f"suite.{table}.{data}.{norm}: unknown norm; it is one of {', '.join(NORMS)}")
                read(suite, data, norm)
    for data, norms in suite.decisive_epsilons.items():
        for norm in norms or {}:
            known = suite_epsilons(suite, data, norm)
            for epsilon in decisive_epsilons(suite, data, norm):
                if epsilon not in known:
                    raise UserError(
                        f"suite.decisive_epsilons.{data}.{norm}={epsilon.label}: must be one of suite.epsilons.{data}."
                        f"{norm}, {', '.join(item.label for item in known)}"
                    )
    for name, attack in suite.attacks.items():
        if name in RESERVED_ATTACKS:
            raise UserError(f"suite.attacks.{name}: tables show something else under that name; choose another")
        check_attack(f"suite.attacks.{name}", attack)
    if suite.sanity is not None:
        for name, value in vars(suite.sanity).items():
            if name != "seed" and value is not None and not value > 0:
                null = "null or " if name == "n_convergence" else ""
                raise UserError(f"suite.sanity.{name}={value}: must be {null}above 0")
