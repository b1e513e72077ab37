"""What starting costs and how cost grows: the commands that are measured, and what is made of what they took."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import compose_train
from omegaconf import OmegaConf
from synthetic_runs import compose_evaluate

from drs.benchmarks import growth, startup
from drs.benchmarks.growth import class_rows, evaluation_rows, made_up_models, table_rows
from drs.benchmarks.startup import curve_rows, imports, in_turn, measured_process, peak_memory_rows, startup_rows
from drs.config import EvaluateConfig, TrainConfig
from drs.correlation import correlation_table
from drs.granulated import granulated_table

ENVIRONMENT = dict(os.environ)


def test_a_process_is_measured_with_its_failures() -> None:
    small, seconds = measured_process(["-c", "import time; time.sleep(0.1)"], ENVIRONMENT)
    large, _ = measured_process(["-c", "x = bytearray(100 * 2**20)"], ENVIRONMENT)
    assert seconds >= 0.1 and 0.06 < large - small < 0.2
    with pytest.raises(RuntimeError, match="^-c import sys; .* ended with 3: gone wrong"):
        measured_process(["-c", "import sys; print('gone wrong', file=sys.stderr); sys.exit(3)"], ENVIRONMENT)


def test_what_a_process_imports_is_seen() -> None:
    code = ["-c", "from xml.dom import minidom"]
    assert imports("xml.dom", code, ENVIRONMENT) and imports("xml.dom.minidom", code, ENVIRONMENT)
    assert not imports("minidom", code, ENVIRONMENT) and not imports("xml.sax", code, ENVIRONMENT)


def test_calls_are_made_in_turn_and_their_values_kept_apart() -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[[], tuple[int, int]]:
        def call() -> tuple[int, int]:
            calls.append(name)
            return ord(name), len(calls)

        return call

    values = in_turn([noted("a"), noted("b"), noted("c")], 2)
    assert "".join(calls) == "cbaabc"
    assert values.tolist() == [[[97, 3], [98, 2], [99, 1]], [[97, 4], [98, 5], [99, 6]]]


def test_a_curve_compares_each_size_with_the_one_before() -> None:
    values = np.array([[1.0, 2.0, 8.0], [1.0, 3.0, 9.0], [1.0, 4.0, 11.0]])
    first, second = curve_rows("growth", "a case", "{} images", (5, 10, 20), "s", values, threads=2, note="a note")
    assert (first.ours, first.theirs, second.ours, second.theirs) == (
        "10 images", "5 images", "20 images", "10 images",
    )  # fmt: skip
    assert (first.ours_median, first.theirs_median, first.ratio) == (3.0, 1.0, 3.0)
    assert (first.low, first.high, first.repeats, first.threads, first.note) == (2.0, 4.0, 3, 2, "a note")
    assert (second.ours_median, second.theirs_median, second.ratio) == (9.0, 3.0, 3.0)


def test_a_start_is_timed_of_runs_that_are_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(startup, "REPEATS", 1)
    monkeypatch.setattr(startup, "WARMUP", 0)
    monkeypatch.setattr(startup, "RUNS", (1, 2))
    *rows, sweep = startup_rows(tmp_path, ENVIRONMENT)
    assert [(row.ours, row.theirs) for row in rows] == [
        (name, other)
        for name in ("train.py --help", "a run that is done")
        for other in ("import torch", "import hydra, omegaconf")
    ]
    for beside_torch, beside_hydra in (rows[:2], rows[2:]):
        # Neither has to import torch, so its import is no floor of theirs.
        assert beside_torch.note == "torch is not imported" and beside_torch.least is None and not beside_torch.floor
        assert beside_hydra.least == beside_hydra.theirs_median and beside_hydra.floor and not beside_hydra.note
        assert beside_hydra.ratio > 1  # type: ignore[operator]
    assert (sweep.ours, sweep.theirs, sweep.section) == ("a sweep of 2", "a sweep of 1", "startup")
    each = float(re.search(r"first, (-?[\d.]+) ms for each run", sweep.note)[1])  # type: ignore[index]
    assert each == pytest.approx(1e3 * (sweep.ours_median - sweep.theirs_median), abs=0.1)  # type: ignore[operator]
    configs = [OmegaConf.load(path) for path in tmp_path.glob("startup/runs/*/config.yaml")]
    assert [config.device for config in configs] == 2 * ["cpu"]


def test_a_run_that_should_be_done_and_is_not_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not say 'skipped: ': done: run 1"):
        startup._call(["-c", "print('done: run 1')"], ENVIRONMENT, "skipped: ")()


class Processes:
    """Stands in for ``measured_process``: composes what a command asks for, and has it cost as many as its images."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.trainings: list[TrainConfig] = []
        self.evaluations: list[EvaluateConfig] = []

    def __call__(self, arguments: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
        script, *overrides = arguments
        if script == "-c":
            return 0.5, 1.0
        config = compose_train(*overrides) if script == startup.TRAIN else compose_evaluate(*overrides)
        assert config.device == "cpu" and Path(config.results_dir) == self.results
        folder = self.results / config.study
        if isinstance(config, TrainConfig):
            assert not folder.exists()  # or nothing would be trained
            folder.mkdir()
            self.trainings.append(config)
            return config.data.train_samples / 1000, 2.0  # type: ignore[operator]
        assert script == startup.EVALUATE and folder.exists() and not (folder / "evaluated").exists()
        (folder / "evaluated").touch()
        self.evaluations.append(config)
        images = config.suite.n_samples["default"]
        return images / 10, float(images)


def test_memory_is_of_new_trainings_and_of_an_evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    monkeypatch.setattr(startup, "measured_process", processes)
    *beside_torch, growing, evaluation = peak_memory_rows(tmp_path, ENVIRONMENT, (1000, 3000), repeats=2)
    assert [config.data.train_samples for config in processes.trainings] == [3000, 1000, 1000, 3000]
    assert [(row.case, row.ours_median, row.ratio, row.least, row.repeats) for row in beside_torch] == [
        ("training, MNIST lenet, 1000 images", 1.0, 2.0, 0.5, 2),
        ("training, MNIST lenet, 3000 images", 3.0, 6.0, 0.5, 2),
    ]
    assert (growing.ours, growing.theirs, growing.ratio, growing.repeats) == ("3000 images", "1000 images", 3.0, 2)
    assert [config.study for config in processes.evaluations] == ["of-3000"]
    assert (evaluation.ours_median, evaluation.ratio, evaluation.repeats) == (100.0, 200.0, 1)
    assert evaluation.note == "measured once: it takes 1000 s"
    assert {row.section for row in (*beside_torch, growing, evaluation)} == {"memory"}


def test_evaluations_of_more_images_are_each_of_a_new_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    monkeypatch.setattr(growth, "measured_process", processes)
    seconds, peak = evaluation_rows(tmp_path, ENVIRONMENT, (10, 40))
    assert len(processes.trainings) == 1 and len(processes.evaluations) == 2
    assert (seconds.ours, seconds.theirs, seconds.unit) == ("40 images", "10 images", "s")
    assert (seconds.ours_median, seconds.theirs_median, peak.ours_median, peak.theirs_median) == (40, 10, 4, 1)
    assert seconds.repeats == 1 and all("measured once: it takes 10 to 40 s" in row.note for row in (seconds, peak))


def test_the_loss_grows_with_the_classes() -> None:
    rows = list(class_rows((3, 30, 300), repeats=2))
    assert [(row.ours, row.theirs) for row in rows] == 4 * [("30 classes", "3 classes"), ("300 classes", "30 classes")]
    assert [row.case.partition(",")[0] for row in rows] == 4 * ["DR-softmax"] + 4 * ["cross-entropy"]
    ours, theirs = ([row for row in part if row.unit == "MiB"] for part in (rows[:4], rows[4:]))
    logits = 256 * 300 * 4 / 2**20
    # The gradient and what it is made from; cross-entropy hands a further [B, K] on between its two halves.
    assert ours[1].ours_median == pytest.approx(2 * logits, rel=0.05)
    assert theirs[1].ours_median == pytest.approx(3 * logits, rel=0.05)
    for row in (*ours, *theirs):
        assert 5 < row.ratio < 10.5 and row.low == row.ratio == row.high and row.repeats == 3  # type: ignore[operator]


def test_tables_grow_with_the_models(tmp_path: Path) -> None:
    rows = list(table_rows(tmp_path, ENVIRONMENT, (10, 60), repeats=1))
    assert [(row.case, row.unit) for row in rows] == [
        ("table of correlations: time", "s"), ("table of partial correlations: time", "s"),
        ("table of granulated Kendall coefficients: time", "s"), ("tables of coefficients: peak memory", "GiB"),
    ]  # fmt: skip
    assert {(row.ours, row.theirs, row.section) for row in rows} == {("60 models", "10 models", "growth")}
    assert all(row.ours_median > 0 and row.repeats == 1 for row in rows)  # type: ignore[operator]
    assert [len(pd.read_pickle(tmp_path / f"{count}.pickle")) for count in (10, 60)] == [10, 60]
    # Pandas and SciPy alone; torch would make it some 0.2 GiB more.
    assert 0.05 < rows[-1].theirs_median < 0.3  # type: ignore[operator]
    # A table of made-up models is one that the real tables are made from.
    for table in (correlation_table, granulated_table):
        assert len(table(made_up_models(40)).dropna()) > 0


def test_tables_have_each_their_own_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(arguments: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
        _, _, _, models, seconds, *tables = arguments
        count = len(pd.read_pickle(models))
        # As long as the name is and as many as there are.
        Path(seconds).write_text(json.dumps([len(name) * count for name in tables[1::2]]))
        return count / 100, 1.0

    monkeypatch.setattr(growth, "measured_process", measured)
    *times, peak = table_rows(tmp_path, {}, (10, 20), repeats=2)
    names = ["correlation_table", "partial_correlation_table", "granulated_table"]
    assert [row.theirs_median for row in times] == [10 * len(name) for name in names]
    assert [row.ratio for row in (*times, peak)] == 4 * [2.0] and {row.repeats for row in (*times, peak)} == {2}
    assert (peak.ours_median, peak.theirs_median) == (0.2, 0.1)
