"""Attacks that look for the smallest perturbation, foolbox's implementations."""

import math
from itertools import islice
from typing import Any

import foolbox
import torch
from torch import Tensor, nn

from drs.attacks.climbing import climb
from drs.attacks.contract import perturbation_norm
from drs.attacks.objectives import FAMILIES, Objective

SMALLEST_START = 1 / 512
"""Radius of the first ball in which a start is looked for, as a share of the diameter of the pixel cube."""
GROWTH = 2**0.5
"""Ratio of the radii of two such balls, one after the other."""
START_STEP = 0.5
"""The first gradient step in such a ball, as a share of its radius."""
TARGETS = 2
"""Classes, the nearest by clean logits, from which a search starts."""
STEP_SIZES = {"linf": 3.0, "l2": 1.0}
"""The first step of a search from a start, as an L2 norm; foolbox's own is 1 in every norm. See ``FastMinimumNorm``."""
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


def adversarial_starts(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    norm: str,
    steps: int,
    objective: Objective | None = None,
    least: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Climb from the clean images in one ball after another, each larger, until the model errs.

    Args:
        model: In eval mode.
        images: ``[B, C, H, W]``.
        labels: ``[B]``.
        norm: ``linf`` or ``l2``, of the balls; the last holds the whole pixel cube.
        steps: Gradient steps in each ball.
        objective: Climbed; the margin if None.
        least: ``[B]``, no ball smaller than this radius is tried for an image; of all sizes if None.

    Returns:
        Misclassified images ``[B, C, H, W]``, the clean one where none was found, and the radius of the ball in which
        one was, ``[B]``, infinite where none was.
    """
    (margin,) = FAMILIES["margin"](images, labels)
    climbed = margin if objective is None else objective
    starts, radii = images.clone(), images.new_full((len(images),), math.inf)
    diameter = 1.0 if norm == "linf" else images[0].numel() ** 0.5
    radius = diameter * SMALLEST_START
    while radius < diameter * GROWTH and bool(radii.isinf().any()):
        waiting = radii.isinf() if least is None else radii.isinf() & (least <= radius)
        rest = waiting.nonzero().squeeze(1)
        if len(rest):
            reached, fallen, _, _ = climb(
                model, images[rest], labels[rest], radius, _placed(climbed, rest), norm=norm, steps=steps,
                relative_step_size=START_STEP, start=images[rest],
            )  # fmt: skip
            starts[rest[fallen]] = reached[fallen]
            radii[rest[fallen]] = radius
        radius *= GROWTH
    return starts, radii


def _placed(objective: Objective, places: Tensor) -> Objective:
    """Return the objective for a part of the batch whose samples have these places in it."""
    return lambda logits, truth, positions: objective(logits, truth, places[positions])


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

    In L2 the search of foolbox does not converge from the clean image where many pixels are 0 or 1: it clips the step
    there, the perturbation comes out shorter than its bound, and the next bound is set from what was left of it. From
    an image on the other side of the decision boundary it does.

    In either norm one search ends at the boundary to one class, which for some images is not the nearest; hence a start
    towards each of several classes. ``scripts/agreement.py`` shows what is left beside PGD in the same ball. In Linf
    the first step is larger than foolbox's, which is short of a corner: that of a ball of radius 0.1 is 2.8 away in 784
    pixels.

    Args:
        norm: ``linf`` or ``l2``.
        steps: Gradient steps of a search.
        start_steps: Gradient steps in each ball in which a misclassified start is looked for, see
            ``adversarial_starts``; with 0 there is one search, from the clean image.
        targets: Searches, each from a start towards another class, the nearest by clean logits first; the smallest
            norm counts. At most one for each class that is not the label.
    """

    bounded = False
    ends_on_boundary = True

    def __init__(self, norm: str, steps: int, start_steps: int = 0, targets: int = TARGETS) -> None:
        self.norm = norm
        self.name = f"FMN {norm} (foolbox)"
        self.start_steps = start_steps
        self.targets = targets
        step_size = STEP_SIZES[norm] if start_steps else 1.0
        self.attack = (foolbox.attacks.LInfFMNAttack if norm == "linf" else ProjectingL2FMN)(
            steps=steps, max_stepsize=step_size
        )

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``; where nothing was found the clean image comes back.

        From the clean image the search can creep up to the boundary and stay just inside. Where it found nothing, or
        found no start, it starts from an image of the batch that the model puts into another class.
        """
        images = images.contiguous()
        if self.start_steps:
            result, found = self._search_from_starts(model, images, labels)
        else:
            result, found = self._search(model, images, labels, None)
        missing = (~found).nonzero().squeeze(1)
        if len(missing):
            starts, known = other_class_images(model, images, labels[missing])
            missing, starts = missing[known], starts[known]
        if len(missing):
            result[missing], _ = self._search(model, images[missing], labels[missing], starts)
        return settle(model, images, result, labels)

    def _search_from_starts(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest misclassified images over all targets, and which have one; the clean one where none."""
        with torch.no_grad():
            clean = model(images).float()
        result, smallest = images.clone(), images.new_full((len(images),), math.inf, dtype=torch.float64)
        least = None
        for objective in islice(FAMILIES["targeted_margin"](clean, labels), self.targets):
            starts, radii = adversarial_starts(model, images, labels, self.norm, self.start_steps, objective, least)
            # A start need not be as near as it can be, so later targets do not climb in the small balls again.
            least = torch.where(radii.isinf(), 0.0, radii) if least is None else least
            chosen = _misclassified(model, starts, labels, radii.isfinite().nonzero().squeeze(1))
            if not len(chosen):
                continue
            moved = images.clone()
            moved[chosen] = self._run(model, images[chosen], labels[chosen], starts[chosen])[0]
            # What is compared is misclassified, so that the smaller norm is not one that was pushed on afterwards.
            moved = settle(model, images, moved, labels)
            norms = perturbation_norm(images, moved, self.norm)
            better = (norms > 0) & (norms < smallest)
            result[better], smallest = moved[better], torch.where(better, norms, smallest)
        return result, smallest.isfinite()

    def _search(self, model: nn.Module, images: Tensor, labels: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the smallest perturbed images, the clean one where none was found, and whether one was."""
        moved, success = self._run(model, images, labels, starts)
        return torch.where(success.view(-1, 1, 1, 1), moved, images), success

    def _run(self, model: nn.Module, images: Tensor, labels: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        options = {} if starts is None else {"starting_points": starts}
        _, moved, success = self.attack(wrapped, images, labels, epsilons=None, **options)
        return moved.detach(), success


@torch.no_grad()
def _misclassified(model: nn.Module, starts: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    """Return those of the chosen positions ``[M]`` that the model gets wrong in one batch, which foolbox insists on."""
    while len(chosen):
        wrong = model(starts[chosen]).argmax(dim=1) != labels[chosen]
        if bool(wrong.all()):
            break
        chosen = chosen[wrong]  # another batch size rounds differently, so the rest is asked again
    return chosen
