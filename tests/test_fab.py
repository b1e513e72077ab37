"""FAB of this project: its projection against a linear programme, its norms against closed forms and the library's."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from test_attacks import linear_problem, minimal_norms
from torch import Tensor, nn

from drs.attack_config import FABConfig, TargetedFABConfig
from drs.attacks import build_attack, run_attack
from drs.attacks.autoattack import shortest_move_onto_plane
from drs.attacks.fab import TargetedFastAdaptiveBoundary, move_onto_plane
from drs.data import LabelledImages

Digits = tuple[LabelledImages, LabelledImages, LabelledImages]
N = 12


def least_length(point: Tensor, normal: Tensor, value: Tensor) -> float:
    """Minimise t subject to value + <w, d> = 0, |d_i| <= t and 0 <= x + d <= 1, by a linear programme."""
    n = len(point)
    ones, one = np.ones((n, 1)), np.eye(n)
    found = linprog(
        np.r_[np.zeros(n), 1],
        A_ub=np.block([[one, -ones], [-one, -ones]]), b_ub=np.zeros(2 * n),
        A_eq=np.r_[normal.double().numpy(), 0][None], b_eq=[-float(value)],
        bounds=[*((-float(each), 1 - float(each)) for each in point), (0, None)],
    )  # fmt: skip
    assert found.success
    return float(found.fun)


def some_planes(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return points, normals and values such that each plane meets the cube."""
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(40, N, generator=generator, dtype=dtype)
    points[:20] = points[:20].round()  # corners, as many pixels of MNIST are
    normals = torch.randn(40, N, generator=generator, dtype=dtype)
    normals[::3, :4] = 0
    on_plane = torch.rand(40, N, generator=generator, dtype=dtype)
    return points, normals, (normals * (points - on_plane)).sum(dim=1)


def test_projection_is_the_linear_programmes() -> None:
    points, normals, values = some_planes(torch.float64)
    values[5] = 0  # on the plane already
    moves = move_onto_plane(points, normals, values)
    assert bool((moves[5] == 0).all())
    for point, normal, value, move in zip(points, normals, values, moves, strict=True):
        assert float(move.abs().max()) == pytest.approx(least_length(point, normal, value), abs=1e-9)
        assert float(value + normal @ move) == pytest.approx(0, abs=1e-9)
        assert bool(((point + move >= -1e-12) & (point + move <= 1 + 1e-12)).all())


def test_projection_goes_to_the_nearest_corner_where_no_point_of_the_cube_is_on_the_plane() -> None:
    points, normals, values = some_planes(torch.float64)
    corners = points + move_onto_plane(points, normals, values.sign() * 1e3)
    torch.testing.assert_close(
        corners, torch.where(normals == 0, points, (normals * values.sign()[:, None] < 0).double())
    )
    assert bool((move_onto_plane(points, torch.zeros_like(normals), values) == 0).all())


def test_projection_is_that_of_the_adapter_in_as_many_pixels_as_an_image_has() -> None:
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(30, 3072, generator=generator).mul(3).sub(1).clamp(0, 1)
    normals = torch.randn(30, 3072, generator=generator) * torch.logspace(-6, 3, 30).unsqueeze(1)
    values = (normals * (points - torch.rand(30, 3072, generator=generator))).sum(dim=1)
    theirs = shortest_move_onto_plane(points, normals, (normals * points).sum(dim=1) - values)
    torch.testing.assert_close(move_onto_plane(points, normals, values), theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("final_steps", "most"), [(0, 1.01), (3, 1.001)])
def test_norms_are_those_of_a_linear_classifier(final_steps: int, most: float) -> None:
    model, images, labels = linear_problem(classes=4)
    outcome = run_attack(
        build_attack(FABConfig("fab", "linf", steps=20, final_steps=final_steps)), model, images, labels
    )
    ratio = outcome.distance / minimal_norms(model, images, labels, "linf")
    assert (outcome.logits.argmax(1) != labels).all()
    assert ratio.min() > 0.9999 and ratio.max() < most


def test_norms_are_those_of_a_linear_classifier_where_the_pixel_range_binds() -> None:
    model, images, _ = linear_problem(classes=3, n=20)
    images = (images > 0.5).float()
    with torch.no_grad():
        logits = model(images)
    labels, weight = logits.argmax(1), model[1].weight.detach()  # type: ignore[index]
    outcome = run_attack(build_attack(FABConfig("fab", "linf", steps=30, final_steps=3)), model, images, labels)
    assert (outcome.logits.argmax(1) != labels).all()
    for image, label, scores, norm in zip(images.flatten(1), labels, logits, outcome.distance, strict=True):
        others = [other for other in range(3) if other != int(label)]
        exact = min(least_length(image, weight[k] - weight[label], scores[k] - scores[label]) for k in others)
        assert float(norm) == pytest.approx(exact, rel=1e-3)


class Halves(nn.Module):
    """A classifier of ten classes as one of two, low and high, so that there is one class to go to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([part.logsumexp(dim=1) for part in self.model(images).split(5, dim=1)], dim=1)


@pytest.mark.parametrize("steps", [3, 15])
def test_norms_on_a_trained_network_are_the_librarys(digits_model: nn.Module, digits: Digits, steps: int) -> None:
    """Of two classes, because the library stops at the first class that it reaches within the radius."""
    model = Halves(digits_model).eval()
    images, labels = digits[2].pixels()[:100], (digits[2].labels[:100] >= 5).long()
    theirs = run_attack(
        build_attack(TargetedFABConfig("fab_t", "linf", steps=steps)), model, images, labels, epsilon=1.0
    )
    ours = run_attack(build_attack(FABConfig("fab", "linf", steps=steps, final_steps=0)), model, images, labels)
    assert torch.equal(ours.logits.argmax(1), theirs.logits.argmax(1))
    moved = theirs.distance > 0
    assert moved.sum() > 80
    ratio = ours.distance[moved] / theirs.distance[moved]
    # Rounding grows along a search, and at a kink of the network two searches may part.
    assert ((ratio - 1).abs() < 1e-4).double().mean() > 0.9
    assert ratio.min() > 0.98 and ratio.max() < 1.02


def test_final_search_shortens_and_stays_beyond_the_boundary(digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[2].pixels()[:60], digits[2].labels[:60]
    with_search, without = (
        run_attack(build_attack(FABConfig("fab", "linf", steps=5, final_steps=steps)), digits_model, images, labels)
        for steps in (3, 0)
    )
    assert torch.equal(with_search.logits.argmax(1) == labels, without.logits.argmax(1) == labels)
    ratio = with_search.distance / without.distance.clamp_min(1e-9)
    assert ratio.max() <= 1 and 0.8 < ratio[without.distance > 0].median() < 0.999


def test_clean_images_come_back_where_no_class_can_be_reached() -> None:
    model, images, labels = linear_problem(classes=3)
    with torch.no_grad():
        model[1].weight.zero_()  # type: ignore[index]
        labels = model(images).argmax(1)
    assert torch.equal(TargetedFastAdaptiveBoundary(steps=3).perturb(model, images, labels, 1.0), images)
