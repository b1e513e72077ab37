"""What ends on the decision boundary of a copy of a model, brought to the boundary of the model itself."""

from collections.abc import Callable

import torch
from torch import Tensor

SHARES = (0.97, 0.98, 0.99, 0.995, 1.0, 1.005, 1.01, 1.02, 1.03)
"""Shares of a perturbation among which the model's boundary is looked for; rounding moves it by far less."""
HALVINGS = 6
"""Of the distance between the two shares that it lies between."""
BEYOND = 1e-4
"""By what share a perturbation goes beyond the boundary, since rounding differs with the batch."""


@torch.no_grad()
def bring_to_boundary(
    classify: Callable[[Tensor], Tensor], images: Tensor, moved: Tensor, labels: Tensor, longest: Tensor
) -> Tensor:
    """Return images on the line through ``images`` and ``moved``, near the latter, that a model only just errs on.

    Args:
        classify: Images ``[B, C, H, W]`` to classes ``[B]``.
        images: ``[B, C, H, W]`` in [0,1].
        moved: ``[B, C, H, W]`` in [0,1].
        labels: ``[B]``.
        longest: ``[B]``, the largest share of each perturbation that is allowed, at least 1.

    Returns:
        ``[B, C, H, W]`` in [0,1]; ``moved`` where no share within some hundredths of 1 makes the model err.
    """
    shape = (-1, *[1] * (images.dim() - 1))

    def at(shares: Tensor) -> Tensor:
        return (images + shares.view(shape) * (moved - images)).clamp(0, 1)

    right, wrong = torch.zeros_like(longest), torch.full_like(longest, torch.inf)
    for share in SHARES:
        tried = longest.clamp_max(share)
        errs = classify(at(tried)) != labels
        open_yet = wrong.isinf()
        wrong = torch.where(open_yet & errs, tried, wrong)
        right = torch.where(open_yet & ~errs, tried, right)
    found = wrong.isfinite()
    right = torch.where(right > 0, right, wrong)  # it errs at the least share already
    for _ in range(HALVINGS):
        middle = (right + wrong) / 2
        errs = classify(at(torch.where(found, middle, 1.0))) != labels
        wrong, right = torch.where(errs, middle, wrong), torch.where(errs, right, middle)
    reached = torch.minimum(wrong * (1 + BEYOND), longest)
    return torch.where(found.view(shape), at(torch.where(found, reached, 1.0)), moved)
