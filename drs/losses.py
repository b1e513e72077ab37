"""The distribution-restrained softmax loss and the losses that it is compared with.

Every loss maps logits ``[B, K]`` and integer labels ``[B]`` to a scalar, computed in float32 even under autocast
(float64 logits stay float64). ``DRSoftmaxLoss`` and ``distribution_penalty`` can be used without the rest of this
package.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Space = Literal["log_softmax", "softmax", "logits"]
Center = Literal["non_label", "all_classes"]
Reduction = Literal["sum", "mean"]


def check_targets(logits: Tensor, labels: Tensor) -> None:
    """Raise ``ValueError`` unless ``logits`` is ``[B, K]`` with K >= 2 and ``labels`` is ``[B]`` within 0..K-1.

    On an accelerator the check of the values waits for the device.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be [B, K] and labels [B], but they are {list(logits.shape)} and {list(labels.shape)}; "
            "flatten leading dimensions first"
        )
    if logits.shape[1] < 2:
        raise ValueError(f"a classifier needs at least 2 classes, but logits have {logits.shape[1]}")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, but their type is {labels.dtype}")
    if labels.numel():
        low, high = (int(value) for value in torch.aminmax(labels))
        if low < 0 or high >= logits.shape[1]:
            bad = low if low < 0 else high
            raise ValueError(f"label {bad} is outside 0..{logits.shape[1] - 1}")


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    # linalg.vecdot builds the [B, K] product first; a batched matrix product does not.
    return torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).view(-1)


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
        squares = _row_dot(values, values)
        return (squares - 2 * mean * total + others * mean.square()).clamp_min(0)
    values = log_probabilities if space == "log_softmax" else logits
    mean = (values.sum(dim=1, keepdim=True) - values.gather(1, index)) / divisor
    deviations = (values - mean).scatter_(1, index, 0.0)
    return _row_dot(deviations, deviations)


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
    _check_switch("space", space, ("log_softmax", "softmax", "logits"))
    _check_switch("center", center, ("non_label", "all_classes"))
    check_targets(logits, labels)
    with torch.autocast(logits.device.type, enabled=False):
        logits = _full_precision(logits)
        return _penalty(logits, F.log_softmax(logits, dim=1), labels, space, center)


def _check_switch(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; it is one of {', '.join(allowed)}")


def _check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        bound = f"at least {low}" if math.isinf(high) else f"between {low} and {high}"
        raise ValueError(f"{name}={value} must be {bound}")


class ClassificationLoss(nn.Module):
    """What the training loop needs of a loss; ``compute`` is what a subclass defines.

    Attributes:
        phases: How many optimisation steps a batch gets (2 for complement objective training, else 1).
        noise_std: Standard deviation, in pixel units, of Gaussian noise that training adds to the input.
        validate: Whether ``forward`` checks shapes and label values. On an accelerator the check waits for the
            device; a training loop that has checked its data set once may turn it off.
    """

    phases: int = 1
    noise_std: float = 0.0
    validate: bool = True

    def forward(self, logits: Tensor, labels: Tensor, phase: int = 0) -> Tensor:
        """Return the scalar loss of logits ``[B, K]`` and labels ``[B]``; ``ValueError`` on bad shapes or labels."""
        if self.validate:
            check_targets(logits, labels)
        with torch.autocast(logits.device.type, enabled=False):
            return self.compute(_full_precision(logits), labels, phase)

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """Return the scalar loss of checked float32 or float64 logits."""
        raise TypeError(f"{type(self).__name__} does not define compute")


class CrossEntropyLoss(ClassificationLoss):
    """Mean cross-entropy over the batch."""

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
        _check_range("weight", weight, 0)
        _check_range("ce_weight", ce_weight, 0)
        _check_switch("space", space, ("log_softmax", "softmax", "logits"))
        _check_switch("reduction", reduction, ("sum", "mean"))
        _check_switch("center", center, ("non_label", "all_classes"))
        self.weight = weight
        self.ce_weight = ce_weight
        self.space: Space = space
        self.reduction: Reduction = reduction
        self.center: Center = center

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """See ``ClassificationLoss``."""
        log_probabilities = F.log_softmax(logits, dim=1)
        penalty = _penalty(logits, log_probabilities, labels, self.space, self.center)
        reduced = penalty.sum() if self.reduction == "sum" else penalty.mean()
        return self.ce_weight * F.nll_loss(log_probabilities, labels) + self.weight * reduced


class LabelSmoothingLoss(ClassificationLoss):
    """Cross-entropy against labels mixed with the uniform distribution (Szegedy et al. 2016, arXiv 1512.00567).

    Args:
        smoothing: Share of the uniform distribution, 0..1.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        _check_range("smoothing", smoothing, 0, 1)
        self.smoothing = smoothing

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """See ``ClassificationLoss``."""
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)


def complement_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the entropy ``[B]``, in nats, of the softmax renormalised over the non-label classes.

    The complement entropy of Chen et al. 2019 (arXiv 1903.01182, eq. 2), computed in log space: the label's logit
    cancels, so the entropy is that of a softmax over the other K-1 logits.
    """
    others = logits.scatter(1, labels.unsqueeze(1), -math.inf)
    log_q = F.log_softmax(others, dim=1)
    # exp(-inf) * -inf is NaN, in the value and in the gradient; the label's entry stands for 0 log 0 = 0.
    log_q = log_q.scatter(1, labels.unsqueeze(1), 0.0)
    return -(log_q.exp().scatter(1, labels.unsqueeze(1), 0.0) * log_q).sum(dim=1)


class GuidedComplementEntropyLoss(ClassificationLoss):
    """Guided complement entropy, Chen et al. 2019 (ICCV, arXiv 1903.09799, eq. 5).

    ``-mean_i p_iy^alpha H(q_i) / log(K-1)``: raises the label's probability and flattens the others at once,
    without cross-entropy.

    Args:
        alpha: Exponent of the guiding factor, above 0; the authors use 1/3 where the classes are ten.
    """

    def __init__(self, alpha: float = 1 / 3) -> None:
        super().__init__()
        _check_range("alpha", alpha, 0)
        self.alpha = alpha

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """See ``ClassificationLoss``."""
        if logits.shape[1] < 3:
            raise ValueError("guided complement entropy needs at least 3 classes: log(K-1) is 0 for 2")
        guide = torch.exp(-self.alpha * F.cross_entropy(logits, labels, reduction="none"))
        return -(guide * complement_entropy(logits, labels)).mean() / math.log(logits.shape[1] - 1)


class ComplementObjectiveLoss(ClassificationLoss):
    """Complement objective training, Chen et al. 2019 (ICLR, arXiv 1903.01182, algorithm 1).

    Each batch gets two optimisation steps: phase 0 lowers the cross-entropy, phase 1 raises the complement entropy,
    ``-mean_i H(q_i) / (K-1)``.
    """

    phases = 2

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """See ``ClassificationLoss``."""
        if phase == 0:
            return F.cross_entropy(logits, labels)
        return -complement_entropy(logits, labels).mean() / (logits.shape[1] - 1)


class LogitSqueezingLoss(ClassificationLoss):
    """Logit squeezing, Kannan et al. 2018 (arXiv 1803.06373, section 4.2).

    Cross-entropy plus ``weight * mean_i |z_i|_2``.

    Args:
        weight: Weight of the norm.
        noise_std: Standard deviation of Gaussian input noise in pixel units; the paper squeezes logits together with
            noise (0.5 on MNIST). 0 leaves the input alone.
    """

    def __init__(self, weight: float = 0.5, noise_std: float = 0.0) -> None:
        super().__init__()
        _check_range("weight", weight, 0)
        _check_range("noise_std", noise_std, 0)
        self.weight = weight
        self.noise_std = noise_std

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """See ``ClassificationLoss``."""
        return F.cross_entropy(logits, labels) + self.weight * torch.linalg.vector_norm(logits, dim=1).mean()


class ConfidencePenaltyLoss(ClassificationLoss):
    """Confidence penalty, Pereyra et al. 2017 (arXiv 1701.06548, eq. 2).

    Cross-entropy minus ``weight * mean_i H(p_i)``.

    Args:
        weight: Weight of the entropy, in nats.
    """

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        _check_range("weight", weight, 0)
        self.weight = weight

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """See ``ClassificationLoss``."""
        log_probabilities = F.log_softmax(logits, dim=1)
        negative_entropy = _row_dot(log_probabilities.exp(), log_probabilities)
        return F.nll_loss(log_probabilities, labels) + self.weight * negative_entropy.mean()


LOSSES: dict[str, Callable[..., ClassificationLoss]] = {
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
    _check_switch("loss", name, tuple(LOSSES))
    return LOSSES[name](**options)
