"""The L2 attack of Carlini and Wagner 2017 (arXiv 1608.04644), twice.

torchattacks' version is what users of the paper's tool run, and it is weak: it masks the label by multiplying by 0,
so that the runner-up reads 0 where all other logits are negative; it cannot move pixels that are exactly 0 or 1; it
keeps one constant; and it stops early on the total over the batch. foolbox's version searches for the constant.
"""

import foolbox
import torchattacks
from torch import Tensor, nn

from drs.attacks.gradient_sign import call_torchattacks


class TorchattacksCarliniWagner:
    """torchattacks' CW, with the constant c fixed.

    Args:
        c: Weight of the misclassification term.
        confidence: Margin to be reached, kappa in the paper.
        steps: Adam steps.
        learning_rate: Of Adam.
    """

    name = "CW (torchattacks)"
    norm = "l2"
    bounded = False

    def __init__(self, c: float, confidence: float, steps: int, learning_rate: float) -> None:
        self.c = c
        self.confidence = confidence
        self.steps = steps
        self.learning_rate = learning_rate

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``."""
        attack = torchattacks.CW(model, c=self.c, kappa=self.confidence, steps=self.steps, lr=self.learning_rate)
        return call_torchattacks(attack, images, labels)


class CarliniWagner:
    """foolbox's CW with binary search over the constant; finds a small perturbation for each sample.

    Args:
        binary_search_steps: Constants tried per sample.
        steps: Adam steps per constant.
        step_size: Of Adam.
        confidence: Margin to be reached, kappa in the paper.
        initial_const: The first constant.
        abort_early: Stop a constant whose loss no longer falls.
    """

    name = "CW (foolbox)"
    norm = "l2"
    bounded = False

    def __init__(
        self,
        binary_search_steps: int,
        steps: int,
        step_size: float,
        confidence: float,
        initial_const: float,
        abort_early: bool,
    ) -> None:
        self.attack = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=binary_search_steps,
            steps=steps,
            stepsize=step_size,
            confidence=confidence,
            initial_const=initial_const,
            abort_early=abort_early,
        )

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``."""
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        adversarial: Tensor = self.attack(wrapped, images, labels, epsilons=None)[0]
        return adversarial.clamp(0, 1)
