"""Minimal norms: searches that converge, one smallest norm over all attacks, and a report of where they differ."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose_train
from real_data import data_cache, real_arrays
from synthetic import study_tables
from test_attacks import linear_problem, minimal_norms
from test_claims import _claim, _group, _landing, _timing
from test_sanity import suite
from torch import Tensor, nn

from drs.attack_config import (
    APGDConfig,
    AttackConfig,
    CWConfig,
    FABConfig,
    FMNFromStartConfig,
    ProjectedConfig,
    TargetedAPGDConfig,
    TargetedFABConfig,
    TransferConfig,
    check_attack,
)
from drs.attacks import build_attack, run_attack
from drs.attacks.carlini_wagner import _Clipped
from drs.attacks.minimal_norm import SMALLEST_START, _misclassified, adversarial_starts
from drs.attacks.objectives import FAMILIES
from drs.cells import Cell
from drs.claims import decide_claims
from drs.config import PROJECT_ROOT
from drs.convergence import is_unconverged, missed_share
from drs.correlation import correlation_table
from drs.data import load_test_split
from drs.errors import UserError
from drs.minimal_norms import median_norm, norm_rows, smallest_outcome
from drs.report_norms import norms_section
from drs.runs import RunFolder
from drs.suite_config import UNBOUNDED, Epsilon
from drs.verdicts import PRIMARY_WEIGHT

MODELS = PROJECT_ROOT / "results" / "reference" / "laptop" / "models"
RADIUS = Epsilon(1.0, "1.0")
"""The larger of the decisive L2 radii of the digits."""
FIXED = ProjectedConfig("projected", "l2", objectives=["margin"])
FMN = FMNFromStartConfig("fmn_from_start", "l2")
CW = CWConfig("cw", "l2")


# --- The searches


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_are_misclassified_and_no_further_than_the_next_ball_after_the_boundary(norm: str) -> None:
    model, images, labels = linear_problem(classes=4)
    distances = minimal_norms(model, images, labels, norm)
    starts, radii = adversarial_starts(model, images, labels, norm, 10)
    assert radii.isfinite().all() and (model(starts).argmax(1) != labels).all()
    difference = (starts - images).flatten(1).double()
    norms = torch.linalg.vector_norm(difference, ord=math.inf if norm == "linf" else 2, dim=1)
    first = SMALLEST_START * (1.0 if norm == "linf" else images[0].numel() ** 0.5)
    assert (norms >= 0.999 * distances).all()
    assert (norms <= torch.maximum(1.55 * distances, torch.tensor(first))).all()
    assert (norms <= radii + 1e-5).all()


def test_starts_go_towards_the_class_that_is_asked_for_and_leave_out_the_smaller_balls() -> None:
    model, images, labels = linear_problem(classes=4)
    with torch.no_grad():
        clean = model(images)
    order = clean.scatter(1, labels.unsqueeze(1), -math.inf).argsort(1, descending=True)
    objectives = list(FAMILIES["targeted_margin"](clean, labels))
    nearest, _ = adversarial_starts(model, images, labels, "l2", 10)
    for rank, objective in enumerate(objectives):
        starts, radii = adversarial_starts(model, images, labels, "l2", 10, objective)
        assert radii.isfinite().all()
        # Another class may be crossed on the way to one that is further off.
        towards, by_margin = ((model(found).argmax(1) == order[:, rank]).sum() for found in (starts, nearest))
        assert towards > by_margin or (rank == 0 and towards > 0.9 * len(images))
    least = torch.where(torch.arange(len(images)) % 2 == 0, 4.0, 0.0)
    _, bounded = adversarial_starts(model, images, labels, "l2", 10, objectives[0], least)
    _, free = adversarial_starts(model, images, labels, "l2", 10, objectives[0])
    assert (bounded[::2] >= 4.0).all() and torch.equal(bounded[1::2], free[1::2])


class Detour(nn.Module):
    """Three classes on two pixels: from the centre class 1 has the larger logit but is further off than class 2."""

    def forward(self, images: Tensor) -> Tensor:
        x, y = images[:, 0, 0, 0] - 0.5, images[:, 0, 0, 1] - 0.5
        return torch.stack([torch.zeros_like(x), 0.5 * x - 0.15, 5.0 * y - 0.5], dim=1)


@pytest.mark.parametrize(
    "config",
    [
        FMNFromStartConfig("fmn_from_start", "l2", steps=60),
        FMNFromStartConfig("fmn_from_start", "linf", steps=60),
        CWConfig("cw", "l2", binary_search_steps=5, steps=50, step_sizes=[0.05]),
    ],
    ids=["fmn_l2", "fmn_linf", "cw"],
)
def test_a_second_search_finds_the_boundary_to_the_class_that_is_nearer_but_not_the_runner_up(
    config: FMNFromStartConfig | CWConfig,
) -> None:
    images, labels = torch.full((2, 1, 1, 2), 0.5), torch.zeros(2, dtype=torch.int64)
    outcome = run_attack(build_attack(config), Detour().eval(), images, labels)
    assert (outcome.logits.argmax(1) == 2).all()
    assert (outcome.distance / 0.1 < 1.05).all() and (outcome.distance / 0.1 > 0.999).all()
    once = run_attack(build_attack(replace(config, targets=1)), Detour().eval(), images, labels)
    assert (once.logits.argmax(1) == 1).all(), "one search goes to the runner-up; the config says how many there are"
    more = run_attack(build_attack(replace(config, targets=9)), Detour().eval(), images, labels)
    assert torch.equal(more.distance, outcome.distance), "there are two other classes only"


def test_a_search_without_any_start_leaves_the_image_as_it_is() -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([2.0, 0.0]) + 0 * images.flatten(1)[:, :1]

    images, labels = torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    for config in (
        FMNFromStartConfig("fmn_from_start", "l2", steps=5),
        CWConfig("cw", "l2", binary_search_steps=2, steps=5),
    ):
        outcome = run_attack(build_attack(config), Constant().eval(), images, labels)
        assert (outcome.logits.argmax(1) == 0).all() and (outcome.distance == 0).all(), config.kind


def test_a_start_that_another_batch_size_rounds_back_is_left_out() -> None:
    """foolbox refuses a whole batch for one start that the model gets right in it."""
    asked: list[int] = []

    class Rounding(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            asked.append(len(images))
            limit = 0.3 if len(images) < 4 else 0.1
            score = images.flatten(1)[:, 0] - limit
            return torch.stack([-score, score], dim=1)

    starts = torch.tensor([0.05, 0.2, 0.5, 0.9]).view(4, 1, 1, 1)
    left = _misclassified(Rounding(), starts, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert left.tolist() == [2, 3]
    assert asked == [4, 3, 2], "the rest is asked again until all of it is misclassified in one batch"


def test_cw_sees_clipped_images_and_a_gradient_beyond_the_pixel_range_too() -> None:
    """Without it a pixel that has left the range would never come back."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.tensor([-0.05, 0.0, 0.5, 1.08]).view(1, 1, 2, 2).requires_grad_()
    logits = _Clipped(linear)(images)
    torch.testing.assert_close(logits, linear(images.detach().clamp(0, 1)))
    (gradient,) = torch.autograd.grad(logits[0, 0], images)
    assert torch.equal(gradient.flatten(), linear[1].weight[0])


@pytest.mark.parametrize("distance", [1.0, 0.02])
def test_cw_moves_pixels_that_are_exactly_0_or_1_and_finds_small_norms_too(distance: float) -> None:
    """A linear model on a corner of the pixel cube: the shortest way leads inwards, so its length is the distance."""
    generator = torch.Generator().manual_seed(0)
    image = (torch.rand(1, 1, 8, 8, generator=generator) > 0.5).float()
    weight = (1 - 2 * image.flatten()) * (0.5 + torch.rand(64, generator=generator))
    linear = nn.Linear(64, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([-weight, weight]))
        shift = weight @ image.flatten() + distance * weight.norm()
        linear.bias.copy_(torch.stack([shift, -shift]))
    attack = build_attack(CWConfig("cw", "l2", binary_search_steps=6, steps=50))
    outcome = run_attack(attack, nn.Sequential(nn.Flatten(), linear).eval(), image, torch.zeros(1, dtype=torch.int64))
    assert outcome.logits.argmax() == 1
    assert 0.999 < float(outcome.distance) / distance < 1.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CWConfig("cw", "l2", step_sizes=[0.02, 0.0]), r"suite\.attacks\.a\.step_sizes=0\.0: must be above 0"),
        (CWConfig("cw", "l2", step_sizes=[]), r"suite\.attacks\.a\.step_sizes=\[\]: needs at least one"),
        (
            FMNFromStartConfig("fmn_from_start", "l2", start_steps=0),
            r"suite\.attacks\.a\.start_steps=0: must be above 0",
        ),
        (FMNFromStartConfig("fmn_from_start", "l2", targets=0), r"suite\.attacks\.a\.targets=0: must be above 0"),
        (CWConfig("cw", "l2", targets=0), r"suite\.attacks\.a\.targets=0: must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(config: AttackConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_attack("suite.attacks.a", config)


# --- On a trained convolutional network, whose decision boundaries are not those of a toy

N = 100
"""Images, so that one of them is a point."""
SLOW = ("linf", "ce")
SECOND: dict[str, AttackConfig] = {
    "cross-entropy": ProjectedConfig("projected", "linf", objectives=["ce"], steps=60, restarts=3),
    "margin": ProjectedConfig("projected", "linf", objectives=["targeted_margin"], steps=40),
    "margin in L2": ProjectedConfig(
        "projected", "l2", objectives=["margin", "ce"], steps=60, restarts=3, relative_step_size=0.5
    ),
    "FAB": FABConfig("fab", "linf", steps=40, final_steps=0),
}
RADII = {"l2": 1.5, "linf": 0.1}
SAME_RADIUS: dict[str, dict[str, tuple[AttackConfig, str]]] = {
    # Each with what solves the same problem; they may differ by a point, a single image of 100. scripts/agreement.py
    # compares more images, at the suite's settings. FAB has a second implementation of its own: both stop short
    # of the smallest norms, by more than a point.
    "l2": {
        "FMN": (FMNFromStartConfig("fmn_from_start", "l2", steps=60), "margin in L2"),
        "CW": (CWConfig("cw", "l2", binary_search_steps=5, steps=60, step_sizes=[0.05]), "margin in L2"),
    },
    "linf": {
        "APGD-CE": (APGDConfig("apgd_ce", "linf", steps=100, restarts=3), "cross-entropy"),
        "APGD-T": (TargetedAPGDConfig("apgd_t", "linf", steps=40), "margin"),
        "FAB-T": (TargetedFABConfig("fab_t", "linf", steps=40), "FAB"),
        "FMN": (FMNFromStartConfig("fmn_from_start", "linf", steps=100), "margin"),
    },
}


@functools.cache
def lenet(loss: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a published LeNet, and MNIST's first test images in the fixed order with their labels."""
    real_arrays("mnist", fetch=True)
    data, _ = load_test_split("mnist", n=N, cache=data_cache())
    return RunFolder(MODELS / f"mnist-lenet-{loss}").load_model(torch.device("cpu")), data.pixels(), data.labels


def percent_standing(config: AttackConfig, loss: str, epsilon: float) -> float:
    model, images, labels = lenet(loss)
    outcome = run_attack(build_attack(config), model, images, labels, epsilon=epsilon)
    right = outcome.logits.argmax(1) == labels
    return 100 * float((right | (outcome.distance > epsilon + 1e-6)).double().mean())


@functools.cache
def reference(loss: str, norm: str, second: str) -> float:
    """Return what an attack of this project leaves standing, in %."""
    return percent_standing(SECOND[second], loss, RADII[norm])


@pytest.mark.parametrize(
    ("norm", "name", "loss"),
    [
        pytest.param(norm, name, loss, marks=[pytest.mark.slow] if name == "FAB-T" or (norm, loss) == SLOW else [])
        for norm, own in SAME_RADIUS.items()
        for name in own
        for loss in ("ce", "dr_softmax")
    ],
)
def test_library_attacks_agree_with_ours_on_a_trained_network(norm: str, name: str, loss: str) -> None:
    config, second = SAME_RADIUS[norm][name]
    expected = reference(loss, norm, second)
    assert 20 < expected < 80, "a radius at which nearly all stand or fall compares nothing"
    assert abs(percent_standing(config, loss, RADII[norm]) - expected) <= 1 + 1e-9


# --- The smallest norm over all attacks


def made_up(
    **attacks: tuple[AttackConfig, Epsilon, list[float]],
) -> tuple[list[Cell], dict[Path, dict[str, np.ndarray]]]:
    """Return cells and arrays of a model with label 0 everywhere: clean, and attacks that need these norms.

    NaN is an image that the attack did not fool. The last image is wrong when clean.
    """
    train, run = compose_train("data=digits", "model=mlp"), RunFolder(Path("run"))
    n = max(len(norms) for *_, norms in attacks.values())
    clean = Cell(run, train, "clean", None, UNBOUNDED, n, 10, Path("clean"))
    planned, arrays = [clean], {clean.path: _arrays([math.nan] * (n - 1) + [0.0], 0)}
    for number, (name, (config, epsilon, norms)) in enumerate(attacks.items(), start=1):
        after = tuple(cell for cell in planned if cell.attack == "transfer") if config.standing_only else ()
        planned.append(Cell(run, train, name, config, epsilon, len(norms), 10, Path(name), after=after))
        arrays[planned[-1].path] = _arrays(norms, number)
    return planned, arrays


def _arrays(norms: list[float], number: int) -> dict[str, np.ndarray]:
    """The logit of class 1 is the number of the attack where it fooled the model."""
    fooled = ~np.isnan(norms)
    logits = np.stack([np.zeros(len(norms)), np.where(fooled, number + 1.0, -1.0)], axis=1)
    return {
        "indices": np.arange(len(norms)), "labels": np.zeros(len(norms), dtype=int), "logits": logits,
        "distance": np.nan_to_num(np.array(norms)),
    }  # fmt: skip


NAN = math.nan


def test_smallest_norm_is_taken_over_every_attack_that_saw_the_image() -> None:
    planned, arrays = made_up(
        fmn_l2=(FMN, UNBOUNDED, [1.4, 1.4, 1.4, NAN, 0.0]),
        margin_pgd_l2=(FIXED, RADIUS, [NAN, 0.9, NAN, NAN, 0.0]),
        cw=(CW, UNBOUNDED, [0.5, 1.5]),
        pgd=(ProjectedConfig("projected", "linf"), Epsilon(0.1, "0.1"), [0.1, 0.1, 0.1, 0.1, 0.0]),
    )
    found = smallest_outcome(planned, arrays, "l2")
    assert found is not None
    assert found["distance"].tolist() == [0.5, 0.9, 1.4, 0.0, 0.0]
    assert found["logits"].argmax(1).tolist() == [1, 1, 1, 0, 1], "what nothing felled keeps its clean logits"
    assert found["logits"][:3, 1].tolist() == [4, 3, 2], "the logits are those of the attack with the smallest norm"
    assert median_norm(found) == 0.9 and median_norm(found, 2) == pytest.approx(0.7)
    assert median_norm(_arrays([NAN, NAN, 1.0], 1)) == math.inf, "what was not felled counts as infinite"
    assert smallest_outcome(planned, arrays, "linf") is None, "nothing searched in this norm"


def test_what_only_some_models_have_does_not_count() -> None:
    """A transfer attack needs a twin; an attack on what it left standing rests on it."""
    after = ProjectedConfig("projected", "l2", objectives=["ce"], decisive=True, standing_only=True)
    planned, arrays = made_up(
        fmn_l2=(FMN, UNBOUNDED, [1.4, 1.4]),
        transfer=(TransferConfig("transfer", "l2"), RADIUS, [0.5, NAN]),
        later=(after, RADIUS, [0.5, 0.5]),
    )
    found = smallest_outcome(planned, arrays, "l2")
    assert found is not None and found["distance"].tolist() == [1.4, 0.0]
    assert {row["n_missed"] for row in norm_rows(planned, arrays, suite())} == {0}


def test_missed_are_the_images_that_fall_at_a_radius_which_the_search_says_is_too_small() -> None:
    planned, arrays = made_up(
        fmn_l2=(FMN, UNBOUNDED, [1.4, 1.4, 0.8, NAN, 0.0]),
        margin_pgd_l2=(FIXED, RADIUS, [NAN, 0.9, NAN, 0.5, 0.0]),
        cw=(CW, UNBOUNDED, [0.9, 0.9, NAN]),
    )
    rows = {(row["attack"], row["epsilon_label"]): row for row in norm_rows(planned, arrays, suite())}
    fmn, cw = rows["fmn_l2", "1.0"], rows["cw", "1.0"]
    assert (fmn["n_fixed"], fmn["n_missed"], fmn["missed"]) == (5, 2, 0.4)
    assert (fmn["median"], fmn["median_smallest"], fmn["n"]) == (1.4, 0.8, 5)
    assert (cw["n_fixed"], cw["n_missed"], cw["n"]) == (3, 0, 3)
    assert (cw["median"], cw["median_smallest"]) == (0.9, 0.9), "both over the images that the search saw"
    elsewhere = rows["fmn_l2", "0.5"]
    assert elsewhere["n_fixed"] == 0 and math.isnan(elsewhere["missed"]), "no attack has that radius"


# --- What the claims and the report say of them


@pytest.mark.parametrize(("missed", "n", "says"), [(1, 16, False), (2, 16, True), (3, 100, False), (4, 100, True)])
def test_a_search_is_not_converged_above_three_points_and_never_for_a_single_image(
    missed: int, n: int, says: bool
) -> None:
    rows = pd.DataFrame({"n_fixed": [n - 6, 6], "n_missed": [missed, 0]})
    assert missed_share(rows) == missed / n
    assert is_unconverged(rows) is says
    assert not is_unconverged(rows.assign(n_fixed=0, n_missed=0)), "nothing was compared"


def _searches(missed: int, n: int = 20) -> pd.DataFrame:
    rows = [
        {"data": "mnist", "model": "lenet", "loss": loss, "loss_weight": weight, "attack": attack, "n": images,
         "n_fixed": images, "n_missed": missed if (attack, loss) == ("fmn_l2", "ce") else 0, "excluded": ""}
        for loss, weight in (("ce", 0.0), ("dr_softmax", PRIMARY_WEIGHT))
        for attack, images in (("cw", n), ("fmn_l2", 100))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _evidence(searches: pd.DataFrame, cw: float, fmn: float) -> str:
    models = _group(0.03, 0.03, noise=1e-6)
    ours = models["loss_weight"] == PRIMARY_WEIGHT
    for column, change in (("norm.cw", cw), ("norm.fmn_l2", fmn), ("norm.smallest_l2", 0.25)):
        models[column] = 1.0 + change * ours + 1e-6 * models["seed"] * ours
    claims = decide_claims(
        models, correlation_table(models, n_bootstrap=20, n_permutations=19), _timing(), _landing(),
        strong_suite=True, minimal_norms=searches,
    )  # fmt: skip
    return str(_claim(claims, "C2")["evidence"])


def test_evidence_of_robustness_leads_with_the_smallest_norm_and_says_what_contradicts_it() -> None:
    text = _evidence(_searches(missed=12), cw=0.2, fmn=-0.3)
    assert "minimal norm: smallest L2 found by any attack +0.25" in text
    assert "L2 by CW (20 images) +0.20" in text and "L2 by FMN -0.30" in text
    assert "CW and FMN contradict each other, so that only the smallest norm found counts" in text
    assert "fells images that it says need more" in text and "L2 by FMN on cross-entropy (12.0 % of the images)" in text
    assert "L2 by CW on" not in text


def test_evidence_of_norms_that_agree_has_no_reservation() -> None:
    text = _evidence(_searches(missed=2, n=100), cw=0.2, fmn=0.3)
    assert "contradict" not in text and "need more" not in text
    assert "L2 by CW +0.20" in text, "no search saw fewer images than another"


def test_report_has_each_search_beside_the_smallest_norm_and_names_those_that_did_not_converge() -> None:
    tables = study_tables()
    text = norms_section(tables["minimal_norms"])
    mnist = text.split("### mnist/lenet")[1].split("###")[0]
    cifar = text.split("### cifar10/smallcnn")[1].split("###")[0]
    assert "| CW |" in mnist and "1.50 ± 0.00" in mnist and "1.25 ± 0.00" in mnist and "**10.0**" in mnist
    label = tables["minimal_norms"].query("data == 'mnist'")["epsilon_label"].iloc[0]
    assert f"Not converged: CW on CE at ε = {label} (10.0 %)." in mnist
    assert "Every search agrees with the attacks at a fixed radius to within 3 points." in cifar
    assert "No attack looked for minimal perturbations." in norms_section(tables["minimal_norms"].iloc[:0])
    few = norms_section(tables["minimal_norms"].assign(n=2))
    assert "1.50" not in few and "n = 2" in few, "a median over two images is not printed"
