"""Models trained side by side in a CUDA graph against models trained alone; but for one test, without a card."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import compose_train
from test_bench_sweeps import enlarged, two, weights_of

from drs.benchmarks import graphs
from drs.benchmarks.graphs import STREAMS, Group, captured, fit_graphed, learning_rates, side_by_side
from drs.data import LabelledImages
from drs.errors import UserError
from drs.optimisation import build_optimizer, build_schedule
from drs.training import fit

CPU = torch.device("cpu")


@pytest.fixture
def few(digits: tuple[LabelledImages, LabelledImages, LabelledImages]) -> LabelledImages:
    """Four batches of the digits and a few more, which an epoch leaves out."""
    return digits[0].first(210)


@pytest.mark.parametrize("model", ["mlp", "lenet"])
@pytest.mark.parametrize("models_per_graph", [1, 2])
def test_models_trained_side_by_side_are_those_trained_alone(
    few: LabelledImages, model: str, models_per_graph: int
) -> None:
    configs = two(f"model={model}", "epochs=3")
    training = enlarged(configs, few) if model == "lenet" else few
    together = fit_graphed(configs, training, CPU, models_per_graph=models_per_graph)
    alone = [fit(config, training, training.first(0), CPU)[0] for config in configs]
    assert not any(module.training for model in together for module in model.modules())
    for one, other in zip(weights_of(together), weights_of(alone), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert one.grad is None and one.stride() == other.stride()


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_learning_rates_are_those_of_the_schedule(schedule: str) -> None:
    config = compose_train("optim=adam", f"optim.schedule={schedule}").optim
    optimizer = build_optimizer(torch.nn.Linear(1, 1), config)
    followed = build_schedule(optimizer, config, 9)
    for rate in learning_rates(config, 9).tolist():
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        followed.step()


def test_what_cannot_be_trained_side_by_side_is_named(few: LabelledImages) -> None:
    for overrides, message in (
        (["data.augment=crop"], "data.augment=crop: only data.augment=none is trained as a CUDA graph"),
        (["optim=sgd"], "optim.name=sgd: only optim.name=adam"),
        (["model=smallcnn"], "model.name=smallcnn: training changes the buffers"),
    ):
        with pytest.raises(ValueError) as error:
            fit_graphed([compose_train("data=digits", "model=mlp", "optim=adam", *overrides)], few, CPU)
        assert str(error.value).startswith(message)
    with pytest.raises(UserError, match="batch_size=50: must be at most the 40 samples"):
        fit_graphed(two("model=mlp"), few.first(40), CPU)
    configs = two("model=mlp")
    for config in configs:
        config.data.num_classes = 9
    with pytest.raises(UserError, match="digits has the label 9"):
        fit_graphed(configs, few, CPU)


class Stream:
    """A stream that notes down what it is asked to wait for."""

    current: "Stream"
    device = CPU

    def __init__(self, *_: Any) -> None:
        self.log: list[Any] = []

    def record_event(self) -> tuple["Stream", int]:
        """Return the stream, and how much it had done."""
        return self, len(self.log)

    def wait_event(self, event: tuple["Stream", int]) -> None:
        """Note down an event."""
        self.log.append(event)

    def wait_stream(self, other: "Stream") -> None:
        """Note down all that another stream has done."""
        self.log.append((other, len(other.log)))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> type[Stream]:
    """Puts streams that note down in the place of a card's."""

    @contextlib.contextmanager
    def use(stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        try:
            yield
        finally:
            Stream.current = before

    monkeypatch.setattr(Stream, "current", Stream(), raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream.current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return Stream


def test_streams_fork_from_the_current_one_and_join_it(streams: type[Stream]) -> None:
    main, sides = Stream.current, [Stream(), Stream()]
    main.log.append("gather")
    images, labels = torch.arange(3.0).view(3, 1), torch.arange(3).view(3, 1)

    def step(pixels: torch.Tensor, classes: torch.Tensor) -> None:
        Stream.current.log.append((float(pixels), int(classes)))

    side_by_side([step] * 3, images, labels, sides)  # type: ignore[arg-type]
    assert sides[0].log == [(main, 1), (0.0, 0), (2.0, 2)] and sides[1].log == [(main, 1), (1.0, 1)]
    assert main.log[1:] == [(sides[0], 3), (sides[1], 2)] and Stream.current is main
    side_by_side([step] * 2, images[:2], labels[:2], [main, sides[0]])  # type: ignore[arg-type]
    assert sides[0].log[-2:] == [(main, 3), (1.0, 1)]  # and waits for nothing that the current one does after the fork


class Graph:
    """A CUDA graph that is replayed by taking the step that its capture took."""

    step: Any

    def replay(self) -> None:
        """Take the step."""
        self.step()


def test_a_capture_begins_where_training_begins(
    few: LabelledImages, monkeypatch: pytest.MonkeyPatch, streams: type[Stream]
) -> None:
    configs = two("model=mlp", "batch_size=150")  # an epoch has a step, fewer than the warm-up
    group = Group(configs, few, CPU)
    group.streams = [Stream() for _ in configs]  # type: ignore[misc]
    group.rates.fill_(0.1)
    places = [weights.data_ptr() for weights in weights_of([learner.model for learner in group.learners])]
    taken: list[Stream] = []
    real = Group.step

    def step(self: Group) -> None:
        taken.append(Stream.current)
        real(self)

    @contextlib.contextmanager
    def capture(graph: Graph, *, stream: Stream) -> Iterator[None]:
        """Look at what is there to be captured; what is captured is not done."""
        assert int(group.count) == 0 and all(not state.any() for state in states(group))
        for learner, config in zip(group.learners, configs, strict=True):
            torch.manual_seed(config.seed)
            fresh = graphs.build_model_of(config)
            assert all(map(torch.equal, weights_of([learner.model]), weights_of([fresh])))
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            yield
        graph.step = group.step
        group.reset()

    def states(group: Group) -> list[torch.Tensor]:
        return [
            value
            for learner in group.learners
            for state in learner.optimizer.state.values()
            for value in state.values()
        ]

    monkeypatch.setattr(Group, "step", step)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    replay = captured(group)
    assert len(states(group)) == 3 * len(places)  # of each tensor: steps and two moments, kept for the replays
    assert len(taken) == graphs.WARM_UP_STEPS + 1 and len(set(taken)) == 1 and taken[0] is not Stream.current
    assert [weights.data_ptr() for weights in weights_of([learner.model for learner in group.learners])] == places
    assert Stream.current.log[-1] == (taken[0], len(taken[0].log) - 2)  # what follows waits for the warm-up
    replay()
    assert all(
        float(learner.optimizer.state[next(learner.model.parameters())]["step"]) == 1 for learner in group.learners
    )


def test_a_capture_that_fails_says_why(
    few: LabelledImages, monkeypatch: pytest.MonkeyPatch, streams: type[Stream]
) -> None:
    group, before = Group(two("model=mlp"), few, CPU), Stream.current

    class Capture:
        """A capture whose end fails where a step did, and leaves its stream the current one, as PyTorch's does."""

        def __init__(self, graph: Any, *, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            Stream.current = self.stream
            monkeypatch.setattr(group, "step", fail)

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    with pytest.raises(RuntimeError, match="a step cannot be captured: operation not permitted when stream is capt"):
        captured(group)
    assert Stream.current is before


class Steps:
    """A pace that counts."""

    total = taken = 0

    def begin(self, total: int) -> None:
        """Note down the steps to come."""
        self.total = total

    def step(self) -> None:
        """Count a step."""
        self.taken += 1


@pytest.mark.parametrize("models_per_graph", [1, 2])
def test_a_pace_is_told_of_all_steps(few: LabelledImages, models_per_graph: int) -> None:
    pace = Steps()
    fit_graphed(two("model=mlp"), few, CPU, models_per_graph=models_per_graph, pace=pace)  # type: ignore[arg-type]
    assert pace.total == pace.taken == 2 * 4 * (2 // models_per_graph)  # epochs, steps and groups


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_graph_on_a_card_trains_the_same_models(few: LabelledImages) -> None:
    cuda = torch.device("cuda")
    configs = two("model=lenet", "epochs=3")
    training = enlarged(configs, few)
    training = LabelledImages(training.images.to(cuda), training.labels.to(cuda))
    for models_per_graph in (1, 2):
        graphed = fit_graphed(configs, training, cuda, models_per_graph=models_per_graph)
        alone = [fit(config, training, training.first(0), cuda)[0] for config in configs]
        for one, other in zip(weights_of(graphed), weights_of(alone), strict=True):
            # A gradient near 0 whose sign rounding decides moves a weight by up to the learning rate, step by step.
            apart = (one - other).abs()
            assert apart.max() < 2e-2 and (apart > 1e-3).float().mean() < 0.02
    many = [config for config in configs for _ in range(STREAMS)]
    graphed = fit_graphed(many, training, cuda, models_per_graph=len(many))  # more models than there are streams
    for which, config in enumerate(configs):
        plain = fit(config, training, training.first(0), cuda)[0]
        for model in graphed[which * STREAMS : (which + 1) * STREAMS]:
            for one, other in zip(weights_of([model]), weights_of([plain]), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)
