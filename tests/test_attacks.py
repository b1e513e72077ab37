"""The attacks against a linear classifier, whose minimal perturbations are known, and against a second library."""

import math

import foolbox
import pytest
import torch
from torch import Tensor, nn

from drs.attack_config import CWConfig, CWTorchattacksConfig, FGSMConfig, PGDConfig
from drs.attacks import Attack, build_attack, perturbation_norm, run_attack
from drs.attacks.contract import check_adversarial
from drs.attacks.isolation import isolated
from drs.data import LabelledImages
from drs.errors import UserError

SIDE = 6
FGSM = FGSMConfig("fgsm", "linf")
PGD = PGDConfig("pgd", "linf")
CW = CWConfig("cw", "l2", binary_search_steps=9, steps=400, step_sizes=[0.005], abort_early=False)
CW_TORCHATTACKS = CWTorchattacksConfig("cw_torchattacks", "l2", c=10.0, steps=200, learning_rate=0.01)


def linear_problem(classes: int, shift: float = 0.0, n: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier, images near grey so that the pixel range does not bind, its predictions as labels."""
    generator = torch.Generator().manual_seed(classes)
    linear = nn.Linear(SIDE * SIDE, classes)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(classes, SIDE * SIDE, generator=generator))
        linear.bias.copy_(-0.5 * linear.weight.sum(1) + shift)
    images = 0.5 + 0.05 * torch.randn(n, 1, SIDE, SIDE, generator=generator)
    model = nn.Sequential(nn.Flatten(), linear).eval()
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def minimal_norms(model: nn.Module, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """The distance to the nearest decision boundary: min over j of (z_y - z_j) / |w_y - w_j| in the dual norm."""
    weight = model[1].weight.double()  # type: ignore[index]
    with torch.no_grad():
        logits = model(images).double()
    rows = torch.arange(len(labels))
    margins = logits[rows, labels][:, None] - logits
    differences = weight[labels][:, None] - weight[None]
    lengths = differences.abs().sum(2) if norm == "linf" else differences.square().sum(2).sqrt()
    distances = margins / lengths
    distances[rows, labels] = math.inf
    return distances.min(1).values.detach()


def standing(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float = math.inf) -> Tensor:
    outcome = run_attack(attack, model, images, labels, epsilon=epsilon)
    return outcome.logits.argmax(1) == labels


@pytest.mark.parametrize("config", [FGSM, PGD])
def test_linf_attacks_flip_a_linear_classifier_just_where_the_distance_says(config: FGSMConfig | PGDConfig) -> None:
    model, images, labels = linear_problem(classes=2)
    distances = minimal_norms(model, images, labels, "linf")
    attack = build_attack(config)
    for epsilon in distances.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist():
        expected = distances > epsilon
        undecided = (distances - epsilon).abs() < 1e-3 * epsilon
        assert torch.equal(standing(attack, model, images, labels, epsilon)[~undecided], expected[~undecided])


def test_cw_finds_the_minimal_l2_norm_of_a_linear_classifier() -> None:
    model, images, labels = linear_problem(classes=2)
    distances = minimal_norms(model, images, labels, "l2")
    outcome = run_attack(build_attack(CW), model, images, labels)
    assert (outcome.logits.argmax(1) != labels).all()
    assert (outcome.distance / distances).min() > 0.999
    assert (outcome.distance - distances).max() < 0.002


def test_cw_is_never_below_the_minimal_norm_and_near_it_with_more_classes() -> None:
    """It heads for the class with the largest other logit, which is not always the nearest in distance."""
    model, images, labels = linear_problem(classes=4)
    distances = minimal_norms(model, images, labels, "l2")
    ratio = run_attack(build_attack(CW), model, images, labels).distance / distances
    assert ratio.min() > 0.999
    assert ratio.median() < 1.05


def test_torchattacks_cw_depends_on_a_shift_of_the_logits_and_the_correct_one_does_not() -> None:
    """The library masks the label by multiplying by 0; where all logits are negative it has no gradient left."""
    survivors = {}
    for shift in (0.0, -50.0):
        model, images, labels = linear_problem(classes=4, shift=shift)
        survivors[shift] = standing(build_attack(CW_TORCHATTACKS), model, images, labels).float().mean()
        assert not standing(build_attack(CW), model, images, labels).any()
    assert survivors[0.0] < 0.5
    assert survivors[-50.0] > 0.9


def test_torchattacks_cw_cannot_move_pixels_at_the_ends_of_the_range() -> None:
    model, images, _ = linear_problem(classes=4)
    images = (images > 0.5).float()
    labels = model(images).argmax(1)
    weak = run_attack(build_attack(CW_TORCHATTACKS), model, images, labels)
    assert float(weak.distance.max()) < 1e-3
    correct = run_attack(build_attack(CW), model, images, labels)
    assert (correct.logits.argmax(1) != labels).float().mean() > 0.5


def test_pgd_agrees_with_foolbox_on_a_trained_model(
    digits_model: nn.Module, digits: tuple[LabelledImages, LabelledImages, LabelledImages]
) -> None:
    test = digits[2]
    images, labels = test.pixels(), test.labels
    for epsilon in (0.05, 0.1):
        ours = float(standing(build_attack(PGD), digits_model, images, labels, epsilon).float().mean())
        second = foolbox.attacks.LinfProjectedGradientDescentAttack(rel_stepsize=0.125, steps=20, random_start=True)
        wrapped = foolbox.PyTorchModel(digits_model, bounds=(0, 1))
        theirs = 1 - float(second(wrapped, images, labels, epsilons=epsilon)[2].float().mean())
        assert 0.02 < theirs < 0.98, "an epsilon at which everything stands or falls compares nothing"
        assert abs(ours - theirs) <= 0.01


def test_wrong_samples_are_failures_and_are_not_attacked() -> None:
    model, images, labels = linear_problem(classes=3)
    wrong = (labels + 1) % 3
    outcome = run_attack(build_attack(FGSM), model, images, wrong, epsilon=0.1)
    assert (outcome.logits.argmax(1) != wrong).all()
    assert float(outcome.distance.abs().max()) == 0


class Shifting:
    """An attack that adds a constant, whatever epsilon says."""

    name = "constant"
    norm = "linf"
    bounded = True

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        return images + self.amount


def test_attack_that_leaves_the_ball_or_the_range_is_refused() -> None:
    model, images, labels = linear_problem(classes=3)
    with pytest.raises(UserError, match="left the ball"):
        run_attack(Shifting(0.02), model, images, labels, epsilon=0.01)
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        run_attack(Shifting(0.9), model, images, labels, epsilon=1.0)
    with pytest.raises(UserError, match="not finite"):
        run_attack(Shifting(math.nan), model, images, labels, epsilon=0.1)
    run_attack(Shifting(0.02), model, images, labels, epsilon=0.02)


def test_exception_inside_an_attack_is_not_swallowed() -> None:
    class Broken(Shifting):
        def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
            raise RuntimeError("out of luck")

    model, images, labels = linear_problem(classes=3)
    with pytest.raises(RuntimeError, match="out of luck"):
        run_attack(Broken(0.0), model, images, labels, epsilon=0.1)


@pytest.mark.parametrize(
    ("epsilon", "message"), [(0.0, "above 0"), (-0.1, "above 0"), (8.0, "8/255"), (math.nan, "above 0")]
)
def test_bad_epsilon_is_refused(epsilon: float, message: str) -> None:
    model, images, labels = linear_problem(classes=3)
    with pytest.raises(UserError, match=message):
        run_attack(build_attack(FGSM), model, images, labels, epsilon=epsilon)


def test_bad_input_is_refused() -> None:
    model, images, labels = linear_problem(classes=3)
    attack = build_attack(FGSM)
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        run_attack(attack, model, 255 * images, labels, epsilon=0.1)
    with pytest.raises(UserError, match="float32"):
        run_attack(attack, model, images.double(), labels, epsilon=0.1)
    with pytest.raises(UserError, match="training mode"):
        run_attack(attack, model.train(), images, labels, epsilon=0.1)


def test_model_whose_logits_are_nan_is_refused_rather_than_robust() -> None:
    """The argmax of NaN is class 0, so a dead model would be right on every image of that class."""
    model, images, _ = linear_problem(classes=3)
    with torch.no_grad():
        model[1].weight.fill_(math.nan)  # type: ignore[index,union-attr,operator]
    with pytest.raises(UserError, match="not finite"):
        run_attack(build_attack(FGSM), model, images, torch.zeros(len(images), dtype=torch.long), epsilon=0.1)


@pytest.mark.parametrize("config", [FGSM, PGD, CW_TORCHATTACKS, CWConfig("cw", "l2", binary_search_steps=2, steps=10)])
def test_attack_leaves_generator_modes_and_gradients_alone_and_repeats(config: FGSMConfig) -> None:
    linear, images, labels = linear_problem(classes=3)
    model = nn.Sequential(linear, nn.BatchNorm1d(3)).eval()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = run_attack(build_attack(config), model, images, labels, epsilon=0.02)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    second = run_attack(build_attack(config), model, images, labels, epsilon=0.02)
    assert torch.equal(first.logits, second.logits)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_module_by_module_even_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    with pytest.raises(ValueError, match="boom"), isolated(model, seed=0):
        model.train()
        raise ValueError("boom")
    assert model[0].training
    assert not model[1].training


def test_batch_size_does_not_change_fgsm() -> None:
    model, images, labels = linear_problem(classes=3)
    whole = run_attack(build_attack(FGSM), model, images, labels, epsilon=0.02)
    parts = run_attack(build_attack(FGSM), model, images, labels, epsilon=0.02, batch_size=7)
    torch.testing.assert_close(whole.logits, parts.logits)


def test_norms() -> None:
    images = torch.zeros(1, 1, 2, 2)
    moved = torch.tensor([[[[0.3, 0.4], [0.0, 0.0]]]])
    assert float(perturbation_norm(images, moved, "l2")) == pytest.approx(0.5)
    assert float(perturbation_norm(images, moved, "linf")) == pytest.approx(0.4)
    check_adversarial(images, moved, 0.5, "l2", "x")
    with pytest.raises(UserError, match="left the ball"):
        check_adversarial(images, moved, 0.49, "l2", "x")
