"""Attacks of a second library beside the suite's: the same problem, and the same answer on it."""

import importlib

import numpy as np
import pytest
import torch
from test_attacks import linear_problem, minimal_norms
from torch import Tensor, nn

from drs import agreement
from drs.agreement import FIXED_CW, INSIDE, SHIFT, SOUND_CW, WIDE_CW, agreement_table, compare
from drs.attack_config import CWTorchattacksConfig, HopSkipJumpConfig, SquareConfig
from drs.attacks import Attack, AttackOutcome, build_attack, run_attack, second_library
from drs.attacks.second_library import (
    ArtHopSkipJump,
    ArtSquare,
    FoolboxCarliniWagner,
    ShiftedLogits,
    SoundCarliniWagner,
)
from drs.benchmarks.peers import MODULES, is_installed
from drs.data import LabelledImages
from drs.suite_config import SuiteConfig

Digits = tuple[LabelledImages, LabelledImages, LabelledImages]
needs_art = pytest.mark.skipif(not is_installed(MODULES["ART"]), reason="ART is not installed")
CW = CWTorchattacksConfig("cw_torchattacks", "l2", c=1.0, steps=60, learning_rate=0.05)
SETTINGS = (CW.c, CW.confidence, CW.steps, CW.learning_rate)


def _standing(outcome: AttackOutcome, labels: Tensor) -> float:
    return 100 * float((outcome.logits.argmax(dim=1) == labels).double().mean())


@needs_art
def test_square_of_two_libraries_leaves_as_much_standing(digits_model: nn.Module, digits: Digits) -> None:
    images, labels = digits[2].pixels()[:200], digits[2].labels[:200]
    shares = torch.zeros(2, 3)
    for seed in range(3):
        ours = build_attack(SquareConfig("square", "linf", n_queries=100, seed=seed))
        for row, attack in enumerate((ours, ArtSquare(n_queries=100, restarts=1, seed=seed))):
            found = run_attack(attack, digits_model, images, labels, epsilon=0.1, seed=seed)
            shares[row, seed] = _standing(found, labels)
            assert found.distance.max() <= 0.1 + 1e-6
    assert shares.min() > 10 and shares.max() < 90, "where nearly all stand or fall nothing is compared"
    assert (shares[0] - shares[1]).abs().max() <= 1, shares
    assert shares[0].max() - shares[0].min() > 1, "other draws than the same would not do"


@needs_art
def test_square_of_art_repeats_itself_and_leaves_generators_and_numpy_alone(
    digits_model: nn.Module, digits: Digits
) -> None:
    images, labels = digits[2].pixels()[:40], digits[2].labels[:40]
    module = importlib.import_module("art.attacks.evasion.square_attack")
    np.random.seed(3)
    torch.manual_seed(3)
    expected = float(np.random.random()), float(torch.rand(()))
    np.random.seed(3)
    torch.manual_seed(3)
    first, again, other = (
        run_attack(ArtSquare(20, 1, seed), digits_model, images, labels, epsilon=0.1).logits for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (float(np.random.random()), float(torch.rand(()))) == expected
    assert module.np is np


@needs_art
def test_hop_skip_jump_of_two_libraries_ends_on_the_boundary_near_the_smallest_norm() -> None:
    model, images, labels = linear_problem(classes=2, n=10)
    exact = minimal_norms(model, images, labels, "linf")
    config = HopSkipJumpConfig("hop_skip_jump", "linf", steps=10, initial_gradient_eval_steps=50)
    ratios = []
    for attack in (build_attack(config), ArtHopSkipJump(10, 50, 10000)):
        found = run_attack(attack, model, images, labels)
        assert (found.logits.argmax(dim=1) != labels).all()
        # The margin of a linear model falls in proportion to a move: at the boundary it is all but gone.
        left = (found.logits[:, 0] - found.logits[:, 1]).abs()
        with torch.no_grad():
            clean = model(images)
        assert (left / (clean[:, 0] - clean[:, 1]).abs()).max() < 5e-3
        ratios.append(float((found.distance / exact).median()))
    assert all(1 <= ratio < 1.3 for ratio in ratios) and abs(ratios[0] / ratios[1] - 1) < 0.1, ratios


def _distances(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> Tensor:
    found = run_attack(attack, model, images, labels, batch_size=batch_size)
    return found.distance.masked_fill(found.logits.argmax(dim=1) == labels, torch.inf)


def test_cw_of_two_libraries_finds_the_same_image_by_image_where_no_defect_bites(
    digits_model: nn.Module, digits: Digits
) -> None:
    """Each of the things that are set right is needed: without one of them the two differ."""
    images, labels = digits[2].pixels()[:100], digits[2].labels[:100]
    inside = INSIDE + (1 - 2 * INSIDE) * images
    raised, lowered = ShiftedLogits(digits_model, SHIFT), ShiftedLogits(digits_model, -SHIFT)
    sound, foolbox = SoundCarliniWagner(*SETTINGS), FoolboxCarliniWagner(*SETTINGS)

    def apart(attack: Attack, model: nn.Module, n: int = 100, batch_size: int = 500) -> float:
        """Return the share of images on which norms differ by more than 1 %, or which only one of the two fools."""
        ours, theirs = (_distances(one, model, inside[:n], labels[:n], batch_size) for one in (attack, foolbox))
        return float((~torch.isclose(ours, theirs, rtol=0.01)).double().mean())

    fooled = _distances(foolbox, raised, inside, labels).isfinite().double().mean()
    assert fooled > 0.3, "where little falls nothing is compared"
    assert apart(sound, raised) == 0
    assert apart(sound, lowered) > 0.2, "the label's mask"
    assert apart(sound, raised, 8, 2) == 0
    assert apart(build_attack(CW), raised, 8, 2) > 0, "the early stop"


def test_cw_is_compared_where_it_is_sound_for_agreement_and_as_the_suite_runs_it_for_strength(
    digits_model: nn.Module, digits: Digits
) -> None:
    images, labels = digits[2].pixels()[:100], digits[2].labels[:100]
    suite = SuiteConfig("small", {"cw_torchattacks": CW}, {"toy": {"l2": [0.7]}}, {"default": 10})
    first, second = compare("mlp", "toy", digits_model, images, labels, suite, ["cw_torchattacks"])
    assert (first.attack, first.second, first.required) == (SOUND_CW, FIXED_CW, True)
    assert (second.attack, second.second, second.required) == ("cw_torchattacks", WIDE_CW, False)
    assert first.agrees and 10 < first.standing[0] < 90
    assert second.difference > 5, "pixels at 0 and 1 do not move"
    inside = INSIDE + (1 - 2 * INSIDE) * images
    norms = _distances(FoolboxCarliniWagner(*SETTINGS), ShiftedLogits(digits_model, SHIFT), inside, labels)
    assert first.standing_second[0] == pytest.approx(100 * float((norms > 0.7).double().mean()))


@needs_art
def test_random_searches_are_averaged_over_seeds_and_a_costly_one_sees_some_images(
    digits_model: nn.Module, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(agreement.CHANGES, "square", {"n_queries": 30})
    monkeypatch.setitem(agreement.CHANGES, "hop_skip_jump", {})
    monkeypatch.setitem(agreement.IMAGES, "hop_skip_jump", 6)
    monkeypatch.setitem(agreement.SEEDS, "hop_skip_jump", 6)
    attacks = {
        "square": SquareConfig("square", "linf", n_samples=5, n_queries=10**9),
        "hop_skip_jump": HopSkipJumpConfig("hop_skip_jump", "linf", steps=4, initial_gradient_eval_steps=20),
    }
    suite = SuiteConfig("small", attacks, {"toy": {"linf": [0.1]}}, {"default": 10})
    images, labels = digits[2].pixels()[:60], digits[2].labels[:60]
    square, hop = compare("mlp", "toy", digits_model, images, labels, suite, ["square", "hop_skip_jump"])
    assert (square.n, len(square.standing), len(square.standing_second), square.medians) == (60, 3, 3, None)
    assert len({*square.standing, *square.standing_second}) > 1, "each seed draws for itself"
    assert (hop.n, len(hop.standing), len(hop.standing_second)) == (6, 6, 6) and hop.medians is not None
    hop_skip_jump = build_attack(attacks["hop_skip_jump"])
    found = [run_attack(hop_skip_jump, digits_model, images[:6], labels[:6], seed=seed).distance for seed in range(6)]
    assert hop.medians[0] == pytest.approx(sum(float(one.median()) for one in found) / 6)
    assert not torch.equal(found[0], found[1]), "each seed draws for itself"
    assert agreement_table([square]).splitlines()[2].count(" to ") == 2
    assert " / " in agreement_table([hop]).splitlines()[2].split("|")[-2]


def test_art_draws_by_torch_s_seed_and_leaves_numpy_s_generator_alone() -> None:
    before, drawn = np.random.get_state()[1].copy(), []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        with second_library._NumpySeed():
            drawn.append(float(np.random.random()))
    assert drawn[0] == drawn[2] != drawn[1]
    assert (np.random.get_state()[1] == before).all()


@needs_art
def test_art_takes_the_radius_of_its_noise_from_the_sample_that_it_puts_the_noise_on() -> None:
    """As ART has it, the first radius after a step is that of the step's end, which the search then moves inwards."""
    model, images, _ = linear_problem(classes=3)
    attack = importlib.import_module("art.attacks.evasion").HopSkipJump(
        second_library._art_classifier(model, images), norm=np.inf, verbose=False
    )
    taken: list[float] = []
    attack._compute_update = lambda **given: taken.append(given["delta"])
    attack.curr_iter = 1
    second_library._measure_noise_at_boundary(attack)
    original, far, near = np.zeros(3), np.full(3, 0.4), np.full(3, 0.1)
    bounds = {"clip_min": 0.0, "clip_max": 1.0}
    asked = attack._compute_delta(current_sample=far, original_sample=original, **bounds)
    attack._compute_update(current_sample=near, num_eval=1, delta=asked, target=0, mask=None, **bounds)
    assert taken == [pytest.approx(asked / 4)]
