"""Every library attack against a second implementation, or against the exact distances of a linear classifier."""

import random
import warnings

import eagerpy
import foolbox
import numpy as np
import pytest
import torch
import torchattacks
from scipy.optimize import linprog
from test_attacks import linear_problem, minimal_norms, standing
from torch import nn
from torchattacks.attacks import fab

from drs.attack_config import (
    APGDConfig,
    AttackConfig,
    CWConfig,
    FMNConfig,
    FMNFromStartConfig,
    HopSkipJumpConfig,
    ProjectedConfig,
    SquareConfig,
    TargetedAPGDConfig,
    TargetedFABConfig,
)
from drs.attacks import build_attack, run_attack
from drs.attacks.autoattack import shortest_move_onto_plane
from drs.attacks.decision_based import QUERIES_AT_ONCE, RepeatedMisclassification, SamplewiseHopSkipJump
from drs.attacks.minimal_norm import settle
from drs.data import LabelledImages
from drs.errors import UserError

Digits = tuple[LabelledImages, LabelledImages, LabelledImages]
LIBRARY = {
    "apgd_ce": APGDConfig("apgd_ce", "linf", steps=20),
    "apgd_t": TargetedAPGDConfig("apgd_t", "linf", steps=20),
    "fab_t": TargetedFABConfig("fab_t", "linf", steps=20),
    "square": SquareConfig("square", "linf", n_queries=300),
    "fmn_linf": FMNConfig("fmn", "linf", steps=60),
    "fmn_l2": FMNConfig("fmn", "l2", steps=60),
    "fmn_from_start_linf": FMNFromStartConfig("fmn_from_start", "linf", steps=30),
    "fmn_from_start_l2": FMNFromStartConfig("fmn_from_start", "l2", steps=30),
    "cw": CWConfig("cw", "l2", binary_search_steps=2, steps=20),
    "hop_skip_jump": HopSkipJumpConfig("hop_skip_jump", "linf", steps=4),
}
EPSILON = 0.1


def robust_accuracy(config: AttackConfig, model: nn.Module, digits: Digits, n: int, epsilon: float = EPSILON) -> float:
    images, labels = digits[2].pixels()[:n], digits[2].labels[:n]
    outcome = run_attack(build_attack(config), model, images, labels, epsilon=epsilon)
    right = outcome.logits.argmax(1) == labels
    return float((right | (outcome.distance > epsilon + 1e-6)).float().mean())


@pytest.mark.parametrize("epsilon", [pytest.param(0.05, marks=pytest.mark.slow), 0.1])
def test_four_gradient_attacks_of_three_sources_agree_within_a_point(
    digits_model: nn.Module, digits: Digits, epsilon: float
) -> None:
    """APGD and targeted APGD (torchattacks), PGD with restarts (foolbox) and ours solve the same problem."""
    n = 300
    images, labels = digits[2].pixels()[:n], digits[2].labels[:n]
    second = foolbox.attacks.LinfProjectedGradientDescentAttack(rel_stepsize=0.05, steps=100, random_start=True)
    fallen = torch.zeros(n, dtype=torch.bool)
    torch.manual_seed(0)
    for _ in range(3):
        fallen |= second(foolbox.PyTorchModel(digits_model, bounds=(0, 1)), images, labels, epsilons=epsilon)[2]
    theirs = 1 - float(fallen.float().mean())
    assert 0.05 < theirs < 0.95, "an epsilon at which everything stands or falls compares nothing"
    for config in (
        APGDConfig("apgd_ce", "linf", steps=100),
        TargetedAPGDConfig("apgd_t", "linf", steps=50),
        TargetedFABConfig("fab_t", "linf", steps=50),
        ProjectedConfig("projected", "linf", objectives=["targeted_margin"], steps=50),
    ):
        assert abs(robust_accuracy(config, digits_model, digits, n, epsilon) - theirs) <= 0.01 + 1e-9, config.kind


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_minimal_norms_are_those_of_a_linear_classifier(norm: str) -> None:
    model, images, labels = linear_problem(classes=4)
    distances = minimal_norms(model, images, labels, norm)
    outcome = run_attack(build_attack(FMNConfig("fmn", norm, steps=500)), model, images, labels)
    assert (outcome.logits.argmax(1) != labels).all()
    ratio = outcome.distance / distances
    assert ratio.min() > 0.999
    assert ratio.median() < 1.05


@pytest.mark.parametrize(("norm", "classes"), [("linf", 4), ("l2", 4), ("linf", 2)])
def test_fab_flips_a_linear_classifier_just_where_the_distance_says(norm: str, classes: int) -> None:
    model, images, labels = linear_problem(classes=classes)
    distances = minimal_norms(model, images, labels, norm)
    attack = build_attack(TargetedFABConfig("fab_t", norm, steps=30))
    for epsilon in distances.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist():
        undecided = (distances - epsilon).abs() < 1e-2 * epsilon
        found = standing(attack, model, images, labels, epsilon)
        assert torch.equal(found[~undecided], (distances > epsilon)[~undecided])


def test_fmn_and_cw_find_similar_l2_norms_on_a_trained_model(digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[2].pixels()[:100], digits[2].labels[:100]
    norms = [
        run_attack(build_attack(config), digits_model, images, labels).distance.median()
        for config in (
            FMNConfig("fmn", "l2", steps=300),
            CWConfig("cw", "l2", binary_search_steps=9, steps=200, targets=1),
        )
    ]
    assert 0.95 < float(norms[0] / norms[1]) < 1.15


def test_search_without_gradients_is_never_stronger_than_with(digits_model: nn.Module, digits: Digits) -> None:
    white = robust_accuracy(
        ProjectedConfig("projected", "linf", objectives=["targeted_margin"]), digits_model, digits, 200
    )
    square = robust_accuracy(SquareConfig("square", "linf", n_queries=1000), digits_model, digits, 200)
    labels_only = robust_accuracy(HopSkipJumpConfig("hop_skip_jump", "linf", steps=15), digits_model, digits, 30)
    white_on_30 = robust_accuracy(
        ProjectedConfig("projected", "linf", objectives=["targeted_margin"]), digits_model, digits, 30
    )
    assert white - 0.01 <= square < white + 0.2
    assert white_on_30 - 0.01 <= labels_only < 0.95


def test_hop_skip_jump_asks_for_nothing_but_the_class(digits_model: nn.Module, digits: Digits) -> None:
    """A model that only ever returns one-hot rows scaled at random gives it all that it needs."""

    class Label(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = digits_model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 2.0 * nn.functional.one_hot(self.model(images).argmax(1), 10).float()

    images, labels = digits[2].pixels()[:10], digits[2].labels[:10]
    attack = build_attack(LIBRARY["hop_skip_jump"])
    plain = run_attack(attack, digits_model, images, labels).distance
    assert torch.equal(run_attack(attack, Label().eval(), images, labels).distance, plain)


@pytest.mark.parametrize("name", list(LIBRARY))
def test_attack_repeats_and_disturbs_nothing(name: str, digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[2].pixels()[:8], digits[2].labels[:8]
    attack = build_attack(LIBRARY[name])
    states = []
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr]
        outcomes.append(run_attack(attack, digits_model, images, labels, epsilon=EPSILON))
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        states.append(
            torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1]) and before[2] == after[2]
        )
    assert all(states), "a generator was disturbed"
    assert torch.equal(outcomes[0].logits, outcomes[1].logits), "the result depends on a global generator"
    assert not any(module.training for module in digits_model.modules())
    assert all(parameter.requires_grad for parameter in digits_model.parameters())


@pytest.mark.parametrize("name", list(LIBRARY))
@pytest.mark.parametrize("channels", [1, 3])
def test_attack_takes_channels_last_colour_and_single_images(name: str, channels: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    model = model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    images = torch.rand(3, channels, 8, 8).contiguous(memory_format=torch.channels_last)
    labels = model(images).argmax(1)
    attack = build_attack(LIBRARY[name])
    for count in (1, 3):
        outcome = run_attack(attack, model, images[:count], labels[:count], epsilon=0.2)
        assert outcome.logits.shape == (count, 5)


def test_hop_skip_jump_counts_a_sample_without_a_start_as_standing() -> None:
    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0, -1.0]]).repeat(len(images), 1)

    images, labels = torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    outcome = run_attack(build_attack(LIBRARY["hop_skip_jump"]), Constant().eval(), images, labels)
    assert (outcome.logits.argmax(1) == labels).all()
    assert (outcome.distance == 0).all()


def test_foolbox_still_needs_our_projection_in_l2() -> None:
    """When this fails, the library has been mended and ``ProjectingL2FMN`` can go."""
    model, images, labels = linear_problem(classes=2)
    distances = minimal_norms(model, images, labels, "l2")
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    found = foolbox.attacks.L2FMNAttack(steps=300)(wrapped, images, labels, epsilons=None)[1]
    norms = torch.linalg.vector_norm((found - images).flatten(1).double(), dim=1)
    assert (norms / distances).median() > 5


def test_minimum_norm_search_starts_again_from_another_image_where_it_found_nothing() -> None:
    """On a linear model the first search often stops just inside the boundary."""
    model, images, labels = linear_problem(classes=2)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    plain = foolbox.attacks.LInfFMNAttack(steps=300)(wrapped, images, labels, epsilons=None)[2]
    assert not plain.all(), "the search has nothing to repeat here"
    outcome = run_attack(build_attack(FMNConfig("fmn", "linf", steps=300)), model, images, labels)
    assert (outcome.logits.argmax(1) != labels).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_flips_two_classes_just_where_the_distance_says(norm: str) -> None:
    model, images, labels = linear_problem(classes=2)
    distances = minimal_norms(model, images, labels, norm)
    for epsilon in distances.quantile(torch.tensor([0.3, 0.7], dtype=torch.float64)).tolist():
        undecided = (distances - epsilon).abs() < 1e-2 * epsilon
        found = standing(build_attack(APGDConfig("apgd_ce", norm, steps=50)), model, images, labels, epsilon)
        assert torch.equal(found[~undecided], (distances > epsilon)[~undecided])


def test_targeted_apgd_is_refused_in_l2() -> None:
    with pytest.raises(UserError, match="norm=l2: APGD-T .* is an attack in linf"):
        build_attack(TargetedAPGDConfig("apgd_t", "l2"))


@pytest.mark.parametrize(
    "config", [TargetedFABConfig("fab_t", "linf", steps=20), FMNConfig("fmn", "linf", steps=60)], ids=["fab_t", "fmn"]
)
def test_batch_size_does_not_change_attacks_without_randomness(
    config: AttackConfig, digits_model: nn.Module, digits: Digits
) -> None:
    images, labels = digits[2].pixels()[:30], digits[2].labels[:30]
    whole, parts = (
        run_attack(build_attack(config), digits_model, images, labels, epsilon=EPSILON, batch_size=size).distance
        for size in (30, 7)
    )
    assert float(whole.median()) > 0
    torch.testing.assert_close(whole, parts, rtol=1e-2, atol=1e-5)


def test_hop_skip_jump_steps_in_l2_do_not_shrink_with_the_batch(digits_model: nn.Module, digits: Digits) -> None:
    """foolbox's own do: with it the ratio is above 1.2."""
    images, labels = digits[2].pixels()[:10], digits[2].labels[:10]
    attack = build_attack(HopSkipJumpConfig("hop_skip_jump", "l2", steps=3))
    together, alone = (
        run_attack(attack, digits_model, images, labels, batch_size=size).distance.median() for size in (10, 1)
    )
    assert float(together / alone) < 1.12


def estimates(
    attack: foolbox.attacks.HopSkipJumpAttack, model: nn.Module, points: torch.Tensor, labels: torch.Tensor, copies: int
) -> torch.Tensor:
    """Estimates of the gradient ``[B, C, H, W]`` with noise of radius 1/8 to B/8."""
    is_adversarial = foolbox.attacks.base.get_is_adversarial(
        RepeatedMisclassification(labels), foolbox.PyTorchModel(model, bounds=(0, 1))
    )
    torch.manual_seed(0)
    radius = torch.arange(1.0, len(points) + 1) / 8
    found: torch.Tensor = attack.approximate_gradients(
        is_adversarial, eagerpy.astensor(points), copies, eagerpy.astensor(radius)
    ).raw
    return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_hop_skip_jump_estimates_as_foolbox_does_for_a_single_image(
    norm: str, digits_model: nn.Module, digits: Digits
) -> None:
    images, labels = digits[2].pixels()[:6], digits[2].labels[:6]
    ours, theirs = (kind(constraint=norm) for kind in (SamplewiseHopSkipJump, foolbox.attacks.HopSkipJumpAttack))
    alone = []
    for place in range(6):
        pair = [estimates(attack, digits_model, images[[place]], labels[[place]], 600) for attack in (ours, theirs)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
        alone.append(pair[0])
    assert max(float((one - alone[0]).norm()) for one in alone) > 0.5, "each image has an estimate of its own"


def test_hop_skip_jump_puts_noise_of_its_radius_on_each_image_of_a_batch(
    digits_model: nn.Module, digits: Digits
) -> None:
    """foolbox's own is shorter by the square root of the batch size."""
    labels, points, asked = digits[2].labels[:2], torch.full((2, 1, 8, 8), 0.5), []
    for kind in (SamplewiseHopSkipJump, foolbox.attacks.HopSkipJumpAttack):
        seen: list[torch.Tensor] = []
        hook = digits_model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        # At these radii no pixel leaves [0,1].
        estimates(kind(constraint="l2"), digits_model, points, labels, 100)
        hook.remove()
        lengths = (torch.cat(seen) - 0.5).flatten(1).norm(dim=1).view(-1, 2)
        asked.append((lengths.median(dim=0).values / torch.tensor([1 / 8, 2 / 8])).tolist())
    assert asked[0] == pytest.approx([1, 1], abs=1e-4)
    assert asked[1] == pytest.approx([2**-0.5] * 2, rel=0.1)


def test_hop_skip_jump_asks_for_many_noisy_copies_at_a_time(digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[2].pixels()[:7], digits[2].labels[:7]
    seen: list[int] = []
    hook = digits_model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    found = estimates(SamplewiseHopSkipJump(constraint="linf"), digits_model, images, labels, 100)
    hook.remove()
    assert sum(seen) == 700 and max(seen) <= QUERIES_AT_ONCE and len(seen) == 2
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(7))


def test_hop_skip_jump_goes_on_with_smaller_batches_where_memory_runs_out(
    digits_model: nn.Module, digits: Digits
) -> None:
    """The estimate stays the same."""

    class Small(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) > 64:
                raise torch.cuda.OutOfMemoryError("too many images")
            logits: torch.Tensor = digits_model(images)
            return logits

    images, labels = digits[2].pixels()[:5], digits[2].labels[:5]
    attack = SamplewiseHopSkipJump(constraint="linf")
    whole, small = (estimates(attack, model, images, labels, 200) for model in (digits_model, Small().eval()))
    torch.testing.assert_close(whole, small)


@pytest.mark.parametrize("sides", ["all", "none"])
def test_hop_skip_jump_has_an_estimate_where_all_copies_are_on_one_side(sides: str, digits: Digits) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    labels = torch.full((4,), 0 if sides == "none" else 1)
    found = estimates(SamplewiseHopSkipJump(constraint="l2"), model, digits[2].pixels()[:4], labels, 50)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_hop_skip_jump_comes_near_the_minimal_norm_of_a_linear_classifier(norm: str) -> None:
    model, images, labels = linear_problem(classes=2, n=10)
    outcome = run_attack(build_attack(HopSkipJumpConfig("hop_skip_jump", norm, steps=10)), model, images, labels)
    assert (outcome.logits.argmax(1) != labels).all()
    ratio = outcome.distance / minimal_norms(model, images, labels, norm)
    assert ratio.min() > 0.999
    assert ratio.median() < 1.2


def test_hop_skip_jump_starts_from_another_image_where_all_noise_has_the_label() -> None:
    class Contrast(nn.Module):
        """Class 0 for bright images and for noise, whose mean is near 0.5; class 1 for dark ones."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            brightness = images.flatten(1).mean(1)
            return torch.stack([brightness, torch.full_like(brightness, 0.2)], 1)

    images = torch.cat([torch.full((2, 1, 8, 8), 0.3), torch.full((1, 1, 8, 8), 0.05)])
    attack = build_attack(LIBRARY["hop_skip_jump"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = run_attack(attack, Contrast().eval(), images, torch.tensor([0, 0, 1]))
    assert outcome.logits.argmax(1).tolist() == [1, 1, 0]
    assert ((outcome.distance[:2] > 0.0999) & (outcome.distance[:2] < 0.12)).all()


def test_settle_pushes_over_the_boundary_and_gives_up_what_was_not_found() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]]))
        model[1].bias.copy_(torch.tensor([-2.0, 2.0]))
    images = torch.full((3, 1, 2, 2), 0.75)
    moved = images.clone()
    moved[0] = 0.5  # On the boundary, where the tie goes to the label.
    moved[1] = 0.25
    moved[2] = 0.7
    result = settle(model, images, moved, torch.zeros(3, dtype=torch.long))
    assert model(result).argmax(1).tolist() == [1, 1, 0]
    assert 0.4999 < float(result[0].detach().min()) < 0.5
    assert torch.equal(result[1], moved[1])
    assert torch.equal(result[2], images[2])


def test_shortest_move_onto_a_plane_is_the_linear_programmes_and_the_librarys() -> None:
    """The oracle minimises t subject to <w, x + d> = b, |d_i| <= t and 0 <= x + d <= 1."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(40, 12, generator=generator, dtype=torch.float64)
    points[:10] = points[:10].round()  # corners, as many pixels of MNIST are
    normals = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    normals[::3, :4] = 0
    offsets = (normals * torch.rand(40, 12, generator=generator, dtype=torch.float64)).sum(dim=1)
    moves = shortest_move_onto_plane(points, normals, offsets)
    for point, normal, offset, move in zip(points, normals, offsets, moves, strict=True):
        ones = np.ones((12, 1))
        found = linprog(
            np.r_[np.zeros(12), 1],
            A_ub=np.block([[np.eye(12), -ones], [-np.eye(12), -ones]]), b_ub=np.zeros(24),
            A_eq=np.r_[normal.numpy(), 0][None], b_eq=[float(offset - normal @ point)],
            bounds=[*((-float(value), 1 - float(value)) for value in point), (0, None)],
        )  # fmt: skip
        assert found.success
        assert float(move.abs().max()) == pytest.approx(found.fun, abs=1e-9)
        assert float(normal @ (point + move)) == pytest.approx(float(offset), abs=1e-9)
        assert bool(((point + move >= -1e-12) & (point + move <= 1 + 1e-12)).all())
    # Planes that miss the cube: both go to the corner.
    offsets[::4] += 100
    ours = shortest_move_onto_plane(points, normals, offsets)
    theirs = fab.projection_linf(points.float(), normals.float(), offsets.float())
    torch.testing.assert_close(ours.float(), theirs, atol=1e-5, rtol=1e-4)
    assert bool((shortest_move_onto_plane(points, torch.zeros_like(normals), offsets) == 0).all())


def test_fab_is_the_librarys_own(digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[2].pixels(torch.arange(60)), digits[2].labels[:60]
    attack = build_attack(TargetedFABConfig("fab_t", "linf", steps=20))
    found = run_attack(attack, digits_model, images, labels, epsilon=0.1)
    library = torchattacks.FAB(digits_model, norm="Linf", eps=0.1, steps=20, multi_targeted=True, n_classes=10)
    theirs = digits_model(library(images, labels)).argmax(dim=1) == labels
    assert torch.equal(found.logits.argmax(dim=1) == labels, theirs)
    assert 0.05 < float(theirs.float().mean()) < 0.95
