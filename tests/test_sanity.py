"""Sanity checks and worst cases from arrays made by hand, and the cascade that attacks only what still stands."""

import functools
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose_train
from hydra import compose, initialize_config_dir
from scipy.stats import binomtest
from torch import nn

from drs.array_files import load_arrays_file
from drs.attack_config import ConvergenceConfig, NoiseConfig, PGDConfig, ProjectedConfig, SanityConfig, SquareConfig
from drs.attacks import build_attack, probes, run_attack
from drs.attacks.projected import ProjectedAttack
from drs.cells import Cell, find_twin, plan_cells, standing_at
from drs.config import PROJECT_ROOT, TrainConfig, evaluate_config, fingerprint
from drs.data import LabelledImages
from drs.figure_style import wilson_interval
from drs.filling import fill_cell, load_test
from drs.model_rows import read_model, worst_case
from drs.report_checks import sanity_section
from drs.runs import RunFolder, run_folder
from drs.sanity import failed_checks, probe_figures, sanity_rows
from drs.sanity_checks import CHECKS, unseen_share
from drs.suite_config import UNBOUNDED, Epsilon, SuiteConfig
from drs.sweeper import register_plugins
from drs.training import train

N = 100
EPSILON = Epsilon(0.1, "0.1")


@functools.cache
def suite(*overrides: str) -> SuiteConfig:
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return evaluate_config(compose("evaluate", ["suite=strong", *overrides])).suite


def arrays(standing: np.ndarray, **more: np.ndarray) -> dict[str, np.ndarray]:
    """Two classes, label 0, distance 0.05 where an attack has moved a sample."""
    logits = np.where(standing[:, None], [[1.0, 0.0]], [[0.0, 1.0]])
    distance = np.where(standing, 0.0, 0.05)
    return {"logits": logits, "labels": np.zeros(len(standing), int), "distance": distance, **more}


PROBES = ["clean", "epsilon_0", "ce", "ce_best", "ce_last", "ce_climbs", "margin", "margin_climbs", "targeted",
          "more_steps", "more_restarts", "scaled_0.1", "scaled_10", "normalised", "shifted", "large",
          "unbounded"]  # fmt: skip


def judged(
    probes: dict[str, int] | None = None, gradients: Any = 1.0, names: list[str] = PROBES,
    convergence: tuple[int, int, int, int] | None = None, **attacks: np.ndarray,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Judge a made-up model: a probe leaves as many of the first samples standing as it says.

    ``convergence`` is so many samples, and how many of them stand PGD, and it with more steps and with more restarts.
    """
    counts = {"clean": N, "epsilon_0": N, "large": 5, "unbounded": 0} | (probes or {})
    standing = np.stack([np.arange(N) < counts.get(name, 40) for name in names])
    run, config = RunFolder(Path("run")), compose_train("data=digits", "model=mlp")

    def cell(name: str, settings: object, epsilon: Epsilon = EPSILON, after: tuple[Cell, ...] = ()) -> Cell:
        return Cell(run, config, name, settings, epsilon, N, 10, Path(name + epsilon.label), after=after)  # type: ignore[arg-type]

    clean = cell("clean", None, UNBOUNDED)
    planned, found = [clean], {clean.path: arrays(np.ones(N, bool))}
    base = {"pgd": np.arange(N) < 40, "fgsm": np.arange(N) < 60} | attacks
    kinds = {"noise": NoiseConfig("noise", "linf"), "square": SquareConfig("square", "linf")}
    for name, own in base.items():
        after = (planned[1],) if name == "square" else ()
        planned.append(cell(name, kinds.get(name, PGDConfig("pgd", "linf")), after=after))
        attacked = found[planned[1].path]["logits"][:, 0] > 0.5 if name == "square" else np.ones(N, bool)
        found[planned[-1].path] = arrays(own, attacked=attacked)
    planned.append(cell("sanity", SanityConfig()))
    found[planned[-1].path] = {
        "standing": standing, "gradient_norm": np.where(np.arange(N) < 50, gradients, 1.0),
        "about": np.array(json.dumps({"probes": names})),
    }  # fmt: skip
    if convergence is not None:
        n, *left = convergence
        planned.append(cell("convergence", ConvergenceConfig(3, 1, 1.0, 500, 0)))
        about = np.array(json.dumps({"probes": ["margin", "more_steps", "more_restarts"]}))
        found[planned[-1].path] = {"standing": np.stack([np.arange(n) < count for count in left]), "about": about}
    return {row["check"]: row for row in sanity_rows(planned, found)}


def test_an_honest_model_passes_everything_that_was_run() -> None:
    rows = judged(noise=np.arange(N) < 95)
    assert {name for name, row in rows.items() if row["passed"] == "fail"} == set()
    assert {name for name, row in rows.items() if row["passed"] == "not run"} == {
        "square_not_stronger", "transfer_not_stronger",
    }  # fmt: skip
    assert list(rows) == list(CHECKS)
    assert failed_checks(list(rows.values())) == ""


@pytest.mark.parametrize(
    ("probes", "figures"),
    [
        ({"epsilon_0": 98}, {"eps0_equals_clean": 0.02}),
        ({"unbounded": 3}, {"unbounded_succeeds": 0.03}),
        ({"more_steps": 36}, {"more_steps": 0.04}),
        ({"more_steps": 41}, {"more_steps": 0.01}),
        ({"more_restarts": 36}, {"more_restarts": 0.04}),
        ({"more_restarts": 39}, {"more_restarts": 0.01}),
        ({"targeted": 35}, {"objective_gap": 0.05, "objective_spread": 0.05}),
        ({"targeted": 43}, {"objective_spread": 0.03}),
        ({"targeted": 42, "ce_climbs": 41, "margin_climbs": 39}, {"objective_spread": 0.03}),
        ({"margin_climbs": 36}, {"objective_gap": 0.04, "objective_spread": 0.04}),
        # What one climb finds is not compared with what nine find.
        ({"margin": 36, "more_steps": 36, "more_restarts": 36}, {}),
        ({"ce_climbs": 36, "margin_climbs": 36, "targeted": 36}, {}),
        ({"scaled_10": 30}, {"logit_shift_and_scale": 0.10, "logit_rescaling": 0.10}),
        ({"normalised": 30}, {"logit_shift_and_scale": 0.10, "logit_rescaling": 0.10}),
        ({"scaled_0.1": 39}, {"logit_rescaling": 0.01}),
        ({"scaled_0.1": 60}, {"logit_rescaling": 0.20}),
        ({"shifted": 30}, {"logit_shift_and_scale": 0.10, "logit_shift": 0.10}),
        ({"shifted": 41}, {"logit_shift": 0.01}),
        ({"ce_last": 41}, {"best_iterate": 0.01}),
        ({"large": 60}, {"falls_with_epsilon": 0.10}),
    ],
)  # fmt: skip
def test_a_probe_that_disagrees_either_way_fails_its_own_checks(
    probes: dict[str, int], figures: dict[str, float]
) -> None:
    rows = judged(probes)
    assert {name for name, row in rows.items() if row["passed"] == "fail"} == set(figures)
    for check, figure in figures.items():
        assert rows[check]["figure"] == pytest.approx(figure)


def test_images_that_change_both_ways_under_a_shift_do_not_make_up_for_each_other() -> None:
    standing = {name: np.arange(N) < 40 for name in PROBES}
    standing["shifted"] = (np.arange(N) < 41) & (np.arange(N) != 3)
    figures = probe_figures(standing, np.ones(N))
    assert figures["logit_shift"][0] == pytest.approx(0.02)
    assert figures["logit_shift_and_scale"][0] == 0


@pytest.mark.parametrize(
    ("check", "largest", "smallest"),
    [
        ("more_steps", 0.0049, 0.005), ("more_restarts", 0.0049, 0.005),  # less than half a point
        ("objective_spread", 0.02, 0.0201), ("objective_gap", 0.02, 0.0201),  # up to two points
        ("logit_shift", 0.0, 0.001), ("logit_rescaling", 0.0, 0.001), ("eps0_equals_clean", 0.0, 0.001),  # nothing
        ("pgd_beats_fgsm", 0.0, 0.001), ("best_iterate", 0.0, 0.001), ("falls_with_epsilon", 0.0, 0.001),
        ("unbounded_succeeds", 0.01, 0.011),
    ],
)  # fmt: skip
def test_largest_figure_that_passes_and_smallest_that_fails(check: str, largest: float, smallest: float) -> None:
    assert CHECKS[check].passes(largest) and CHECKS[check].passes(largest + 1e-15)
    assert not CHECKS[check].passes(smallest)


def test_one_image_is_not_let_off_where_n_is_small() -> None:
    """Square ran on few images: one that falls is a tenth of them."""
    rows = judged({"clean": 40, "epsilon_0": 40}, gradients=np.where(np.arange(N) == 7, 0.0, 1.0))
    assert (rows["zero_gradient"]["figure"], rows["zero_gradient"]["n"]) == (pytest.approx(1 / 40), 40)
    assert rows["zero_gradient"]["passed"] == "fail"


def test_an_attack_that_gets_weaker_marks_no_model() -> None:
    """Margin PGD that finds less than cross-entropy does, or fewer falls on rescaled logits, overstates nothing."""
    rows = judged({"targeted": 60, "scaled_0.1": 70})
    assert {name for name, row in rows.items() if row["passed"] == "fail"} == {"objective_spread", "logit_rescaling"}
    assert failed_checks(list(rows.values())) == ""
    assert failed_checks(list(judged({"targeted": 30, "scaled_0.1": 30, "more_steps": 39}).values())) == (
        "more_steps;objective_gap;logit_shift_and_scale"
    )


def test_shares_of_images_carry_wilson_s_interval_and_differences_none() -> None:
    rows = judged({"epsilon_0": 97, "more_steps": 39})
    low, high = wilson_interval([0.03], [N])[:, 0]
    assert (rows["eps0_equals_clean"]["ci_low"], rows["eps0_equals_clean"]["ci_high"]) == pytest.approx((low, high))
    assert math.isnan(rows["more_steps"]["ci_low"]) and math.isnan(rows["square_not_stronger"]["ci_high"])


@pytest.mark.parametrize("n", [1, 10, 100, 1000])
def test_what_none_of_n_images_shows_is_bounded_by_wilson_s_interval(n: int) -> None:
    assert unseen_share(n) == pytest.approx(binomtest(0, n).proportion_ci(method="wilson").high)


def test_report_shows_n_and_threshold_of_every_check_and_which_subsets_are_too_small() -> None:
    made = [judged({"scaled_0.1": 60}), judged({"more_steps": 36, "clean": 30, "epsilon_0": 30})]
    named = {"data": "mnist", "model": "lenet", "loss": "ce", "loss_weight": 0.0, "excluded": ""}
    table = pd.DataFrame([{**named, "run_id": str(i), **row} for i in range(2) for row in made[i].values()])
    text = sanity_section(table)
    assert "| more_steps | 100 | 3.7 | < 0.5 | **1/2 (2.0)** |" in text
    assert "| objective_gap | 100 | 3.7 | ≤ 2 | 2/2 (0.0) |" in text
    assert "| logit_rescaling | 100 | 3.7 | 0 | **1/2 (10.0)** |" in text
    assert "| zero_gradient | 30 to 100 ‡ | 3.7 to 11.4 | ≤ 1 | 2/2 (0.0) |" in text
    assert "| square_not_stronger | – | – | ≤ 0.5 | not run |" in text
    assert "‡ So few images can only show gross masking: zero_gradient on 30 images (1 model)." in text
    assert "Neither objective_spread nor logit_rescaling marks a model" in text
    assert re.search(r"\| more_steps \| change of [^|]* \| < 0\.5 \|", text), "the threshold, beside what is checked"


def test_convergence_is_judged_on_images_of_its_own_where_there_are_some() -> None:
    """A hundred images let no image change within half a point; a thousand let four."""
    few = judged({"margin": 40, "more_steps": 39, "more_restarts": 40})
    assert (few["more_steps"]["passed"], few["more_steps"]["n"]) == ("fail", N)
    many = judged({"margin": 40, "more_steps": 39, "more_restarts": 40}, convergence=(1000, 400, 396, 395))
    for check, passed, figure in (("more_steps", "pass", 0.004), ("more_restarts", "fail", 0.005)):
        assert (many[check]["passed"], many[check]["n"]) == (passed, 1000)
        assert many[check]["figure"] == pytest.approx(figure)
    assert many["more_steps"]["detail"] == "margin 40.0 %, more_steps 39.6 %"
    others = [name for name in few if name not in ("more_steps", "more_restarts")]
    assert [many[name]["figure"] for name in others] == pytest.approx(
        [few[name]["figure"] for name in others], nan_ok=True
    )


def test_convergence_has_a_cell_of_its_own_and_leaves_the_other_checks_theirs() -> None:
    config, run = compose_train("data=digits", "model=mlp"), RunFolder(Path("run"))

    def checks(*overrides: str) -> dict[str, Cell]:
        cells = plan_cells(run, suite("suite=strong", *overrides), {run: config})
        return {cell.attack: cell for cell in cells if cell.attack in ("sanity", "convergence")}

    found, fewer, none = checks(), checks("suite.sanity.n_convergence=50"), checks("suite.sanity.n_convergence=null")
    assert found["convergence"].n == 500, "the test set has no more"
    assert fewer["convergence"].n == 50 and fewer["convergence"].path != found["convergence"].path
    assert set(none) == {"sanity"}
    assert none["sanity"].path == fewer["sanity"].path == found["sanity"].path
    assert found["convergence"].config == ConvergenceConfig(50, 1, 1.0, 500, 0)
    assert checks("suite.sanity.steps=9")["convergence"].path != found["convergence"].path


def test_convergence_is_what_the_probes_find_on_the_same_images(
    digits_model: nn.Module, digits: tuple[LabelledImages, ...]
) -> None:
    images, labels = digits[2].pixels()[:40], digits[2].labels[:40]
    settings = SanityConfig(steps=1, restarts=1, batch_size=16)
    expected = probes.run_probes(digits_model, images, labels, 0.1, settings)
    found, size = probes.run_convergence(digits_model, images, labels, 0.1, ConvergenceConfig(1, 1, 1.0, 16, 0))
    assert size == 16
    assert {name: standing.tolist() for name, standing in found.items()} == {
        name: expected.standing[name].tolist() for name in ("margin", "more_steps", "more_restarts")
    }


def test_restarts_of_cross_entropy_do_not_count_as_a_lost_iterate() -> None:
    """Another start finds what the one climb never saw, so its last iterate did not lose it."""
    assert judged({"ce": 30})["best_iterate"]["figure"] == 0
    assert judged({"ce_last": 44})["best_iterate"]["figure"] == pytest.approx(0.04)


def test_probes_that_are_compared_have_the_same_steps_and_climbs(
    digits_model: nn.Module, digits: tuple[LabelledImages, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int, int]] = []

    class Told(ProjectedAttack):
        def __init__(self, name: str, objectives: list[str], norm: str, steps: int, restarts: int, size: float) -> None:
            super().__init__(name, objectives, norm, steps, restarts, size)
            made.append((objectives[0], steps, restarts))

    monkeypatch.setattr(probes, "ProjectedAttack", Told)
    images, labels = digits[2].pixels()[:20], digits[2].labels[:20]
    found = probes.run_probes(digits_model, images, labels, 0.1, SanityConfig(steps=3, restarts=2))
    assert set(found.standing) == set(PROBES)
    attacks = [attack for attack in made if attack[0] != "margin"]
    # Ten classes: twice the nine targets, and as often on cross-entropy and on the margin.
    assert attacks == [("ce", 3, 2), ("ce", 3, 18), ("targeted_margin", 3, 2)] + [
        (name, 3, 2) for name in ("ce", "ce", "scaled_ce", "ce")
    ]
    count = len(made)
    probes.run_convergence(digits_model, images, labels, 0.1, ConvergenceConfig(3, 2, 1.0, 500, 0))
    assert made[count:] == [("margin", 3, 2), ("margin", 6, 2), ("margin", 3, 4)]
    bounded, climbing, longer, oftener, *wide = [attack for attack in made[1:count] if attack[0] == "margin"]
    assert (bounded[1:], climbing[1:], longer[1:], oftener[1:]) == ((3, 2), (3, 18), (6, 2), (3, 4))


def test_attacks_are_compared_sample_by_sample() -> None:
    other = np.arange(N) >= 60  # as many stand as under PGD, but others
    rows = judged(fgsm=other, noise=other, transfer=other)
    for check in ("pgd_beats_fgsm", "noise_weaker"):
        assert rows[check]["passed"] == "fail"
        assert rows[check]["figure"] == pytest.approx(0.4)
    assert rows["transfer_not_stronger"]["passed"] == "pass", "what FGSM breaks is broken by a gradient attack"
    assert judged(transfer=other)["transfer_not_stronger"]["figure"] == pytest.approx(0.4)
    square = judged(square=np.arange(N) < 30)
    assert square["square_not_stronger"]["passed"] == "fail"
    assert square["square_not_stronger"]["figure"] == pytest.approx(0.1)


def test_gradients_of_exactly_zero_are_counted() -> None:
    assert judged(gradients=0.0)["zero_gradient"]["figure"] == pytest.approx(0.5)
    assert judged(gradients=1e-30)["zero_gradient"]["passed"] == "pass"


def test_worst_case_is_per_sample_and_a_subset_only_adds() -> None:
    lists = [np.array([True, True, False, True]), np.array([False, True])]
    assert worst_case(lists, 4).tolist() == [False, True, False, True]
    assert worst_case(lists, 2).tolist() == [False, True]


def test_a_sample_stands_at_an_epsilon_below_its_distance() -> None:
    found = arrays(np.array([True, False, False]))
    found["distance"] = np.array([0.0, 0.2, 0.0])
    assert standing_at(found, 0.1).tolist() == [True, True, False]
    assert standing_at(found, 0.3).tolist() == [True, False, False]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Two seeds of cross-entropy and one of DR-softmax, briefly trained."""
    results = tmp_path_factory.mktemp("results")
    common = ["data=digits", "model=mlp", "epochs=5", "batch_size=64", "study=s", f"results_dir={results}"]
    configs = [
        compose_train(*common, f"loss={loss}", f"seed={seed}", "progress=false")
        for loss, seed in (("ce", 0), ("ce", 1), ("dr_softmax", 0))
    ]
    for config in configs:
        train(config)
    return [run_folder(config) for config in configs]


def configs(runs: list[RunFolder]) -> dict[RunFolder, TrainConfig]:
    return {run: run.config() for run in runs}


def test_a_twin_is_the_cross_entropy_run_of_the_same_seed(runs: list[RunFolder]) -> None:
    first, second, own = runs
    known = configs(runs)
    assert find_twin(own, known) == first
    assert find_twin(first, known) == second
    assert find_twin(second, known) == first
    assert find_twin(own, configs([own, second])) is None


def test_cells_know_their_objectives_their_source_and_what_comes_before(runs: list[RunFolder]) -> None:
    own = runs[2]
    cells = plan_cells(own, suite(), configs(runs))
    by_name = {(cell.attack, cell.epsilon.label): cell for cell in cells}
    assert by_name["adaptive", "0.1"].objectives == ("targeted_margin", "scaled_ce")
    assert plan_cells(runs[0], suite(), configs(runs))[0].objectives == ()
    assert by_name["transfer", "0.1"].source == runs[0]
    before = {cell.attack for cell in by_name["square", "0.1"].after}
    assert {"fgsm", "pgd", "margin_pgd", "targeted_pgd", "apgd_ce", "adaptive", "apgd_t", "fab_t", "fmn_linf"} == before
    assert not any(cell.attack == "transfer" for cell in plan_cells(own, suite(), configs([own])))
    changed = plan_cells(own, suite("suite.attacks.margin_pgd.steps=3"), configs(runs))
    moved = {cell.attack for cell, other in zip(cells, changed, strict=True) if cell.path != other.path}
    after = {"margin_pgd", "apgd_ce", "adaptive", "apgd_t", "fab_t", "square"}
    assert moved == after, "what comes after a changed attack is new"


def test_cascade_attacks_what_stands_and_keeps_what_has_fallen(runs: list[RunFolder]) -> None:
    short = suite(
        "suite.n_samples.digits=40", "suite.n_decisive.digits=40", "~suite.attacks.cw",
        "~suite.attacks.cw_torchattacks",
        "~suite.attacks.fmn_linf", "~suite.attacks.fmn_l2", "~suite.attacks.hop_skip_jump", "~suite.attacks.fab_t",
        "~suite.attacks.margin_pgd_l2",
        "suite.attacks.square.n_queries=50", "suite.sanity.n_samples=20", "suite.sanity.steps=5",
        "suite.decisive_epsilons.digits.linf=[0.1]",
    )  # fmt: skip
    own = runs[2]
    model = own.load_model(torch.device("cpu"))
    cells = plan_cells(own, short, configs(runs))
    for cell in cells:
        fill_cell(cell, model, torch.device("cpu"))
    found = {cell.path: load_arrays_file(cell.path) for cell in cells}
    for cell in (cell for cell in cells if cell.after):
        earlier = np.logical_and.reduce([standing_at(found[before.path], 0.1)[:40] for before in cell.after])
        assert np.array_equal(found[cell.path]["attacked"], earlier)
        after = standing_at(found[cell.path], 0.1)
        assert not (after & ~earlier).any(), "nothing that has fallen stands up again"
        if isinstance(cell.config, ProjectedConfig):
            # What it says of a sample is what the attack makes of that sample, and not of another.
            data, _ = load_test(cell.train.data, 40, torch.device("cpu"))
            chosen = torch.from_numpy(np.flatnonzero(earlier))
            attack = build_attack(cell.config, adaptive_objectives=cell.objectives)
            alone = run_attack(attack, model, data.pixels(chosen), data.labels[chosen], epsilon=0.1)
            np.testing.assert_allclose(found[cell.path]["logits"][earlier], alone.logits, atol=1e-5)
    reading = read_model({"run_id": own.run_id}, cells, found, short)
    bounded = [cell for cell in cells if cell.is_attack and cell.epsilon.value == 0.1]
    least = np.logical_and.reduce([standing_at(found[cell.path], 0.1) for cell in bounded])
    (row,) = reading.worst
    assert row["worst"] == pytest.approx(least.mean())
    assert row["n"] == 40
    cumulative = {item["attack"] for item in reading.accuracy if item["cumulative"]}
    assert cumulative == {"apgd_ce", "adaptive", "apgd_t", "square"}
    assert isinstance(bounded[2].config, ProjectedConfig)


def test_cells_of_probes_that_were_compared_otherwise_are_not_taken_for_these() -> None:
    """The probes had other climbs once, under the same settings, and HopSkipJump had other noise."""
    config = compose_train("data=digits", "model=mlp")
    whole = suite("suite=strong")
    cells = {cell.attack: cell for cell in plan_cells(RunFolder(Path("run")), whole, {RunFolder(Path("run")): config})}
    for name, selection, mark in (
        ("sanity", ("n_samples", "n_convergence"), {"compared": "climbs"}),
        ("hop_skip_jump", ("n_samples", "decisive", "standing_only"), {"noise": "per image"}),
    ):
        cell = cells[name]
        assert cell.config is not None
        settings = {key: value for key, value in asdict(cell.config).items() if key not in selection}
        content = {"data": "digits", "n": cell.n, "attack": settings, "epsilon": str(cell.epsilon.value),
                   "batch_size": cell.batch_size}  # fmt: skip
        before, now = (fingerprint(one, 8) for one in (content, content | mark))
        assert cell.path.stem.endswith(f"-{now}")
        assert now != before
