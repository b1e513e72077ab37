"""Attacks behind one contract: pixels in [0,1] in, logits out, epsilon in pixel units."""

from collections.abc import Sequence

from torch import nn

from drs.attack_config import (
    APGDConfig,
    AttackConfig,
    CWConfig,
    CWTorchattacksConfig,
    FABConfig,
    FGSMConfig,
    FMNConfig,
    FMNFromStartConfig,
    HopSkipJumpConfig,
    NoiseConfig,
    PGDConfig,
    ProjectedConfig,
    SquareConfig,
    TargetedAPGDConfig,
    TargetedFABConfig,
    TransferConfig,
    is_bounded,
)
from drs.attacks.carlini_wagner import CarliniWagner, TorchattacksCarliniWagner
from drs.attacks.contract import Attack, AttackOutcome, perturbation_norm
from drs.attacks.fab import TargetedFastAdaptiveBoundary
from drs.attacks.gradient_sign import FGSM, PGD
from drs.attacks.projected import ProjectedAttack, RandomNoise, Transfer
from drs.attacks.running import run_attack

__all__ = ["Attack", "AttackOutcome", "build_attack", "is_bounded", "perturbation_norm", "run_attack"]


def build_attack(
    config: AttackConfig, *, adaptive_objectives: Sequence[str] = (), source: nn.Module | None = None
) -> Attack:
    """Build the attack that a config describes.

    Args:
        config: One of the dataclasses of ``drs.attack_config``.
        adaptive_objectives: What an attacker who knows the model's loss climbs; used where the config names none.
        source: The model that a transfer attack is made on.

    Raises:
        TypeError: For a config of no known attack.
        ValueError: For a transfer attack without a source, or gradient steps without an objective.
    """
    if isinstance(config, FGSMConfig):
        return FGSM()
    if isinstance(config, PGDConfig):
        return PGD(config.steps, config.relative_step_size, config.random_start)
    if isinstance(config, CWTorchattacksConfig):
        return TorchattacksCarliniWagner(config.c, config.confidence, config.steps, config.learning_rate)
    if isinstance(config, CWConfig):
        return CarliniWagner(
            config.binary_search_steps, config.steps, config.step_sizes, config.confidence, config.initial_const,
            config.abort_early, config.targets,
        )  # fmt: skip
    if isinstance(config, ProjectedConfig):
        objectives = config.objectives or list(adaptive_objectives)
        if not objectives:
            raise ValueError("gradient steps need an objective: name one, or pass those of the model's loss")
        name = f"PGD on {' and '.join(objectives)}"
        return ProjectedAttack(
            name, objectives, config.norm, config.steps, config.restarts, config.relative_step_size,
            config.random_start,
        )  # fmt: skip
    if isinstance(config, TransferConfig):
        if source is None:
            raise ValueError("a transfer attack needs the model that it is made on")
        return Transfer(source, config.norm, config.steps, config.relative_step_size)
    if isinstance(config, NoiseConfig):
        return RandomNoise(config.draws)
    if isinstance(config, FABConfig):
        return TargetedFastAdaptiveBoundary(config.steps, config.final_steps)
    return _library_attack(config)


def _library_attack(config: AttackConfig) -> Attack:
    from drs.attacks import autoattack, decision_based, minimal_norm

    if isinstance(config, APGDConfig):
        return autoattack.AutoPGD(config.norm, config.steps, config.restarts, config.rho, config.seed)
    if isinstance(config, TargetedAPGDConfig):
        return autoattack.TargetedAutoPGD(config.norm, config.steps, config.restarts, config.rho, config.seed)
    if isinstance(config, TargetedFABConfig):
        return autoattack.TargetedFAB(config.norm, config.steps, config.restarts, config.seed)
    if isinstance(config, SquareConfig):
        return autoattack.SquareAttack(config.norm, config.n_queries, config.restarts, config.seed)
    if isinstance(config, FMNFromStartConfig):
        return minimal_norm.FastMinimumNorm(config.norm, config.steps, config.start_steps, config.targets)
    if isinstance(config, FMNConfig):
        return minimal_norm.FastMinimumNorm(config.norm, config.steps)
    if isinstance(config, HopSkipJumpConfig):
        return decision_based.HopSkipJump(
            config.norm, config.steps, config.initial_gradient_eval_steps, config.max_gradient_eval_steps
        )
    raise TypeError(f"no attack for {type(config).__name__}")
