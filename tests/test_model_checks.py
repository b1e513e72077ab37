"""Models that an attack would judge wrongly are refused by name before it starts."""

import pytest
import torch
from test_attacks import linear_problem
from torch import Tensor, nn

from drs.attack_config import PGDConfig, TargetedAPGDConfig
from drs.attacks import build_attack, run_attack
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
    ],
)
def test_odd_but_valid_logits_pass(change: object) -> None:
    model, images, _ = linear_problem(classes=4)
    check_model(Wrapped(model, change).eval(), images)


def test_targeted_dlr_names_how_many_classes_it_needs() -> None:
    model, images, labels = linear_problem(classes=3)
    with pytest.raises(UserError, match="APGD-T .* at least 4 classes, but the model has 3"):
        run_attack(build_attack(TargetedAPGDConfig("apgd_t", "linf")), model, images, labels, epsilon=0.01)
