"""A hard-label attack: it sees which class a model predicts, and neither scores nor gradients."""

import logging

import foolbox
import torch
from torch import Tensor, nn


class HopSkipJump:
    """HopSkipJump (Chen et al. 2020, arXiv 1904.02144), foolbox's implementation, one sample after another.

    A search needs a misclassified image to start from: the clean image blended with noise until the model errs. A
    sample for which no such image is found counts as standing.

    Args:
        norm: ``linf`` or ``l2``.
        steps: Boundary steps.
        initial_gradient_eval_steps: Queries for the first estimate of the gradient.
        max_gradient_eval_steps: The most for any.
    """

    bounded = False

    def __init__(self, norm: str, steps: int, initial_gradient_eval_steps: int, max_gradient_eval_steps: int) -> None:
        self.norm = norm
        self.name = f"HopSkipJump {norm} (foolbox)"
        self.start = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(steps=50)
        self.attack = foolbox.attacks.HopSkipJumpAttack(
            init_attack=self.start,
            steps=steps,
            initial_gradient_eval_steps=initial_gradient_eval_steps,
            max_gradient_eval_steps=max_gradient_eval_steps,
            constraint="linf" if norm == "linf" else "l2",
            tensorboard=False,
        )

    @torch.no_grad()
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``; where nothing was found the clean image comes back."""
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        images = images.contiguous()
        logging.disable(logging.WARNING)
        try:
            starts = self.start.run(wrapped, images, foolbox.criteria.Misclassification(labels))
        finally:
            logging.disable(logging.NOTSET)
        begun = wrapped(starts).argmax(dim=1) != labels
        result = images.clone()
        if bool(begun.any()):
            criterion = foolbox.criteria.Misclassification(labels[begun])
            found = self.attack.run(wrapped, images[begun], criterion, starting_points=starts[begun])
            result[begun] = found.clamp(0, 1)
        return result
