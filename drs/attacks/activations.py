"""Bias, shortcut and ReLU after a convolution in float16, in one pass over its feature maps.

Such operations are bound by a card's memory: together they take about as long as the convolution. One by one, bias,
shortcut and ReLU read and write the feature maps three times; here they do so once, in Triton where that is at hand.
"""

import functools
import importlib
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function

MAX_ELEMENTS = 2**31
"""Elements that the kernel can count."""
RELUS = (torch.relu, torch.relu_, nn.functional.relu)
SUMS = (operator.add, operator.iadd, torch.add)


@functools.cache
def _kernel() -> Any:
    """Return the kernel of ``drs.attacks.triton_relu``, or None where there is no Triton."""
    try:
        return importlib.import_module("drs.attacks.triton_relu").biased_relu
    except ImportError:
        return None


def _biased_relu(values: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
    maps = (values,) if shortcut is None else (values, shortcut)
    if values.is_cuda and values.numel() < MAX_ELEMENTS and all(_is_channels_last(each, values) for each in maps):
        kernel = _kernel()
        if kernel is not None:
            found: Tensor = kernel(values, bias, shortcut)
            return found
    total = values.float() + bias.view(1, -1, 1, 1)
    return (total if shortcut is None else total + shortcut.float()).relu().half()


def _is_channels_last(maps: Tensor, like: Tensor) -> bool:
    return maps.shape == like.shape and maps.is_contiguous(memory_format=torch.channels_last)


class _BiasedReLU(Function):
    """The function of ``BiasedReLU``; its backward pass needs the result only."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
        result = _biased_relu(values, bias, shortcut)
        ctx.save_for_backward(result)
        ctx.dtypes = values.dtype, None if shortcut is None else shortcut.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (result,), (of_values, of_shortcut) = ctx.saved_tensors, ctx.dtypes
        passed = torch.ops.aten.threshold_backward(gradients[0], result, 0)
        return passed.to(of_values), None, None if of_shortcut is None else passed.to(of_shortcut)


class BiasedReLU(nn.Module):
    """``relu(values + bias + shortcut)`` in float16, computed in float32.

    Args:
        bias: ``[C]``.
    """

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias.detach().float().clone())

    def forward(self, values: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return ``[B, C, H, W]`` of ``values`` and ``shortcut`` like it."""
        result: Tensor = _BiasedReLU.apply(values, self.bias, shortcut)
        return result


def fuse_activations(model: fx.GraphModule, take_bias: Callable[[nn.Module], Tensor | None]) -> int:
    """Let the ReLUs of a traced model, and the sums before them, take the biases of the convolutions before those.

    Args:
        model: Traced, in eval mode, to be run in float16; it is changed.
        take_bias: Takes the bias ``[C]`` from a module and returns it, or does nothing and returns None where it is of
            another kind or has none.

    Returns:
        How many ReLUs were changed.
    """
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in model.graph.nodes if node.op == "call_module")
    # A parameter that is also read by itself must stay where it is.
    read = {str(node.target).rpartition(".")[0] for node in model.graph.nodes if node.op == "get_attr"}

    def take(term: Any) -> Tensor | None:
        """Take the bias of a layer whose value nobody else wants."""
        is_layer = isinstance(term, fx.Node) and term.op == "call_module" and calls[term.target] == 1
        if not is_layer or len(term.users) != 1 or any(f"{name}.".startswith(f"{term.target}.") for name in read):
            return None
        return take_bias(modules[str(term.target)])

    changed = 0
    for node in list(model.graph.nodes):
        if not _is_relu(node, modules):
            continue
        inner = node.args[0]
        is_sum = inner.op == "call_function" and inner.target in SUMS and len(inner.args) == 2 and not inner.kwargs
        terms = list(inner.args) if is_sum and len(inner.users) == 1 else [inner]
        # The bias of a value that is added to itself counts twice.
        if not all(isinstance(term, fx.Node) for term in terms) or len(set(terms)) < len(terms):
            continue
        biases = [take(term) for term in terms]
        found = [bias.float() for bias in biases if bias is not None]
        if not found:
            continue
        if biases[0] is None:
            terms.reverse()  # the layer's value first, which has the shape of the result
        name = f"biased_relu_{changed}"
        model.add_submodule(name, BiasedReLU(torch.stack(found).sum(dim=0)))
        with model.graph.inserting_before(node):
            node.replace_all_uses_with(model.graph.call_module(name, tuple(terms)))
        model.graph.erase_node(node)
        if terms[0] is not inner:
            model.graph.erase_node(inner)
        changed += 1
    model.recompile()
    return changed


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.ReLU)
    return node.op == "call_function" and node.target in RELUS
