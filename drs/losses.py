"""The distribution-restrained softmax loss, and every loss by the name that a config gives it.

Every loss maps logits ``[B, K]`` and integer labels ``[B]`` to a scalar, computed in float32 even under autocast
(float64 logits stay float64). ``DRSoftmaxLoss`` and ``distribution_penalty`` can be used without the rest of this
package's pipeline.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from drs.comparator_losses import (
    ComplementObjectiveLoss,
    ConfidencePenaltyLoss,
    GuidedComplementEntropyLoss,
    LabelSmoothingLoss,
    LogitSqueezingLoss,
)
from drs.fused_loss import fused_backward, fused_loss
from drs.loss_base import ClassificationLoss, check_range, check_switch, check_targets, full_precision, row_dot

Space = Literal["log_softmax", "softmax", "logits"]
Center = Literal["non_label", "all_classes"]
Reduction = Literal["sum", "mean"]


def _penalty(logits: Tensor, log_probabilities: Tensor, labels: Tensor, space: Space, center: Center) -> Tensor:
    index = labels.unsqueeze(1)
    divisor = logits.shape[1] - 1 if center == "non_label" else logits.shape[1]
    if space == "softmax":
        # Softmax values of the non-label classes can be tiny beside the label's, so the label is removed before
        # the exponential; the in-place exponential keeps this at one extra [B, K] tensor.
        values = log_probabilities.scatter(1, index, -math.inf).exp_()
        total = values.sum(dim=1)
        mean = total / divisor
        others = logits.shape[1] - 1
        squares = row_dot(values, values)
        return (squares - 2 * mean * total + others * mean.square()).clamp_min(0)
    values = log_probabilities if space == "log_softmax" else logits
    mean = (values.sum(dim=1, keepdim=True) - values.gather(1, index)) / divisor
    deviations = (values - mean).scatter_(1, index, 0.0)
    return row_dot(deviations, deviations)


def distribution_penalty(
    logits: Tensor, labels: Tensor, *, space: Space = "log_softmax", center: Center = "non_label"
) -> Tensor:
    """Return the squared deviations of the non-label values from their mean, summed over the classes.

    For sample i with label y and values s this is ``sum_{j != y} (s_ij - m_i)^2``, the second term of the
    distribution-restrained softmax loss (Wang et al., arXiv 2303.12363).

    Args:
        logits: ``[B, K]``, any float type.
        labels: ``[B]`` integers in 0..K-1.
        space: The values s: ``log_softmax`` (default), ``softmax`` (the literal reading of the paper's abstract) or
            ``logits`` (what the authors' code computes).
        center: ``non_label`` (default): m is the mean over the K-1 non-label classes; the penalty does not change
            when a constant is added to every value, so ``log_softmax`` and ``logits`` agree. ``all_classes``: m is
            the sum over the non-label classes divided by K, as in the authors' second version; m then falls short of
            the mean, so the non-label mean itself is penalised too, and a shift of the values changes the penalty
            (``log_softmax`` undoes a shift of the logits first; ``space="logits"`` is the authors' loss).

    Returns:
        ``[B]``, float32 (float64 for float64 logits), not negative; 0 for K = 2 with ``center="non_label"``.

    Raises:
        ValueError: For a wrong shape, a label outside 0..K-1 or an unknown switch.
    """
    check_switch("space", space, ("log_softmax", "softmax", "logits"))
    check_switch("center", center, ("non_label", "all_classes"))
    check_targets(logits, labels)
    labels = labels.long()
    with torch.autocast(logits.device.type, enabled=False):
        logits = full_precision(logits)
        return _penalty(logits, F.log_softmax(logits, dim=1), labels, space, center)


class CrossEntropyLoss(ClassificationLoss):
    """Mean cross-entropy over the batch."""

    adaptive_objectives = ("targeted_margin", "ce")

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """See ``ClassificationLoss``."""
        return F.cross_entropy(logits, labels)


class DRSoftmaxLoss(ClassificationLoss):
    """Distribution-restrained softmax loss, Wang et al., arXiv 2303.12363.

    ``ce_weight * mean_i CE(z_i, y_i) + weight * reduce_i sum_{j != y_i} (s_ij - m_i)^2``. With the default
    ``reduction="sum"`` the penalty is a sum over the batch while the cross-entropy is a mean, as in the authors'
    code, so the effective weight of the penalty grows with the batch size.

    Args:
        weight: Weight of the penalty, b; the authors' code has 0.005 in its first version and 0.001 in its second.
        ce_weight: Weight of the cross-entropy, a.
        space: See ``distribution_penalty``.
        center: See ``distribution_penalty``.
        reduction: ``sum`` or ``mean`` of the penalty over the batch.

    Raises:
        ValueError: For a negative weight or an unknown switch; in ``forward`` for bad shapes or labels.
    """

    def __init__(
        self,
        weight: float = 0.005,
        ce_weight: float = 1.0,
        space: Space = "log_softmax",
        reduction: Reduction = "sum",
        center: Center = "non_label",
    ) -> None:
        super().__init__()
        check_range("weight", weight, 0)
        check_range("ce_weight", ce_weight, 0)
        check_switch("space", space, ("log_softmax", "softmax", "logits"))
        check_switch("reduction", reduction, ("sum", "mean"))
        check_switch("center", center, ("non_label", "all_classes"))
        self.weight = weight
        self.ce_weight = ce_weight
        self.space: Space = space
        self.reduction: Reduction = reduction
        self.center: Center = center

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """See ``ClassificationLoss``."""
        if not self._is_fused:
            return self.eager(logits, labels)
        weight = self._weight_of_sum(labels)
        return fused_loss(
            logits, labels, ce_weight=self.ce_weight, weight=weight, eager=lambda again: self.eager(again, labels)
        )

    def backpropagate(self, logits: Tensor, labels: Tensor, phase: int = 0) -> Tensor:
        """See ``ClassificationLoss``. A subclass, which may compute another loss, leaves it to autograd."""
        may_derive = type(self) is DRSoftmaxLoss and torch.is_grad_enabled()
        if self._is_fused and may_derive and not torch.is_autocast_enabled(logits.device.type):
            if self.validate:
                check_targets(logits, labels)
            labels = labels.long()
            weight = self._weight_of_sum(labels)
            value = fused_backward(full_precision(logits), labels, ce_weight=self.ce_weight, weight=weight)
            if value is not None:
                return value
        return super().backpropagate(logits, labels, phase)

    @property
    def _is_fused(self) -> bool:
        return self.space == "log_softmax" and self.center == "non_label"

    def _weight_of_sum(self, labels: Tensor) -> float:
        return self.weight if self.reduction == "sum" else self.weight / max(len(labels), 1)

    def eager(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what ``compute`` returns, in operations that autograd differentiates itself; slower, and as exact."""
        log_probabilities = F.log_softmax(logits, dim=1)
        penalty = _penalty(logits, log_probabilities, labels, self.space, self.center)
        reduced = penalty.sum() if self.reduction == "sum" else penalty.mean()
        return self.ce_weight * F.nll_loss(log_probabilities, labels) + self.weight * reduced


LOSSES: dict[str, type[ClassificationLoss]] = {
    "ce": CrossEntropyLoss,
    "dr_softmax": DRSoftmaxLoss,
    "label_smoothing": LabelSmoothingLoss,
    "gce": GuidedComplementEntropyLoss,
    "cot": ComplementObjectiveLoss,
    "logit_squeezing": LogitSqueezingLoss,
    "confidence_penalty": ConfidencePenaltyLoss,
}


def build_loss(name: str, **options: float | str) -> ClassificationLoss:
    """Build the loss that a config names; ``ValueError`` for an unknown name or an option out of range."""
    check_switch("loss", name, tuple(LOSSES))
    return LOSSES[name](**options)
