"""The own gradient attacks against a linear classifier, whose minimal perturbations are known, and a planted mask."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_attacks import linear_problem, minimal_norms, standing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drs.attack_config import NoiseConfig, PGDConfig, ProjectedConfig, TransferConfig
from drs.attacks import build_attack, climbing, run_attack
from drs.attacks.climbing import climb, project, random_start, room_for
from drs.attacks.objectives import FAMILIES, Objective, logit_scale, margin
from drs.data import LabelledImages
from drs.losses import LOSSES, build_loss

Digits = tuple[LabelledImages, LabelledImages, LabelledImages]
Room = Callable[[int, str], int]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", list(FAMILIES))
@pytest.mark.parametrize("classes", [2, 5])
def test_every_objective_flips_a_linear_classifier_just_where_the_distance_says(
    norm: str, objective: str, classes: int
) -> None:
    """With more than two classes only a search over targets is sure to find the nearest boundary."""
    model, images, labels = linear_problem(classes=classes)
    distances = minimal_norms(model, images, labels, norm)
    attack = build_attack(ProjectedConfig("projected", norm, objectives=[objective], steps=40, restarts=1))
    for epsilon in distances.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist():
        expected = distances > epsilon
        undecided = (distances - epsilon).abs() < 1e-2 * epsilon
        found = standing(attack, model, images, labels, epsilon)
        assert found[expected & ~undecided].all(), "nothing falls inside its distance to the boundary"
        if classes == 2 or objective == "targeted_margin":
            assert torch.equal(found[~undecided], expected[~undecided])
        else:
            assert (found & ~expected).float().mean() < 0.2


def test_projection_keeps_the_ball_and_the_pixel_range() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 4, 4, generator=generator)
    moved = images + torch.randn(20, 1, 4, 4, generator=generator)
    linf = project(images, moved, 0.1, "linf")
    l2 = project(images, moved, 0.3, "l2")
    assert (linf - images).abs().max() <= 0.1 + 1e-6
    assert torch.linalg.vector_norm((l2 - images).flatten(1), dim=1).max() <= 0.3 + 1e-6
    assert min(linf.min(), l2.min()) >= 0 and max(linf.max(), l2.max()) <= 1
    inside = images.clamp(0.3, 0.7)
    assert torch.equal(project(inside, inside + 0.01, 1.0, "l2"), inside + 0.01)
    start = random_start(images, 0.2, "l2")
    assert 0 < torch.linalg.vector_norm((start - images).flatten(1), dim=1).max() <= 0.2 + 1e-6


def test_margin_masks_the_label_by_infinity_so_that_negative_logits_count() -> None:
    logits = torch.tensor([[-1.0, -5.0, -3.0], [-1.0, -5.0, -3.0]])
    assert margin(logits, torch.tensor([0, 1])).tolist() == [-2.0, 4.0]


def test_logit_scale_is_the_inverse_spread_of_the_other_logits_and_never_saturates() -> None:
    logits = torch.tensor([[5.0, 1.0, 3.0], [1e4, -1e4, 1e4 - 1]])
    scale = logit_scale(logits, torch.tensor([0, 0]))
    assert scale[0].item() == pytest.approx(1.0)
    assert (scale[1] * 1.0).item() == pytest.approx(1 / torch.tensor([-1e4, 1e4 - 1]).std(unbiased=False).item())
    equal = logit_scale(torch.tensor([[1000.0, 0.0, 0.0]]), torch.tensor([0]))
    assert equal.item() == pytest.approx(20 / 1000)


class Band(nn.Module):
    """Misclassifies images whose mean lies in a narrow band, so that a wide step jumps out of it again."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1)
        inside = 0.02 - (mean - 0.55).abs()
        return torch.stack([torch.zeros_like(mean), 10 * inside], dim=1)


def test_the_best_iterate_is_kept_and_the_last_one_is_told() -> None:
    images, labels = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    (objective,) = FAMILIES["margin"](images, labels)
    best, fallen, last, _ = climb(
        Band(), images, labels, 0.5, objective, norm="linf", steps=1, relative_step_size=0.1, start=images,
        drop_fallen=False,
    )  # fmt: skip
    assert fallen.all() and last.all()
    assert (Band()(best).argmax(1) == 1).all()
    start = torch.full((3, 1, 4, 4), 0.551)
    _, fallen, last, _ = climb(
        Band(), images, labels, 0.5, lambda *given: -objective(*given), norm="linf", steps=2, relative_step_size=0.5,
        start=start, drop_fallen=False,
    )  # fmt: skip
    assert fallen.all() and not last.any()


def test_a_sample_that_has_fallen_is_not_moved_further() -> None:
    model, images, labels = linear_problem(classes=3)
    (objective,) = FAMILIES["margin"](images, labels)
    best, fallen, _, reached = climb(
        model, images, labels, 0.5, objective, norm="linf", steps=20, relative_step_size=0.05, start=images
    )
    kept, _, _, _ = climb(
        model, images, labels, 0.5, objective, norm="linf", steps=20, relative_step_size=0.05, start=images,
        drop_fallen=False,
    )  # fmt: skip
    assert fallen.all()
    torch.testing.assert_close(reached, margin(model(best), labels))
    assert (best - images).abs().amax() < (kept - images).abs().amax()


def test_margin_attack_breaks_a_model_whose_huge_logits_hide_the_gradient_of_cross_entropy(
    digits_model: nn.Module, digits: Digits
) -> None:
    class Scaled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.model(images) * 1e4
            return logits

    model = Scaled(digits_model).eval()
    images, labels = digits[2].pixels()[:100], digits[2].labels[:100]
    weak = standing(build_attack(PGDConfig("pgd", "linf")), model, images, labels, 0.3).float().mean()
    assert weak > 0.5, "the mask is not there"
    for objective in ("margin", "targeted_margin", "scaled_ce"):
        attack = build_attack(ProjectedConfig("projected", "linf", objectives=[objective]))
        assert standing(attack, model, images, labels, 0.3).float().mean() < 0.05, objective


def test_transfer_crafts_on_the_source_and_is_judged_on_the_target(digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[2].pixels()[:100], digits[2].labels[:100]
    config = TransferConfig("transfer", "linf")
    direct = standing(build_attack(config, source=digits_model), digits_model, images, labels, 0.15)
    assert direct.float().mean() < 0.3
    assert all(parameter.requires_grad for parameter in digits_model.parameters()), "the source is left as it was"
    blind = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    useless = standing(build_attack(config, source=blind), digits_model, images, labels, 0.15)
    assert useless.float().mean() > direct.float().mean() + 0.2
    with pytest.raises(ValueError, match="needs the model"):
        build_attack(config)


def test_noise_is_weaker_than_gradients_and_stays_in_the_ball(digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[2].pixels()[:100], digits[2].labels[:100]
    noise = run_attack(build_attack(NoiseConfig("noise", "linf")), digits_model, images, labels, epsilon=0.15)
    pgd = standing(build_attack(PGDConfig("pgd", "linf")), digits_model, images, labels, 0.15)
    assert (noise.logits.argmax(1) == labels).float().mean() > pgd.float().mean() + 0.1
    assert noise.distance.max() <= 0.15 + 1e-6


def test_results_repeat_and_leave_the_generators_alone(digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[2].pixels()[:60], digits[2].labels[:60]
    attack = build_attack(ProjectedConfig("projected", "linf", objectives=["margin"], restarts=3, steps=10))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run_attack(attack, digits_model, images, labels, epsilon=0.1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = run_attack(attack, digits_model, images, labels, epsilon=0.1)
    assert torch.equal(first.logits, second.logits)


def test_first_restart_starts_at_the_clean_image_unless_it_is_to_start_at_random() -> None:
    model, images, labels = linear_problem(classes=3)
    found = {}
    for at_random in (False, True):
        config = ProjectedConfig("projected", "linf", objectives=["margin"], steps=2, random_start=at_random)
        outcomes = [run_attack(build_attack(config), model, images, labels, epsilon=0.01, seed=seed) for seed in (0, 1)]
        found[at_random] = torch.equal(outcomes[0].logits, outcomes[1].logits)
    assert found == {False: True, True: False}


def test_every_loss_names_objectives_that_exist() -> None:
    for name, loss in LOSSES.items():
        assert loss.adaptive_objectives and set(loss.adaptive_objectives) <= set(FAMILIES), name
    assert {"targeted_margin", "scaled_ce"} <= set(LOSSES["dr_softmax"].adaptive_objectives)
    assert build_loss("ce").adaptive_objectives != build_loss("dr_softmax").adaptive_objectives
    with pytest.raises(ValueError, match="objective"):
        build_attack(ProjectedConfig("projected", "linf"))


def test_scaled_cross_entropy_finds_the_runner_up_where_the_others_are_even() -> None:
    """All but the runner-up have the same logit: the plain gradient is spread over nine classes."""
    logits = torch.zeros(1, 10, dtype=torch.float64)
    logits[0, 0], logits[0, 1] = 8.0, 0.01
    labels = torch.tensor([0])
    shares = {}
    for name in ("ce", "scaled_ce"):
        moved = logits.clone().requires_grad_(True)
        (objective,) = FAMILIES[name](logits, labels)
        (slope,) = torch.autograd.grad(objective(moved, labels, torch.tensor([0])).sum(), moved)
        shares[name] = float(slope[0, 1] / slope[0, 1:].sum())
    assert shares["ce"] == pytest.approx(math.exp(0.01) / (8 + math.exp(0.01)))
    assert shares["scaled_ce"] > shares["ce"]


class Shadowed(nn.Module):
    """Three pixels, three classes; class 2 is always just below class 1."""

    def forward(self, images: Tensor) -> Tensor:
        first, second, _ = (10 * images.flatten(1)).unbind(1)
        return torch.stack([first, second, second - 0.01], dim=1)


def test_every_target_is_the_samples_own_after_others_have_fallen() -> None:
    """The first sample falls to its first target; the second one only to its second, which the first does not have."""
    images = torch.tensor([[0.5, 0.49, 0.5], [0.45, 0.47, 0.5]]).view(2, 1, 1, 3)
    attack = build_attack(ProjectedConfig("projected", "linf", objectives=["targeted_margin"], steps=20))
    assert not standing(attack, Shadowed().eval(), images, torch.tensor([0, 1]), 0.02).any()


def plain_climb(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    objective: Objective,
    norm: str,
    steps: int,
    start: Tensor,
    dropping: bool,
) -> tuple[list[Tensor], list[float], list[bool]]:
    """Climb sample by sample, all in one batch at every step: best iterates, their margins, whether the last fell."""
    best, best_margin, last = list(start), [-math.inf] * len(images), [False] * len(images)
    ended = [False] * len(images)
    current = start
    for step in range(steps + 1):
        current = current.detach().clone().requires_grad_(True)
        logits = model(current)
        for i, (row, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
            if ended[i]:
                continue
            reached = max(value for k, value in enumerate(row) if k != label) - row[label]
            last[i] = row.index(max(row)) != label
            if last[i] and reached == 0:
                reached = torch.finfo(torch.float32).tiny
            if reached > best_margin[i]:
                best[i], best_margin[i] = current[i].detach(), reached
            ended[i] = dropping and last[i]
        (gradient,) = torch.autograd.grad(objective(logits, labels, torch.arange(len(images))).sum(), current)
        length = epsilon * 0.5 * 0.5 * (1 + math.cos(math.pi * step / steps))
        flat = gradient.flatten(1)
        unit = flat.sign() if norm == "linf" else F.normalize(flat, eps=1e-30)
        current = project(images, current.detach() + length * unit.view_as(images), epsilon, norm)
    return best, best_margin, last


def in_coarse_batches(standing: int, device_type: str) -> int:
    """Return a size in steps of seven, so that of what has fallen some stays."""
    return -(-standing // 7) * 7


@pytest.mark.parametrize("room", [room_for, in_coarse_batches])
@pytest.mark.parametrize("dropping", [True, False])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.004), ("l2", 0.02)])
@pytest.mark.parametrize("family", ["ce", "margin", "targeted_margin", "scaled_ce"])
def test_climb_does_what_a_plain_one_does(
    family: str, norm: str, epsilon: float, dropping: bool, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drs.attacks.climbing.room_for", room)
    model, images, labels = linear_problem(classes=5)
    objective = next(FAMILIES[family](model(images).detach(), labels))
    sizes = []
    torch.manual_seed(0)
    start = random_start(images, epsilon, norm)
    untouched = start.clone()
    watch = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    best, fallen, last, margins = climb(
        model, images, labels, epsilon, objective, norm=norm, steps=8, relative_step_size=0.5, start=start,
        drop_fallen=dropping,
    )  # fmt: skip
    watch.remove()
    expected, expected_margins, expected_last = plain_climb(
        model, images, labels, epsilon, objective, norm, 8, start, dropping
    )
    assert 0 < fallen.sum() < len(images), "nothing is told apart"
    torch.testing.assert_close(best, torch.stack(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(margins, torch.tensor(expected_margins), rtol=1e-4, atol=1e-4)
    assert fallen.tolist() == [value > 0 for value in expected_margins] and last.tolist() == expected_last
    assert torch.equal(start, untouched) and not best.requires_grad
    if dropping:
        assert len(set(sizes)) > 2 and all(size == len(images) or size == room(size, "cpu") for size in sizes)
    else:
        assert set(sizes) == {len(images)}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_card_what_has_fallen_leaves_a_step_later_and_nothing_else_changes(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, labels = linear_problem(classes=5)
    objective = next(FAMILIES["margin"](model(images).detach(), labels))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))

    def climbed() -> tuple[Tensor, ...]:
        sizes.clear()
        return climb(
            model, images, labels, {"linf": 0.004, "l2": 0.02}[norm], objective, norm=norm, steps=8,
            relative_step_size=0.5, start=images,
        )  # fmt: skip

    at_once, expected = climbed(), list(sizes)
    monkeypatch.setattr(climbing, "room_for", lambda standing, _: standing)
    monkeypatch.setattr(climbing, "_drops_at_once", lambda _: False)
    later = climbed()
    assert len(set(expected)) > 2 and sizes == [len(images), *expected[:-1]]
    for one, other in zip(later, at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    sizes.clear()
    _, fallen, _, _ = climb(
        model, images, labels, 1.0, objective, norm="linf", steps=8, relative_step_size=0.5, start=images
    )
    assert fallen.all() and len(sizes) < 9, "a climb ends once all have fallen"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.004), ("l2", 0.02)])
def test_a_climb_on_a_card_is_that_on_a_cpu(norm: str, epsilon: float) -> None:
    model, images, labels = linear_problem(classes=5)
    objective = next(FAMILIES["margin"](model(images).detach(), labels))
    found = [
        climb(
            model.to(device), images.to(device), labels.to(device), epsilon, objective, norm=norm, steps=8,
            relative_step_size=0.5, start=images.to(device),
        )
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=0, atol=1e-4)


def test_on_a_cpu_what_has_fallen_leaves_at_once_and_on_a_card_sizes_are_shared() -> None:
    assert [room_for(standing, "cpu") for standing in (1, 17, 9999)] == [1, 17, 9999]
    rooms = [room_for(standing, "cuda") for standing in range(1, 10_001)]
    assert all(standing <= room <= max(16, standing * 17 / 16 + 15) for standing, room in enumerate(rooms, start=1))
    assert rooms == sorted(rooms) and len(set(rooms)) < 120
    assert all(room_for(room, "cuda") == room for room in rooms)


class Waits(TorchDispatchMode):
    """Counts what must wait for a card: numbers asked for, positions of what is true, and masks as an index."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.positions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.numbers += name in ("_local_scalar_dense", "equal", "is_nonzero")
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        self.positions += masked or name in ("nonzero", "masked_select", "unique", "_unique2", "repeat_interleave")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dropping", [True, False])
def test_a_step_waits_for_the_device_once_at_most(norm: str, dropping: bool) -> None:
    model, images, labels = linear_problem(classes=5)
    (objective,) = FAMILIES["margin"](images, labels)
    asked = 0

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal asked
        asked += inputs[0].requires_grad

    watch = model.register_forward_pre_hook(count)
    with Waits() as waits:
        climb(
            model, images, labels, 0.002, objective, norm=norm, steps=6, relative_step_size=0.5, start=images,
            drop_fallen=dropping,
        )  # fmt: skip
    watch.remove()
    assert asked == 6 and waits.numbers == (6 if dropping else 0) and waits.positions == 0


@pytest.mark.parametrize("room", [room_for, in_coarse_batches, lambda standing, device_type: 100])
def test_what_has_fallen_keeps_its_iterate_while_it_is_still_in_the_batch(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ten lie in the band and would leave it at once; the others never come near."""
    monkeypatch.setattr("drs.attacks.climbing.room_for", room)
    start = torch.cat([torch.full((10, 1, 4, 4), 0.551), torch.full((10, 1, 4, 4), 0.3)])
    labels = torch.zeros(20, dtype=torch.int64)
    (objective,) = FAMILIES["margin"](start, labels)
    best, fallen, last, margins = climb(
        Band(), start, labels, 0.1, lambda *given: -objective(*given), norm="linf", steps=3, relative_step_size=0.5,
        start=start,
    )  # fmt: skip
    assert fallen.tolist() == last.tolist() == 10 * [True] + 10 * [False]
    assert torch.equal(best[:10], start[:10])
    torch.testing.assert_close(margins, margin(Band()(best), labels))


class Even(nn.Module):
    """Two equal logits for every image."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1)
        return torch.stack([mean, mean], dim=1)


@pytest.mark.parametrize("dropping", [True, False])
def test_a_tie_goes_to_the_lower_class_and_the_iterates_are_new_tensors(dropping: bool) -> None:
    images, labels = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1])
    (objective,) = FAMILIES["margin"](images, labels)
    for steps in (0, 2):
        best, fallen, last, margins = climb(
            Even(), images, labels, 0.1, objective, norm="linf", steps=steps, relative_step_size=0.5, start=images,
            drop_fallen=dropping,
        )  # fmt: skip
        assert fallen.tolist() == last.tolist() == [False, True] and margins[0] == 0 < margins[1]
        assert torch.equal(best, images) and best.data_ptr() != images.data_ptr()
