"""Models that an attack would judge wrongly are refused by name before it starts."""

import pytest
import torch
from test_attacks import linear_problem
from torch import Tensor, nn

from drs.attack_config import (
    APGDConfig,
    AttackConfig,
    CWConfig,
    FABConfig,
    FGSMConfig,
    FMNConfig,
    PGDConfig,
    ProjectedConfig,
    TargetedAPGDConfig,
    TargetedFABConfig,
    TransferConfig,
)
from drs.attacks import build_attack, isolation, run_attack
from drs.attacks.contract import check_model
from drs.errors import UserError


class Wrapped(nn.Module):
    """A model behind a function of its logits."""

    def __init__(self, model: nn.Module, change: object) -> None:
        super().__init__()
        self.model = model
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        changed: Tensor = self.change(self.model(images))  # type: ignore[operator]
        return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda logits: logits.softmax(1), "returns probabilities"),
        (lambda logits: logits.softmax(1).half(), "returns probabilities"),
        (lambda logits: logits.softmax(1).bfloat16(), "returns probabilities"),
        (lambda logits: 0.999 * logits.softmax(1), r"returns probabilities.*values from .* each row sums to 0\.999\)"),
        (lambda logits: 0.1 * logits.softmax(1), r"returns probabilities.*each row sums to 0\.1\)"),
        (lambda logits: 0.8 * logits.softmax(1) + 0.05, r"returns probabilities.*each row sums to 1\)"),
        (lambda logits: 0.8 * logits.softmax(1) + 0.1, r"returns probabilities.*each row sums to 1\.2\)"),
        (lambda logits: (30 * logits).softmax(1).clamp(2e-3, 1), "returns probabilities"),
        (lambda logits: (logits.softmax(1) * 0.9).bfloat16(), "returns probabilities"),
        (lambda logits: (logits, logits), "returns a tuple"),
        (lambda logits: logits + 5e-4 * torch.randn_like(logits), "stochastic"),
        (lambda logits: logits + torch.randn_like(logits), "stochastic"),
        (lambda logits: nn.functional.dropout(logits, 0.5), "stochastic"),
        (lambda logits: logits[:, :1], r"returns \[16, 1\]"),
        (lambda logits: logits.unsqueeze(2), r"returns \[16, 4, 1\]"),
    ],
)
def test_model_is_refused_by_name(change: object, words: str) -> None:
    model, images, labels = linear_problem(classes=4)
    with pytest.raises(UserError, match=words):
        run_attack(build_attack(PGDConfig("pgd", "linf")), Wrapped(model, change).eval(), images, labels, epsilon=0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits,
        lambda logits: logits.log_softmax(1),
        lambda logits: (4 * logits).round() / 4,
        lambda logits: 1e5 * logits,
        lambda logits: logits + 1e-7 * torch.randn_like(logits),
        lambda logits: logits.sigmoid(),
        lambda logits: (logits - logits.min()) / (logits.max() - logits.min()),
        lambda logits: 1e-3 * (logits - logits.min()),
        lambda logits: 0 * logits,
        lambda logits: 0 * logits + torch.tensor([0.1, 0.2, 0.3, 0.1]),
        lambda logits: 1e-6 * logits + torch.tensor([0.1, 0.2, 0.3, 0.1]),
        lambda logits: 100 * logits.softmax(1),
    ],
)
def test_odd_but_valid_logits_pass(change: object) -> None:
    model, images, _ = linear_problem(classes=4)
    check_model(Wrapped(model, change).eval(), images)


def test_targeted_dlr_names_how_many_classes_it_needs() -> None:
    model, images, labels = linear_problem(classes=3)
    words = r"APGD-T .* at least 4 classes, but the model has 3: .* leave the attack out with '~suite\.attacks\.apgd_t'"
    with pytest.raises(UserError, match=words):
        run_attack(build_attack(TargetedAPGDConfig("apgd_t", "linf")), model, images, labels, epsilon=0.01)


GRADIENT_ATTACKS = [
    FGSMConfig("fgsm", "linf"),
    PGDConfig("pgd", "linf"),
    ProjectedConfig("projected", "linf", objectives=["margin"]),
    APGDConfig("apgd_ce", "linf", steps=5),
    TargetedAPGDConfig("apgd_t", "linf", steps=5),
    TargetedFABConfig("fab_t", "linf", steps=5),
    FABConfig("fab", "linf", steps=5),
    FMNConfig("fmn", "linf", steps=5),
    FMNConfig("fmn", "l2", steps=5),
    CWConfig("cw", "l2", binary_search_steps=1, steps=5),
]


class Broken(nn.Module):
    """Right logits, and a gradient that is NaN wherever a pixel is looked at."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits + (0 * images).sqrt().flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("config", GRADIENT_ATTACKS, ids=lambda config: f"{config.kind}-{config.norm}")
def test_gradient_that_is_not_finite_is_refused_rather_than_robust(
    config: AttackConfig, device_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign of NaN is 0, so nothing would move, and every image would stand."""
    model, images, labels = linear_problem(classes=4)
    at_once = isolation._reads_at_once(device_type)
    monkeypatch.setattr(isolation, "_reads_at_once", lambda _: at_once)
    images_said = "40 of 40 images" if at_once else "some of the images"
    with pytest.raises(UserError, match=f"the model's gradient is not finite for {images_said}; gradient attacks"):
        run_attack(build_attack(config), Broken(model).eval(), images, labels, epsilon=0.1)
    run_attack(build_attack(config), model, images, labels, epsilon=0.1)
    assert not model._forward_pre_hooks, "the watch on the gradient was left behind"


def test_transfer_refuses_a_source_whose_gradient_is_not_finite() -> None:
    model, images, labels = linear_problem(classes=4)
    config = TransferConfig("transfer", "linf", steps=3)
    with pytest.raises(UserError, match="transfer's source model's gradient is not finite for 40 of 40 images"):
        run_attack(build_attack(config, source=Broken(model).eval()), model, images, labels, epsilon=0.1)
    run_attack(build_attack(config, source=model), Broken(model).eval(), images, labels, epsilon=0.1)
    assert not model._forward_pre_hooks, "the caller's source is left as it was"


@pytest.mark.parametrize(("norm", "largest"), [("linf", 1.0), ("l2", 5.0)])
def test_epsilon_is_at_most_what_two_images_can_be_apart(norm: str, largest: float) -> None:
    """Images of 25 values in [0,1] lie in a cube with a diagonal of 5."""
    model, images, labels = linear_problem(classes=4)
    images = images.flatten(1)[:, :25].reshape(-1, 1, 5, 5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 4)).eval()
    attack = build_attack(ProjectedConfig("projected", norm, objectives=["margin"], steps=2))
    run_attack(attack, model, images, labels, epsilon=largest)
    with pytest.raises(UserError, match=f"epsilon={largest + 0.01}: must be at most"):
        run_attack(attack, model, images, labels, epsilon=largest + 0.01)


def test_attack_and_its_score_run_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image just across the boundary in float32 may be back on the other side in TF32."""
    model, images, labels = linear_problem(classes=4)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    run_attack(build_attack(FGSMConfig("fgsm", "linf")), model, images, labels, epsilon=0.1)
    assert seen and not any(seen)
    assert torch.backends.cudnn.allow_tf32


class Interrupted(Broken):
    """The same, and the user interrupts the second pass, or memory runs out in it."""

    def __init__(self, model: nn.Module, error: BaseException) -> None:
        super().__init__(model)
        self.error, self.passes = error, 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += images.requires_grad
        if self.passes == 2:
            raise self.error
        return super().forward(images)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("full"), ValueError("boom")])
def test_late_watch_hides_no_interrupt_and_no_lack_of_memory(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "_reads_at_once", lambda _: False)
    linear, images, labels = linear_problem(classes=4)
    model = Interrupted(linear, error).eval()
    expected = UserError if isinstance(error, ValueError) else type(error)
    with pytest.raises(expected), isolation.isolated(model, 0):
        for _ in range(2):
            leaf = images.clone().requires_grad_()
            model(leaf).sum().backward()
    assert not model._forward_pre_hooks
