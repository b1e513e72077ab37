"""Several small models trained as one batch through ``torch.func``: what is measured before it may enter a sweep.

The models differ in seed (initial weights and the order of the images) and in the weight of the loss. Their parameters
are stacked, ``[N, ...]`` each, and one call of a vectorised gradient serves all of them. Adam works value by value, so
that one optimiser over the stacks is N of them. The gradient can be compiled; on a card it then is a CUDA graph, whose
kernels are launched at once.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from drs.checkpoints import build_model_of
from drs.config import TrainConfig
from drs.data import LabelledImages, iterate_batches
from drs.optimisation import build_optimizer, build_schedule
from drs.schema import CrossEntropyConfig, DRSoftmaxConfig, StandardConfig
from drs.training import check_labels

COMPILE: dict[str, Any] = {"options": {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}}
"""How the gradient is compiled: as with ``mode="reduce-overhead"``; on a card, an error if CUDA graphs are skipped."""
WARM_UP_STEPS = 4
"""A CUDA graph is compiled and run as it is in the first step, recorded in the second, and replayed from the third."""
SETTLED, PACED = 2, 20
"""The steps of a training between which its pace is taken."""
Gradients = Callable[[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor, Tensor], dict[str, Tensor]]
Fit = Callable[..., list[nn.Module]]
"""Trains a model for each config, as ``fit_packed`` does; takes configs, images, a device and ``pace``."""


class TooSlow(TimeoutError):
    """A training was stopped because its first steps say that it would take too long."""


class Pace:
    """Stops a training if its first steps say that all of them would take too long.

    Args:
        within: Seconds that all steps may take.
        device: Where the training runs.
    """

    def __init__(self, within: float, device: torch.device) -> None:
        self.within = within
        self.device = device

    def begin(self, total: int) -> None:
        """Take note that a training of so many steps begins."""
        self.total, self.taken = total, 0

    def step(self) -> None:
        """Take note of a step; ``TooSlow`` after step ``PACED`` where the steps would take longer than they may."""
        self.taken += 1
        if self.taken not in (SETTLED, PACED):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.taken == SETTLED:
            self.began = now
            return
        projected = (now - self.began) / (PACED - SETTLED) * self.total
        if projected > self.within:
            raise TooSlow(f"projected from its first {PACED} steps: {projected:.0f} s, not run to the end")


def fit_packed(
    configs: Sequence[TrainConfig],
    training: LabelledImages,
    device: torch.device,
    *,
    compiled: bool = False,
    pace: Pace | None = None,
) -> list[nn.Module]:
    """Train a model for each config, all at once, and return them in eval mode.

    Each is what ``drs.training.fit`` makes of its config, but for rounding. There is no validation, and a loss that is
    not finite does not stop the training. Sets the global seed of torch.

    Args:
        configs: Alike but for seed, loss and its weight. The loss is ``ce`` or ``dr_softmax`` in its default form, the
            optimiser Adam, procedure and precision are the defaults, and training changes no buffer of the model.
        training: All of them see it whole, each in its own order.
        device: Where the data are.
        compiled: Whether to compile the gradient, which takes from seconds to minutes at the first call in a process
            for an architecture, a number of models and a batch size; a compiler of C++ is needed, on a card Triton and
            a compiler of C.
        pace: May end the training early.

    Raises:
        ValueError: For configs that differ otherwise, or ask for what is not packed, naming the key and its value.
        UserError: For a label that is not a class of the config, or fewer images than a batch.
        RuntimeError: If the gradient cannot be compiled.
        TooSlow: If ``pace`` ends it.
    """
    check_packable(configs)
    first = configs[0]
    check_labels(training, first.data)
    models = [_untrained(config, device) for config in configs]
    stacks, buffers = stack_module_state(models)
    holder = _Stacks(stacks)
    # Without a gradient of their own: torch.func would otherwise keep what a second derivative needs.
    parameters = {name: stack.detach() for name, stack in zip(stacks, holder.stacks, strict=True)}
    for stack in holder.stacks:
        stack.grad = torch.empty_like(stack)
    total_steps = len(training) // first.batch_size * first.epochs
    optimizer = build_optimizer(holder, first.optim)
    schedule = build_schedule(optimizer, first.optim, total_steps)
    weights = torch.tensor([getattr(config.loss, "weight", 0.0) for config in configs], device=device)
    gradients = _gradients(first, compiled=compiled)
    orders = [torch.Generator().manual_seed(config.seed) for config in configs]
    if pace is not None:
        pace.begin(total_steps)
    for _ in range(first.epochs):
        for images, labels in _batches(first, training, orders):
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            found = gradients(parameters, buffers, images, labels, weights)
            # Copied, because the next replay of a CUDA graph writes over what this one returned.
            for name, stack in zip(stacks, holder.stacks, strict=True):
                assert stack.grad is not None
                stack.grad.copy_(found[name])
            optimizer.step()
            schedule.step()
            if pace is not None:
                pace.step()
    for position, model in enumerate(models):
        model.load_state_dict({name: stack[position] for name, stack in {**parameters, **buffers}.items()})
    return [model.eval() for model in models]


def warm_up(train: Fit, configs: Sequence[TrainConfig], training: LabelledImages, device: torch.device) -> float:
    """Take a few steps of a training that are thrown away, so that its next call compiles and loads nothing.

    Returns:
        The seconds that this took.
    """
    began = time.perf_counter()
    brief = [copy.copy(config) for config in configs]
    for config in brief:
        config.epochs = 1
    train(brief, training.first(WARM_UP_STEPS * configs[0].batch_size), device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def check_packable(configs: Sequence[TrainConfig]) -> None:
    """Raise ``ValueError`` unless ``fit_packed`` can train these configs as ``drs.training.fit`` would."""
    if not configs:
        raise ValueError("there is no config to train")
    reference = _keys(configs[0])
    for config in configs:
        _check_packed(config)
        for key, value in _keys(config).items():
            if key not in reference or value != reference[key]:
                raise ValueError(
                    f"{key}={value}: {reference.get(key)} in the first config; packed models differ in seed, loss and "
                    "weight of the loss only"
                )
    with torch.device("meta"):
        model = build_model_of(configs[0])
    changed = [name for name, module in model.named_modules() if getattr(module, "track_running_stats", False)]
    if changed:
        raise ValueError(
            f"model.name={configs[0].model.name}: training changes the buffers of {changed[0]}; only models whose "
            "buffers stay as they are are packed"
        )


def _check_packed(config: TrainConfig) -> None:
    """Raise ``ValueError`` for what a single config asks for that is not packed."""
    packed: dict[str, Any] = {"ce": CrossEntropyConfig("ce")}
    packed["dr_softmax"] = DRSoftmaxConfig("dr_softmax", getattr(config.loss, "weight", 0.0))
    if config.loss.name not in packed:
        raise ValueError(f"loss.name={config.loss.name}: only {' and '.join(packed)} are packed")
    allowed = {
        "optim.name": "adam", "procedure.name": StandardConfig().name, "precision": "float32", "compile": False,
        **{f"loss.{key}": value for key, value in asdict(packed[config.loss.name]).items()},
    }  # fmt: skip
    asked = {**_keys(config), **{f"loss.{key}": value for key, value in asdict(config.loss).items()}}
    for key, value in allowed.items():
        if asked[key] != value:
            raise ValueError(f"{key}={asked[key]}: only {key}={value} is packed")


def _keys(config: TrainConfig) -> dict[str, Any]:
    """Return the values of a config by their keys, such as ``optim.name``, without the seed and the loss."""
    values: dict[str, Any] = {}
    for key, value in vars(config).items():
        if key in ("seed", "loss"):
            continue
        values |= {f"{key}.{name}": part for name, part in vars(value).items()} if is_dataclass(value) else {key: value}
    return values


class _Stacks(nn.Module):
    """What an optimiser asks for parameters."""

    def __init__(self, stacks: dict[str, Tensor]) -> None:
        super().__init__()
        self.stacks = nn.ParameterList(stacks.values())


def _untrained(config: TrainConfig, device: torch.device) -> nn.Module:
    """Return the model of a config with the weights that its seed gives, in training mode."""
    torch.manual_seed(config.seed)
    return build_model_of(config).to(device).train()


def _batches(
    config: TrainConfig, training: LabelledImages, orders: Sequence[torch.Generator]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images ``[N, B, C, H, W]`` and labels ``[N, B]`` of an epoch, each of N models in an order of its own."""
    streams = [
        iterate_batches(
            training, config.batch_size, generator=order, augment=config.data.augment, padding=config.data.padding
        )
        for order in orders
    ]
    for batches in zip(*streams, strict=True):
        images, labels = zip(*batches, strict=True)
        yield torch.stack(images), torch.stack(labels)


def _penalty(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over the batch of ``drs.losses.distribution_penalty``, in operations that can be vectorised."""
    is_label = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
    values = F.log_softmax(logits, dim=1).masked_fill(is_label, 0.0)
    mean = values.sum(dim=1, keepdim=True) / (logits.shape[1] - 1)
    return (values - mean).masked_fill(is_label, 0.0).square().sum()


def _gradients(config: TrainConfig, *, compiled: bool) -> Gradients:
    """Return the gradient of the loss of N models with the architecture of a config.

    What is compiled is kept by PyTorch, and serves later trainings of the same architecture and shapes.

    Returns:
        Maps stacked parameters and buffers ``[N, ...]`` by name, images ``[N, B, C, H, W]``, labels ``[N, B]`` and
        weights of the penalty ``[N]`` to the gradients of the parameters, ``[N, ...]`` by name.
    """
    with torch.device("meta"):
        shape = build_model_of(config).train()

    def value(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor, weight: Tensor
    ) -> Tensor:
        logits = functional_call(shape, (parameters, buffers), (images,))
        return F.cross_entropy(logits, labels) + weight * _penalty(logits, labels)

    gradients: Gradients = vmap(grad(value))
    if compiled:
        # Whole and for fixed shapes: a part that is left out, or a size that varies, would keep it from a CUDA graph.
        gradients = torch.compile(gradients, fullgraph=True, dynamic=False, **COMPILE)
    return gradients
