"""Sanity checks and worst cases from arrays made by hand, and the cascade that attacks only what still stands."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose_train
from hydra import compose, initialize_config_dir
from torch import nn

from drs.array_files import load_arrays_file
from drs.attack_config import NoiseConfig, PGDConfig, ProjectedConfig, SanityConfig, SquareConfig
from drs.attacks import build_attack, probes, run_attack
from drs.attacks.projected import ProjectedAttack
from drs.cells import Cell, find_twin, plan_cells, standing_at
from drs.config import PROJECT_ROOT, TrainConfig, evaluate_config
from drs.data import LabelledImages
from drs.filling import fill_cell, load_test
from drs.model_rows import read_model, worst_case
from drs.report_checks import sanity_section
from drs.runs import RunFolder, run_folder
from drs.sanity import failed_checks, sanity_rows
from drs.sanity_checks import CHECKS
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


PROBES = ["clean", "epsilon_0", "ce", "ce_best", "ce_last", "margin", "targeted", "more_steps", "more_restarts",
          "scaled_0.1", "scaled_10", "normalised", "shifted", "large", "unbounded"]  # fmt: skip


def judged(
    probes: dict[str, int] | None = None, gradients: float = 1.0, names: list[str] = PROBES, **attacks: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Judge a made-up model: a probe leaves as many of the first samples standing as it says."""
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
    ("check", "probes", "figure"),
    [
        ("eps0_equals_clean", {"epsilon_0": 98}, 0.02),
        ("unbounded_succeeds", {"unbounded": 3}, 0.03),
        ("more_steps", {"more_steps": 36}, 0.04),
        ("more_restarts", {"more_restarts": 36}, 0.04),
        ("objective_gap", {"targeted": 35}, 0.05),
        ("objective_gap", {"margin": 36, "more_steps": 36, "more_restarts": 36}, 0.04),
        ("logit_shift_and_scale", {"scaled_10": 30}, 0.10),
        ("logit_shift_and_scale", {"normalised": 30}, 0.10),
        ("logit_shift_and_scale", {"shifted": 30}, 0.10),
        ("best_iterate", {"ce_last": 44}, 0.04),
        ("falls_with_epsilon", {"large": 60}, 0.10),
    ],
)
def test_a_probe_that_disagrees_fails_its_check_alone(check: str, probes: dict[str, int], figure: float) -> None:
    rows = judged(probes)
    assert rows[check]["passed"] == "fail"
    assert rows[check]["figure"] == pytest.approx(figure)
    assert {name for name, row in rows.items() if row["passed"] == "fail"} == {check}


def test_a_better_first_attack_is_no_failure_and_one_sample_never_is() -> None:
    """Only falls count against a model: a margin attack that is weaker than cross-entropy shows no mask."""
    assert judged({"targeted": 60, "scaled_0.1": 70})["objective_gap"]["passed"] == "pass"
    assert judged({"more_steps": 39})["more_steps"]["passed"] == "pass"
    assert judged({"more_steps": 38})["more_steps"]["passed"] == "fail"
    assert judged({"epsilon_0": 99})["eps0_equals_clean"]["passed"] == "fail", "predictions must not move at all"


@pytest.mark.parametrize(("steps", "clean"), [(40, N), (39, N), (38, N), (36, 40)])
def test_a_check_passes_up_to_what_it_allows_and_no_further(steps: int, clean: int) -> None:
    rows = judged({"more_steps": steps, "clean": clean, "epsilon_0": clean}, gradients=0.0)
    for row in rows.values():
        passed = "not run" if not row["n"] else "pass" if row["figure"] <= row["allowed"] + 1e-9 else "fail"
        assert row["passed"] == passed, row
    allowed = {name: row["allowed"] for name, row in rows.items()}
    assert allowed["more_steps"] == pytest.approx(0.01), "one of 100 samples is more than the threshold of 0.005"
    assert allowed["objective_gap"] == pytest.approx(0.02), "the threshold is more than one sample"
    assert allowed["zero_gradient"] == pytest.approx(1 / clean), "n is the number of samples that are right"
    assert allowed["eps0_equals_clean"] == 0
    assert math.isnan(allowed["square_not_stronger"]), "not run"


def test_report_shows_what_is_allowed_at_this_n_and_where_n_is_too_small() -> None:
    made = [judged({"more_steps": 39}), judged({"more_steps": 36, "clean": 40, "epsilon_0": 40})]
    named = {"data": "mnist", "model": "lenet", "loss": "ce", "loss_weight": 0.0, "excluded": ""}
    table = pd.DataFrame([{**named, "run_id": str(i), **row} for i in range(2) for row in made[i].values()])
    text = sanity_section(table)
    assert "| more_steps | 100 | 1.0 ‡ | **1/2 (2.5)** |" in text
    assert "| objective_gap | 100 | 2.0 | 2/2 (0.0) |" in text
    assert "| zero_gradient | 40 to 100 | 1.0 to 2.5 ‡ | 2/2 (0.0) |" in text
    assert "| square_not_stronger | – | – | not run |" in text
    assert re.search(r"\| more_steps \| change of [^|]* \| 0\.5 \|", text), "the threshold, beside what is checked"


def test_restarts_of_cross_entropy_do_not_count_as_a_lost_iterate() -> None:
    """Another start finds what the one climb never saw, so its last iterate did not lose it."""
    assert judged({"ce": 30})["best_iterate"]["figure"] == 0
    assert judged({"ce_last": 44})["best_iterate"]["figure"] == pytest.approx(0.04)
    older = [name for name in PROBES if name != "ce_best"]
    assert judged({"ce_last": 44}, names=older)["best_iterate"]["figure"] == pytest.approx(0.04)


def test_probes_that_are_compared_have_the_same_steps_and_restarts(
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
    assert attacks == [(name, 3, 2) for name in ("ce", "targeted_margin", "ce", "ce", "scaled_ce", "ce")]
    bounded, longer, oftener, *wide = [attack for attack in made[1:] if attack[0] == "margin"]
    assert (bounded[1:], longer[1:], oftener[1:]) == ((3, 2), (6, 2), (3, 4))


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
