"""Projected gradient attacks that keep the best iterate and drop what has fallen, Linf and L2.

Projected gradient descent after Madry et al. 2018 (arXiv 1706.06083), on objectives of ``drs.attacks.objectives``. The
step shrinks to 0 along half a cosine, so that the last iterates settle.
"""

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from drs.attacks.contract import watch_gradient
from drs.attacks.objectives import FAMILIES, Objective, margin


def project(images: Tensor, moved: Tensor, epsilon: float, norm: str) -> Tensor:
    """Return ``moved`` ``[B, C, H, W]`` brought back to the ``norm`` ball around ``images`` and to [0,1]."""
    if norm == "linf":
        return torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon).clamp(0, 1)
    difference = moved - images
    length = torch.linalg.vector_norm(difference.flatten(1), dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    # Clipping to the box moves no pixel away from its clean value, so it cannot leave the ball.
    return (images + difference * (epsilon / length).clamp_max(1.0)).clamp(0, 1)


def random_start(images: Tensor, epsilon: float, norm: str) -> Tensor:
    """Return a random point of each ball: uniform in Linf; a random direction and a uniform radius in L2."""
    if norm == "linf":
        return project(images, images + (2 * torch.rand_like(images) - 1) * epsilon, epsilon, norm)
    direction = torch.randn_like(images)
    length = torch.linalg.vector_norm(direction.flatten(1), dim=1).view(-1, 1, 1, 1)
    radius = epsilon * torch.rand(len(images), 1, 1, 1, device=images.device)
    return project(images, images + direction / length * radius, epsilon, norm)


def _direction(gradient: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return gradient.sign()
    # A float32 norm of tiny gradients underflows; the largest entry is taken out first.
    largest = gradient.abs().flatten(1).amax(dim=1).view(-1, 1, 1, 1)
    scaled = gradient / torch.where(largest > 0, largest, torch.ones_like(largest))
    length = torch.linalg.vector_norm(scaled.flatten(1), dim=1).view(-1, 1, 1, 1)
    return scaled / torch.where(length > 0, length, torch.ones_like(length))


def climb(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    objective: Objective,
    *,
    norm: str,
    steps: int,
    relative_step_size: float,
    start: Tensor,
    drop_fallen: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Climb an objective from ``start`` and keep, for each sample, the iterate with the largest margin.

    Args:
        model: In eval mode; pixels in [0,1] in, logits out.
        images: ``[B, C, H, W]``, the centres of the balls.
        labels: ``[B]``.
        epsilon: Radius in pixel units.
        objective: Climbed by its gradient's sign (Linf) or direction (L2).
        norm: ``linf`` or ``l2``.
        steps: Gradient steps; ``steps + 1`` iterates are looked at.
        relative_step_size: The first step as a share of epsilon.
        start: ``[B, C, H, W]`` inside the balls.
        drop_fallen: Stop a sample at its first misclassified iterate.

    Returns:
        The best iterates ``[B, C, H, W]``, whether each is misclassified ``[B]``, whether the last iterate is ``[B]``,
        and the margins ``[B]`` of the best iterates, above 0 where they are misclassified.
    """
    best, best_margin = start.clone(), torch.full((len(images),), -math.inf, device=images.device)
    last_fallen = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    active = torch.arange(len(images), device=images.device)
    centre, truth, current = images, labels, start.clone()
    for step in range(steps + 1):
        # The last iterate is looked at and not left again.
        with torch.set_grad_enabled(step < steps):
            logits = model(current.requires_grad_(step < steps)).float()
        reached = margin(logits.detach(), truth)
        better = reached > best_margin[active]
        best[active[better]] = current.detach()[better]
        best_margin[active[better]] = reached[better]
        # A tie goes to the lower class, so only the predicted class tells whether a sample has fallen.
        fallen = logits.detach().argmax(dim=1) != truth
        best_margin[active[fallen & (reached == 0)]] = torch.finfo(torch.float32).tiny
        last_fallen[active] = fallen
        if step == steps:
            break
        value = objective(logits, truth, active).sum()
        (gradient,) = torch.autograd.grad(value, current)
        current = current.detach()
        if drop_fallen and bool(fallen.any()):
            keep = ~fallen
            active, current, gradient = active[keep], current[keep], gradient[keep]
            centre, truth = centre[keep], truth[keep]
            if not len(active):
                break
        length = epsilon * relative_step_size * 0.5 * (1 + math.cos(math.pi * step / steps))
        current = project(centre, current + length * _direction(gradient, norm), epsilon, norm)
    return best, best_margin > 0, last_fallen, best_margin


class ProjectedAttack:
    """Gradient steps on one or more objectives, with restarts; what has fallen is left alone.

    The first restart of every objective starts at the clean image unless ``random_start``, the others at random in the
    ball.

    Args:
        name: For messages.
        objectives: Keys of ``drs.attacks.objectives.FAMILIES``, climbed one after another.
        norm: ``linf`` or ``l2``.
        steps: Gradient steps per restart.
        restarts: Per objective, and per target of a targeted one.
        relative_step_size: The first step as a share of epsilon.
        random_start: Start the first restart at random too.
    """

    bounded = True

    def __init__(
        self,
        name: str,
        objectives: Sequence[str],
        norm: str,
        steps: int,
        restarts: int,
        relative_step_size: float,
        random_start: bool = False,
    ) -> None:
        self.name = name
        self.objectives = tuple(objectives)
        self.norm = norm
        self.steps = steps
        self.restarts = restarts
        self.relative_step_size = relative_step_size
        self.random_start = random_start

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``."""
        with torch.no_grad():
            clean = model(images).float()
        best, best_margin = images.clone(), margin(clean, labels)
        standing = torch.arange(len(images), device=images.device)
        for restart in range(self.restarts):
            for family in self.objectives:
                for objective in FAMILIES[family](clean, labels):
                    if not len(standing):
                        return best
                    centre, truth, places = images[standing], labels[standing], standing

                    def placed(
                        logits: Tensor,
                        truth: Tensor,
                        positions: Tensor,
                        objective: Objective = objective,
                        places: Tensor = places,
                    ) -> Tensor:
                        return objective(logits, truth, places[positions])

                    at_random = self.random_start or restart > 0
                    start = random_start(centre, epsilon, self.norm) if at_random else centre
                    found, fallen, _, reached = climb(
                        model, centre, truth, epsilon, placed, norm=self.norm, steps=self.steps,
                        relative_step_size=self.relative_step_size, start=start,
                    )  # fmt: skip
                    better = fallen | (reached > best_margin[standing])
                    best[standing[better]] = found[better]
                    best_margin[standing[better]] = reached[better]
                    standing = standing[~fallen]
        return best


class Transfer:
    """Margin PGD on another model of the same data; the target is never asked (Papernot et al. 2016, 1605.07277).

    Args:
        source: The model to attack, in eval mode, on the device of the images. It is copied.
        norm: ``linf`` or ``l2``.
        steps: Gradient steps.
        relative_step_size: The first step as a share of epsilon.
    """

    name = "transfer"
    bounded = True

    def __init__(self, source: nn.Module, norm: str, steps: int, relative_step_size: float) -> None:
        self.source = copy.deepcopy(source).requires_grad_(False)  # the caller may go on training its own
        self.source.register_forward_pre_hook(partial(watch_gradient, whose="the transfer's source model's"))
        self.norm = norm
        self.steps = steps
        self.relative_step_size = relative_step_size

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``; ``model`` plays no part."""
        (objective,) = FAMILIES["margin"](images, labels)
        # The iterate that fools the source by the widest margin crosses over best, so nothing is dropped.
        best, _, _, _ = climb(
            self.source, images, labels, epsilon, objective, norm=self.norm, steps=self.steps,
            relative_step_size=self.relative_step_size, start=images, drop_fallen=False,
        )  # fmt: skip
        return best


class RandomNoise:
    """Random corners of the Linf ball; a sample falls if one of the draws fools the model.

    Args:
        draws: Corners tried per sample.
    """

    name = "random noise"
    norm = "linf"
    bounded = True

    def __init__(self, draws: int) -> None:
        self.draws = draws

    @torch.no_grad()
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``."""
        best = images.clone()
        standing = torch.ones(len(images), dtype=torch.bool, device=images.device)
        for _ in range(self.draws):
            noisy = project(images, images + torch.randn_like(images).sign() * epsilon, epsilon, self.norm)
            fallen = standing & (model(noisy).argmax(dim=1) != labels)
            best[fallen] = noisy[fallen]
            standing &= ~fallen
        return best
