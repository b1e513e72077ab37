"""The benchmark as a command: what it writes and when, whole commands timed, and the sections of a card on a CPU."""

import os
import re
import runpy
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose_train
from hydra import compose, initialize_config_dir
from test_benchmarks import ROW

from drs.benchmarks import commands, gpu
from drs.benchmarks.cards import (
    Recipe,
    airbench_recipe,
    chosen_algorithms,
    lenet_rows,
    our_recipe,
    sharing_row,
    speedrun_rows,
    train_in_turn,
)
from drs.benchmarks.commands import count_models, fast_search_row, seconds_of, strong_row, studies_row, study_commands
from drs.benchmarks.harness import Machine, Row
from drs.benchmarks.report import TITLES, read_provenance, read_rows, write_rows
from drs.benchmarks.sections import sections
from drs.config import PROJECT_ROOT, evaluate_config
from drs.errors import UserError
from drs.sweeper import register_plugins

BENCH = PROJECT_ROOT / "scripts" / "bench.py"
CPU = torch.device("cpu")
MACHINE = Machine(10.0, 10.0)
DIGITS = ("data=digits", "model=mlp", "optim=adam", "batch_size=64")


def test_what_was_measured_stays_when_a_section_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = runpy.run_path(str(BENCH))

    def fails(_: Machine) -> Iterator[Row]:
        yield replace(ROW, section="loss")
        assert [row.case for row in read_rows(tmp_path)] == [ROW.case]  # it is written before the next is measured
        raise OSError("no\nspace")

    def works(machine: Machine) -> Iterator[Row]:
        assert machine.gigaflops > 0
        yield replace(ROW, section="memory")

    assert bench["measure"]({"loss": fails, "memory": works}, tmp_path) == ["loss"]
    rows = read_rows(tmp_path)
    assert [row.section for row in rows] == ["loss", "loss", "memory"]
    assert [row.verdict for row in rows] == ["met", "not measured", "met"]
    assert rows[1].note == "it ended with OSError: no space"
    assert "OSError" in capsys.readouterr().err
    # Another time the section is replaced, and the other one is kept.
    assert bench["measure"]({"loss": works}, tmp_path) == []
    assert [row.section for row in read_rows(tmp_path)] == ["memory", "memory"]


def test_what_was_measured_on_a_card_is_kept_where_there_is_none(tmp_path: Path) -> None:
    bench = runpy.run_path(str(BENCH))
    on_a_card = replace(ROW, section="gpu_loss", device="cuda")
    unmeasured = [replace(ROW, section=name, device="cuda", ratio=None) for name in ("gpu_step", "loss")]
    bench["measure"]({"loss": lambda _: iter([ROW])}, tmp_path)
    write_rows(tmp_path, [on_a_card, *unmeasured], read_provenance(tmp_path))
    said: list[str] = []
    left = bench["without_those_of_a_card"](["loss", "gpu_loss", "gpu_step"], tmp_path, said.append)
    assert left == ["loss", "gpu_step"] and said == ["gpu_loss: no GPU here; what was measured on one is kept"]


def test_a_section_that_is_stopped_says_so(tmp_path: Path) -> None:
    bench = runpy.run_path(str(BENCH))

    def stopped(_: Machine) -> Iterator[Row]:
        yield replace(ROW, section="loss")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench["measure"]({"loss": stopped}, tmp_path)
    assert len(read_rows(tmp_path)) == 1 and not read_provenance(tmp_path)["loss"]["finished"]
    assert "**Stopped before its last row.**" in (tmp_path / "REPORT.md").read_text()
    versions = read_provenance(tmp_path)["loss"]["versions"]
    assert {"torch", "adversarial-robustness-toolbox", "airbench", "joblib"} <= set(versions)


def test_unknown_section_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench.py", "--only", "loss,everything"])
    script = runpy.run_path(str(BENCH))
    with pytest.raises(UserError, match=r"ONLY=everything: must be one of loss, training, attacks, strong, sweeps, s"):
        script["main"]()


def test_without_a_gpu_each_of_its_targets_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(sections()) == list(TITLES)
    for section, targets in gpu.TARGETS.items():
        rows = list(sections()[section](MACHINE))
        assert len(rows) == len(targets) and {row.verdict for row in rows} == {"not measured"}
        assert {row.section for row in rows} == {section}
    assert set(gpu.TARGETS) == {name for name in TITLES if name.startswith("gpu")}


def test_recipes_are_trained_in_turn(tmp_path: Path) -> None:
    config = compose_train(*DIGITS, "loss=ce", "epochs=5", f"data.cache={tmp_path}/data")
    ours = our_recipe(config, CPU)
    seen: list[int] = []

    def prepare(seed: int) -> Any:
        seen.append(seed)
        time.sleep(0.2)  # is not timed
        return torch.nn.Identity

    found, idle = train_in_turn([ours, Recipe(prepare, lambda _: 0.5)], CPU, 2)
    assert seen == [0, 0, 1] and config.seed == 0
    assert (idle[0] < 0.1).all() and (idle[1] == 0.5).all()
    assert (found[0] > 0).all() and (found[1] > 0.85).all() and found[1][0] != found[1][1]
    rows = list(speedrun_rows(found, None, "mlp", "cpu"))
    assert [row.verdict for row in rows] == ["met" if found[1].mean() >= 0.94 else "missed", "not measured"]
    assert "[bench]" in rows[1].note


def test_a_fast_recipe_that_is_not_good_enough_meets_nothing() -> None:
    theirs = np.array([2.0, 4.0]), np.array([0.94, 0.95])
    for accuracy, verdict in ((0.95, "met"), (0.93, "missed")):
        _, beside = speedrun_rows((np.array([1.0, 3.0]), np.full(2, accuracy)), theirs, "mlp", "cpu")
        assert beside.ratio == pytest.approx(2 / 3) and "airbench 94.50 %" in beside.note and beside.verdict == verdict
    shared = sharing_row(30.0, 8, 4, theirs, "cpu")
    assert (shared.ours_median, shared.theirs_median, shared.verdict) == (16.0, 20.0, "missed")
    config = compose_train(*DIGITS)

    def fails() -> float:
        raise RuntimeError("no\ncompiler")

    ways = {"one way": lambda: 90.0, "broken": fails, "another": lambda: 30.0}
    *each, best = lenet_rows(config, 3, 60, "cpu", ways)
    assert [(row.ours, row.ours_median) for row in each] == [("one way", 90.0), ("broken", None), ("another", 30.0)]
    assert all(row.tried for row in each) and each[1].note == "it failed: no compiler"
    assert (best.ours, best.ours_median, best.verdict) == ("another", 30.0, "met")


def test_airbench_changes_no_setting_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "airbench", None)
    with pytest.raises(ImportError):
        airbench_recipe(tmp_path, compose_train("data=cifar10"))
    before = torch.backends.cudnn.benchmark
    with chosen_algorithms(by_trial=not before):
        assert torch.backends.cudnn.benchmark is not before
    with chosen_algorithms():
        torch.backends.cudnn.benchmark = not before
    assert torch.backends.cudnn.benchmark is before


def test_commands_are_timed_stopped_and_fail_with_their_reason(tmp_path: Path) -> None:
    environment = dict(os.environ)
    assert seconds_of([["train.py", "--help"]], environment) > 0
    with pytest.raises(RuntimeError, match=r"train\.py .* ended with 2: error: .*modle"):
        seconds_of([["train.py", "modle=mlp"]], environment)
    long = ["train.py", *DIGITS, "epochs=100000", "study=long", f"results_dir={tmp_path}", "progress=false"]
    began = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"train\.py .* had not ended after 5 s"):
        seconds_of([["train.py", "--help"], long], environment, within=5)
    assert time.perf_counter() - began < 20


def test_studies_are_those_of_a_gpu_under_the_paper_suite() -> None:
    register_plugins()
    for experiment in gpu.STUDIES:
        train, evaluate = study_commands((experiment,), 4)
        assert train == ["train.py", f"experiment={experiment}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4"]
        assert evaluate[0] == "evaluate.py"
        with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
            config = evaluate_config(compose("evaluate", list(evaluate[1:])))
            paper = evaluate_config(compose("evaluate", ["study=any", "suite=paper"]))
        assert config.study == experiment and list(config.suite.attacks) == list(paper.suite.attacks)
    assert count_models(gpu.STUDIES) >= 200


def test_studies_that_take_too_long_say_how_far_they_came(tmp_path: Path) -> None:
    environment = {**os.environ, "DRS_RESULTS": str(tmp_path)}
    row = studies_row(("smoke",), environment, tmp_path, 600, "cpu", workers=1, within=12)
    trained = len(list((tmp_path / "smoke" / "runs").glob("*/checkpoint.safetensors")))
    assert row.verdict == "missed" and row.note == row.reason.removeprefix("They were ").removesuffix(".")
    assert 0 < trained <= 8 and row.note == f"stopped after 12 s, when {trained} of 8 models were trained"


def test_sections_of_a_card_run_on_a_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "CUDA", CPU)
    monkeypatch.setitem(sys.modules, "airbench", None)
    for name, overrides in (("RECIPE", "loss=ce"), ("LENET", "loss=dr_softmax")):
        monkeypatch.setattr(gpu, name, (*DIGITS, overrides, "epochs=1")[: None if name == "RECIPE" else -1])
    for name in ("SPEEDRUNS", "SHARED", "LENETS"):
        monkeypatch.setattr(gpu, name, 2)
    assert [row.verdict for row in gpu.speedrun_section(MACHINE)] == ["missed", "not measured"]
    assert [row.verdict for row in gpu.sharing_section(MACHINE)] == ["not measured"]

    def packed(*_: Any) -> float:
        raise RuntimeError("no memory")

    monkeypatch.setattr(gpu, "seconds_packed", packed)
    graphs, failed, best = gpu.lenets_section(MACHINE)
    assert [row.verdict for row in (graphs, failed, best)] == ["", "not measured", "met"]
    assert failed.ours == "packed through torch.func" and failed.note == "it failed: no memory"
    assert best.ours == graphs.ours == "side by side in CUDA graphs" and "mean test accuracy of 2 models" in best.note


@pytest.mark.slow
def test_strong_suite_is_timed_as_a_whole(tmp_path: Path) -> None:
    row = strong_row("strong", [*DIGITS, "epochs=3"], os.environ, tmp_path, samples=20, bound=1e4, device="cpu")
    assert row.verdict == "met" and row.case == "strong suite, one mlp on digits, 20 images"
    assert (tmp_path / "strong" / "REPORT.md").exists()
    tables = tmp_path / "strong" / "tables"
    accuracy = pd.read_csv(tables / "accuracy.csv").query("attack == 'targeted_pgd'").set_index("epsilon_label")
    assert re.search(
        rf"; \d\d\.\d% of the images are right, .* PGD {accuracy.robust_accuracy['0.1']:.1%} at 0\.1, "
        rf"{accuracy.robust_accuracy['0.2']:.1%} at 0\.2; trained with .*epochs=3$", row.note
    )  # fmt: skip
    told = re.search(r"Of (\d+) finished cells, .* the longest took: (.*)\.$", row.reason)
    assert told is not None and int(told[1]) == len([*tmp_path.glob("strong/runs/*/eval/*.npz")])
    names, seconds = zip(*(item.rsplit(" ", 2)[:2] for item in told[2].split(", ")), strict=True)
    assert len(names) == 12 and "sanity@0.1" in names and "cw" in names
    assert sorted(seconds, key=int, reverse=True) == [*seconds]
    beside = fast_search_row(row, os.environ, tmp_path, data="digits", samples=20, settings=["workers=1"])
    assert beside.tried and beside.case == row.case and beside.ratio is not None
    assert "differ by +0.0 to +0.0 points" in beside.note  # there is nothing to fold in an mlp, and no TF32 on a CPU


def test_both_searches_compute_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    cells, tables = tmp_path / "strong" / "runs" / "one" / "eval", tmp_path / "strong" / "tables"
    cells.mkdir(parents=True)
    tables.mkdir()

    def run(commands: Any, *_: Any) -> float:
        ((script, *arguments),) = commands
        asked.append(arguments[-5])
        assert script == "evaluate.py" and not cells.exists(), "what one has computed is not there for the other"
        cells.mkdir()
        accuracy = 0.5 + 0.01 * len(asked)
        row = f"pgd,linf,0.1,False,{accuracy}"
        (tables / "accuracy.csv").write_text(f"attack,norm,epsilon_label,cumulative,robust_accuracy\n{row}\n")
        return 3.0 * len(asked)

    monkeypatch.setattr(commands, "seconds_of", run)
    row = fast_search_row(
        replace(ROW, case="strong suite, one mlp, 9 images"), {}, tmp_path, data="digits", samples=5, settings=[]
    )
    assert asked == ["suite.fast_search=true", "suite.fast_search=false"]
    assert row.case == "strong suite, one mlp, 5 images"
    assert row.ratio == 0.5 and "differ by -1.0 to -1.0 points" in row.note


def test_strong_suite_that_takes_too_long_is_stopped_and_misses(tmp_path: Path) -> None:
    training = [*DIGITS, "epochs=1", "data.train_samples=64"]
    row = strong_row(
        "strong", training, os.environ, tmp_path, samples=20, bound=10, device="cpu", settings=["workers=1"], within=0.2
    )
    assert row.ours_median == 0.2 and row.verdict == "missed"
    assert row.note.endswith("; with workers=1; stopped after 0.2 s")
    assert row.reason.endswith("No cell was finished.")
