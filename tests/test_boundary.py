"""What ends on a copy's decision boundary is brought to that of the model."""

import math

import pytest
import torch
from torch import Tensor, nn

from drs.attack_config import FMNConfig, TargetedFABConfig
from drs.attacks import build_attack, run_attack, running, stand_in
from drs.attacks.boundary import BEYOND, HALVINGS, SHARES, bring_to_boundary
from drs.attacks.half_precision import HalfPrecision

WIDTH = 0.01 / 2**HALVINGS
"""What is left of the widest step between two shares."""


def _brought(lengths: Tensor, boundary: float, longest: float = math.inf) -> Tensor:
    """Return the lengths that moves of some lengths come to, where the model errs beyond a length."""
    images = torch.full((len(lengths), 1, 2, 2), 0.5)
    moved = images + lengths.view(-1, 1, 1, 1)
    labels = torch.zeros(len(lengths), dtype=torch.int64)
    found = bring_to_boundary(
        lambda x: ((x - 0.5).amax(dim=(1, 2, 3)) > boundary).long(), images, moved, labels,
        (longest / lengths).clamp_min(1.0),
    )  # fmt: skip
    return (found - images).amax(dim=(1, 2, 3))


def test_move_ends_just_beyond_the_boundary() -> None:
    near = torch.tensor([0.0975, 0.0996, 0.1, 0.1004, 0.102])
    found = _brought(near, 0.1)
    assert (found > 0.1).all() and (found <= 0.1 * (1 + WIDTH + 2 * BEYOND)).all(), found


def test_move_far_from_the_boundary_stays_or_goes_back_by_the_least_share() -> None:
    short, long = torch.tensor([0.09]), torch.tensor([0.2])
    torch.testing.assert_close(_brought(short, 0.1), short)
    torch.testing.assert_close(_brought(long, 0.1), SHARES[0] * (1 + BEYOND) * long)


def test_move_never_leaves_its_ball() -> None:
    lengths = torch.tensor([0.0995, 0.0999])
    assert (_brought(lengths, 0.1, longest=0.1005) > 0.1).all()
    kept = _brought(lengths, 0.1, longest=0.09999)
    torch.testing.assert_close(kept, lengths, msg="no share within the ball errs, so the moves stay as they are")
    assert (_brought(torch.tensor([0.1]), 0.099, longest=0.1) <= 0.1).all()


def test_image_that_was_not_moved_stays() -> None:
    assert (_brought(torch.zeros(3), 0.1) == 0).all()


@pytest.mark.parametrize("config", [FMNConfig("fmn", "linf", steps=30), TargetedFABConfig("fab_t", "linf", steps=20)])
def test_search_on_a_rounded_copy_finds_the_models_boundary(config: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "HALF_PRECISION_ON", ("cpu",))
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    model = nn.Sequential(*layers).eval()
    images = torch.rand(60, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    assert isinstance(stand_in.stand_in(model, images), HalfPrecision)
    asked = []
    # The hook goes to the copy, too, which is another module.
    model.register_forward_pre_hook(lambda one, inputs: asked.append(one is model and inputs[0].requires_grad))
    outcomes, passes = [], []
    for fast in (True, False):
        asked.clear()
        outcomes.append(run_attack(build_attack(config), model, images, labels, epsilon=0.03, fast_search=fast))
        passes.append(sum(asked))
    assert passes[0] <= 0.1 * passes[1], "hardly anything is searched for on the model"
    fast, plain = outcomes
    fallen = [outcome.logits.argmax(dim=1) != labels for outcome in (fast, plain)]
    assert fallen[0].any() and (fallen[0] != fallen[1]).sum() <= 1
    both = fallen[0] & fallen[1]
    ratio = fast.distance[both] / plain.distance[both]
    assert 0.98 < ratio.median() < 1.002, "as near as a search on the model, or nearer"


class _Threshold(nn.Module):
    """A model of images of one value that errs beyond a value of its own for each."""

    def __init__(self, boundaries: list[float]) -> None:
        super().__init__()
        self.boundaries = torch.tensor(boundaries)

    def forward(self, images: Tensor) -> Tensor:
        values = images.flatten(1)
        beyond = values[:, 0] - self.boundaries[values[:, 1].mul(10).round().long()]
        return torch.stack([-beyond, beyond], dim=1)


class _Moving:
    """Moves the first pixel to just below the bound; the second is the number of the image."""

    name, norm, bounded, ends_on_boundary = "a move", "linf", True, True

    def __init__(self) -> None:
        self.counts: list[int] = []

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        self.counts.append(len(images))
        moved = images.clone()
        moved[:, :, 0, 0] += 0.999 * epsilon
        return moved


def test_image_that_would_leave_its_ball_is_attacked_on_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rounded = _Threshold([0.05, 0.1005]).eval(), _Threshold([0.05, 0.0995]).eval()
    monkeypatch.setattr(running, "stand_in", lambda *_: rounded)
    images = torch.tensor([[0.0, 0.0], [0.0, 0.1]]).view(2, 1, 1, 2)
    attack = _Moving()
    labels = torch.zeros(2, dtype=torch.int64)
    outcome = run_attack(attack, model, images, labels, epsilon=0.1, fast_search=True)
    assert attack.counts == [2, 1]
    assert outcome.logits.argmax(dim=1).tolist() == [1, 0]
    assert (outcome.distance <= 0.1 + 1e-6).all()
