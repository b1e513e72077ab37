"""Several small models trained as one batch through ``torch.func``: what is measured before it may enter a sweep.

The models differ in seed (initial weights and the order of the images) and in the weight of the loss. Their parameters
are stacked, ``[N, ...]`` each, and one call of a vectorised gradient serves all of them. Adam works value by value, so
that one optimiser over the stacks is N of them.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from drs.checkpoints import build_model_of
from drs.config import TrainConfig
from drs.data import LabelledImages, iterate_batches
from drs.optimisation import build_optimizer, build_schedule


class _Stacks(nn.Module):
    """What an optimiser asks for parameters."""

    def __init__(self, stacks: dict[str, Tensor]) -> None:
        super().__init__()
        self.stacks = nn.ParameterList(stacks.values())


def _penalty(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over the batch of ``drs.losses.distribution_penalty``, in operations that can be vectorised."""
    is_label = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
    values = F.log_softmax(logits, dim=1).masked_fill(is_label, 0.0)
    mean = values.sum(dim=1, keepdim=True) / (logits.shape[1] - 1)
    return (values - mean).masked_fill(is_label, 0.0).square().sum()


def fit_packed(configs: Sequence[TrainConfig], training: LabelledImages, device: torch.device) -> list[nn.Module]:
    """Train a model for each config, all at once, and return them in eval mode.

    Each is what ``drs.training.fit`` makes of its config, but for rounding; there is no validation.

    Args:
        configs: Alike but for seed and the weight of the loss, which is ``ce`` or ``dr_softmax`` in its default form;
            the optimiser is Adam, and the model has no state beside its parameters.
        training: All of them see it whole, each in its own order.
        device: Where the data are.

    Raises:
        ValueError: For configs that differ otherwise, or a loss or an optimiser that this does not know.
    """
    first = configs[0]
    weights = []
    for config in configs:
        if (config.data, config.model, config.optim, config.epochs, config.batch_size) != (
            first.data, first.model, first.optim, first.epochs, first.batch_size,
        ):  # fmt: skip
            raise ValueError("models that are packed may differ in seed and in the weight of the loss only")
        if config.optim.name != "adam" or config.loss.name not in ("ce", "dr_softmax"):
            raise ValueError(
                f"{config.loss.name} with {config.optim.name}: only ce and dr_softmax with adam are packed"
            )
        weights.append(getattr(config.loss, "weight", 0.0))
    models = []
    for config in configs:
        torch.manual_seed(config.seed)
        models.append(build_model_of(config).to(device).train())
    stacks, buffers = stack_module_state(models)
    shape = copy.deepcopy(models[0]).to("meta")
    holder = _Stacks(stacks)
    stacks = dict(zip(stacks, holder.stacks, strict=True))
    optimizer = build_optimizer(holder, first.optim)
    steps = len(training) // first.batch_size
    schedule = build_schedule(optimizer, first.optim, steps * first.epochs)
    scale = torch.tensor(weights, device=device)

    def value(
        parameters: dict[str, Tensor], constants: dict[str, Tensor], images: Tensor, labels: Tensor, weight: Tensor
    ) -> Tensor:
        logits = functional_call(shape, (parameters, constants), (images,))
        return F.cross_entropy(logits, labels) + weight * _penalty(logits, labels)

    gradients = vmap(grad(value))
    orders = [torch.Generator().manual_seed(config.seed) for config in configs]
    for _ in range(first.epochs):
        streams = [
            iterate_batches(
                training, config.batch_size, generator=order, augment=config.data.augment, padding=config.data.padding
            )
            for config, order in zip(configs, orders, strict=True)
        ]
        for batches in zip(*streams, strict=True):
            images, labels = (torch.stack(parts) for parts in zip(*batches, strict=True))
            found = gradients(stacks, buffers, images, labels, scale)
            for name, stack in stacks.items():
                stack.grad = found[name]
            optimizer.step()
            schedule.step()
    for position, model in enumerate(models):
        model.load_state_dict({name: stack[position] for name, stack in {**stacks, **buffers}.items()})
    return [model.eval() for model in models]
