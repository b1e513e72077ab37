"""The benchmark's arithmetic on known answers, and its rows on the smallest real work. No time is tested."""

import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose_train
from torch import nn

from drs.benchmarks.harness import Machine, Row, count_flops, peak_tensor_bytes, ratio_of_medians, time_in_turn
from drs.benchmarks.report import read_provenance, read_rows, report_text, write_rows
from drs.benchmarks.training import _relu_first, training_rows
from drs.errors import UserError
from drs.provenance import describe_machine

ROW = Row(
    "loss", "a | b", "ours", "theirs", "ms", 2.0, 1.0, 2.0, 1.9, 2.0, 5, "<= 2", "cpu", 1, "a floor", "a note", 0.5
)
HERE = {**describe_machine(torch.device("cpu")), "machine": {"gigaflops": 17.0, "gigabytes": 9.0}}
PROVENANCE = {
    "loss": {**HERE, "commit": "a" * 40, "dirty": False},
    "gpu_loss": {**HERE, "commit": "b" * 40, "dirty": True},
}


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


def test_met_by_the_whole_interval_or_not() -> None:
    assert ROW.is_certain and not replace(ROW, high=2.1).is_certain
    assert "| met, but not by the whole interval |" in report_text([replace(ROW, high=2.1)], PROVENANCE)
    assert "| met |" in report_text([ROW], PROVENANCE)
    # What is missed is missed, however wide the interval.
    assert "| missed |" in report_text([replace(ROW, ratio=2.05)], PROVENANCE)


def test_rows_are_kept_and_reported(tmp_path: Path) -> None:
    unmeasured = replace(
        ROW, section="gpu_loss", ours_median=None, theirs_median=None, ratio=None, low=None, high=None, note="no GPU"
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
        r"| a \| b | ours | theirs | ms | 2.00 | 1.00 | 0.500 | 4.00 | 2.00 (1.90 to 2.00) | &lt;= 2 | met | 5 | cpu |"
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


def test_training_rows_compare_trainings_that_reach_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("drs.benchmarks.training.REPEATS", 2)
    config = compose_train(
        "data=digits", "model=mlp", "loss=ce", "optim=adam", "epochs=4", "batch_size=32", f"data.cache={tmp_path}"
    )
    whole, batches, *steps, alone = training_rows(config, Machine(1e-3, 1), ">= 1000")
    ours, plain = map(float, re.findall(r"([\d.]+) ±", whole.note))
    assert min(ours, plain) > 80 and abs(ours - plain) < 8
    assert whole.least > 0 and whole.verdict == "missed"  # type: ignore[operator]
    # Products there and back, but for the images' gradient, of 64 x 256, 256 x 256 and 256 x 10 weights.
    products = 2 * 32 * (2 * 64 * 256 + 3 * (256 * 256 + 256 * 10))
    n_steps = whole.least * 1e6 / products  # type: ignore[operator]
    assert n_steps == round(n_steps) and n_steps % 4 == 0 and 20 < n_steps / 4 < 1797 / 32
    assert re.search(r"in memory take [\d.e-]+ s, [\d.e-]+ times their products: ", whole.reason)
    assert all(row.tried and row.ratio is not None for row in (batches, *steps, alone))
    tried = ["channels first", "bfloat16", "ReLU before pooling", "optimiser not fused", "compiled"]
    assert [row.ours for row in steps] == tried[: None if shutil.which(os.environ.get("CXX", "g++")) else -1]
    assert alone.ours == "freed memory goes back"


def test_relu_and_pooling_change_places() -> None:
    def build(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(*layers), nn.ReLU())

    swapped = _relu_first(build(nn.MaxPool2d(2), nn.ReLU(), nn.Tanh()))
    assert [type(layer).__name__ for layer in swapped[1]] == ["ReLU", "MaxPool2d", "Tanh"]  # type: ignore[index]
    assert str(_relu_first(build(nn.Tanh(), nn.ReLU()))) == str(build(nn.Tanh(), nn.ReLU()))
