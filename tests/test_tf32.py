"""Attacks that search in TF32: the search alone is less precise, and cells and report say so."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import compose_train
from test_attacks import PGD, linear_problem
from torch import Tensor, nn

from drs.attack_config import PGDConfig, SanityConfig
from drs.attacks import build_attack, run_attack
from drs.cells import Cell, plan_cells
from drs.filling import fill_cell
from drs.report_text import scoring_section
from drs.runs import RunFolder
from drs.suite_config import Epsilon, SuiteConfig

SUITE = SuiteConfig(
    "tiny", {"pgd": PGDConfig("pgd", "linf", steps=2)}, {"digits": {"linf": [0.1]}}, {"default": 20},
    sanity=SanityConfig(n_samples=20, steps=2, restarts=1),
)  # fmt: skip


class Watched(nn.Module):
    """A model that notes, for each pass, whether it may be in TF32 and whether a gradient is asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.passes: list[tuple[bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        allowed = {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}
        assert len(allowed) == 1, "convolutions and products are in the same precision"
        self.passes.append((allowed.pop(), torch.is_grad_enabled() and images.requires_grad))
        return self.model(images)


@pytest.mark.parametrize("tf32", [False, True])
def test_only_the_search_is_in_tf32_and_only_where_it_is_asked_for(tf32: bool) -> None:
    linear, images, labels = linear_problem(classes=3)
    model = Watched(linear).eval()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    run_attack(build_attack(PGD), model, images, labels, epsilon=0.02, tf32=tf32)
    assert {allowed for allowed, searching in model.passes if searching} == {tf32}
    assert {allowed for allowed, searching in model.passes if not searching} == {False}, "what is judged is float32"
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_cells_in_tf32_have_names_of_their_own_but_for_those_that_do_not_search(tmp_path: Path) -> None:
    train = compose_train("data=digits", "model=mlp")
    run = RunFolder(tmp_path / "run")
    plain, fast = (plan_cells(run, replace(SUITE, tf32=tf32), {run: train}) for tf32 in (False, True))
    same = {one.attack for one, other in zip(plain, fast, strict=True) if one.path == other.path}
    assert same == {"clean", "sanity"}
    assert {cell.attack for cell in fast if cell.tf32} == {"pgd"}


@pytest.mark.parametrize("tf32", [False, True])
def test_a_cell_is_computed_as_it_says(tmp_path: Path, digits_model: nn.Module, tf32: bool) -> None:
    train = compose_train("data=digits", "model=mlp", f"data.cache={tmp_path}/data")
    model = Watched(digits_model).eval()
    config = PGDConfig("pgd", "linf", steps=2)
    cell = Cell(
        RunFolder(tmp_path / "run"), train, "pgd", config, Epsilon(0.1, "0.1"), 20, 20, tmp_path / "a.npz", tf32=tf32
    )
    fill_cell(cell, model, torch.device("cpu"))
    assert {allowed for allowed, searching in model.passes if searching} == {tf32}


def test_report_says_that_attacks_searched_in_tf32() -> None:
    assert "TF32" in scoring_section({"tf32": True}, {})
    assert "searched" not in scoring_section({}, {})
