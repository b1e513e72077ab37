"""Attacks of projected gradient steps, Linf and L2, and of random noise; see ``drs.attacks.climbing`` for a climb."""

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from drs.attacks.climbing import climb, project, random_start
from drs.attacks.isolation import watch_gradient
from drs.attacks.objectives import FAMILIES, Objective, margin


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
