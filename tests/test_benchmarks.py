"""The benchmark's arithmetic on known answers, and its rows on the smallest real work. No time is tested."""

import runpy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from drs.benchmarks.attacks import attack_rows
from drs.benchmarks.harness import Machine, Row, peak_tensor_bytes, ratio_of_medians, time_in_turn
from drs.benchmarks.losses import loss_rows
from drs.benchmarks.report import read_provenance, read_rows, report_text, write_rows
from drs.config import PROJECT_ROOT
from drs.data import LabelledImages
from drs.errors import UserError
from drs.provenance import describe_machine

ROW = Row("loss", "a | b", "ours", "theirs", "ms", 2.0, 1.0, 2.0, 1.9, 2.1, 5, "<= 2", "cpu", 1, "a floor", "a note")
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


@pytest.mark.parametrize(
    ("ratio", "target", "verdict"),
    [(2.0, "<= 2", "met"), (2.01, "<= 2", "missed"), (3.0, ">= 3", "met"), (2.9, ">= 3", "missed"), (1.0, "", ""),
     (None, ">= 3", "not measured")],
)  # fmt: skip
def test_verdict_compares_the_ratio_with_the_target(ratio: float | None, target: str, verdict: str) -> None:
    assert replace(ROW, ratio=ratio, target=target).verdict == verdict


def test_rows_are_kept_and_reported(tmp_path: Path) -> None:
    unmeasured = replace(
        ROW, section="gpu", ours_median=None, theirs_median=None, ratio=None, low=None, high=None, note="no GPU"
    )
    write_rows(tmp_path, [ROW, unmeasured], PROVENANCE)
    assert read_rows(tmp_path) == [ROW, unmeasured]
    text = (tmp_path / "REPORT.md").read_text()
    assert r"| a \| b | ours | theirs | ms | 2.00 | 1.00 | 2.00 (1.90 to 2.10) | &lt;= 2 | met | 5 | cpu |" in text
    assert "not measured" in text and "- a \\| b, ours: floor: a floor." in text
    assert "Targets: 1 met, 1 not measured." in report_text([ROW, unmeasured], PROVENANCE)
    # Each section says where it was measured itself: they need not be of one day or commit.
    assert text.index(f"commit `{'a' * 12}`: ") < text.index(f"commit `{'b' * 12}` with changes: ")
    assert read_provenance(tmp_path) == PROVENANCE
    (tmp_path / "provenance.json").write_text("[1")
    with pytest.raises(UserError, match=r"provenance\.json is not JSON .* delete it and .*bench\.csv"):
        read_provenance(tmp_path)
    (tmp_path / "bench.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"bench\.csv: has not the columns section, case"):
        read_rows(tmp_path)


def test_loss_rows_count_no_tensor_beyond_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drs.benchmarks.losses.SHAPES", ((16, 50, 3),))
    timed, memory = loss_rows(Machine(10, 10))
    assert timed.ratio is not None and timed.repeats == 3
    assert memory.ratio is not None and -1 < memory.ratio <= 1.2  # beside [B, K] there are a few [B] tensors


def test_attack_rows_say_who_is_stronger(
    digits: tuple[LabelledImages, LabelledImages, LabelledImages],
    digits_model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("drs.benchmarks.attacks.REPEATS", 1)
    test = digits[2]
    images, labels = test.pixels(torch.arange(40)), test.labels[:40]
    rows = list(attack_rows(digits_model, images, labels, 0.2, described="mlp", target=">= 3"))
    assert [row.ours for row in rows] == ["our PGD", "our margin PGD"]
    assert all(row.ratio is not None and "torchattacks" in row.note and "foolbox" in row.note for row in rows)
    assert rows[1].note.startswith("no weaker")


def test_unknown_section_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench.py", "--only", "everything"])
    script = runpy.run_path(str(PROJECT_ROOT / "scripts" / "bench.py"))
    with pytest.raises(UserError, match=r"ONLY=everything: must be one of loss, training, attacks, startup, memory"):
        script["main"]()
