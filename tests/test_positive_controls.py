"""The strong suite on models whose answer is known: planted masks are flagged and broken, real robustness is kept."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import compose_train, made_once
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from drs.array_files import load_arrays_file
from drs.attack_config import SanityConfig
from drs.attacks.probes import run_probes
from drs.cells import plan_cells
from drs.config import PROJECT_ROOT, evaluate_config
from drs.filling import fill_cell, load_test
from drs.masking import MASKING_CHECKS
from drs.model_rows import ModelReading, read_model
from drs.runs import RunFolder, run_folder
from drs.sanity import FAIL, PASS, probe_figures, sanity_rows
from drs.sanity_checks import CHECKS
from drs.suite_config import SuiteConfig
from drs.sweeper import register_plugins
from drs.training import train

EPSILON = "0.2"
"""An undefended perceptron on the digits has fallen at this Linf radius."""
N = 60


@functools.cache
def strong_suite() -> SuiteConfig:
    register_plugins()
    overrides = [
        "suite=strong",
        f"suite.n_samples.digits={N}",
        f"suite.n_decisive.digits={N}",
        f"suite.sanity.n_samples={N}",
        "suite.sanity.steps=20",
        f"suite.epsilons.digits.linf=[{EPSILON}]",
        f"suite.decisive_epsilons.digits.linf=[{EPSILON}]",
        "suite.attacks.cw.n_samples=10",
        "suite.attacks.cw_torchattacks.n_samples=10",
        "suite.attacks.hop_skip_jump.n_samples=5",
        "suite.attacks.hop_skip_jump.steps=5",
        "suite.attacks.square.n_samples=30",
        "suite.attacks.square.n_queries=1000",
    ]
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return evaluate_config(compose("evaluate", overrides)).suite


@dataclass(frozen=True)
class Judged:
    """What the strong suite says of one model."""

    reading: ModelReading
    passed: set[str]
    failed: set[str]
    worst: float
    pgd: float


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cross-entropy models and an adversarially trained one, trained once for all test workers."""
    adversarial = ["procedure=adversarial", f"procedure.epsilon={EPSILON}", "procedure.steps=5"]
    settings = [["loss=ce", "seed=0"], ["loss=ce", "seed=1"], ["loss=ce", "seed=0", "epochs=40", *adversarial]]

    def train_all(folder: Path) -> None:
        common = ["data=digits", "model=mlp", "epochs=20", "batch_size=64", "study=controls", f"results_dir={folder}"]
        for setting in settings:
            train(compose_train(*common, *setting, "progress=false"))

    return made_once(tmp_path_factory, "controls", train_all)


def judge(study: Path, chosen: list[str], plant: Callable[[nn.Module], nn.Module], tmp_path: Path) -> Judged:
    """Evaluate one trained model, changed by ``plant``, in a folder of its own."""
    common = ["data=digits", "model=mlp", "epochs=20", "batch_size=64", "study=controls", f"results_dir={study}"]
    runs = [run_folder(compose_train(*common, "loss=ce", f"seed={seed}")) for seed in (0, 1)]
    run = run_folder(compose_train(*common, *chosen))
    place = RunFolder(tmp_path / run.run_id)
    suite = strong_suite()
    cells = plan_cells(place, suite, {place: run.config()} | {twin: twin.config() for twin in runs})
    model = plant(run.load_model(torch.device("cpu"))).eval()
    for cell in cells:
        fill_cell(cell, model, torch.device("cpu"))
    arrays = {cell.path: load_arrays_file(cell.path) for cell in cells}
    reading = read_model({"run_id": run.run_id}, cells, arrays, suite)
    rows = sanity_rows(cells, arrays)
    (linf,) = [row for row in reading.worst if row["norm"] == "linf"]
    passed, failed = ({row["check"] for row in rows if row["passed"] == verdict} for verdict in (PASS, FAIL))
    return Judged(reading, passed, failed, linf["worst"], linf["pgd"])


class Saturated(nn.Module):
    """Logits scaled so far that softmax saturates: what defensive distillation leaves (Carlini and Wagner 2017)."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.factor * self.model(images)
        return logits


class Quantised(nn.Module):
    """Logits rounded to steps, which have no gradient anywhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        # Ties between rounded logits go to the exact ones, so that clean accuracy stays what it was.
        logits = self.model(images)
        return ((4 * logits).round() / 4 + 1e-3 * logits.detach()).detach() + 0.0 * images.flatten(1).sum(1, True)


def test_undefended_model_falls_and_passes_every_masking_check(study: Path, tmp_path: Path) -> None:
    judged = judge(study, ["loss=ce", "seed=0"], lambda model: model, tmp_path)
    assert judged.worst <= 0.05
    assert judged.pgd <= 0.1
    assert set(MASKING_CHECKS) <= judged.passed, "every one is run, and passes"


@pytest.mark.parametrize("factor", [1e4])
def test_hugely_scaled_logits_are_flagged_and_broken(study: Path, tmp_path: Path, factor: float) -> None:
    judged = judge(study, ["loss=ce", "seed=0"], lambda model: Saturated(model, factor), tmp_path)
    assert judged.pgd > 0.5, "the mask is not there"
    assert judged.worst <= 0.05
    assert {"objective_gap", "logit_shift_and_scale", "zero_gradient"} <= judged.failed


def test_quantised_logits_are_flagged_and_broken_without_a_gradient(study: Path, tmp_path: Path) -> None:
    judged = judge(study, ["loss=ce", "seed=0"], Quantised, tmp_path)
    assert judged.pgd > 0.5, "the mask is not there"
    assert judged.worst < judged.pgd / 2
    assert "zero_gradient" in judged.failed
    assert judged.failed & {"transfer_not_stronger", "square_not_stronger"}


ADVERSARIAL = ["loss=ce", "seed=0", "epochs=40", "procedure=adversarial", f"procedure.epsilon={EPSILON}",
               "procedure.steps=5"]  # fmt: skip


def test_adversarially_trained_model_keeps_most_of_its_robustness(study: Path, tmp_path: Path) -> None:
    judged = judge(study, ADVERSARIAL, lambda model: model, tmp_path)
    assert judged.pgd > 0.3
    assert judged.worst > 0.75 * judged.pgd
    must = {"eps0_equals_clean", "pgd_beats_fgsm", "falls_with_epsilon", "logit_shift", "best_iterate"}
    assert must | set(MASKING_CHECKS) <= judged.passed


def test_objectives_are_compared_after_as_many_climbs(study: Path) -> None:
    """A target for each of nine classes is nine climbs, which find more than one on cross-entropy: no mask."""
    common = ["data=digits", "model=mlp", "epochs=20", "batch_size=64", "study=controls", f"results_dir={study}"]
    run = run_folder(compose_train(*common, *ADVERSARIAL))
    test, _ = load_test(run.config().data, 200, torch.device("cpu"))
    config = SanityConfig(steps=20, restarts=1)
    found = run_probes(run.load_model(torch.device("cpu")), test.pixels(), test.labels, float(EPSILON), config)
    check = CHECKS["objective_gap"]
    unequal = float(found.standing["ce"].mean() - found.standing["targeted"].mean())
    assert not check.passes(unequal), "one climb on cross-entropy beside nine on targets"
    assert check.passes(probe_figures(found.standing, found.gradient_norm)["objective_gap"][0])
