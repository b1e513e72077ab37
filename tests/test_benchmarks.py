"""The benchmark's arithmetic on known answers, and its rows on the smallest real work. No time is tested."""

import os
import re
import runpy
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose_train
from hydra import compose, initialize_config_dir
from torch import nn

from drs.attack_config import AttackConfig, CWConfig, FGSMConfig, PGDConfig
from drs.benchmarks.attacks import MODULES, PEERS, attack_rows, look_rows
from drs.benchmarks.cards import (
    packing_row,
    seconds_of_sweep,
    sharing_row,
    speedrun_rows,
    studies_row,
    study_commands,
    train_here,
    train_with_airbench,
)
from drs.benchmarks.gpu import TARGETS, missing_rows
from drs.benchmarks.growth import class_rows, made_up_models, table_rows
from drs.benchmarks.harness import Machine, Row, count_flops, peak_tensor_bytes, ratio_of_medians, time_in_turn
from drs.benchmarks.losses import loss_rows
from drs.benchmarks.packing import fit_packed
from drs.benchmarks.report import TITLES, read_provenance, read_rows, report_text, write_rows
from drs.benchmarks.startup import measured_process
from drs.benchmarks.suites import suite_rows
from drs.benchmarks.training import training_rows
from drs.benchmarks.waiting import WAITS, waiting_rows
from drs.config import PROJECT_ROOT, evaluate_config
from drs.correlation import correlation_table
from drs.data import LabelledImages
from drs.errors import UserError
from drs.granulated import granulated_table
from drs.provenance import describe_machine
from drs.sweeper import register_plugins
from drs.training import fit

ROW = Row(
    "loss", "a | b", "ours", "theirs", "ms", 2.0, 1.0, 2.0, 1.9, 2.1, 5, "<= 2", "cpu", 1, "a floor", "a note", 0.5
)
HERE = {**describe_machine(torch.device("cpu")), "machine": {"gigaflops": 17.0, "gigabytes": 9.0}}
PROVENANCE = {"loss": {**HERE, "commit": "a" * 40, "dirty": False}, "gpu": {**HERE, "commit": "b" * 40, "dirty": True}}


def test_ratio_of_medians_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    ratio, low, high = ratio_of_medians(3 + 0.1 * rng.standard_normal(200), 2 + 0.1 * rng.standard_normal(200))
    assert low < 1.5 < high and high - low < 0.05
    assert ratio == pytest.approx(1.5, abs=0.02)
    assert ratio_of_medians(np.full(3, 4.0), np.full(3, 2.0)) == (2.0, 2.0, 2.0)


def test_functions_are_timed_in_turn_and_the_order_is_turned_round() -> None:
    order: list[str] = []
    seconds = time_in_turn([lambda: order.append("a"), lambda: (order.append("b"), time.sleep(0.01))], 2, warmup=1)
    assert "".join(order) == "abbaab"
    assert seconds.shape == (2, 2) and (seconds[:, 1] >= 0.01).all() and (seconds[:, 0] < 0.01).all()


def test_peak_of_tensors_is_what_lives_at_a_time() -> None:
    source = torch.ones(1000)

    def both() -> None:
        first = source + 1
        second = first * 2
        del first
        second.add_(1).view(10, 100)
        third = second + 1
        del second, third

    assert peak_tensor_bytes(both) == 2 * 4000
    assert peak_tensor_bytes(lambda: source.add_(1)) == 0


def test_flops_are_those_of_products_there_and_back() -> None:
    left, right = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    assert count_flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert count_flops(lambda: (left @ right).relu().sum().backward()) == 2 * 2 * 3 * 5 * 7
    assert count_flops(lambda: left.exp()) == 0


@pytest.mark.parametrize(
    ("ratio", "target", "verdict"),
    [(2.0, "<= 2", "met"), (2.01, "<= 2", "missed"), (3.0, ">= 3", "met"), (2.9, ">= 3", "missed"), (1.0, "", ""),
     (None, ">= 3", "not measured")],
)  # fmt: skip
def test_verdict_compares_the_ratio_with_the_target(ratio: float | None, target: str, verdict: str) -> None:
    assert replace(ROW, ratio=ratio, target=target).verdict == verdict
    # A ratio that is good enough is not enough where what goes with it does not hold.
    assert replace(ROW, ratio=ratio, target=target, held=False).verdict == verdict.replace("met", "missed")


def test_rows_are_kept_and_reported(tmp_path: Path) -> None:
    unmeasured = replace(
        ROW, section="gpu", ours_median=None, theirs_median=None, ratio=None, low=None, high=None, note="no GPU"
    )
    rows = [
        ROW,
        replace(ROW, case="slow", ratio=2.5, reason="Because."),
        replace(ROW, case="weak", held=False, reason="It is weaker."),
        replace(ROW, ours="a try", tried=True, target=""),
    ]
    write_rows(tmp_path, [*rows, unmeasured], PROVENANCE)
    assert read_rows(tmp_path) == [*rows, unmeasured]
    text = (tmp_path / "REPORT.md").read_text()
    line = (
        r"| a \| b | ours | theirs | ms | 2.00 | 1.00 | 0.500 | 4.00 | 2.00 (1.90 to 2.10) | &lt;= 2 | met | 5 | cpu |"
    )
    assert line in text
    assert "not measured" in text and "- a \\| b, ours: floor: a floor." in text
    assert "- weak, ours: 2.00 where &lt;= 2 is wanted. It is weaker." in text
    assert text.count("- slow, ours: 2.50 where &lt;= 2 is wanted. Because.") == 1
    assert text.index(line) < text.index("### What was tried") < text.index("| a try |") < text.index("### Missed, and")
    assert "Targets: 1 met, 1 not measured." in report_text([ROW, unmeasured], PROVENANCE)
    # Each section says where it was measured itself: they need not be of one day or commit.
    assert text.index(f"commit `{'a' * 12}`: ") < text.index(f"commit `{'b' * 12}` with changes: ")
    assert read_provenance(tmp_path) == PROVENANCE
    (tmp_path / "provenance.json").write_text("[1")
    with pytest.raises(UserError, match=r"provenance\.json is not JSON .* delete it and .*bench\.csv"):
        read_provenance(tmp_path)
    # Rows written before there was a floor in figures are still read.
    frame = pd.read_csv(tmp_path / "bench.csv").drop(columns=["least", "tried", "reason", "held"])
    frame.to_csv(tmp_path / "bench.csv", index=False)
    assert read_rows(tmp_path)[0] == replace(ROW, least=None)
    (tmp_path / "bench.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"bench\.csv: has not the columns section, case"):
        read_rows(tmp_path)


def test_loss_rows_count_no_tensor_beyond_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drs.benchmarks.losses.SHAPES", ((16, 50, 3),))
    timed, variant, memory = loss_rows(Machine(10, 10))
    assert timed.ratio is not None and timed.repeats == 3 and not timed.tried and variant.tried
    assert memory.ratio is not None and -1 < memory.ratio <= 1.2  # beside [B, K] there are a few [B] tensors


def test_training_rows_compare_trainings_that_reach_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("drs.benchmarks.training.REPEATS", 2)
    config = compose_train(
        "data=digits", "model=mlp", "loss=ce", "optim=adam", "epochs=4", "batch_size=32", f"data.cache={tmp_path}"
    )
    whole, batches, *steps = training_rows(config, ">= 1000")
    ours, plain = map(float, re.findall(r"([\d.]+) ±", whole.note))
    assert min(ours, plain) > 80 and abs(ours - plain) < 8
    assert whole.least > 0 and whole.verdict == "missed"  # type: ignore[operator]
    assert whole.reason.startswith(f"At the floor the ratio would be {whole.theirs_median / whole.least:.3g}:")  # type: ignore[operator]
    assert all(row.tried and row.ratio is not None for row in (batches, *steps))
    assert [row.ours for row in steps] == ["channels first", "bfloat16", *(["compiled"] if shutil.which("g++") else [])]


def test_trainings_are_timed_with_threads_that_wait_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("drs.benchmarks.waiting.REPEATS", 1)
    monkeypatch.setattr("drs.benchmarks.waiting.WAITS", dict(list(WAITS.items())[:2]))
    small = ["data=digits", "model=mlp", "epochs=1", f"data.cache={tmp_path}"]
    rows = list(waiting_rows(small, os.environ))
    assert [row.case[-11:] for row in rows] == ["1 at a time", "2 at a time"]
    assert all(row.tried and row.ours == "asleep at once" and row.ratio and row.ratio > 0 for row in rows)
    with pytest.raises(RuntimeError, match="failed"):
        list(waiting_rows([*small, "epochs=none"], os.environ))


def test_attack_rows_say_who_is_stronger(
    digits: tuple[LabelledImages, LabelledImages, LabelledImages],
    digits_model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("drs.benchmarks.attacks.REPEATS", 1)
    test = digits[2]
    images, labels = test.pixels(torch.arange(40)), test.labels[:40]
    monkeypatch.setitem(MODULES, "ART", "no_such_package.at_all")
    rows = list(attack_rows(digits_model, images, labels, 0.2, described="mlp", target=">= 3"))
    assert [row.ours for row in rows] == 3 * ["our PGD"] + 3 * ["our margin PGD"]
    assert [row.theirs for row in rows] == 2 * list(PEERS)
    measured = [row for row in rows if row.theirs != "ART"]
    assert all(row.ratio is not None and "torchattacks" in row.note and "foolbox" in row.note for row in measured)
    assert all(0 < row.ours_median < 2 * row.least for row in measured)  # type: ignore[operator]
    assert all(1 < float(row.floor.partition(" of 41 looks")[0]) <= 41 for row in measured)
    assert sum(row.target == ">= 3" for row in rows) == 2  # of the fastest peer alone
    assert all(row.ratio is None and "[bench]" in row.note for row in rows if row.theirs == "ART")
    assert measured[-1].note.startswith("no weaker") and measured[-1].held

    # An attack that leaves its images alone is fast, and its rows say that this is not what was asked.
    def look_on(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
        model(images.clone().requires_grad_())
        return images

    monkeypatch.setattr("drs.benchmarks.attacks._ours", lambda _: look_on)
    idle = [row for row in attack_rows(digits_model, images, labels, 0.2, described="mlp", target=">= 3") if row.target]
    assert all(row.ratio > 3 and row.verdict == "missed" for row in idle)  # type: ignore[operator]
    assert all(row.reason.startswith("It leaves more images standing") for row in idle)
    tried = list(look_rows(digits_model, images, labels, described="mlp"))
    assert len(tried) == 3 and all(row.tried and row.ratio is not None for row in tried)


def test_the_suite_and_the_same_attacks_by_hand_find_the_same(
    digits: tuple[LabelledImages, LabelledImages, LabelledImages], digits_model: nn.Module
) -> None:
    test = digits[2]
    attacks: dict[str, AttackConfig] = {
        "fgsm": FGSMConfig("fgsm", "linf"),
        "pgd": PGDConfig("pgd", "linf", steps=2, relative_step_size=0.25, random_start=False),
        "cw": CWConfig("cw", "l2"),
    }
    (row,) = suite_rows(
        digits_model, test.pixels(torch.arange(40)), test.labels[:40], attacks, [0.1, 0.3], 20, described="mlp",
        target=">= 2",
    )  # fmt: skip
    pairs = re.findall(r"(fgsm|pgd) at ([\d.]+) ([\d.]+) and ([\d.]+) %", row.note)
    assert [(name, epsilon) for name, epsilon, *_ in pairs] == [
        ("fgsm", "0.1"), ("fgsm", "0.3"), ("pgd", "0.1"), ("pgd", "0.3"),
    ]  # fmt: skip
    assert "without cw, which torchattacks does not have" in row.note
    assert all(one == other for _, _, one, other in pairs) and len({one for _, _, one, _ in pairs}) > 1


def test_models_trained_as_one_batch_are_those_trained_in_turn(
    digits: tuple[LabelledImages, LabelledImages, LabelledImages],
) -> None:
    training, validation, _ = digits
    training = training.first(200)
    configs = [
        compose_train("data=digits", "model=mlp", "optim=adam", "epochs=2", "batch_size=50", *rest)
        for rest in (("loss=dr_softmax", "loss.weight=0.01", "seed=3"), ("loss=ce", "seed=4"))
    ]
    packed = fit_packed(configs, training, torch.device("cpu"))
    for config, model in zip(configs, packed, strict=True):
        plain, _ = fit(config, training, validation, torch.device("cpu"))
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    configs[1].batch_size = 20
    with pytest.raises(ValueError, match="may differ in seed and in the weight of the loss only"):
        fit_packed(configs, training, torch.device("cpu"))


def test_growth_compares_each_size_with_the_one_before() -> None:
    rows = list(class_rows((3, 30, 300), repeats=1))
    assert [(row.ours, row.theirs) for row in rows] == 2 * [("30 classes", "3 classes"), ("300 classes", "30 classes")]
    assert rows[1].theirs_median == rows[0].ours_median
    # A table of made-up models is one that the real tables are made from.
    assert [row.case for row in table_rows((10, 15))] == [
        "table of correlations", "table of partial correlations", "table of granulated Kendall coefficients",
    ]  # fmt: skip
    for table in (correlation_table, granulated_table):
        assert len(table(made_up_models(15)).dropna()) > 0


def test_a_process_is_measured_with_its_failures() -> None:
    small, seconds = measured_process(["-c", "import time; time.sleep(0.1)"], dict(os.environ))
    large, _ = measured_process(["-c", "x = bytearray(100 * 2**20)"], dict(os.environ))
    assert seconds >= 0.1 and 0.06 < large - small < 0.2
    with pytest.raises(RuntimeError, match="ended with 3: gone wrong"):
        measured_process(["-c", "import sys; print('gone wrong', file=sys.stderr); sys.exit(3)"], dict(os.environ))


def test_without_a_gpu_each_of_its_targets_has_a_row() -> None:
    for section, targets in TARGETS.items():
        rows = list(missing_rows(section, "no GPU at hand"))
        assert len(rows) == len(targets) and {row.verdict for row in rows} == {"not measured"}
        assert {row.section for row in rows} == {section} and section in TITLES


def test_whole_trainings_are_timed_and_measured(tmp_path: Path) -> None:
    overrides = ["data=digits", "model=mlp", "optim=adam", "batch_size=64", f"data.cache={tmp_path}/data"]
    config = compose_train(*overrides, "loss=ce", "epochs=5")
    ours = train_here(config, torch.device("cpu"), 2)
    assert (ours[0] > 0).all() and (ours[1] > 0.85).all() and ours[1][0] != ours[1][1] and config.seed == 0
    rows = list(speedrun_rows(ours, None, "mlp", "cpu"))
    assert [row.verdict for row in rows] == ["met" if ours[1].mean() >= 0.94 else "missed", "not measured"]
    assert "[bench]" in rows[1].note
    theirs = np.array([2.0, 4.0]), np.array([0.94, 0.95])
    _, beside = speedrun_rows((np.array([1.0, 3.0]), ours[1]), theirs, "mlp", "cpu")
    assert beside.ratio == pytest.approx(2 / 3) and "airbench 94.50 %" in beside.note
    sweep = [*overrides, "loss=dr_softmax", "epochs=1"]
    seconds = seconds_of_sweep(sweep, 1, 1, tmp_path / "results", dict(os.environ))
    done = [path.parent.name for path in (tmp_path / "results" / "cards" / "runs").glob("*/checkpoint.safetensors")]
    assert len(done) == 1
    shared = sharing_row(30.0, 8, 4, theirs, "cpu")
    assert (shared.ours_median, shared.theirs_median, shared.verdict) == (16.0, 20.0, "missed")
    packed = packing_row(compose_train(*sweep), 3, 1e4, torch.device("cpu"), {2: seconds + 1e5})
    assert (packed.ours, packed.verdict) == ("packed through torch.func", "met") and "a sweep of 2" in packed.note
    with pytest.raises(RuntimeError, match=r"train\.py .* ended with 2: error: .*modle"):
        seconds_of_sweep(["modle=mlp"], 1, 1, tmp_path / "results", dict(os.environ))


def test_studies_are_those_of_a_gpu_under_the_paper_suite() -> None:
    register_plugins()
    for experiment in ("mnist", "cifar10"):
        train, evaluate = study_commands((experiment,), 4)
        assert train == ["train.py", f"experiment={experiment}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4"]
        assert evaluate[0] == "evaluate.py"
        with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
            config = evaluate_config(compose("evaluate", evaluate[1:]))
            paper = evaluate_config(compose("evaluate", ["study=any", "suite=paper"]))
        assert config.study == experiment and list(config.suite.attacks) == list(paper.suite.attacks)
    row = studies_row(("mnist", "cifar10"), 660.0, 600, "cuda")
    assert (row.verdict, row.ratio) == ("missed", 1.1) and row.section in TITLES


def test_airbench_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "airbench", None)
    with pytest.raises(ImportError):
        train_with_airbench(tmp_path, compose_train("data=cifar10"), 1)


def test_unknown_section_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench.py", "--only", "everything"])
    script = runpy.run_path(str(PROJECT_ROOT / "scripts" / "bench.py"))
    with pytest.raises(
        UserError, match=r"ONLY=everything: must be one of loss, training, attacks, sweeps, startup, memory"
    ):
        script["main"]()
