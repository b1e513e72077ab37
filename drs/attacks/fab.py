"""The targeted fast adaptive boundary attack in Linf, after the paper (Croce and Hein 2020, arXiv 1907.02044).

It is what the library's FAB is compared with (``drs.agreement``) and shares no code with it, nor with the projection
that ``drs.attacks.autoattack`` gives the library. Each search runs over the whole batch at once.
"""

import math

import torch
from torch import Tensor, nn

from drs.attacks.objectives import FAMILIES, Objective

SHORT_OF_BOUNDARY = 0.99
"""Share of the way to where the boundary is expected that the final search goes: on it, rounding decides the class."""


def move_onto_plane(points: Tensor, normals: Tensor, values: Tensor) -> Tensor:
    """Return the moves of smallest Linf norm from points of [0,1]^n to where a linear function is 0, within [0,1]^n.

    A move of length t takes each coordinate by t, or by the room r_i that it has if that is less, and changes the
    function by ``sum_i |w_i| min(t, r_i)``. Between neighbours among the sorted r_i that is linear in t, so the length
    is exact.

    Args:
        points: ``[B, n]`` in [0,1].
        normals: w, the gradients of the functions, ``[B, n]``.
        values: Of the functions at the points, ``[B]``.

    Returns:
        ``[B, n]``; where the function has no zero in the cube, the move to the corner where it is nearest to 0.
    """
    heading = -values.sign().unsqueeze(1) * normals.sign()
    room = torch.where(heading > 0, 1 - points, points) * heading.abs()
    rooms, order = room.sort(dim=1)
    # Sums of hundreds of terms that nearly cancel; float32 would put the point beside the plane.
    rooms, weights = rooms.double(), normals.abs().gather(1, order).double()
    used = (weights * rooms).cumsum(dim=1)
    slopes = weights.sum(dim=1, keepdim=True) - weights.cumsum(dim=1)
    needed = values.abs().double().unsqueeze(1)
    # The first r_i at which enough is changed; up to it, the smaller ones are used up and the rest still move.
    place = torch.searchsorted(used + slopes * rooms, needed).clamp_max(room.shape[1] - 1)
    before = used.gather(1, place) - (weights * rooms).gather(1, place)
    slope = slopes.gather(1, place) + weights.gather(1, place)
    length = (needed - before) / slope.clamp_min(torch.finfo(torch.float64).tiny)
    return heading * room.minimum(length.to(room.dtype))


def _norms(moved: Tensor, images: Tensor) -> Tensor:
    """Return the Linf norms ``[B]`` of ``moved - images``."""
    return (moved - images).abs().flatten(1).amax(dim=1)


def _scaled(factors: Tensor, moves: Tensor) -> Tensor:
    """Return moves ``[B, C, H, W]`` times a factor each ``[B]``."""
    return factors.view(-1, 1, 1, 1) * moves


class TargetedFastAdaptiveBoundary:
    """FAB towards each other class in turn (algorithm 1 with a target), one search each, from the clean image.

    A step goes from the iterate to the plane on which the logits of target and label are equal by the linearisation
    there, and a little towards the projection of the clean image on that plane. Whenever an iterate is misclassified,
    it is kept if it is the nearest, and left for a point nearer to the clean image.

    Args:
        steps: Projection steps per target.
        final_steps: Of the final search between the result and the clean image, 0 for none. The paper has 3, the
            authors' later code, which AutoAttack and torchattacks share, none.
        alpha_max: The largest weight of the clean image's projection.
        extrapolation: How far the moves onto the plane go, eta in the paper.
        backward: What is kept of a perturbation that succeeded, beta in the paper.
    """

    name = "FAB-T (this project)"
    ends_on_boundary = True
    norm = "linf"
    bounded = False

    def __init__(
        self,
        steps: int,
        final_steps: int = 3,
        alpha_max: float = 0.1,
        extrapolation: float = 1.05,
        backward: float = 0.9,
    ) -> None:
        self.steps = steps
        self.final_steps = final_steps
        self.alpha_max = alpha_max
        self.extrapolation = extrapolation
        self.backward = backward

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``; where nothing was found the clean image comes back."""
        with torch.no_grad():
            clean = model(images).float()
        nearest, smallest = images.clone(), images.new_full((len(images),), math.inf)
        for towards in FAMILIES["targeted_margin"](clean, labels):
            found, norms = self._search(model, images, labels, towards, images)
            better = norms < smallest
            nearest[better], smallest[better] = found[better], norms[better]
        return self._search_between(model, images, nearest, labels)

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, towards: Objective, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the nearest misclassified iterates, the clean images where there is none, and norms (infinite)."""
        nearest, smallest = images.clone(), images.new_full((len(images),), math.inf)
        positions = torch.arange(len(images), device=images.device)
        current = start
        for _ in range(self.steps):
            current = current.detach().requires_grad_()
            values = towards(model(current).float(), labels, positions)
            (gradients,) = torch.autograd.grad(values.sum(), current)
            with torch.no_grad():
                current = self._step(images, current, values, gradients)
                wrong = model(current).argmax(dim=1) != labels
                norms = _norms(current, images)
                better = wrong & (norms < smallest)
                nearest[better], smallest[better] = current[better], norms[better]
                current[wrong] = (images + self.backward * (current - images))[wrong]
        return nearest, smallest

    def _step(self, images: Tensor, current: Tensor, values: Tensor, gradients: Tensor) -> Tensor:
        """Return the next iterates, each between two points slightly beyond the plane of its linearisation."""
        slope = gradients.flatten(1)
        values_at_images = values + ((images - current).flatten(1) * slope).sum(dim=1)
        own = move_onto_plane(current.flatten(1), slope, values)
        direct = move_onto_plane(images.flatten(1), slope, values_at_images)
        length, length_direct = own.abs().amax(dim=1), direct.abs().amax(dim=1)
        alpha = (length / (length + length_direct).clamp_min(1e-12)).clamp_max(self.alpha_max)
        from_own = current + self.extrapolation * own.view_as(images)
        from_images = images + self.extrapolation * direct.view_as(images)
        return (_scaled(1 - alpha, from_own) + _scaled(alpha, from_images)).clamp(0, 1)

    @torch.no_grad()
    def _search_between(self, model: nn.Module, images: Tensor, moved: Tensor, labels: Tensor) -> Tensor:
        """Return points between clean and misclassified images, nearer to the boundary and still misclassified.

        Each step looks where the difference of two logits would be 0 if it were linear on the segment, those of the
        label and of the class that the misclassified end is in; the point found takes the place of one of the ends.
        """
        inner, outer = images, moved
        for _ in range(self.final_steps):
            logits = model(outer).float()
            classes = logits.argmax(dim=1)
            pair = torch.stack([classes, labels], dim=1)
            ends = [each.gather(1, pair) for each in (logits, model(inner).float())]
            beyond, short = ((end[:, 0] - end[:, 1]) for end in ends)
            share = (beyond / (beyond - short).clamp_min(1e-12)).clamp(0, 1)
            middle = outer + _scaled(SHORT_OF_BOUNDARY * share, inner - outer)
            wrong = (model(middle).argmax(dim=1) != labels).view(-1, 1, 1, 1)
            inner, outer = torch.where(wrong, inner, middle), torch.where(wrong, middle, outer)
        return outer
