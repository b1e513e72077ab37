"""Several small models trained side by side in one CUDA graph: what is measured before it may enter a sweep.

Every model keeps the kernels that ``drs.training.fit`` runs for it. A step of all models is recorded once, each model
on a stream of its own between a fork and a join, and then replayed: the card starts the kernels itself, and small
kernels of different models overlap. What changes from step to step, the images and the learning rate, is looked up on
the card by a counter that the graph moves on, so that the host does nothing but replay. Where there is no card, the
same step is called in a loop.

Capture, the warm-up before it and Adam's ``capturable`` form follow
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from drs.benchmarks.packing import Pace, check_packable
from drs.checkpoints import build_model_of
from drs.config import OptimConfig, TrainConfig
from drs.data import LabelledImages
from drs.errors import UserError
from drs.losses import build_loss
from drs.optimisation import build_optimizer, build_schedule
from drs.training import check_labels

MODELS_PER_GRAPH = 32
"""Models whose steps are one graph; more of them are trained one group after another."""
STREAMS = 32
"""PyTorch has no more streams of one priority on a device, and gives out the same ones again after so many."""
WARM_UP_STEPS = 3
"""Steps before a capture: libraries choose kernels and allocate workspaces, which a capture does not allow."""


def fit_graphed(
    configs: Sequence[TrainConfig],
    training: LabelledImages,
    device: torch.device,
    *,
    models_per_graph: int = MODELS_PER_GRAPH,
    pace: Pace | None = None,
) -> list[nn.Module]:
    """Train a model for each config, several at a time, and return them in eval mode.

    Each is what ``drs.training.fit`` makes of its config but for rounding: the learning rate is a float32 on the
    device, and some of cuDNN's kernels for gradients sum in no fixed order. There is no validation, and a loss that is
    not finite does not stop the training. No model that passes ``check_graphable`` draws random numbers in a step. Sets
    the global seed of torch.

    Args:
        configs: As ``drs.benchmarks.packing.fit_packed`` takes them, without augmentation.
        training: All of them see it whole, each in its own order.
        device: Where the data are.
        models_per_graph: Models that are trained at a time, at least 1.
        pace: May end the training early; a step of a whole group counts as one.

    Raises:
        ValueError: For configs that cannot be trained so, naming the key and its value.
        UserError: For a label that is not a class of the config, or fewer images than a batch.
        TooSlow: If ``pace`` ends it.
    """
    check_graphable(configs)
    first = configs[0]
    check_labels(training, first.data)
    steps = len(training) // first.batch_size
    if steps == 0:
        raise UserError(f"batch_size={first.batch_size}: must be at most the {len(training)} samples")
    groups = [configs[start : start + models_per_graph] for start in range(0, len(configs), models_per_graph)]
    if pace is not None:
        pace.begin(len(groups) * first.epochs * steps)
    return [model for group in groups for model in _fit_group(group, training, device, pace)]


def check_graphable(configs: Sequence[TrainConfig]) -> None:
    """Raise ``ValueError`` unless ``fit_graphed`` can train these configs as ``drs.training.fit`` would."""
    check_packable(configs)
    augment = configs[0].data.augment
    if augment != "none":
        raise ValueError(f"data.augment={augment}: only data.augment=none is trained as a CUDA graph")


def _fit_group(
    configs: Sequence[TrainConfig], training: LabelledImages, device: torch.device, pace: Pace | None
) -> list[nn.Module]:
    """Train the models of one graph, all at once."""
    first = configs[0]
    group = Group(configs, training, device)
    step = captured(group) if device.type == "cuda" else group.step
    rates = learning_rates(first.optim, first.epochs * group.steps).view(first.epochs, group.steps)
    generators = [torch.Generator().manual_seed(config.seed) for config in configs]
    for epoch in range(first.epochs):
        # As ``drs.data.iterate_batches`` draws them.
        orders = torch.stack([torch.randperm(len(training), generator=generator) for generator in generators])
        group.begin_epoch(orders, rates[epoch])
        for _ in range(group.steps):
            step()
            if pace is not None:
                pace.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the graph goes with this function, and its memory with it
    for learner in group.learners:
        learner.optimizer.zero_grad(set_to_none=True)  # the gradients lie in the graph's memory
    return [learner.model.eval() for learner in group.learners]


def learning_rates(config: OptimConfig, total_steps: int) -> Tensor:
    """Return the learning rate of each step ``[total_steps]``, float32, as the schedule of a config gives them."""
    optimizer = build_optimizer(nn.ParameterList([nn.Parameter(torch.zeros(1))]), config)
    schedule = build_schedule(optimizer, config, total_steps)
    rates = torch.empty(total_steps)
    for step in range(total_steps):
        rates[step] = optimizer.param_groups[0]["lr"]
        optimizer.step()  # without gradients it does nothing; a schedule asks for it
        schedule.step()
    return rates


class Learner:
    """One model with its loss and its optimiser; all that a step changes stays at its place in memory.

    Args:
        config: Of the model; its seed decides the initial weights.
        rate: The learning rate ``[1]`` on the device, float32, which a step reads anew.
        device: Of the model.
    """

    def __init__(self, config: TrainConfig, rate: Tensor, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        model = build_model_of(config).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = model.train()
        self.initial = {name: value.clone() for name, value in self.model.state_dict().items()}
        options = {key: value for key, value in asdict(config.loss).items() if key != "name"}
        self.loss = build_loss(config.loss.name, **options)
        self.loss.validate = False  # as in ``fit``; a capture may not wait for the device
        self.optimizer = build_optimizer(self.model, config.optim)
        for settings in self.optimizer.param_groups:
            settings.update(lr=rate, capturable=device.type == "cuda")

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Take an optimisation step, in the operations of ``drs.training.fit``.

        Args:
            images: ``[B, C, H, W]`` float32 pixels.
            labels: ``[B]`` int64.
        """
        logits = self.model(images.contiguous(memory_format=torch.channels_last))
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.backpropagate(logits, labels)
        self.optimizer.step()

    def reset(self) -> None:
        """Go back to the initial weights and an optimiser that has taken no step, in the same memory."""
        self.model.load_state_dict(self.initial)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()


class Group:
    """The models of one graph, and what their steps read: orders, learning rates and a counter of steps.

    Args:
        configs: Of N models, alike as ``check_graphable`` asks.
        training: The images that all of them see.
        device: Where the images are.

    Attributes:
        steps: In an epoch.
        learners: N of them.
        orders: The indices of an epoch's batches, ``[N, steps, B]`` int64 on the device.
        rates: Its learning rates, ``[steps]`` float32 on the device.
        count: Steps of the epoch taken so far, ``[1]`` int64 on the device.
        rate: The learning rate of the step, ``[1]`` float32 on the device.
        streams: Those that the models take turns on; none but on a card.
    """

    def __init__(self, configs: Sequence[TrainConfig], training: LabelledImages, device: torch.device) -> None:
        batch_size = configs[0].batch_size
        self.training = training
        self.device = device
        self.steps = len(training) // batch_size
        self.orders = torch.zeros(len(configs), self.steps, batch_size, dtype=torch.int64, device=device)
        self.rates = torch.zeros(self.steps, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.rate = torch.zeros(1, device=device)
        self.learners = [Learner(config, self.rate, device) for config in configs]
        wanted = min(len(configs), STREAMS) if device.type == "cuda" else 0
        self.streams = [torch.cuda.Stream(device) for _ in range(wanted)]

    def begin_epoch(self, orders: Tensor, rates: Tensor) -> None:
        """Write what the steps of an epoch read.

        Args:
            orders: A permutation of the images for each model, ``[N, images]`` int64; a last short batch is left out.
            rates: ``[steps]``.
        """
        self.orders.copy_(orders[:, : self.orders[0].numel()].view_as(self.orders))
        self.rates.copy_(rates)
        self.count.zero_()

    def step(self) -> None:
        """Take the next step of every model; on a card, side by side."""
        torch.index_select(self.rates, 0, self.count, out=self.rate)
        indices = self.orders.index_select(1, self.count).squeeze(1)
        images, labels = self.training.pixels(indices), self.training.labels[indices]
        side_by_side([learner.step for learner in self.learners], images, labels, self.streams)
        self.count.add_(1)

    def reset(self) -> None:
        """Forget all steps, in the same memory."""
        for learner in self.learners:
            learner.reset()
        self.count.zero_()


def side_by_side(
    steps: Sequence[Callable[[Tensor, Tensor], None]],
    images: Tensor,
    labels: Tensor,
    streams: Sequence[torch.cuda.Stream],
) -> None:
    """Call each step with its images and labels on one of some streams, or in turn where there are none.

    All streams begin where the current one is, which then waits for all of them.

    Args:
        steps: N of them.
        images: ``[N, B, C, H, W]``.
        labels: ``[N, B]``.
        streams: The steps take turns on them.
    """
    if not streams:
        for step, pixels, classes in zip(steps, images, labels, strict=True):
            step(pixels, classes)
        return
    current = torch.cuda.current_stream(streams[0].device)
    # One event before any step: a stream of these may be the current one, and the others must not wait for its step.
    fork = current.record_event()
    for stream in streams:
        stream.wait_event(fork)
    for step, pixels, classes, stream in zip(steps, images, labels, itertools.cycle(streams), strict=False):
        with torch.cuda.stream(stream):
            step(pixels, classes)
    for stream in streams:
        current.wait_stream(stream)


def captured(group: Group) -> Callable[[], None]:
    """Return what replays a step of a group as a CUDA graph; the group is as if it had taken none.

    The warm-up runs on the streams of the capture: what autograd and the libraries keep for a stream is then there.

    Raises:
        RuntimeError: If the step cannot be captured.
    """
    before, main = torch.cuda.current_stream(group.device), torch.cuda.Stream(group.device)
    main.wait_stream(before)
    with torch.cuda.stream(main):
        for _ in range(WARM_UP_STEPS):
            group.count.zero_()  # an epoch may have fewer steps
            group.step()
        group.reset()
    before.wait_stream(main)
    graph = torch.cuda.CUDAGraph()
    try:
        # A capture that fails leaves its stream the current one; the outer context goes back.
        with torch.cuda.stream(before), torch.cuda.graph(graph, stream=main):
            group.step()
    except RuntimeError as error:
        # The end of a capture that failed raises as well; what came first says why.
        raise RuntimeError(f"a step cannot be captured: {error.__context__ or error}") from error
    return graph.replay
