"""Attacks that look for the smallest perturbation, foolbox's implementations."""

from typing import Any

import eagerpy
import foolbox
import torch
from torch import Tensor, nn

OVERSHOOT = 1e-3
"""By how much more a perturbation goes than was needed: an image just on the boundary is judged by rounding."""


class ProjectingL2FMN(foolbox.attacks.L2FMNAttack):
    """foolbox's L2 attack with the projection that the paper has.

    In foolbox 3.3.4 the factor of the projection is ``min(1, norm / norm)``, which is 1, so that no iterate is ever
    brought back to the shrinking ball and the norms found are several times too large.
    """

    def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
        """Return ``x`` moved onto the L2 ball of radius ``epsilon`` ``[B]`` around ``x0`` where it lies outside."""
        difference = x - x0
        norms = eagerpy.maximum(difference.flatten(1).norms.l2(axis=-1), 1e-12)
        factor = eagerpy.minimum(1, epsilon / norms)
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
            with torch.no_grad():
                other = model(images).argmax(dim=1).unsqueeze(0) != labels[missing].unsqueeze(1)
            known = other.any(dim=1)
            missing, starts = missing[known], images[other[known].int().argmax(dim=1)]
        if len(missing):
            again, _ = self._search(model, images[missing], labels[missing], starts)
            result[missing] = again
        return result

    def _search(self, model: nn.Module, images: Tensor, labels: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the smallest perturbed images, the clean one where none was found, and whether one was."""
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        options = {} if starts is None else {"starting_points": starts}
        _, moved, success = self.attack(wrapped, images, labels, epsilons=None, **options)
        found = success & torch.isfinite(moved).flatten(1).all(dim=1)
        moved = images + (1 + OVERSHOOT) * (moved - images)
        return torch.where(found.view(-1, 1, 1, 1), moved.clamp(0, 1), images).detach(), found
