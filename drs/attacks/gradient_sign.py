"""Linf attacks of the paper suite, torchattacks' implementations."""

from typing import Any

import torchattacks
from torch import Tensor, nn


def call_torchattacks(attack: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Run a torchattacks attack on pixels in [0,1] ``[B, C, H, W]`` and return the adversarial images.

    The library accepts models it can ask for a device; ours have parameters, so nothing else is needed. The caller
    restores what the library leaves behind (see ``drs.attacks.isolation.isolated``).
    """
    adversarial: Tensor = attack(images, labels)
    return adversarial


class FGSM:
    """One signed gradient step of size epsilon (Goodfellow et al. 2015, arXiv 1412.6572)."""

    name = "FGSM (torchattacks)"
    norm = "linf"
    bounded = True

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``."""
        return call_torchattacks(torchattacks.FGSM(model, eps=epsilon), images, labels)


class PGD:
    """Projected gradient descent on cross-entropy (Madry et al. 2018, arXiv 1706.06083); returns the last iterate.

    Args:
        steps: Gradient steps.
        relative_step_size: Step size as a share of epsilon.
        random_start: Start uniformly inside the epsilon ball.
    """

    name = "PGD (torchattacks)"
    norm = "linf"
    bounded = True

    def __init__(self, steps: int, relative_step_size: float, random_start: bool) -> None:
        self.steps = steps
        self.relative_step_size = relative_step_size
        self.random_start = random_start

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``."""
        attack = torchattacks.PGD(
            model,
            eps=epsilon,
            alpha=self.relative_step_size * epsilon,
            steps=self.steps,
            random_start=self.random_start,
        )
        return call_torchattacks(attack, images, labels)
