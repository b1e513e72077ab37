"""An evaluation in which something is damaged, broken, or shared with another evaluation of the same study."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from brief_study import CELLS, configuration
from test_batches import LittleMemory

from drs import evaluation as evaluation_module
from drs.array_files import load_arrays_file, save_arrays
from drs.attack_config import PGDConfig
from drs.cells import Cell, plan_cells
from drs.claiming import claim
from drs.errors import DamagedFileError, Interrupted, UserError
from drs.evaluation import StudyEvaluation, evaluate_run, evaluate_study, redo_damaged
from drs.filling import fill_cell
from drs.interrupts import interrupt_on_termination
from drs.report_text import failures_section
from drs.run_failures import failure_lines
from drs.runs import RunFolder, iterate_runs
from drs.study import STAMP, is_current, mark_current, only_writer
from drs.tables import attack_times, build_tables, busy_seconds, halved_batches


@pytest.fixture
def results(brief_results: Path, tmp_path: Path) -> Path:
    shutil.copytree(brief_results, tmp_path / "results")
    return tmp_path / "results"


def runs_of(results: Path) -> list[RunFolder]:
    return list(iterate_runs(results / "s"))


NAMES = ["clean@inf", "fgsm@0.1", "fgsm@0.2", "pgd@0.1", "pgd@0.2"]


def flip_bit(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def evaluated(evaluation: StudyEvaluation) -> set[str]:
    return {cell.run.run_id for cell in evaluation.cells}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("checkpoint.safetensors", "its SHA-256 is"),
        ("metrics.csv", "its SHA-256 is"),
        ("config.yaml", "its SHA-256 is"),
        ("status.json", "status.json: "),
    ],
)
def test_damaged_run_is_told_and_left_out_while_the_others_are_evaluated(results: Path, name: str, said: str) -> None:
    first, second, third = runs_of(results)
    # In the middle of the weights, of a number and of a name: what no parser would notice.
    flip_bit(second.path / name, 0.6)
    config = configuration(results)
    found = evaluate_study(config)
    assert evaluated(found) == {first.run_id, third.run_id}
    (failure,) = found.failures
    assert failure.run == second and name in failure.error and said in failure.error and "\n" not in failure.error
    tables, _ = build_tables(found.cells, config.suite, results / "s", found.failures)
    assert tables["failures"]["run_id"].tolist() == [second.run_id]
    assert tables["failures"]["reason"][0] == f"not evaluated: {failure.error}"
    assert len(tables["models"]) == 2
    section = failures_section(tables["failures"], tables["models"])
    assert "1 run failed, or has no whole evaluation" in section and name in section
    assert failure_lines([failure])[0].startswith(f"{second.run_id}  ")
    if name == "checkpoint.safetensors":
        assert json.loads((second.path / "eval" / "failure.json").read_text())["error"] == failure.error


def test_truncated_checkpoint_is_told_by_its_size(results: Path) -> None:
    path = runs_of(results)[0].path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (failure,) = evaluate_study(configuration(results)).failures
    assert f"{path}: has {path.stat().st_size} bytes, but {path.stat().st_size + 1} were written" in failure.error


def test_model_without_finite_logits_fails_alone_and_fail_fast_ends_the_evaluation(results: Path) -> None:
    broken = runs_of(results)[0]
    model = broken.load_model(torch.device("cpu"))
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    broken.save_weights(model, "mlp")
    broken.write_status(**{**broken.status(), "files": broken.describe_files()})
    with pytest.raises(UserError, match=r"logits that are not finite.*\(fail_fast=true ends the evaluation\)"):
        evaluate_study(configuration(results, "fail_fast=true"))
    assert not list((results / "s").rglob("*.npz"))
    found = evaluate_study(configuration(results))
    assert len(evaluated(found)) == 2
    assert found.failures[0].where == "clean"
    assert "logits that are not finite" in found.failures[0].error


def test_same_mistake_in_every_run_is_one_error(results: Path) -> None:
    with pytest.raises(UserError, match=r"suite\.n_samples\.digits=5000: the test set has 500 samples"):
        evaluate_study(configuration(results, "suite.n_samples.digits=5000", "suite.n_clean=5000"))


def test_images_that_are_attacked_are_among_those_of_the_clean_accuracy(results: Path) -> None:
    message = r"suite\.n_clean=19: must be null or at least the 20 images of digits that are attacked"
    with pytest.raises(UserError, match=message):
        evaluate_study(configuration(results, "suite.n_samples.digits=20", "suite.n_clean=19"))


def test_runs_that_are_no_seeds_of_one_setting_are_refused(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, failures = evaluation_module.read_runs(results / "s")
    first, other, *_ = configs
    mixed = {**configs, other: replace(configs[first], epochs=77, seed=9)}
    monkeypatch.setattr(evaluation_module, "read_runs", lambda _: (mixed, failures))
    with pytest.raises(
        UserError, match=f"{first.run_id} and {other.run_id} would count as seeds .* epochs=[0-9]* and 77"
    ):
        evaluate_study(configuration(results))


def test_defect_leaves_its_traceback_and_is_tried_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = runs_of(results)[1]

    def fails(cell: Cell, *arguments: object) -> float:
        if cell.run == broken and isinstance(cell.config, PGDConfig):
            raise RuntimeError("first line\nthe shape is wrong")
        return fill_cell(cell, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation_module, "fill_cell", fails)
    found = evaluate_study(configuration(results))
    assert evaluated(found) == {run.run_id for run in runs_of(results)} - {broken.run_id}
    assert (found.failures[0].where, found.failures[0].error) == ("pgd@0.1", "RuntimeError: the shape is wrong")
    record = json.loads((broken.path / "eval" / "failure.json").read_text())
    assert "Traceback (most recent call last)" in record["traceback"] and "in fails" in record["traceback"]
    assert len(list((broken.path / "eval").glob("*.npz"))) == 3, "what was finished before it stays"
    monkeypatch.undo()
    assert evaluate_study(configuration(results)).failures == []
    assert not (broken.path / "eval" / "failure.json").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_request_to_end_that_python_drops_ends_the_evaluation_before_the_next_cell(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[Path] = []

    class Dropped:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def fills(cell: Cell, *arguments: object) -> float:
        seconds = fill_cell(cell, *arguments)  # type: ignore[arg-type]
        filled.append(cell.path)
        if len(filled) == 2:
            Dropped()
            gc.collect()
        return seconds

    monkeypatch.setattr(evaluation_module, "fill_cell", fills)
    before = signal.getsignal(signal.SIGTERM)
    try:
        interrupt_on_termination()
        with pytest.raises(Interrupted):
            evaluate_study(configuration(results))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(filled) == 2 and all(path.exists() for path in filled)
    assert not list((results / "s").rglob("failure.json")) and not list((results / "s").rglob(".claim*"))


def test_damaged_and_outdated_cells_are_told_and_computed_again(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(results)
    found = evaluate_study(config)
    before = {cell.path: load_arrays_file(cell.path) for cell in found.cells}
    cut, flipped, outdated, whole = (found.cells[index].path for index in (0, 4, 8, 9))
    cut.write_bytes(cut.read_bytes()[:-50])
    flip_bit(flipped, 0.3)
    about = json.loads(str(before[outdated]["about"]))
    save_arrays(outdated, **{**before[outdated], "about": np.array(json.dumps({**about, "weights": "0" * 64}))})
    times = whole.stat().st_mtime_ns
    capsys.readouterr()
    again = evaluate_study(config)
    with pytest.raises(DamagedFileError):
        build_tables(again.cells, config.suite, again.folder)
    again = redo_damaged(again, config)
    build_tables(again.cells, config.suite, again.folder)
    said = capsys.readouterr().out
    assert f"{cut}: not a whole array file" in said
    assert f"{flipped}: not a whole array file" in said
    assert f"{outdated}: was made from other weights than the run has now" in said
    assert again.computed == 3 and not again.failures
    assert whole.stat().st_mtime_ns == times
    for path, arrays in before.items():
        after = load_arrays_file(path)
        for name in ("indices", "labels", "logits", "distance"):
            np.testing.assert_array_equal(arrays[name], after[name])


def test_memory_of_a_gpu_that_runs_out_halves_the_batch_and_the_evaluation_goes_on(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = runs_of(results)[0]
    original = RunFolder.load_model

    def load_model(run: RunFolder, device: torch.device) -> torch.nn.Module:
        model = original(run, device)
        return LittleMemory(model, 10).eval() if run == short else model

    monkeypatch.setattr(RunFolder, "load_model", load_model)
    config = configuration(results)
    found = evaluate_study(config)
    assert found.failures == [] and found.computed == 3 * CELLS
    tables, abouts = build_tables(found.cells, config.suite, found.folder)
    assert len(tables["models"]) == 3
    halved = halved_batches(abouts)
    assert halved.keys() == {f"{short.run_id} {name}" for name in NAMES}
    assert {sizes for sizes in halved.values()} == {"1000 to 8", "500 to 8"}


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_clock_that_jumps_changes_no_duration_of_an_attack(
    results: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    now = [1.8e9]

    def clock() -> float:
        now[0] += jump
        return now[0]

    monkeypatch.setattr(time, "time", clock)
    config = configuration(results)
    began = time.monotonic()
    found = evaluate_study(config)
    took = time.monotonic() - began
    for cell in found.cells:  # the system's clock sets the times of files
        os.utime(cell.path, (clock(), clock()))
    _, abouts = build_tables(found.cells, config.suite, found.folder)
    assert found.failures == [] and found.computed == 3 * CELLS
    assert 0 < busy_seconds(attack_times(abouts)) <= took + 0.01
    assert evaluate_study(config).computed == 0, "no time of a file decides whether a cell is there"


def test_record_of_what_tables_were_made_from_that_is_damaged_vouches_for_nothing(results: Path) -> None:
    config = configuration(results)
    evaluation = evaluate_study(config)
    for name in ("REPORT.md", "report.html"):
        (results / "s" / name).touch()
    mark_current(evaluation, config)
    assert is_current(evaluation, config)
    whole = (results / "s" / STAMP).read_bytes()
    for damaged in (whole[:-9], b"", b"\xff" + whole[1:], b"[]", whole.replace(b'"timing"', b'"timinf"')):
        (results / "s" / STAMP).write_bytes(damaged)
        assert not is_current(evaluation, config)


def test_cell_that_others_build_on_is_computed_again_where_it_is_damaged(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decisive = ["+suite.attacks.fgsm.decisive=true", "+suite.attacks.pgd.decisive=true"]
    config = configuration(results, *decisive, "+suite.attacks.pgd.standing_only=true")
    found = evaluate_study(config)
    run = runs_of(results)[0]
    pgd = next(cell for cell in found.cells if cell.run == run and cell.attack == "pgd")
    (fgsm,) = pgd.after
    before = {cell.path: load_arrays_file(cell.path) for cell in (fgsm, pgd)}
    flip_bit(fgsm.path, 0.5)
    pgd.path.unlink()
    assert evaluate_study(config).computed == 2
    assert f"{fgsm.path}: not a whole array file" in capsys.readouterr().out
    for path, arrays in before.items():
        np.testing.assert_array_equal(arrays["logits"], load_arrays_file(path)["logits"])


def _evaluate_and_count(results: Path, queue: "multiprocessing.Queue[int]") -> None:
    torch.set_num_threads(1)
    queue.put(evaluate_study(configuration(results)).computed)


def test_two_evaluations_share_the_work_and_compute_nothing_twice(results: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=_evaluate_and_count, args=(results, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    computed = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert sum(computed) == 3 * CELLS
    assert evaluate_study(configuration(results)).computed == 0
    assert not list((results / "s").rglob(".claim*")) and not list((results / "s").rglob("*.tmp"))


def in_background(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_run_with_another_evaluation_is_put_off_and_then_done(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "POLL_SECONDS", 0.05)
    first, second, third = runs_of(results)
    config = configuration(results)
    found: list[StudyEvaluation] = []
    with claim(first.path / "eval" / ".claim", "a test"):
        cells = plan_cells(first, config.suite, {first: first.config()})
        assert evaluate_run(first, cells, torch.device("cpu")).elsewhere
        thread = in_background(lambda: found.append(evaluate_study(config)))
        until = time.monotonic() + 60
        while len(list((third.path / "eval").glob("*.npz"))) < CELLS:
            assert time.monotonic() < until and thread.is_alive()
            time.sleep(0.02)
        assert not list((first.path / "eval").glob("*.npz"))
    thread.join(timeout=60)
    assert found[0].computed == 3 * CELLS
    assert "waiting for 1 runs that another evaluation is at work on" in capsys.readouterr().out


def test_tables_are_written_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drs.study.POLL_SECONDS", 0.02)
    inside: list[int] = []
    overlaps: list[int] = []

    def write(number: int) -> None:
        with only_writer(tmp_path):
            inside.append(number)
            time.sleep(0.1)
            overlaps.append(len(inside))
            inside.remove(number)

    threads = [in_background(lambda number=number: write(number)) for number in range(3)]  # type: ignore[misc]
    for thread in threads:
        thread.join(timeout=30)
    assert overlaps == [1, 1, 1]
