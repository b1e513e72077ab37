"""Adversarial training and TRADES: the inner attacks against closed forms, and what training with them leaves alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import compose_train
from test_attacks import linear_problem
from torch import nn

from drs.attack_config import ProjectedConfig
from drs.attacks import build_attack, run_attack
from drs.data import LabelledImages
from drs.procedures import AdversarialTraining, Trades, build_procedure
from drs.schema import AdversarialConfig, StandardConfig, TradesConfig
from drs.training import fit

Digits = tuple[LabelledImages, LabelledImages, LabelledImages]
CPU = torch.device("cpu")
BASE = ("data=digits", "model=mlp", "loss=ce", "batch_size=64", "epochs=2", "seed=0")


def trained(digits: Digits, *overrides: str) -> nn.Module:
    return fit(compose_train(*BASE, *overrides), digits[0], digits[1], CPU)[0]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_inner_attack_reaches_the_maximum_of_a_linear_classifier() -> None:
    """With two classes cross-entropy grows along one direction, so the maximum is the corner of the ball."""
    model, images, labels = linear_problem(classes=2)
    weight = model[1].weight.detach()  # type: ignore[index]
    direction = (weight[1 - labels] - weight[labels]).sign().view_as(images)
    procedure = AdversarialTraining(AdversarialConfig("adversarial", 0.02, 10, 0.25), torch.Generator().manual_seed(0))
    found = procedure.images(model, images, labels)
    assert torch.allclose(found, (images + 0.02 * direction).clamp(0, 1), atol=1e-6)


def test_inner_attack_stays_in_the_ball_and_in_the_pixel_range(digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[0].pixels(torch.arange(64)), digits[0].labels[:64]
    for config in (AdversarialConfig("adversarial", 0.1), TradesConfig("trades", 0.1)):
        procedure = build_procedure(config, 0, CPU)
        found = procedure.images(digits_model, images, labels)
        if isinstance(procedure, Trades):
            assert torch.equal(found, images), "the loss itself is taken on clean images"
            assert procedure.adversarial is not None
            found = procedure.adversarial
        assert (found - images).abs().max() == pytest.approx(0.1, abs=1e-6)
        assert found.min() >= 0 and found.max() <= 1
        assert not found.requires_grad


def test_trades_raises_the_divergence_that_it_penalises(digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[0].pixels(torch.arange(64)), digits[0].labels[:64]
    procedure = Trades(TradesConfig("trades", 0.1, steps=5, beta=2.0), torch.Generator().manual_seed(0))
    procedure.images(digits_model, images, labels)
    with torch.no_grad():
        logits = digits_model(images)
        value = procedure.regulariser(digits_model, logits)
        p = logits.softmax(1).double()
        q = digits_model(procedure.adversarial).softmax(1).double()
        expected = 2.0 * (p * (p.log() - q.log())).sum(1).mean()
        start = digits_model((images + 1e-3 * torch.randn(images.shape)).clamp(0, 1)).softmax(1).double()
        at_start = 2.0 * (p * (p.log() - start.log())).sum(1).mean()
    assert value is not None
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    assert expected > 100 * at_start


def test_regulariser_of_trades_has_a_gradient_through_both_predictions() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images, labels = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
    procedure = Trades(TradesConfig("trades", 0.1, beta=1.0), torch.Generator().manual_seed(0))
    procedure.images(model, images, labels)
    logits = model(images)
    value = procedure.regulariser(model, logits)
    assert value is not None
    through_both = torch.autograd.grad(value, model[1].weight, retain_graph=True)[0]
    detached = procedure.regulariser(model, logits.detach())
    assert detached is not None
    through_one = torch.autograd.grad(detached, model[1].weight)[0]
    assert not torch.allclose(through_both, through_one)


@pytest.mark.parametrize("procedure", ["adversarial", "trades"])
def test_inner_attack_leaves_modes_gradients_statistics_and_generators_alone(procedure: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = {"adversarial": AdversarialConfig("adversarial", 0.1), "trades": TradesConfig("trades", 0.1)}[procedure]
    state = torch.get_rng_state()
    images = torch.full((4, 1, 8, 8), 0.5)
    build_procedure(config, 0, CPU).images(model, images, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_trades_without_a_penalty_and_attack_without_reach_are_standard_training(digits: Digits) -> None:
    standard = trained(digits)
    assert same(standard, trained(digits, "procedure=trades", "procedure.epsilon=0.1", "procedure.beta=0"))
    tiny = trained(digits, "procedure=adversarial", "procedure.epsilon=1e-7")
    difference = max(
        float((a - b).abs().max())
        for a, b in zip(standard.state_dict().values(), tiny.state_dict().values(), strict=True)
    )
    assert difference < 1e-2
    assert not same(standard, trained(digits, "procedure=adversarial", "procedure.epsilon=0.1"))


def test_training_with_a_procedure_repeats_bit_for_bit(digits: Digits) -> None:
    for procedure in ("adversarial", "trades"):
        overrides = (f"procedure={procedure}", "procedure.epsilon=0.1", "procedure.steps=2")
        assert same(trained(digits, *overrides), trained(digits, *overrides))


@pytest.mark.parametrize("loss", ["ce", "dr_softmax", "cot"])
@pytest.mark.parametrize("procedure", ["adversarial", "trades"])
def test_every_loss_trains_to_more_robustness_with_a_procedure(digits: Digits, loss: str, procedure: str) -> None:
    images, labels = digits[2].pixels()[:200], digits[2].labels[:200]
    attack = build_attack(ProjectedConfig("projected", "linf", objectives=["margin"], steps=20))
    accuracy = {}
    bound = (
        f"procedure={procedure}",
        "procedure.epsilon=0.15",
        "procedure.steps=3",
        "procedure.relative_step_size=0.5",
    )
    for name, chosen in (("standard", ()), (procedure, bound)):
        model = trained(digits, f"loss={loss}", "epochs=12", *chosen)
        outcome = run_attack(attack, model, images, labels, epsilon=0.15)
        accuracy[name] = float((outcome.logits.argmax(1) == labels).float().mean())
    assert accuracy[procedure] > accuracy["standard"] + 0.1


def test_mixed_precision_trains_with_a_procedure(digits: Digits) -> None:
    model = trained(digits, "procedure=adversarial", "procedure.epsilon=0.1", "precision=bfloat16", "epochs=3")
    with torch.no_grad():
        loss = F.cross_entropy(model(digits[2].pixels()), digits[2].labels)
    assert math.isfinite(float(loss)) and float(loss) < 2


def test_standard_training_builds_no_attack() -> None:
    images = torch.rand(2, 1, 4, 4)
    procedure = build_procedure(StandardConfig(), 0, CPU)
    assert procedure.images(nn.Identity(), images, torch.tensor([0, 1])) is images
    assert procedure.regulariser(nn.Identity(), images) is None
