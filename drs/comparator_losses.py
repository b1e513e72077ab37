"""The losses that the distribution-restrained softmax loss is compared with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from drs.loss_base import ClassificationLoss, check_range, row_dot


class LabelSmoothingLoss(ClassificationLoss):
    """Cross-entropy against labels mixed with the uniform distribution (Szegedy et al. 2016, arXiv 1512.00567).

    Args:
        smoothing: Share of the uniform distribution, 0..1.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        check_range("smoothing", smoothing, 0, 1)
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
        check_range("alpha", alpha, 0)
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
        check_range("weight", weight, 0)
        check_range("noise_std", noise_std, 0)
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
        check_range("weight", weight, 0)
        self.weight = weight

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """See ``ClassificationLoss``."""
        log_probabilities = F.log_softmax(logits, dim=1)
        negative_entropy = row_dot(log_probabilities.exp(), log_probabilities)
        return F.nll_loss(log_probabilities, labels) + self.weight * negative_entropy.mean()
