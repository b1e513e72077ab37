"""The L2 attack of Carlini and Wagner 2017 (arXiv 1608.04644), twice.

torchattacks' version is what users of the paper's tool run, and it is weak: it masks the label by multiplying by 0,
so that the runner-up reads 0 where all other logits are negative; it cannot move pixels that are exactly 0 or 1; it
keeps one constant; and it stops early on the total over the batch. foolbox's version searches for the constant.

foolbox's version too hardly moves such pixels: it works on the inverse hyperbolic tangent of the pixels, where 0 and 1
lie 7 away from 1/2 and Adam's steps are some hundredths. So it is given a pixel range that is wider than [0,1].
"""

from collections.abc import Sequence

import foolbox
import torch
import torchattacks
from foolbox.criteria import Misclassification, TargetedMisclassification
from torch import Tensor, nn

from drs.attacks.contract import perturbation_norm
from drs.attacks.gradient_sign import call_torchattacks

TARGETS = 2
"""Searches, each after the first for a class that was not reached before."""
WIDENING = 0.1
"""By how much the pixel range that foolbox's CW works in is wider than [0,1], on either side."""


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


class _Clipped(nn.Module):
    """A model that sees its images clipped to [0,1]; the gradient takes no notice of the clipping."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + (images.clamp(0, 1) - images).detach())


class CarliniWagner:
    """foolbox's CW with binary search over the constant; the smallest perturbation over step sizes and targets.

    An attack cannot find a perturbation that is much smaller than one step of Adam moves the image, nor one that lies
    further than all its steps reach. The norms of data sets differ by a factor of ten, hence more than one size.

    A search for any class but the label ends at the boundary to one class, which for some images is not the nearest,
    however many constants and steps it has. So another search follows for a class that has not been reached. It cannot
    take the place of the first: where the logits of the other classes are even, as the distribution-restrained loss
    wants them, they do not tell which class is near.

    Args:
        binary_search_steps: Constants tried per sample, step size and target.
        steps: Adam steps per constant.
        step_sizes: Of Adam, each a search of its own.
        confidence: Margin to be reached, kappa in the paper.
        initial_const: The first constant.
        abort_early: Stop a constant whose loss no longer falls.
        targets: Searches: one for any class, each further one for the class that is nearest by clean logits of those
            that were not reached before. At most one for each class that is not the label.
    """

    name = "CW (foolbox)"
    ends_on_boundary = True
    norm = "l2"
    bounded = False

    def __init__(
        self,
        binary_search_steps: int,
        steps: int,
        step_sizes: Sequence[float],
        confidence: float,
        initial_const: float,
        abort_early: bool,
        targets: int = TARGETS,
    ) -> None:
        self.targets = targets
        self.attacks = [
            foolbox.attacks.L2CarliniWagnerAttack(
                binary_search_steps=binary_search_steps,
                steps=steps,
                stepsize=step_size,
                confidence=confidence,
                initial_const=initial_const,
                abort_early=abort_early,
            )
            for step_size in step_sizes
        ]

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``; where nothing was found the clean image comes back."""
        wrapped = foolbox.PyTorchModel(_Clipped(model).eval(), bounds=(-WIDENING, 1 + WIDENING), device=images.device)
        with torch.no_grad():
            clean = model(images).float()
        asked = torch.zeros_like(clean, dtype=torch.bool).scatter(1, labels.unsqueeze(1), True)
        result, smallest = images.clone(), torch.full_like(labels, torch.inf, dtype=torch.float64)
        for number in range(min(self.targets, clean.shape[1] - 1)):
            if bool(asked.all()):
                break
            # Where every class was reached it is any class, and what is found counts only if it is not the label.
            nearest = clean.masked_fill(asked, -torch.inf).argmax(dim=1)
            asked.scatter_(1, nearest.unsqueeze(1), number > 0)
            criterion = TargetedMisclassification(nearest) if number else Misclassification(labels)
            for attack in self.attacks:
                # Clipping moves no pixel away from its clean value, so it only makes the perturbation smaller.
                moved = attack(wrapped, images, criterion, epsilons=None)[0].clamp(0, 1)
                with torch.no_grad():
                    predicted = model(moved).argmax(dim=1)
                asked.scatter_(1, predicted.unsqueeze(1), True)
                norms = perturbation_norm(images, moved, self.norm)
                better = (predicted != labels) & (norms < smallest)
                result[better], smallest = moved[better], torch.where(better, norms, smallest)
        return result
