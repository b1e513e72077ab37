"""What a gradient attack climbs: functions of logits ``[B, K]`` and labels ``[B]``, larger for a better attack.

A family turns the clean logits and the labels of a batch into one or more rounds; a round is an objective.
Cross-entropy alone is a poor guide for a defence that flattens or saturates logits (Carlini and Wagner 2017, arXiv
1608.04644; Mosbach et al. 2018, arXiv 1810.12042), so an attack that knows its target climbs the margin itself.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits ``[B, K]``, labels ``[B]`` and the positions ``[B]`` of the samples in the batch -> ``[B]``."""

SATURATION = 20.0
"""The largest scaled margin: exp(-20) still has a gradient in float32."""


def largest_other(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest logit ``[B]`` of a class that is not the label; the label is masked by minus infinity."""
    return logits.scatter(1, labels.unsqueeze(1), -math.inf).amax(dim=1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``max_{j != y} z_j - z_y``, ``[B]``: above 0 where the sample is misclassified; not normalised."""
    return largest_other(logits, labels) - logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def _cross_entropy(clean: Tensor, labels: Tensor) -> Iterator[Objective]:
    yield lambda logits, truth, _: F.cross_entropy(logits, truth, reduction="none")


def _margin(clean: Tensor, labels: Tensor) -> Iterator[Objective]:
    yield lambda logits, truth, _: margin(logits, truth)


def _targeted_margin(clean: Tensor, labels: Tensor) -> Iterator[Objective]:
    """Yield ``z_t - z_y`` for every class t that is not the label, the one nearest by clean logits first."""
    order = clean.scatter(1, labels.unsqueeze(1), -math.inf).argsort(dim=1, descending=True)
    for rank in range(clean.shape[1] - 1):
        targets = order[:, rank]

        def towards(logits: Tensor, truth: Tensor, positions: Tensor, targets: Tensor = targets) -> Tensor:
            chosen = logits.gather(1, torch.stack([targets[positions], truth], dim=1))
            return chosen[:, 0] - chosen[:, 1]

        yield towards


def logit_scale(clean: Tensor, labels: Tensor) -> Tensor:
    """Return the factor ``[B]`` that brings the spread of a sample's non-label logits to 1.

    Where the classes that are not the label have equal logits, as the distribution-restrained loss wants them, the
    gradient of cross-entropy points away from the label but to no class in particular; scaling up lets the runner-up
    stand out. Where logits are huge, scaling down keeps the softmax from saturating: a scaled margin is at most
    ``SATURATION``.
    """
    classes = clean.shape[1]
    others = clean.masked_fill(F.one_hot(labels, classes).bool(), 0.0)
    mean = others.sum(dim=1, keepdim=True) / (classes - 1)
    squares = (clean - mean).square().masked_fill(F.one_hot(labels, classes).bool(), 0.0)
    spread = (squares.sum(dim=1) / (classes - 1)).sqrt()
    distance = -margin(clean, labels)
    tiny = torch.finfo(clean.dtype).tiny
    return torch.minimum(1 / spread.clamp_min(1e-6), SATURATION / distance.clamp_min(tiny))


def _scaled_cross_entropy(clean: Tensor, labels: Tensor) -> Iterator[Objective]:
    scale = logit_scale(clean, labels)
    yield lambda logits, truth, positions: F.cross_entropy(
        logits * scale[positions].unsqueeze(1), truth, reduction="none"
    )


FAMILIES: dict[str, Callable[[Tensor, Tensor], Iterator[Objective]]] = {
    "ce": _cross_entropy,
    "margin": _margin,
    "targeted_margin": _targeted_margin,
    "scaled_ce": _scaled_cross_entropy,
}
