"""The losses against closed forms, finite differences and second implementations."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from drs.comparator_losses import complement_entropy
from drs.config import PROJECT_ROOT
from drs.losses import LOSSES, DRSoftmaxLoss, build_loss, distribution_penalty

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 3.0], [0.0, 1.0, 2.0, -1.0]])
LABELS = torch.tensor([3, 1])


def random_case(batch: int = 5, classes: int = 7, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(batch, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(classes, (batch,), generator=generator)


def looped_penalty(values: torch.Tensor, labels: torch.Tensor, center: str) -> list[float]:
    """The definition, written out with Python floats."""
    result = []
    for row, label in zip(values.tolist(), labels.tolist(), strict=True):
        others = [value for j, value in enumerate(row) if j != label]
        mean = sum(others) / (len(others) if center == "non_label" else len(row))
        result.append(sum((value - mean) ** 2 for value in others))
    return result


def test_vectors() -> None:
    penalty = distribution_penalty(LOGITS, LABELS)
    assert penalty.tolist() == pytest.approx([4.5, 4.66667], abs=1e-5)
    assert distribution_penalty(LOGITS, LABELS, space="softmax").tolist() == pytest.approx([0.0322, 0.2291], abs=5e-5)
    assert F.cross_entropy(LOGITS, LABELS).item() == pytest.approx(0.912141, abs=1e-6)
    assert DRSoftmaxLoss(weight=0.005)(LOGITS, LABELS).item() == pytest.approx(0.957974, abs=1e-6)


@pytest.mark.parametrize("space", ["log_softmax", "softmax", "logits"])
@pytest.mark.parametrize("center", ["non_label", "all_classes"])
def test_penalty_is_its_definition(space: str, center: str) -> None:
    logits, labels = random_case()
    values = {"log_softmax": logits.log_softmax(1), "softmax": logits.softmax(1), "logits": logits}[space]
    found = distribution_penalty(logits, labels, space=space, center=center)
    assert found.tolist() == pytest.approx(looped_penalty(values, labels, center), rel=1e-9, abs=1e-14)


def test_reduction_and_weights() -> None:
    logits, labels = random_case()
    penalty = distribution_penalty(logits, labels)
    cross_entropy = F.cross_entropy(logits, labels)
    summed = DRSoftmaxLoss(weight=0.1, ce_weight=2.0)(logits, labels)
    averaged = DRSoftmaxLoss(weight=0.1, reduction="mean")(logits, labels)
    torch.testing.assert_close(summed, 2 * cross_entropy + 0.1 * penalty.sum())
    torch.testing.assert_close(averaged, cross_entropy + 0.1 * penalty.mean())


def test_default_penalty_ignores_a_shift_and_the_second_version_does_not() -> None:
    logits, labels = random_case()
    for space in ("log_softmax", "logits"):
        torch.testing.assert_close(
            distribution_penalty(logits + 3, labels, space=space), distribution_penalty(logits, labels)
        )
    before = distribution_penalty(logits, labels, space="logits", center="all_classes")
    after = distribution_penalty(logits + 3, labels, space="logits", center="all_classes")
    assert (before - after).abs().min() > 1e-3
    # A shift of the logits leaves log_softmax itself alone, so here the difference is one between the spaces.
    restrained = distribution_penalty(logits, labels, space="log_softmax", center="all_classes")
    assert (before - restrained).abs().min() > 1e-3


def test_second_version_adds_the_squared_mean_of_the_others() -> None:
    """sum (s - S/K)^2 = sum (s - S/(K-1))^2 + (K-1) (S/(K-1) - S/K)^2, S the sum over the non-label classes."""
    logits, labels = random_case(classes=6)
    total = logits.sum(1) - logits.gather(1, labels[:, None]).squeeze(1)
    expected = distribution_penalty(logits, labels, space="logits") + 5 * (total / 5 - total / 6).square()
    torch.testing.assert_close(distribution_penalty(logits, labels, space="logits", center="all_classes"), expected)


def test_two_classes_have_nothing_to_restrain() -> None:
    logits = torch.tensor([[3.0, -2.0], [0.5, 9.0]])
    for space in ("log_softmax", "softmax", "logits"):
        assert distribution_penalty(logits, torch.tensor([0, 0]), space=space).tolist() == pytest.approx([0, 0])


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dr_softmax"])
def test_gradient_of_the_comparators(name: str) -> None:
    logits, labels = random_case()
    loss = build_loss(name)
    for phase in range(loss.phases):
        assert torch.autograd.gradcheck(lambda z, p=phase: loss(z, labels, p), logits.requires_grad_())


@pytest.mark.parametrize("space", ["log_softmax", "softmax", "logits"])
@pytest.mark.parametrize("center", ["non_label", "all_classes"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradient_of_dr_softmax(space: str, center: str, reduction: str) -> None:
    logits, labels = random_case()
    loss = DRSoftmaxLoss(weight=0.3, space=space, center=center, reduction=reduction)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_under_autocast_is_computed_in_float32(name: str) -> None:
    logits, labels = random_case(scale=1.0)
    low = logits.bfloat16()
    loss = build_loss(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for phase in range(loss.phases):
            found = loss(low, labels, phase)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, loss(low.float(), labels, phase), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name: str) -> None:
    logits = torch.tensor([[1e3, -1e3, 0.0, 5.0], [-1e3, 1e3, 1e3, -1e3]], requires_grad=True)
    loss = build_loss(name)
    for phase in range(loss.phases):
        value = loss(logits, torch.tensor([1, 2]), phase)
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


def test_comparators_against_their_formulas() -> None:
    logits, labels = random_case()
    p = logits.softmax(1)
    rows = torch.arange(len(labels))
    entropies = []
    for row, label in zip(p, labels.tolist(), strict=True):
        q = torch.cat([row[:label], row[label + 1 :]])
        entropies.append(torch.distributions.Categorical(q / q.sum()).entropy())
    complement = torch.stack(entropies)
    cross_entropy = -p[rows, labels].log().mean()
    torch.testing.assert_close(complement_entropy(logits, labels), complement)
    expected = {
        "ce": cross_entropy,
        "label_smoothing": 0.9 * cross_entropy - 0.1 * p.log().mean(),
        "gce": -(p[rows, labels] ** (1 / 3) * complement).mean() / math.log(6),
        "logit_squeezing": cross_entropy + 0.5 * logits.norm(dim=1).mean(),
        "confidence_penalty": cross_entropy - 0.1 * torch.distributions.Categorical(p).entropy().mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(build_loss(name)(logits, labels), value, msg=name)
    cot = build_loss("cot")
    torch.testing.assert_close(cot(logits, labels, 0), cross_entropy)
    torch.testing.assert_close(cot(logits, labels, 1), -complement.mean() / 6)


class LargeTensors(TorchDispatchMode):
    """Count the operations that allocate a new tensor as large as the logits."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.storages: set[int] = set()
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.numel:
                self.kept.append(tensor)
                self.storages.add(tensor.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("space", ["log_softmax", "softmax", "logits"])
def test_forward_builds_at_most_one_more_large_tensor_than_cross_entropy(space: str) -> None:
    logits = torch.randn(64, 50, requires_grad=True)
    labels = torch.randint(50, (64,))
    with LargeTensors(logits.numel()) as plain:
        F.cross_entropy(logits, labels)
    with LargeTensors(logits.numel()) as restrained:
        DRSoftmaxLoss(space=space)(logits, labels)
    assert len(restrained.storages - {logits.data_ptr()}) <= len(plain.storages - {logits.data_ptr()}) + 1


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", [-1, 4])
def test_label_out_of_range_is_named(name: str, label: int) -> None:
    with pytest.raises(ValueError, match=rf"label {label} is outside 0\.\.3"):
        build_loss(name)(LOGITS, torch.tensor([0, label]))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), "flatten leading dimensions"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.long), "labels"),
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), "at least 2 classes"),
        (torch.zeros(2, 4), torch.zeros(2), "integers"),
    ],
)
def test_bad_shapes_and_types(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distribution_penalty(logits, labels)


@pytest.mark.parametrize(
    "options",
    [{"weight": -1.0}, {"weight": float("nan")}, {"space": "probs"}, {"center": "mean"}, {"reduction": "none"}],
)
def test_bad_switch_is_named(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DRSoftmaxLoss(**options)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_labels_are_integers_of_any_width(kind: torch.dtype) -> None:
    logits, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    for loss in (DRSoftmaxLoss(), DRSoftmaxLoss(space="softmax"), build_loss("ce")):
        assert torch.equal(loss(logits, labels.to(kind)), loss(logits, labels))
        assert torch.equal(loss.backpropagate(logits, labels.to(kind)), loss.backpropagate(logits, labels))
    assert torch.equal(distribution_penalty(logits, labels.to(kind)), distribution_penalty(logits, labels))


def test_a_cpu_imports_no_triton() -> None:
    code = (
        "import sys, torch, drs.losses; z = torch.randn(3, 4, requires_grad=True)\n"
        "drs.losses.DRSoftmaxLoss()(z, torch.tensor([0, 1, 3])).backward()\n"
        "assert z.grad is not None and not {'triton', 'drs.triton_loss'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT_ROOT)
