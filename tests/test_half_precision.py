"""Searches in float16: gradients keep their sizes, and what does not fit into float16 is searched in float32."""

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from test_attacks import PGD, linear_problem
from torch import Tensor, nn

from drs.attack_config import (
    APGDConfig,
    FGSMConfig,
    NoiseConfig,
    ProjectedConfig,
    SquareConfig,
    TargetedAPGDConfig,
)
from drs.attacks import build_attack, run_attack, running
from drs.attacks import stand_in as stand_in_module
from drs.attacks.half_precision import LARGEST_SCALE, HalfPrecision, in_half_precision, without_gradient
from drs.attacks.isolation import tensor_cores
from drs.attacks.stand_in import is_nearly_fooled, stand_in
from drs.errors import UserError
from drs.models import build_model

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
MARGIN = ProjectedConfig("projected", "linf", steps=10, objectives=["margin"], restarts=1)


@pytest.fixture
def half_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in_module, "HALF_PRECISION_ON", ("cpu",))


@functools.cache
def _trained() -> tuple[nn.Module, Tensor]:
    """A small network with batch norm that has learnt the digits, and images of them that it was not shown."""
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    torch.manual_seed(0)
    model = build_model("smallcnn", num_classes=10, channels=1, size=8, mean=[0.3], std=[0.4], width=8)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(150):
        part = torch.arange(100) + 100 * (step % 12)
        optimiser.zero_grad()
        F.cross_entropy(model(images[part]), labels[part]).backward()
        optimiser.step()
    return model.eval().requires_grad_(False), images[1200:]


def balanced(device: str = "cpu", n: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with batch norm that has learnt something, images, and its predictions as labels."""
    model, images = _trained()
    model, images = copy.deepcopy(model).to(device), images[:n].to(device)
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


def gradient(model: nn.Module, images: Tensor, labels: Tensor, size: Tensor) -> Tensor:
    """Of cross-entropy, of each image times a size ``[B]``."""
    asked = images.clone().requires_grad_()
    value = (F.cross_entropy(model(asked).float(), labels, reduction="none") * size).sum()
    return torch.autograd.grad(value, asked)[0].flatten(1)


def test_gradients_keep_their_directions_and_sizes_where_float16_has_none_so_small() -> None:
    model, images, labels = balanced()
    size = torch.logspace(-20, 3, len(images))
    expected = gradient(model, images, labels, size)
    half = in_half_precision(model, images[:7])
    assert half is not None
    found = gradient(half, images, labels, size)
    assert found.dtype == torch.float32 and found.is_contiguous()
    length = torch.linalg.vector_norm(expected.double(), dim=1)
    assert float(length.min()) < 1e-20
    assert float((torch.linalg.vector_norm(found.double() - expected, dim=1) / length).max()) < 0.3
    with torch.autocast("cpu", torch.float16):
        plain = gradient(model, images, labels, size)
    assert not plain[0].any(), "without the scale there would be none"


def test_images_without_a_gradient_keep_none_and_one_that_is_not_finite_shows() -> None:
    model, images, labels = balanced()
    half = HalfPrecision(model, images)
    size = torch.ones(len(images))
    size[0], size[1] = 0.0, torch.inf
    found = gradient(half, images, labels, size)
    assert not found[0].any() and not torch.isfinite(found[1]).all() and torch.isfinite(found[2:]).all()


def test_one_pass_forward_serves_several_back() -> None:
    """As FAB asks for it."""
    model, images, _ = balanced()
    half = HalfPrecision(model, images)
    both = []
    for each in (model, half):
        asked = images.clone().requires_grad_()
        logits = each(asked)
        for place, size in ((0, 1e-6), (1, 1e3)):
            (found,) = torch.autograd.grad(logits[:, place].sum() * size, asked, retain_graph=True)
            both.append(found)
    for expected, found in zip(both[:2], both[2:], strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.1


def test_pixels_are_not_rounded_to_float16() -> None:
    """What normalises them, the first layer and the last are in float32; the layers between are not."""
    model, images, _ = balanced()
    half = HalfPrecision(model, images)
    inputs: list[tuple[str, torch.dtype, float]] = []

    def note(layer: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        inputs.append((type(layer).__name__, layer.weight.dtype, float((given[0] - given[0].half()).abs().max())))

    for module in half.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    assert half(images).dtype == torch.float32
    assert [(name, dtype) for name, dtype, _ in inputs] == [
        ("Conv2d", torch.float32), *[("Conv2d", torch.float16)] * 4, ("Linear", torch.float32),
    ]  # fmt: skip
    assert inputs[0][2] > 0 and not any(rounding for *_, rounding in inputs[1:])


Precisions = list[tuple[nn.Module, bool, bool]]


@pytest.fixture
def tf32_outside() -> Iterator[None]:
    """A caller that lets a card compute in TF32; a CPU has none, but keeps the switches."""
    with tensor_cores(True):
        yield


def note_tf32(model: nn.Module, noted: Precisions) -> None:
    """Note at every pass of a layer whether products and convolutions may be in TF32 there; copies note it too."""

    def note(layer: nn.Module, _: object) -> None:
        noted.append((layer, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(note)


def test_first_and_last_layer_have_no_tf32_whatever_the_caller_has(tf32_outside: None) -> None:
    model, images, _ = balanced()
    half = HalfPrecision(model, images)
    noted: Precisions = []
    note_tf32(half, noted)
    half(images)
    assert [switches for _, *switches in noted] == [[False, False], *[[True, True]] * 4, [False, False]]
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32, "as the caller had them"


def test_copy_is_compared_with_the_model_in_full_precision(tf32_outside: None) -> None:
    model, images, _ = balanced()
    noted: Precisions = []
    note_tf32(model, noted)
    assert in_half_precision(model, images[:7]) is not None
    of_model = [switches for layer, *switches in noted if layer in set(model.modules())]
    assert len(of_model) >= 12, "logits, and gradients"
    assert len(noted) > len(of_model), "the copy as well"
    assert not any(any(switches) for _, *switches in noted)
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32, "as the caller had them"


@pytest.mark.parametrize(("factor", "lower"), [(1e-2, False), (1.0, True)])
def test_scale_suits_the_gradients(factor: float, lower: bool) -> None:
    model, images, labels = balanced()
    model[1][-1].weight *= factor  # type: ignore[index, operator]
    half = in_half_precision(model, images[:7])
    assert half is not None and (half.scale < LARGEST_SCALE) == lower
    size = torch.ones(len(images))
    expected, found = gradient(model, images, labels, size), gradient(half, images, labels, size)
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_model_whose_gradients_vanish_in_float16_is_searched_in_float32(half_on_cpu: None) -> None:
    model, images, _ = balanced()
    model[1][-1].weight *= 1e-12  # type: ignore[index, operator]
    assert in_half_precision(model, images[:7]) is None
    found = stand_in(model, images)
    assert found is not model and not isinstance(found, HalfPrecision)


def test_model_whose_logits_float16_cannot_hold_is_searched_in_float32(half_on_cpu: None) -> None:
    model, images, _ = balanced()
    half = stand_in(model, images)
    assert isinstance(half, HalfPrecision)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in half.modules()), "it is folded as well"
    model[1][-1].weight *= 1e7  # type: ignore[index, operator]
    found = stand_in(model, images)
    assert found is not model and not isinstance(found, HalfPrecision)
    assert torch.isfinite(found(images)).all()


def test_model_without_batch_normalisation_is_halved_too_and_left_alone(half_on_cpu: None) -> None:
    model, images, _ = linear_problem(classes=3)
    found = stand_in(model, images)
    assert isinstance(found, HalfPrecision) and stand_in(model, images) is found
    assert model[1].weight.dtype == torch.float32 and model[1].weight.requires_grad  # type: ignore[index]


def test_on_a_cpu_copies_are_in_float32() -> None:
    model, images, _ = balanced()
    assert not isinstance(stand_in(model, images), HalfPrecision)


ATTACKS = {
    "fgsm": FGSMConfig("fgsm", "linf"),
    "pgd": replace(PGD, steps=10),
    "margin": MARGIN,
    "margin in L2": replace(MARGIN, norm="l2"),
    "apgd_ce": APGDConfig("apgd_ce", "linf", steps=20),
    "apgd_t": TargetedAPGDConfig("apgd_t", "linf", steps=20),
    "square": SquareConfig("square", "linf", n_queries=200),
    "noise": NoiseConfig("noise", "linf", draws=20),
}
EPSILONS = {"noise": 0.2, "margin in L2": 0.5}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_card)])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_find_in_float16_what_they_find_on_the_model(half_on_cpu: None, name: str, device: str) -> None:
    model, images, labels = balanced(device, n=300)
    attack, epsilon = build_attack(ATTACKS[name]), EPSILONS.get(name, 0.08)
    asked: list[int] = []
    watch = model.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0]) * inputs[0].requires_grad))
    found = run_attack(attack, model, images, labels, epsilon=epsilon, fast_search=True)
    watch.remove()
    assert isinstance(stand_in(model, images), HalfPrecision)
    assert max(asked) <= 15, "few are attacked again on the model"
    expected = run_attack(attack, model, images, labels, epsilon=epsilon)
    half, strict = (outcome.logits.argmax(dim=1) != labels.cpu() for outcome in (found, expected))
    assert int(strict.sum()) in range(50, 250)
    # The two draw the same starts, but what is at the edge may fall to one of them and not to the other.
    assert int((strict & ~half).sum()) <= 4 and int((half & ~strict).sum()) <= 5


def test_offset_of_all_logits_costs_no_strength(half_on_cpu: None) -> None:
    """In float16 logits of 3000 are two apart; margins of them would all be ties."""
    model, images, labels = balanced(n=300)
    attack = build_attack(ATTACKS["square"])
    expected = run_attack(attack, model, images, labels, epsilon=0.08)
    model[1][-1].bias += 3000  # type: ignore[index, operator]
    assert isinstance(stand_in(model, images), HalfPrecision)
    found = run_attack(attack, model, images, labels, epsilon=0.08, fast_search=True)
    fooled = [int((outcome.logits.argmax(dim=1) != labels).sum()) for outcome in (expected, found)]
    assert abs(fooled[0] - fooled[1]) <= 3


def test_images_without_a_gradient_in_float16_are_attacked_on_the_model(half_on_cpu: None) -> None:
    """A saturating layer rounds to where it is flat."""
    model, images, _ = balanced(n=100)
    saturated = nn.Sequential(model, nn.Linear(10, 1), nn.Tanh(), nn.Linear(1, 2)).eval().requires_grad_(False)
    with torch.no_grad():
        saturated[1].weight.copy_(torch.tensor([[1.0] * 5 + [-1.0] * 5]))
        saturated[1].bias.zero_()
        largest = saturated[:2](images).abs().max()
        saturated[1].weight *= 8 / largest  # tanh is 1 in float16 from 4.5 on, in float32 from 9 on
        saturated[3].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        saturated[3].bias.zero_()
        labels = saturated(images).argmax(dim=1)
    half = HalfPrecision(saturated, images)
    flat = without_gradient(half, images)
    assert not without_gradient(saturated, images).any()
    assert int(flat.sum()) in range(1, 100)
    attack = build_attack(replace(MARGIN, steps=20))
    asked: list[int] = []
    watch = saturated.register_forward_pre_hook(lambda _, given: asked.append(len(given[0]) * given[0].requires_grad))
    stand_in_module._known[saturated] = half  # as if none of the images that it was compared on were flat
    found = run_attack(attack, saturated, images, labels, epsilon=0.1, fast_search=True)
    watch.remove()
    expected = run_attack(attack, saturated, images, labels, epsilon=0.1)
    fooled = [outcome.logits.argmax(dim=1) != labels for outcome in (found, expected)]
    assert int((fooled[1] & ~fooled[0]).sum()) <= 1
    assert max(asked) >= int((flat & ~fooled[0]).sum()) > 0


class Overflowing(nn.Module):
    """A model in float16 that has no number for some of what it is asked: images that are not the clean ones, say."""

    def __init__(self, model: nn.Module, clean: Tensor, where: str) -> None:
        super().__init__()
        self.model, self.clean, self.where = model, clean, where

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        moved = (images.detach() - self.clean[: len(images)]).flatten(1).abs().amax(dim=1) > 0
        broken = torch.where(moved, torch.inf, 1.0).unsqueeze(1)
        if self.where == "logits":
            return logits * broken
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * broken)
        return logits


@pytest.mark.parametrize("where", ["logits", "gradients"])
def test_what_does_not_fit_on_the_way_is_searched_on_the_model(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    model, images, labels = linear_problem(classes=3)
    monkeypatch.setattr(running, "stand_in", lambda *_: Overflowing(copy.deepcopy(model), images, where).eval())
    attack = build_attack(MARGIN)
    found, expected = (
        run_attack(attack, model, images, labels, epsilon=0.02, fast_search=fast) for fast in (True, False)
    )
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.distance, expected.distance)
    assert bool((found.logits.argmax(dim=1) != labels).any())


def test_model_that_is_broken_itself_is_still_refused(half_on_cpu: None) -> None:
    model, images, labels = linear_problem(classes=3)
    broken = Overflowing(model, images, "gradients").eval()
    with pytest.raises(UserError, match="the model's gradient is not finite"):
        run_attack(build_attack(MARGIN), broken, images, labels, epsilon=0.02, fast_search=True)


def test_nearly_fooled_is_what_rounding_can_reach_or_what_is_no_number() -> None:
    labels = torch.zeros(5, dtype=torch.int64)
    model = torch.tensor([[1.0, 0, -1], [1, 0.997, -1], [1, 0.97, -1], [1, 0, -1], [1, 0.9, -1]])
    copied = model.clone()
    assert is_nearly_fooled(copied, model, labels).tolist() == [False, True, False, False, False]
    copied[0, 1] += 0.02  # a hundredth of the range, so that two of them count
    copied[3, 0] = torch.inf
    copied[4, 1] = 1.0001
    assert is_nearly_fooled(copied, model, labels).tolist() == [False, True, True, True, True]


def test_copy_whose_margins_are_off_is_refused_however_large_an_offset_of_all_logits() -> None:
    model, images, _ = balanced()
    model[1][-1].bias += 3000  # type: ignore[index, operator]
    wrong = copy.deepcopy(model)
    assert stand_in_module._agree(model, wrong, images, 7)
    wrong[1][-1].bias[0] += 5  # type: ignore[index, operator]
    assert not stand_in_module._agree(model, HalfPrecision(wrong, images), images, 7)
