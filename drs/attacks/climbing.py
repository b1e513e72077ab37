"""One climb of an objective inside Linf or L2 balls, which keeps the best iterates and drops what has fallen.

Projected gradient descent after Madry et al. 2018 (arXiv 1706.06083), on objectives of ``drs.attacks.objectives``. The
step shrinks to 0 along half a cosine, so that the last iterates settle.
"""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from drs.attacks.objectives import Objective, margin

DROP_AT_ONCE = False
"""Whether what has fallen is dropped at once on every device, as it is on a CPU."""


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


class _Cubes:
    """Linf balls within [0,1], as the bounds of every pixel.

    Args:
        low: ``[M, C, H, W]``.
        high: ``[M, C, H, W]``.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high

    @classmethod
    def around(cls, images: Tensor, epsilon: float) -> Self:
        """Return the balls of a radius around images ``[M, C, H, W]``."""
        return cls((images - epsilon).clamp_(0, 1), (images + epsilon).clamp_(0, 1))

    def move(self, current: Tensor, gradient: Tensor, length: float) -> Tensor:
        """Return ``current`` ``[M, C, H, W]`` after a step along the gradient, a new tensor; as ``project`` would."""
        return torch.add(current, _direction(gradient, "linf"), alpha=length).clamp_(self.low, self.high)

    def select(self, kept: Tensor) -> Self:
        """Return the balls at positions ``[K]``."""
        return type(self)(self.low.index_select(0, kept), self.high.index_select(0, kept))


class _Spheres:
    """L2 balls within [0,1].

    Args:
        centre: ``[M, C, H, W]``.
        epsilon: Radius in pixel units.
    """

    def __init__(self, centre: Tensor, epsilon: float) -> None:
        self.centre, self.epsilon = centre, epsilon

    def move(self, current: Tensor, gradient: Tensor, length: float) -> Tensor:
        """Return ``current`` ``[M, C, H, W]`` after a step along the gradient, a new tensor."""
        return project(self.centre, current + length * _direction(gradient, "l2"), self.epsilon, "l2")

    def select(self, kept: Tensor) -> Self:
        """Return the balls at positions ``[K]``."""
        return type(self)(self.centre.index_select(0, kept), self.epsilon)


def _drops_at_once(device_type: str) -> bool:
    """Return whether what has fallen is dropped before the next step; an accelerator would have to be waited for."""
    return device_type == "cpu" or DROP_AT_ONCE


def _reading(count: Tensor) -> Callable[[], int]:
    """Begin to bring a count to the host; return what waits until it is there, and not for later work, and reads it."""
    if not count.is_cuda:
        return lambda: int(count)
    held = torch.empty((), dtype=count.dtype, device="cpu", pin_memory=True)
    held.copy_(count, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(count.device))

    def read() -> int:
        arrived.synchronize()
        return int(held)

    return read


def room_for(standing: int, device_type: str) -> int:
    """Return the size of the batch that so many samples go on in.

    On a CPU all that has fallen is dropped at once. On an accelerator each new size costs a choice of kernels, and a
    few samples more cost little: sizes are multiples of 16, from 512 samples on of a power of two between a
    thirty-second and a sixteenth of the size, so that climbs share them.
    """
    if _drops_at_once(device_type):
        return standing
    grain = max(16, 1 << max(0, standing.bit_length() - 5))
    return -(-standing // grain) * grain


class _Climbers:
    """The samples of a climb that the model still looks at, M of B, and the best iterate of each.

    A sample that has fallen and may be dropped keeps its best iterate, whether or not it has left the batch yet.

    Args:
        start: ``[B, C, H, W]``, copied.
        labels: ``[B]``.
        balls: Around B images.
        drop_fallen: Whether a sample's climb ends at its first misclassified iterate.
    """

    def __init__(self, start: Tensor, labels: Tensor, balls: _Cubes | _Spheres, drop_fallen: bool) -> None:
        self.truth, self.balls, self.drop_fallen = labels, balls, drop_fallen
        self.current = start.detach().clone()
        self.best = self.current.detach()
        self.margin = torch.full((len(start),), -math.inf, device=start.device)
        self.fallen = torch.zeros(len(start), dtype=torch.bool, device=start.device)
        self.standing = ~self.fallen
        self.rows = torch.arange(len(start), device=start.device)
        self.whole: tuple[Tensor, Tensor, Tensor] | None = None
        self.counted: Callable[[], int] | None = None

    def look(self, logits: Tensor, first: bool) -> None:
        """Compare the current iterates, of logits ``[M, K]``, with the best before, if there are any."""
        reached = margin(logits, self.truth)
        # A tie goes to the lower class, so only the predicted class tells whether a sample has fallen.
        self.fallen = logits.argmax(dim=1) != self.truth
        reached = torch.where(self.fallen, reached.clamp_min(torch.finfo(torch.float32).tiny), reached)
        better = reached > self.margin
        if self.drop_fallen:
            better = better & self.standing
        self.margin = torch.where(better, reached, self.margin)
        self.standing = self.margin <= 0
        if not first:
            self.best = torch.where(better.view(-1, 1, 1, 1), self.current.detach(), self.best)

    def move(self, gradient: Tensor, length: float) -> bool:
        """Take a step, with what stands and no more fallen than there is room for; False if nothing stands."""
        self.current = self.current.detach()
        if self.drop_fallen:
            standing = self._count()
            if not standing:
                return False
            size = room_for(standing, gradient.device.type)
            if size < len(self.rows):
                gradient = self._shrink(size, gradient)
        self.current = self.balls.move(self.current, gradient, length)
        return True

    def _count(self) -> int:
        """Return how many stand; on an accelerator, how many stood a step before, which are no fewer.

        The host then has the next step ready for the device before this one is done, and waits once a step.
        """
        count = self.standing.sum()
        if _drops_at_once(count.device.type):
            return int(count)
        before, self.counted = self.counted, _reading(count)
        return len(self.rows) if before is None else before()

    def _shrink(self, size: int, gradient: Tensor) -> Tensor:
        """Store what has fallen and keep so many samples, those that stand first; return the gradient of these."""
        if self.whole is None:
            self.whole = torch.empty_like(self.best), torch.empty_like(self.margin), torch.empty_like(self.fallen)
        order = torch.sort(self.standing.to(torch.uint8), descending=True, stable=True).indices
        kept, gone = order[:size], order[size:]
        self._store(gone)
        self.rows, self.truth, self.margin, self.best, self.fallen, self.standing, self.current, gradient = (
            each.index_select(0, kept)
            for each in (
                self.rows, self.truth, self.margin, self.best, self.fallen, self.standing, self.current, gradient,
            )
        )  # fmt: skip
        self.balls = self.balls.select(kept)
        return gradient

    def _store(self, chosen: Tensor) -> None:
        assert self.whole is not None
        last_fallen = self.fallen | ~self.standing
        for whole, part in zip(self.whole, (self.best, self.margin, last_fallen), strict=True):
            whole.index_copy_(0, self.rows[chosen], part.index_select(0, chosen))

    def collect(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best iterates ``[B, C, H, W]``, their margins ``[B]`` and if the last ones are misclassified."""
        if self.whole is None:
            return self.best, self.margin, self.fallen | ~self.standing if self.drop_fallen else self.fallen
        self._store(torch.arange(len(self.rows), device=self.rows.device))
        return self.whole


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
    balls = _Cubes.around(images, epsilon) if norm == "linf" else _Spheres(images, epsilon)
    climbers = _Climbers(start, labels, balls, drop_fallen)
    for step in range(steps + 1):
        # The last iterate is looked at and not left again.
        with torch.set_grad_enabled(step < steps):
            logits = model(climbers.current.requires_grad_(step < steps)).float()
        climbers.look(logits.detach(), first=step == 0)
        if step == steps:
            break
        value = objective(logits, climbers.truth, climbers.rows).sum()
        (gradient,) = torch.autograd.grad(value, climbers.current)
        if not climbers.move(gradient, epsilon * relative_step_size * 0.5 * (1 + math.cos(math.pi * step / steps))):
            break
    best, best_margin, last_fallen = climbers.collect()
    return best, best_margin > 0, last_fallen, best_margin
