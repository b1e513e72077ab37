"""The loss of ``drs.fused_loss`` in fewer calls, to see what that brings; nothing but the benchmark uses it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _ByLibraryGradient(Function):
    """The gradient is that of log_softmax for an incoming g with ``g_ij = 2 b d_ij``, and ``-a / B`` for the label.

    The deviations d of a sample sum to zero, so g sums to ``-a / B``, which is the factor of p: PyTorch has the rest as
    a single pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ce_weight: float, weight: float) -> Tensor:
        classes = logits.shape[1]
        index = labels.unsqueeze(1)
        values = torch.log_softmax(logits, 1)
        cross_entropy = F.nll_loss(values, labels)
        others = values.scatter(1, index, 0.0)
        deviations = others.sub_(others.mean(1, True), alpha=classes / (classes - 1)).scatter_(1, index, 0.0)
        # By rows: over a whole batch of large rows a float32 length is off in its third digit.
        lengths = torch.linalg.vector_norm(deviations, dim=1)
        outer = deviations.mul_(2 * weight).scatter_(1, index, -ce_weight / len(logits))
        ctx.save_for_backward(values, outer)
        return torch.dot(lengths, lengths).mul_(weight).add_(cross_entropy, alpha=ce_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        values, outer = ctx.saved_tensors
        result = torch._log_softmax_backward_data(outer, values, 1, values.dtype)
        if gradient.device.type != "cpu" or float(gradient) != 1:
            result.mul_(gradient)
        return result, None, None, None


def loss_by_library_gradient(logits: Tensor, labels: Tensor, ce_weight: float, weight: float) -> Tensor:
    """Return ``ce_weight * mean_i CE_i + weight * sum_i penalty_i`` of logits ``[B, K]`` and labels ``[B]``."""
    result: Tensor = _ByLibraryGradient.apply(logits, labels, ce_weight, weight)
    return result
