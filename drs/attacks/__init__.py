"""Attacks behind one contract: pixels in [0,1] in, logits out, epsilon in pixel units."""

from drs.attack_config import AttackConfig, CWConfig, CWTorchattacksConfig, FGSMConfig, PGDConfig
from drs.attacks.carlini_wagner import CarliniWagner, TorchattacksCarliniWagner
from drs.attacks.contract import Attack, AttackOutcome, perturbation_norm, run_attack
from drs.attacks.gradient_sign import FGSM, PGD

__all__ = ["Attack", "AttackOutcome", "build_attack", "perturbation_norm", "run_attack"]


def build_attack(config: AttackConfig) -> Attack:
    """Build the attack that a config describes; ``TypeError`` for a config of no known attack."""
    if isinstance(config, FGSMConfig):
        return FGSM()
    if isinstance(config, PGDConfig):
        return PGD(config.steps, config.relative_step_size, config.random_start)
    if isinstance(config, CWTorchattacksConfig):
        return TorchattacksCarliniWagner(config.c, config.confidence, config.steps, config.learning_rate)
    if isinstance(config, CWConfig):
        return CarliniWagner(
            config.binary_search_steps, config.steps, config.step_size, config.confidence, config.initial_const,
            config.abort_early,
        )  # fmt: skip
    raise TypeError(f"no attack for {type(config).__name__}")
