"""The four attacks of AutoAttack (Croce and Hein 2020, arXiv 2003.01690), torchattacks' implementations.

torchattacks 3.5.1 runs each with 10 steps by default, a tenth of the original; here every length is explicit. Its
attacks reseed torch's global generator, which ``drs.attacks.isolation.isolated`` restores, and take the number of
classes as an argument, which is the model's own here. They get contiguous images, because FAB reshapes with ``view``.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn
from torchattacks.attacks import fab

from drs.attacks.gradient_sign import call_torchattacks
from drs.errors import UserError

_NORMS = {"linf": "Linf", "l2": "L2"}


def count_classes(model: nn.Module, images: Tensor) -> int:
    """Return K, the width of the model's logits."""
    with torch.no_grad():
        return int(model(images[:1]).shape[1])


def _need(name: str, classes: int, least: int, reason: str) -> None:
    if classes < least:
        raise UserError(f"{name} needs at least {least} classes, but the model has {classes}: {reason}")


class _LibraryAttack:
    bounded = True
    name = ""
    norm = "linf"

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``."""
        images = images.contiguous()
        classes = count_classes(model, images)
        # A sample that the library could not fool comes back as it was.
        return call_torchattacks(self._build(model, epsilon, classes), images, labels).detach()

    def _build(self, model: nn.Module, epsilon: float, classes: int) -> Any:
        raise TypeError(f"{type(self).__name__} does not say which attack it is")


class AutoPGD(_LibraryAttack):
    """Auto-PGD on cross-entropy.

    Args:
        norm: ``linf`` or ``l2``.
        steps: Gradient steps per restart.
        restarts: Random starts.
        rho: Share of rising steps below which the step size is halved.
        seed: Of the random starts.
    """

    name = "APGD-CE (torchattacks)"

    def __init__(self, norm: str, steps: int, restarts: int, rho: float, seed: int) -> None:
        self.norm = norm
        self.options = {"steps": steps, "n_restarts": restarts, "rho": rho, "seed": seed}

    def _build(self, model: nn.Module, epsilon: float, classes: int) -> Any:
        return torchattacks.APGD(model, norm=_NORMS[self.norm], eps=epsilon, loss="ce", **self.options)


class TargetedAutoPGD(AutoPGD):
    """Auto-PGD on the targeted difference of logits ratio, each of the K-1 other classes in turn.

    Linf only: in L2 torchattacks steps every sample of a batch by the step size of the first one.

    Raises:
        UserError: For another norm; from ``perturb``, for a model of fewer than 4 classes.
    """

    name = "APGD-T (torchattacks)"

    def __init__(self, norm: str, steps: int, restarts: int, rho: float, seed: int) -> None:
        if norm != "linf":
            raise UserError(f"norm={norm}: {self.name} is an attack in linf")
        super().__init__(norm, steps, restarts, rho, seed)

    def _build(self, model: nn.Module, epsilon: float, classes: int) -> Any:
        reason = (
            "the targeted DLR loss divides by a difference that involves the fourth logit; leave the attack out with "
            "'~suite.attacks.apgd_t', and targeted margin PGD takes its place"
        )
        _need(self.name, classes, 4, reason)
        return torchattacks.APGDT(model, norm=_NORMS[self.norm], eps=epsilon, n_classes=classes, **self.options)


def shortest_move_onto_plane(points: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    """Return the moves of smallest Linf norm that bring points of [0,1]^n onto hyperplanes without leaving [0,1]^n.

    The move of length t changes ``<w, x>`` by ``sum_i |w_i| min(t, r_i)`` with r_i the room that coordinate i has left,
    which is concave and piecewise linear in t: Newton's method from t = 0 meets the offset after a few steps, never
    beyond it (arXiv 1907.02044, section 3.1, sorts the r_i instead).

    Args:
        points: x, ``[B, n]`` in [0,1].
        normals: w, ``[B, n]``.
        offsets: b, ``[B]``.

    Returns:
        ``[B, n]``; where the plane does not meet the cube, the move to the corner nearest to it.
    """
    excess = (normals * points).sum(dim=1) - offsets
    upwards = (normals < 0) == (excess >= 0).unsqueeze(1)
    room = torch.where(upwards, 1 - points, points) * (normals != 0)
    weights = normals.abs()
    needed = excess.abs()
    length = torch.zeros_like(needed)
    before = torch.zeros_like(room, dtype=torch.bool)
    while True:
        free = room > length.unsqueeze(1)
        if torch.equal(free, before):
            break
        before = free
        filled = (weights * room).masked_fill(free, 0.0).sum(dim=1)
        slope = weights.masked_fill(~free, 0.0).sum(dim=1)
        reached = (needed - filled) / slope.clamp_min(torch.finfo(slope.dtype).tiny)
        # Rounding must not let the length shrink, or the loop need not end. Once no coordinate is free, it stays.
        length = torch.where(slope > 0, torch.maximum(reached, length), length)
    move = torch.minimum(room, length.unsqueeze(1))
    return torch.where(upwards, move, -move)


@contextmanager
def _without_sorting() -> Iterator[None]:
    """Let torchattacks' FAB project by ``shortest_move_onto_plane``: sorting takes most of a small model's time."""
    before = fab.projection_linf
    fab.projection_linf = shortest_move_onto_plane
    try:
        yield
    finally:
        fab.projection_linf = before


class TargetedFAB(_LibraryAttack):
    """The fast adaptive boundary attack (Croce and Hein 2020, arXiv 1907.02044), each other class in turn.

    In Linf the library's projection is replaced by a faster one with the same result.

    It stops short of the smallest norms, so that more images stand than under margin PGD in the same ball. That is the
    algorithm's own: ``drs.attacks.fab``, which shares no code with it, stops there too. ``scripts/agreement.py`` shows
    how many images are left, beside that and beside PGD.

    Args:
        norm: ``linf`` or ``l2``.
        steps: Projection steps per target.
        restarts: Per target.
        seed: Of the random starts after the first.
    """

    name = "FAB-T (torchattacks)"
    ends_on_boundary = True

    def __init__(self, norm: str, steps: int, restarts: int, seed: int) -> None:
        self.norm = norm
        self.options = {"steps": steps, "n_restarts": restarts, "seed": seed}

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``."""
        with _without_sorting() if self.norm == "linf" else nullcontext():
            return super().perturb(model, images, labels, epsilon)

    def _build(self, model: nn.Module, epsilon: float, classes: int) -> Any:
        return torchattacks.FAB(
            model, norm=_NORMS[self.norm], eps=epsilon, multi_targeted=True, n_classes=classes, **self.options
        )


class SquareAttack(_LibraryAttack):
    """Random search that sees scores only (Andriushchenko et al. 2020, arXiv 1912.00049).

    The schedule of its squares is stretched to ``n_queries``, as in the paper; AutoAttack's is not.

    Args:
        norm: ``linf`` or ``l2``.
        n_queries: Forward passes per sample.
        restarts: Of the search.
        seed: Of the search.
    """

    name = "Square (torchattacks)"

    def __init__(self, norm: str, n_queries: int, restarts: int, seed: int) -> None:
        self.norm = norm
        self.options = {"n_queries": n_queries, "n_restarts": restarts, "seed": seed}

    def _build(self, model: nn.Module, epsilon: float, classes: int) -> Any:
        return torchattacks.Square(model, norm=_NORMS[self.norm], eps=epsilon, loss="margin", **self.options)
