"""The schema of attacks: types and ranges. Imports no torch."""

from dataclasses import dataclass, field

from drs.errors import UserError

NORMS = ("linf", "l2")
SLACK = 1e-6
"""Rounding allowed beyond epsilon and the pixel range, in pixel units."""


@dataclass
class AttackConfig:
    """What all attacks share.

    Attributes:
        kind: Which attack of ``drs.attacks`` this configures.
        norm: The norm in which it is scored, ``linf`` or ``l2``.
        n_samples: At most so many of the suite's samples are attacked; null for all.
        seed: Seed of the attack's own randomness, apart from every other generator.
        decisive: Run at the suite's decisive epsilons only, on its decisive samples.
        standing_only: Attack only what every attack before it in the suite has left standing.
    """

    kind: str
    norm: str
    n_samples: int | None = None
    seed: int = 0
    decisive: bool = False
    standing_only: bool = False


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
    """CW with binary search over the constant (arXiv 1608.04644, section VI), foolbox.

    Attributes:
        binary_search_steps: Constants tried per sample and step size.
        steps: Adam steps per constant.
        step_sizes: Of Adam; each is a search of its own, and the smallest perturbation counts.
        confidence: Margin to be reached, kappa in the paper.
        initial_const: The first constant.
        abort_early: Stop a constant whose loss no longer falls.
        targets: Searches: one for any class but the label, each further one for the class that is nearest by clean
            logits of those not reached before.
    """

    binary_search_steps: int = 6
    steps: int = 80
    step_sizes: list[float] = field(default_factory=lambda: [0.05, 0.005])
    confidence: float = 0.0
    initial_const: float = 1.0
    abort_early: bool = False
    targets: int = 2


@dataclass
class ProjectedConfig(AttackConfig):
    """Projected gradient steps with restarts, best iterate kept; see ``drs.attacks.projected``.

    Attributes:
        objectives: Keys of ``drs.attacks.objectives.FAMILIES``. Empty: those that the run's own loss names, which
            makes the attack adaptive.
        steps: Gradient steps per restart.
        restarts: Per objective, and per target of a targeted one.
        relative_step_size: The first step as a share of epsilon; it shrinks to 0.
        random_start: Start the first restart at random too, rather than at the clean image.
    """

    objectives: list[str] = field(default_factory=list)
    steps: int = 50
    restarts: int = 1
    relative_step_size: float = 1.0
    random_start: bool = False


@dataclass
class TransferConfig(AttackConfig):
    """Margin PGD on the cross-entropy model of the same data, architecture and seed."""

    steps: int = 50
    relative_step_size: float = 1.0


@dataclass
class NoiseConfig(AttackConfig):
    """Random corners of the Linf ball."""

    draws: int = 10


@dataclass
class APGDConfig(AttackConfig):
    """Auto-PGD on cross-entropy (Croce and Hein 2020, arXiv 2003.01690), torchattacks."""

    steps: int = 100
    restarts: int = 1
    rho: float = 0.75


@dataclass
class TargetedAPGDConfig(AttackConfig):
    """Auto-PGD on the targeted difference of logits ratio, every class in turn (arXiv 2003.01690), torchattacks."""

    steps: int = 100
    restarts: int = 1
    rho: float = 0.75


@dataclass
class TargetedFABConfig(AttackConfig):
    """Fast adaptive boundary attack, every class in turn (Croce and Hein 2020, arXiv 1907.02044), torchattacks."""

    steps: int = 100
    restarts: int = 1


@dataclass
class FABConfig(AttackConfig):
    """Targeted FAB of this project, after the paper; a second implementation, which takes no radius.

    Attributes:
        steps: Projection steps per target.
        final_steps: Of the final search, 3 in the paper; torchattacks' FAB and AutoAttack's have none.
    """

    steps: int = 100
    final_steps: int = 3


@dataclass
class SquareConfig(AttackConfig):
    """Square attack, random search on scores (Andriushchenko et al. 2020, arXiv 1912.00049), torchattacks."""

    n_queries: int = 5000
    restarts: int = 1


@dataclass
class FMNConfig(AttackConfig):
    """Fast minimum-norm attack (Pintor et al. 2021, arXiv 2102.12827), foolbox."""

    steps: int = 200


@dataclass
class FMNFromStartConfig(FMNConfig):
    """The same from misclassified starts rather than the clean image, from which it does not converge in L2.

    Attributes:
        start_steps: Gradient steps in each of the growing balls in which a start is looked for.
        targets: Searches, each from a start towards another class, the nearest by clean logits first; the smallest
            perturbation counts.
    """

    start_steps: int = 4
    targets: int = 2


@dataclass
class HopSkipJumpConfig(AttackConfig):
    """HopSkipJump, which sees predicted classes only (Chen et al. 2020, arXiv 1904.02144), foolbox."""

    steps: int = 32
    initial_gradient_eval_steps: int = 100
    max_gradient_eval_steps: int = 10000


ATTACK_SCHEMAS: dict[str, type[AttackConfig]] = {
    "fgsm": FGSMConfig,
    "pgd": PGDConfig,
    "cw_torchattacks": CWTorchattacksConfig,
    "cw": CWConfig,
    "projected": ProjectedConfig,
    "transfer": TransferConfig,
    "noise": NoiseConfig,
    "apgd_ce": APGDConfig,
    "apgd_t": TargetedAPGDConfig,
    "fab_t": TargetedFABConfig,
    "fab": FABConfig,
    "square": SquareConfig,
    "fmn": FMNConfig,
    "fmn_from_start": FMNFromStartConfig,
    "hop_skip_jump": HopSkipJumpConfig,
}
LINF_ONLY = ("fgsm", "pgd", "noise", "apgd_t", "fab")
L2_ONLY = ("cw", "cw_torchattacks")
OBJECTIVES = ("ce", "margin", "targeted_margin", "scaled_ce")


@dataclass
class SanityConfig:
    """The checks of Carlini et al. 2019 (arXiv 1902.06705) on every model; see ``drs.attacks.probes``.

    Attributes:
        n_samples: The first so many of the suite's samples.
        n_convergence: Test samples for whether twice the steps or restarts find more, however many the suite attacks,
            at most the whole test set; of a hundred, a single one is beyond their thresholds. Null for ``n_samples``.
        steps: Gradient steps of a probe; one probe doubles them.
        restarts: Of a probe, the first from the clean image. One probe doubles them, and two have K-1 times as many, as
            one towards each of the other classes has.
        relative_step_size: The first step as a share of epsilon.
        batch_size: Samples per batch.
        seed: Of the random starts.
    """

    n_samples: int = 200
    steps: int = 50
    restarts: int = 2
    relative_step_size: float = 1.0
    batch_size: int = 500
    seed: int = 0
    n_convergence: int | None = None


@dataclass
class ConvergenceConfig:
    """Settings of the checks that compare margin PGD with twice its steps and restarts, those of ``SanityConfig``."""

    steps: int
    restarts: int
    relative_step_size: float
    batch_size: int
    seed: int


def attack_schema(name: str, section: object) -> type[AttackConfig]:
    """Return the dataclass of an attack section; ``UserError`` for an unknown kind."""
    kind = section.get("kind") if isinstance(section, dict) else None
    if kind is None:
        raise UserError(
            f"suite.attacks.{name}: the suite has no attack of that name, of which an option is set here; take a suite "
            "that has it, or leave out the experiment that sets it (study=NAME instead)"
        )
    if kind not in ATTACK_SCHEMAS:
        raise UserError(f"suite.attacks.{name}.kind={kind}: unknown; it is one of {', '.join(ATTACK_SCHEMAS)}")
    return ATTACK_SCHEMAS[kind]


def check_attack(key: str, attack: AttackConfig) -> None:
    """Raise ``UserError`` for a value of an attack out of range; ``key`` is where its config is."""
    if attack.norm not in NORMS:
        raise UserError(f"{key}.norm={attack.norm}: unknown norm; it is one of {', '.join(NORMS)}")
    for norm, kinds in (("linf", LINF_ONLY), ("l2", L2_ONLY)):
        if attack.kind in kinds and attack.norm != norm:
            raise UserError(f"{key}.norm={attack.norm}: {attack.kind} is an attack in {norm}")
    for name in getattr(attack, "objectives", []):
        if name not in OBJECTIVES:
            raise UserError(f"{key}.objectives={name}: unknown; it is one of {', '.join(OBJECTIVES)}")
    if attack.standing_only and not attack.decisive:
        raise UserError(f"{key}.standing_only=true: needs decisive=true, so that all attacks share their samples")
    positive = ("n_samples", "steps", "start_steps", "relative_step_size", "c", "learning_rate", "binary_search_steps",
                "step_size", "initial_const", "restarts", "draws", "rho", "n_queries", "initial_gradient_eval_steps",
                "max_gradient_eval_steps", "targets")  # fmt: skip
    for name in positive:
        value = getattr(attack, name, None)
        if value is not None and not value > 0:
            raise UserError(f"{key}.{name}={value}: must be above 0")
    for value in (step_sizes := getattr(attack, "step_sizes", [1.0])):
        if not value > 0:
            raise UserError(f"{key}.step_sizes={value}: must be above 0")
    if not step_sizes:
        raise UserError(f"{key}.step_sizes=[]: needs at least one step size, such as [0.05]")
    for name in ("confidence", "final_steps"):
        if (value := getattr(attack, name, 0)) < 0:
            raise UserError(f"{key}.{name}={value}: must be at least 0")


def is_bounded(config: AttackConfig) -> bool:
    """Return whether an attack takes an epsilon, so that each epsilon is an attack of its own."""
    return not isinstance(config, CWConfig | CWTorchattacksConfig | FABConfig | FMNConfig | HopSkipJumpConfig)
