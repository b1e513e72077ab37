"""Attacks that look for the smallest perturbation, foolbox's implementations."""

from typing import Any

import foolbox
import torch
from torch import Tensor, nn

OVERSHOOTS = (1e-4, 1e-3, 1e-2)
"""By what share a perturbation may grow to settle on which side of the boundary its image lies."""


@torch.no_grad()
def settle(model: nn.Module, images: Tensor, moved: Tensor, labels: Tensor) -> Tensor:
    """Return ``moved`` ``[B, C, H, W]``, pushed on by as little as makes the model err; the clean image if none does.

    A search ends on the decision boundary, where rounding decides, and rounding changes with the size of the batch.
    """
    result = moved.clamp(0, 1)
    right = model(result).argmax(dim=1) == labels
    for overshoot in OVERSHOOTS:
        if not bool(right.any()):
            break
        result[right] = (images + (1 + overshoot) * (moved - images)).clamp(0, 1)[right]
        right = model(result).argmax(dim=1) == labels
    result[right] = images[right]
    return result


@torch.no_grad()
def other_class_images(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each label the first image of the batch that the model puts into another class, and if there is one.

    Args:
        model: In eval mode.
        images: ``[B, C, H, W]``.
        labels: ``[M]``.

    Returns:
        Images ``[M, C, H, W]`` and whether each is in another class ``[M]`` bool.
    """
    other = model(images).argmax(dim=1).unsqueeze(0) != labels.unsqueeze(1)
    return images[other.int().argmax(dim=1)], other.any(dim=1)


class ProjectingL2FMN(foolbox.attacks.L2FMNAttack):
    """foolbox's L2 attack with the projection that the paper has.

    In foolbox 3.3.4 the factor of the projection is ``min(1, norm / norm)``, which is 1, so that no iterate is ever
    brought back to the shrinking ball and the norms found are several times too large.
    """

    def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
        """Return ``x`` moved onto the L2 ball of radius ``epsilon`` ``[B]`` around ``x0`` where it lies outside."""
        difference = x - x0
        norms = difference.flatten(1).norms.l2(axis=-1).maximum(1e-12)
        factor = (epsilon / norms).minimum(1)
        return x0 + difference * factor.reshape((-1, *[1] * (x.ndim - 1)))


class FastMinimumNorm:
    """Fast minimum-norm attack (Pintor et al. 2021, arXiv 2102.12827).

    Args:
        norm: ``linf`` or ``l2``.
        steps: Gradient steps.
    """

    bounded = False

    def __init__(self, norm: str, steps: int) -> None:
        self.norm = norm
        self.name = f"FMN {norm} (foolbox)"
        self.attack = (foolbox.attacks.LInfFMNAttack if norm == "linf" else ProjectingL2FMN)(steps=steps)

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``; where nothing was found the clean image comes back.

        From the clean image the search can creep up to the boundary and stay just inside. Where it found nothing, it
        starts again from an image of the batch that the model puts into another class.
        """
        images = images.contiguous()
        result, found = self._search(model, images, labels, None)
        missing = (~found).nonzero().squeeze(1)
        if len(missing):
            starts, known = other_class_images(model, images, labels[missing])
            missing, starts = missing[known], starts[known]
        if len(missing):
            result[missing], _ = self._search(model, images[missing], labels[missing], starts)
        return settle(model, images, result, labels)

    def _search(self, model: nn.Module, images: Tensor, labels: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the smallest perturbed images, the clean one where none was found, and whether one was."""
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        options = {} if starts is None else {"starting_points": starts}
        _, moved, success = self.attack(wrapped, images, labels, epsilons=None, **options)
        return torch.where(success.view(-1, 1, 1, 1), moved, images).detach(), success
