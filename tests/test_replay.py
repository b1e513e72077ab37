"""Recorded passes answer as the model does, whatever an attack asks of them and in which order."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from drs.attack_config import APGDConfig, FMNConfig, ProjectedConfig, SquareConfig
from drs.attacks import build_attack, replay, run_attack
from drs.attacks.replay import KEPT, PATIENCE, SIZES, Replayed, original, replayed

Record = Callable[[nn.Module, Tensor, int, bool], "Buffered"]


class Buffered:
    """A recording as a card has it, but for the card: passes over the same memory, the way back as often as asked."""

    made: list[tuple[int, bool]] = []

    def __init__(self, model: nn.Module, images: Tensor, size: int, backwards: bool) -> None:
        self.model, self.backwards = model, backwards
        self.images = images.new_zeros((size, *images.shape[1:]))
        self.made.append((size, backwards))

    def logits(self, images: Tensor) -> Tensor:
        self.count = len(images)
        self.images[: self.count] = images.detach()
        with torch.set_grad_enabled(self.backwards):
            self.asked = self.images.clone().requires_grad_(self.backwards)
            self.outputs = self.model(self.asked)
        return self.outputs[: self.count].detach().clone()

    def gradient(self, upstream: Tensor) -> Tensor:
        padded = torch.zeros_like(self.outputs)
        padded[: self.count] = upstream
        (found,) = torch.autograd.grad(self.outputs, self.asked, padded, retain_graph=True)
        return found[: self.count].clone()


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)
    return nn.Sequential(*layers).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def nothing_made() -> None:
    Buffered.made = []


def _images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def _gradient(model: nn.Module, images: Tensor, upstream: Tensor) -> Tensor:
    asked = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(asked), asked, upstream)
    return gradient


def _often(model: nn.Module, images: Tensor) -> None:
    for _ in range(PATIENCE):
        model(images)


def test_what_recurs_is_recorded_and_answers_as_the_model_does(network: nn.Module) -> None:
    model = Replayed(network, Buffered)
    for number in range(PATIENCE + 3):
        images, upstream = _images(10 + number % 3, number), torch.randn(10 + number % 3, 5)
        torch.testing.assert_close(model(images), network(images))
        torch.testing.assert_close(_gradient(model, images, upstream), _gradient(network, images, upstream))
        assert len(Buffered.made) == (0 if number < PATIENCE - 1 else 2)
    assert set(Buffered.made) == {(16, False), (16, True)}


def test_batches_too_large_or_empty_are_left_to_the_model(network: nn.Module) -> None:
    model = Replayed(network, Buffered)
    for images in (_images(SIZES[-1] + 1), _images(0)):
        _often(model, images)
        torch.testing.assert_close(model(images), network(images))
    assert Buffered.made == []


def test_way_back_is_of_its_own_pass_whatever_came_between(network: nn.Module) -> None:
    model = Replayed(network, Buffered)
    images = [_images(7, seed).requires_grad_() for seed in range(2)]
    _often(model, images[0])
    first, second = model(images[0]), model(images[1])
    upstream = torch.randn(7, 5)
    for logits, asked in ((first, images[0]), (second, images[1]), (first, images[0])):
        (gradient,) = torch.autograd.grad(logits, asked, upstream, retain_graph=True)
        torch.testing.assert_close(gradient, _gradient(network, asked.detach(), upstream))


def test_smaller_batch_after_a_larger_one_has_nothing_of_it(network: nn.Module) -> None:
    model = Replayed(network, Buffered)
    _gradient_often = [_gradient(model, _images(8), torch.ones(8, 5)) for _ in range(PATIENCE)]
    assert len(_gradient_often) == PATIENCE and Buffered.made == [(8, True)]
    upstream = torch.randn(6, 5)
    found = _gradient(model, _images(6, 1), upstream)
    torch.testing.assert_close(found, _gradient(network, _images(6, 1), upstream))


class _Refusing(Buffered):
    def __init__(self, *arguments: object) -> None:
        Buffered.made.append((0, False))
        raise torch.OutOfMemoryError("no room for a recording")


class _Shifted(Buffered):
    def logits(self, images: Tensor) -> Tensor:
        return super().logits(images).roll(1, dims=1)


class _OnceOnly(Buffered):
    asked_before = False

    def gradient(self, upstream: Tensor) -> Tensor:
        again, self.asked_before = self.asked_before, True
        return super().gradient(upstream) * (0.0 if again else 1.0)


@pytest.mark.parametrize("record", [_Refusing, _Shifted, _OnceOnly])
def test_model_that_cannot_be_recorded_is_called_as_it_is(network: nn.Module, record: Record) -> None:
    model = Replayed(network, record)
    for seed in range(2 * PATIENCE):
        upstream = torch.randn(5, 5)
        found = _gradient(model, _images(5, seed), upstream)
        torch.testing.assert_close(found, _gradient(network, _images(5, seed), upstream))
    assert model.off
    assert len(Buffered.made) == 1, "it is tried once"


def test_few_recordings_are_kept(network: nn.Module) -> None:
    model = Replayed(network, Buffered)
    for size in SIZES[: KEPT + 1]:
        _often(model, _images(size))
    assert len(model._slots) == KEPT
    _often(model, _images(SIZES[0]))
    assert [size for size, _ in Buffered.made] == [*SIZES[: KEPT + 1], SIZES[0]]


def test_precision_has_recordings_of_its_own(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Replayed(network, Buffered)
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        _often(model, _images(4))
    assert Buffered.made == [(4, False), (4, False)]


def test_parameters_are_the_models(network: nn.Module) -> None:
    model = Replayed(network, Buffered)
    assert [id(one) for one in model.parameters()] == [id(one) for one in network.parameters()]
    assert not model.training and original(model) is network and original(network) is network
    assert replayed(network, _images(1)) is network, "there is nothing to record on a CPU"


ATTACKS = [
    ProjectedConfig("projected", "linf", objectives=["margin"], steps=20),
    APGDConfig("apgd_ce", "linf", steps=20),
    SquareConfig("square", "linf", n_queries=60),
    FMNConfig("fmn", "l2", steps=20),
]


@pytest.mark.parametrize("config", ATTACKS, ids=lambda config: config.kind)
@pytest.mark.parametrize("fast", [False, True])
def test_attack_finds_the_same_by_replayed_passes(
    network: nn.Module, config: object, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "REPLAYED_ON", ("cpu",))
    monkeypatch.setattr(replay, "CudaRecording", Buffered)
    images = _images(40)
    labels = network(images).argmax(dim=1)
    outcomes = [
        run_attack(build_attack(config), network, images, labels, epsilon=0.05, replay=True, fast_search=on)
        for on in (False, fast)
    ]
    assert Buffered.made, "nothing was replayed"
    monkeypatch.setattr(replay, "REPLAYED_ON", ())
    plain = run_attack(build_attack(config), network, images, labels, epsilon=0.05)
    for outcome in outcomes:
        fallen = outcome.logits.argmax(dim=1) != labels
        assert (fallen != (plain.logits.argmax(dim=1) != labels)).sum() <= 1
        assert fallen.any()
        torch.testing.assert_close(outcome.distance.mean(), plain.distance.mean(), rtol=0.04, atol=1e-3)


def test_attack_goes_on_where_a_replay_fails(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    class _Breaking(Buffered):
        passes = 0

        def logits(self, images: Tensor) -> Tensor:
            self.passes += 1
            if self.passes > 3:
                raise RuntimeError("a replay failed")
            return super().logits(images)

    monkeypatch.setattr(replay, "REPLAYED_ON", ("cpu",))
    monkeypatch.setattr(replay, "CudaRecording", _Breaking)
    images = _images(40)
    labels = network(images).argmax(dim=1)
    attack = build_attack(ATTACKS[0])
    found = run_attack(attack, network, images, labels, epsilon=0.05, replay=True)
    assert len(_Breaking.made) == 1
    monkeypatch.setattr(replay, "REPLAYED_ON", ())
    plain = run_attack(attack, network, images, labels, epsilon=0.05)
    assert torch.equal(found.logits, plain.logits)
