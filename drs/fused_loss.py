"""The distribution-restrained softmax loss, in its default form, with its gradient in closed form.

With s = log_softmax(z), p = exp(s), m the mean of s over the K-1 non-label classes, and d_j = s_j - m there and 0 for
the label, the loss of a batch is ``a mean_i CE_i + b sum_i sum_j d_ij^2``. The d_ij of a sample sum to zero, so the
gradient of its penalty with respect to the logits is ``2 b d_ij`` alone, and that of the whole is
``a / B (p_ij - [j = y_i]) + 2 b d_ij``. Autograd finds the same in several times as many passes over [B, K] tensors.

On a card one kernel computes both; see ``drs.triton_loss``. Elsewhere, and as its reference, there are two forms in
calls of PyTorch, for few and for many elements.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

EagerLoss = Callable[[Tensor], Tensor]

FEW_ELEMENTS = 2**15
"""Logits of at most so many elements take the form of few calls, where they do not take Triton's."""
TRITON = True
"""Whether logits on a card may take the form in Triton."""


def _reads_gradient(gradient: Tensor) -> bool:
    """Return whether the host has the value of the incoming gradient at once; on an accelerator it would wait."""
    return gradient.device.type == "cpu"


def again(eager: EagerLoss, logits: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient with respect to the logits in a form that can be differentiated again."""
    with torch.autocast(logits.device.type, enabled=False):
        value = eager(logits)
    (twice,) = torch.autograd.grad(value, logits, gradient, create_graph=True)
    return twice


def kept_gradient(ctx: Any, gradient: Tensor) -> Tensor:
    """Return the gradient with respect to the logits of a form that has kept them and the derivative by them."""
    logits, derivative = ctx.saved_tensors
    if torch.is_grad_enabled():
        return again(ctx.eager, logits, gradient)
    # A product even with 1: what is kept must not become the gradient that others go on to change.
    return derivative * gradient


class _LossInFewCalls(Function):
    """For few elements, where it is calls that take the time: the gradient is worked out on the way forward.

    One tensor of the logits' size is kept, the gradient; cross-entropy keeps one too, s. The exponential follows the
    log-softmax at once, because several threads take part in both and fall asleep in between.
    """

    @staticmethod
    def value_and_derivative(
        logits: Tensor, labels: Tensor, ce_weight: float, weight: float, *, gradient: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the scalar loss and its derivative ``[B, K]``; without ``gradient``, no derivative in its place."""
        index = labels.unsqueeze(1)
        values = torch.log_softmax(logits, dim=1)
        probabilities = values.exp() if gradient else None
        cross_entropy = F.nll_loss(values, labels)
        others = values.scatter_(1, index, 0.0)  # in place: from here on, the names are of one tensor
        deviations = others.sub_(others.sum(dim=1, keepdim=True), alpha=1 / (logits.shape[1] - 1))
        flat = deviations.scatter_(1, index, 0.0).view(-1)
        if ce_weight != 1:
            cross_entropy.mul_(ce_weight)
        value = torch.add(cross_entropy, torch.dot(flat, flat), alpha=weight)
        if probabilities is not None:
            ce_scale = ce_weight / len(logits)
            deviations.mul_(2 * weight).scatter_(1, index, -ce_scale).add_(probabilities, alpha=ce_scale)
        return value, deviations

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ce_weight: float, weight: float, eager: EagerLoss) -> Tensor:
        """Return the scalar loss; arguments as in ``fused_loss``."""
        needed = ctx.needs_input_grad[0]
        value, derivative = _LossInFewCalls.value_and_derivative(logits, labels, ce_weight, weight, gradient=needed)
        if needed:
            ctx.save_for_backward(logits, derivative)
            ctx.eager = eager
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient with respect to the logits."""
        return kept_gradient(ctx, gradient), None, None, None, None


class _LossInFewPasses(Function):
    """For many elements. One tensor of the logits' size is kept, d; cross-entropy keeps one too, s."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ce_weight: float, weight: float, eager: EagerLoss) -> Tensor:
        """Return the scalar loss; arguments as in ``fused_loss``."""
        index = labels.unsqueeze(1)
        values = torch.log_softmax(logits, dim=1)
        of_label = values.gather(1, index)
        mean = values.sum(dim=1, keepdim=True).sub_(of_label).div_(logits.shape[1] - 1)
        # The deviations themselves are squared: from sums of squares, what the loss has made small would be rounding.
        deviations = values.sub_(mean).scatter_(1, index, 0.0)
        lengths = torch.linalg.vector_norm(deviations, dim=1)
        ctx.save_for_backward(logits, deviations, mean, of_label, index)
        ctx.ce_weight, ctx.weight, ctx.eager = ce_weight, weight, eager
        return torch.dot(lengths, lengths).mul_(weight).sub_(of_label.mean(), alpha=ce_weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient with respect to the logits."""
        logits, deviations, mean, of_label, index = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(ctx.eager, logits, gradient), None, None, None, None
        factor = float(gradient) if _reads_gradient(gradient) else gradient
        ce_scale = ctx.ce_weight / len(logits) * factor
        result = torch.add(deviations, mean).exp_().mul_(ce_scale)
        if isinstance(factor, float):
            result.add_(deviations, alpha=2 * ctx.weight * factor)
        else:
            result.addcmul_(deviations, 2 * ctx.weight * factor)
        return result.scatter_(1, index, of_label.expm1().mul_(ce_scale)), None, None, None, None


def _is_on_current_card(logits: Tensor, labels: Tensor) -> bool:
    """Return whether both tensors are on the CUDA device on which Triton would run a kernel."""
    return logits.is_cuda and logits.get_device() == labels.get_device() == torch.cuda.current_device()


def _fits_kernel(logits: Tensor, labels: Tensor) -> bool:
    """Return whether Triton's kernel takes such tensors, as ``drs.triton_loss.value_and_derivative`` has it.

    What it does not take, wrong shapes among them, is left to PyTorch. So is a subclass of ``Tensor``, which may have
    no memory of its own to read.
    """
    return (
        type(logits) is Tensor
        and logits.dtype == torch.float32
        and labels.dtype == torch.int64
        and logits.dim() == 2
        and logits.shape[1] > 1
        and labels.shape == logits.shape[:1]
        and logits.is_contiguous()
        and labels.is_contiguous()
    )


@functools.cache
def _triton_form(classes: int) -> type[Function] | None:
    """Return the form in Triton for so many classes; None where Triton is missing or, with a warning, does not work."""
    try:
        from drs.triton_loss import LossInTriton, probe

        probe(classes)
    except ImportError:
        return None
    except torch.OutOfMemoryError:
        raise  # it says nothing of the kernel
    except Exception as error:  # of the driver and of each compiler involved
        reason = " ".join(str(error).split())[:300]
        warnings.warn(f"DR-softmax runs without its Triton kernel: {type(error).__name__}: {reason}", stacklevel=2)
        return None
    return LossInTriton


def chosen_form(logits: Tensor, labels: Tensor) -> type[Function]:
    """Return the autograd function that logits take: Triton's on a card that has it, else one of two by their number.

    Under ``torch.compile``, which makes kernels itself, it is one of the two as well.
    """
    if TRITON and not torch.compiler.is_compiling() and _is_on_current_card(logits, labels):
        form = _triton_form(logits.shape[1]) if _fits_kernel(logits, labels) else None
        if form is not None:
            return form
    return _LossInFewCalls if logits.numel() <= FEW_ELEMENTS else _LossInFewPasses


def fused_loss(logits: Tensor, labels: Tensor, *, ce_weight: float, weight: float, eager: EagerLoss) -> Tensor:
    """Return ``ce_weight * mean_i CE_i + weight * sum_i penalty_i``, the default penalty of ``distribution_penalty``.

    Agrees with ``eager`` but for rounding. With Triton on a card, and elsewhere of more than ``FEW_ELEMENTS`` logits,
    no [B, K] tensor is built beside those that cross-entropy builds; of fewer, one, on the way forward.

    Args:
        logits: ``[B, K]``, float32 or float64.
        labels: ``[B]`` int64 in 0..K-1.
        ce_weight: Weight of the mean cross-entropy.
        weight: Weight of the sum over the batch of the penalty.
        eager: The same loss of the logits in plain operations. It is asked where a derivative is to be
            differentiated again, under the transforms of ``torch.func``, and for an empty batch.
    """
    if not len(labels) or torch._C._are_functorch_transforms_active():
        return eager(logits)
    result: Tensor = chosen_form(logits, labels).apply(logits, labels, ce_weight, weight, eager)
    return result


def fused_backward(logits: Tensor, labels: Tensor, *, ce_weight: float, weight: float) -> Tensor | None:
    """Backpropagate ``fused_loss`` through what the logits came from and return its value, detached.

    The derivative goes where autograd would bring it, bit for bit, and autograd is not asked: beside a small network
    its own calls take as long as the loss does.

    Returns:
        None, with nothing done, where the loss takes a form that leaves its derivative to autograd.
    """
    if not len(labels) or torch._C._are_functorch_transforms_active():
        return None
    derive = getattr(chosen_form(logits, labels), "value_and_derivative", None)
    if derive is None:
        return None
    with torch.no_grad():
        value, derivative = derive(logits, labels, ce_weight, weight)
    logits.backward(derivative)
    return value
