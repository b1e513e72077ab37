"""Logits -> per-sample statistics of the softmax distribution over the non-label classes.

They describe what Wang et al. ("the paper", arXiv 2303.12363) relate to robustness: how the softmax values of the
classes that are not the label are distributed. "Label" is the true label, never the prediction.
"""

import math

import torch
from torch import Tensor

from drs.losses import check_targets

STATISTICS: tuple[str, ...] = (
    "nonlabel_var_log",
    "nonlabel_std",
    "nonlabel_cv",
    "nonlabel_entropy",
    "nonlabel_max",
    "nonlabel_gap",
    "label_prob",
    "margin",
    "logit_norm",
)


def _variance(values: Tensor) -> Tensor:
    return (values - values.mean(dim=1, keepdim=True)).square().mean(dim=1)


def softmax_statistics(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return every statistic of ``STATISTICS`` for every sample.

    With p the softmax of the logits z of K classes, y the label, and q the values of p over the K-1 non-label classes
    renormalised to sum 1 (q does not depend on z_y: it is the softmax of the other K-1 logits):

    - ``nonlabel_var_log``: variance, dividing by K-1, of log p over the non-label classes. Times K-1 it is the
      penalty of the distribution-restrained softmax loss (``drs.losses.distribution_penalty``), which sums squares.
    - ``nonlabel_std``: standard deviation of p over them, dividing by K-1.
    - ``nonlabel_cv``: ``nonlabel_std`` over their mean; the same for p and q, since the two are proportional.
    - ``nonlabel_entropy``: entropy of q over log(K-1), 0..1; 1 is uniform.
    - ``nonlabel_max``, ``nonlabel_gap``: the largest non-label p, and how far it lies above the second largest.
    - ``label_prob``: p of the label.
    - ``margin``: z_y - max_{j != y} z_j; negative where the label loses.
    - ``logit_norm``: Euclidean norm of z minus its mean over the classes.

    None changes when a constant is added to all logits of a sample. Everything is computed in float64 and in log
    space: q comes from the non-label logits alone, so ``nonlabel_var_log``, ``nonlabel_cv``, ``nonlabel_entropy``,
    ``margin`` and ``logit_norm`` stay right where every non-label p underflows; ``nonlabel_std``, ``nonlabel_max``
    and ``nonlabel_gap`` are then 0, the float64 nearest to their value.

    With K = 2 the single non-label class has variance, standard deviation and coefficient of variation 0; its entropy
    is 1 by definition (one class is spread as evenly as it can be), and the missing second largest value counts as 0,
    so the gap is the maximum.

    Args:
        logits: ``[N, K]``, any float type, K >= 2, finite.
        labels: ``[N]`` integers in 0..K-1.

    Returns:
        Name -> float64 ``[N]``, in the order of ``STATISTICS``, on the device of the logits (on the CPU where the
        device has no float64).

    Raises:
        ValueError: For a wrong shape or type, a label outside 0..K-1, K < 2, or a logit that is not finite.
    """
    if not logits.is_floating_point():
        raise ValueError(f"logits must be of a float type, but their type is {logits.dtype}")
    check_targets(logits, labels)
    finite = torch.isfinite(logits)
    if not finite.all():
        row, column = (int(index) for index in (~finite).nonzero()[0])
        raise ValueError(f"logits must be finite, but sample {row}, class {column} is {float(logits[row, column])}")

    if logits.device.type == "mps":
        logits, labels = logits.cpu(), labels.cpu()
    logits = logits.detach().double()
    labels = labels.long().unsqueeze(1)
    samples, classes = logits.shape
    is_label = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels, True)
    others = logits[~is_label].view(samples, classes - 1)
    label_logit = logits.gather(1, labels).squeeze(1)

    log_total = logits.logsumexp(dim=1)
    log_others = others.logsumexp(dim=1)
    log_q = others - log_others.unsqueeze(1)
    q = log_q.exp()
    others_mass = (log_others - log_total).exp()
    q_std = _variance(q).sqrt()
    largest = others.max(dim=1).values
    nonlabel_max = (largest - log_total).exp()

    if classes == 2:
        entropy, gap = torch.ones_like(largest), nonlabel_max
    else:
        # An underflowed q has a finite logarithm, so 0 log 0 needs no special case. Rounding may exceed the bounds.
        entropy = ((q * -log_q).sum(dim=1) / math.log(classes - 1)).clamp(0.0, 1.0)
        second = others.topk(2, dim=1).values[:, 1]
        gap = -nonlabel_max * torch.expm1(second - largest)

    values = (
        _variance(log_q),
        others_mass * q_std,
        (classes - 1) * q_std,
        entropy,
        nonlabel_max,
        gap,
        (label_logit - log_total).exp(),
        label_logit - largest,
        torch.linalg.vector_norm(logits - logits.mean(dim=1, keepdim=True), dim=1),
    )
    return dict(zip(STATISTICS, values, strict=True))
