"""The schema of attacks and suites: types, ranges and epsilons in pixel units. Imports no torch."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from drs.errors import UserError

NORMS = ("linf", "l2")


@dataclass
class AttackConfig:
    """What all attacks share.

    Attributes:
        kind: Which attack of ``drs.attacks`` this configures.
        norm: The norm in which it is scored, ``linf`` or ``l2``.
        n_samples: At most so many of the suite's samples are attacked; null for all.
        seed: Seed of the attack's own randomness, apart from every other generator.
    """

    kind: str
    norm: str
    n_samples: int | None = None
    seed: int = 0


@dataclass
class FGSMConfig(AttackConfig):
    """Fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572), torchattacks."""


@dataclass
class PGDConfig(AttackConfig):
    """Projected gradient descent on cross-entropy (Madry et al. 2018, arXiv 1706.06083), torchattacks.

    Attributes:
        steps: Gradient steps.
        relative_step_size: Step size as a share of epsilon.
        random_start: Start uniformly inside the epsilon ball.
    """

    steps: int = 20
    relative_step_size: float = 0.125
    random_start: bool = True


@dataclass
class CWTorchattacksConfig(AttackConfig):
    """torchattacks' CW (Carlini and Wagner 2017, arXiv 1608.04644) without binary search, as its users run it."""

    c: float = 1.0
    confidence: float = 0.0
    steps: int = 50
    learning_rate: float = 0.01


@dataclass
class CWConfig(AttackConfig):
    """CW with binary search over the constant (arXiv 1608.04644, section VI), foolbox."""

    binary_search_steps: int = 6
    steps: int = 100
    step_size: float = 0.05
    confidence: float = 0.0
    initial_const: float = 1.0
    abort_early: bool = True


ATTACK_SCHEMAS: dict[str, type[AttackConfig]] = {
    "fgsm": FGSMConfig,
    "pgd": PGDConfig,
    "cw_torchattacks": CWTorchattacksConfig,
    "cw": CWConfig,
}


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
    """

    name: str
    attacks: dict[str, Any]
    epsilons: dict[str, Any]
    n_samples: dict[str, int]
    strong: bool = False
    n_clean: int | None = None
    batch_size: int = 500


@dataclass(frozen=True)
class Epsilon:
    """A perturbation bound: its value in pixel units and the label that tables show."""

    value: float
    label: str = field(compare=False)


UNBOUNDED = Epsilon(math.inf, "inf")


def parse_epsilon(text: object, norm: str, key: str) -> Epsilon:
    """Return the epsilon that a config writes as a number or a fraction such as ``8/255``.

    Raises:
        UserError: Naming ``key`` and the value, unless it is above 0 and, for ``linf``, at most 1.
    """
    try:
        value = float(Fraction(str(text).strip()))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{key}={text}: must be a number or a fraction such as 8/255, in pixel units") from None
    if value <= 0:
        raise UserError(f"{key}={text}: must be above 0")
    if norm == "linf" and value > 1:
        raise UserError(f"{key}={text}: must be at most 1; pixels lie in [0,1], so 8 of 255 grey levels is 8/255")
    if norm == "l2" and value > 100:
        raise UserError(f"{key}={text}: must be a Euclidean norm for pixels in [0,1], at most 100")
    return Epsilon(value, str(text).strip())


def suite_epsilons(suite: SuiteConfig, data: str, norm: str) -> list[Epsilon]:
    """Return the suite's epsilons for a data set and norm, ascending.

    Raises:
        UserError: If the suite names none.
    """
    listed = (suite.epsilons.get(data) or {}).get(norm)
    key = f"suite.epsilons.{data}.{norm}"
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{key} is missing; list the epsilons that the {suite.name} suite uses on {data}")
    return sorted((parse_epsilon(item, norm, key) for item in listed), key=lambda epsilon: epsilon.value)


def suite_samples(suite: SuiteConfig, data: str) -> int:
    """Return how many test samples of a data set the suite attacks."""
    return suite.n_samples.get(data, suite.n_samples["default"])


def attack_schema(name: str, section: object) -> type[AttackConfig]:
    """Return the dataclass of an attack section; ``UserError`` for an unknown kind."""
    kind = section.get("kind") if isinstance(section, dict) else None
    if kind not in ATTACK_SCHEMAS:
        raise UserError(f"suite.attacks.{name}.kind={kind}: unknown; it is one of {', '.join(ATTACK_SCHEMAS)}")
    return ATTACK_SCHEMAS[kind]


def check_suite(suite: SuiteConfig) -> None:
    """Raise ``UserError`` for a value out of range, naming its key and what is allowed."""
    if not suite.attacks:
        raise UserError(f"suite.attacks: the {suite.name} suite has no attack")
    if "default" not in suite.n_samples:
        raise UserError("suite.n_samples.default is missing; it serves the data sets that have no number of their own")
    for data, count in suite.n_samples.items():
        if count < 1:
            raise UserError(f"suite.n_samples.{data}={count}: must be at least 1")
    if suite.batch_size < 1:
        raise UserError(f"suite.batch_size={suite.batch_size}: must be at least 1")
    if suite.n_clean is not None and suite.n_clean < 1:
        raise UserError(f"suite.n_clean={suite.n_clean}: must be null or at least 1")
    for data, norms in suite.epsilons.items():
        for norm in norms:
            if norm not in NORMS:
                raise UserError(f"suite.epsilons.{data}.{norm}: unknown norm; it is one of {', '.join(NORMS)}")
            suite_epsilons(suite, data, norm)
    for name, attack in suite.attacks.items():
        _check_attack(f"suite.attacks.{name}", attack)


def _check_attack(key: str, attack: AttackConfig) -> None:
    norm = "linf" if attack.kind in ("fgsm", "pgd") else "l2"
    if attack.norm != norm:
        raise UserError(f"{key}.norm={attack.norm}: {attack.kind} is an attack in {norm}")
    positive = ("n_samples", "steps", "relative_step_size", "c", "learning_rate", "binary_search_steps", "step_size",
                "initial_const")  # fmt: skip
    for name in positive:
        value = getattr(attack, name, None)
        if value is not None and not value > 0:
            raise UserError(f"{key}.{name}={value}: must be above 0")
    confidence = getattr(attack, "confidence", 0.0)
    if confidence < 0:
        raise UserError(f"{key}.confidence={confidence}: must be at least 0")
