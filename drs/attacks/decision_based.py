"""A hard-label attack: it sees which class a model predicts, and neither scores nor gradients."""

import warnings
from typing import Any

import foolbox
import torch
from torch import Tensor, nn

from drs.attacks.minimal_norm import other_class_images, settle

AT_ONCE = 10
"""Samples searched together: each needs hundreds of noisy copies of itself in memory."""


class SamplewiseHopSkipJump(foolbox.attacks.HopSkipJumpAttack):
    """foolbox's attack with a gradient estimate of length 1 for each sample, as the paper has it.

    foolbox 3.3.4 divides by the norm over the whole batch, so that in L2 every step is too short by the square root of
    the batch size; in Linf only the sign counts.
    """

    def approximate_gradients(self, is_adversarial: Any, x_advs: Any, steps: int, delta: Any) -> Any:
        """Return the estimates ``[B, C, H, W]``, each of L2 norm 1."""
        gradients = super().approximate_gradients(is_adversarial, x_advs, steps, delta)
        norms = gradients.flatten(1).norms.l2(axis=-1) + 1e-12
        return gradients / norms.reshape((-1, *[1] * (gradients.ndim - 1)))


class HopSkipJump:
    """HopSkipJump (Chen et al. 2020, arXiv 1904.02144), foolbox's implementation.

    A search needs a misclassified image to start from: the clean image blended with noise until the model errs, or,
    where the model gives all noise the label, another image of the batch. A sample without either counts as standing.

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
        self.start = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(directions=100, steps=50)
        self.attack = SamplewiseHopSkipJump(
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
        images = images.contiguous()
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        result = images.clone()
        for part in torch.arange(len(images), device=images.device).split(AT_ONCE):
            starts, begun = self._starts(model, wrapped, images, part, labels[part])
            part, starts = part[begun], starts[begun]
            if len(part):
                criterion = foolbox.criteria.Misclassification(labels[part])
                result[part] = self.attack.run(wrapped, images[part], criterion, starting_points=starts)
        return settle(model, images, result, labels)

    def _starts(
        self, model: nn.Module, wrapped: foolbox.PyTorchModel, images: Tensor, part: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a first image for each sample of a part, and whether the model puts it into another class."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*failed to draw sufficient random inputs")
            starts = self.start.run(wrapped, images[part], foolbox.criteria.Misclassification(labels))
        lost = model(starts).argmax(dim=1) == labels
        if bool(lost.any()):
            starts[lost], _ = other_class_images(model, images, labels[lost])
        return starts, model(starts).argmax(dim=1) != labels
