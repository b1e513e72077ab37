"""One run's cells spread over processes: the arrays of one process, whatever is damaged or fails on the way."""

import gc
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brief_study import CELLS, configuration

from drs import evaluation as evaluation_module
from drs import filling, spreading
from drs.array_files import load_arrays_file
from drs.cells import Cell, plan_cells
from drs.errors import UserError
from drs.evaluation import evaluate_study
from drs.evaluation_workers import StartingPool, starting_pool, worker_pool
from drs.runs import RunFolder, iterate_runs
from drs.spreading import batches_of, in_order_of_need, prepare_worker

# A batch is smaller than what stands, and PGD waits for FGSM.
OVERRIDES = [
    "workers=2", "+suite.attacks.fgsm.decisive=true", "+suite.attacks.pgd.decisive=true",
    "+suite.attacks.pgd.standing_only=true", "suite.batch_size=7",
]  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with worker_pool(2) as pool:
        yield pool


@pytest.fixture
def run(
    brief_results: Path, tmp_path: Path, pool: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunFolder]:
    """The only run of a study; all of its evaluation is spread."""
    first = next(iter(iterate_runs(brief_results / "s")))
    shutil.copytree(first.path, tmp_path / "s" / "runs" / first.run_id)
    monkeypatch.setattr(spreading, "SPREAD_SECONDS", {"cpu": -1.0})
    monkeypatch.setattr(spreading, "starting_pool", lambda *_: nullcontext(StartingPool(pool, 0, nothing)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the processes has here
    yield RunFolder(tmp_path / "s" / "runs" / first.run_id)
    torch.set_num_threads(threads)


def arrays_of(cells: list[Cell]) -> dict[Path, dict[str, np.ndarray]]:
    return {cell.path: load_arrays_file(cell.path) for cell in cells}


def test_spread_batches_are_those_of_one_process(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, *OVERRIDES)
    found = evaluate_study(config)
    assert found.computed == len(found.cells) == CELLS
    spread = arrays_of(found.cells)
    assert any(0 < arrays["attacked"].sum() < 30 for arrays in spread.values() if "attacked" in arrays)
    shutil.rmtree(run.path / "eval")
    monkeypatch.setattr(spreading, "SPREAD_SECONDS", {"cpu": 1e9})
    for path, arrays in arrays_of(evaluate_study(config).cells).items():
        for name in ("indices", "labels", "logits", "distance"):
            np.testing.assert_allclose(spread[path][name], arrays[name], atol=1e-5)


def test_damaged_earlier_cell_is_computed_again(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, *OVERRIDES)
    evaluate_study(config)
    pgd = next(cell for cell in plan_cells(run, config.suite, {run: run.config()}) if cell.attack == "pgd")
    (fgsm,) = pgd.after
    before = load_arrays_file(pgd.path)
    fgsm.path.write_bytes(fgsm.path.read_bytes()[:-9])
    pgd.path.unlink()
    assert evaluate_study(config).computed == 2
    assert f"{fgsm.path}: not a whole array file" in capsys.readouterr().out
    np.testing.assert_allclose(before["logits"], load_arrays_file(pgd.path)["logits"], atol=1e-5)


def test_cell_that_fails_in_a_process_is_named(run: RunFolder, tmp_path: Path) -> None:
    model = run.load_model(torch.device("cpu"))
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    run.save_weights(model, "mlp")
    run.write_status(**{**run.status(), "files": run.describe_files()})
    with pytest.raises(Exception, match=rf"run {run.run_id}, fgsm@0.1: .* logits that are not finite"):
        evaluate_study(configuration(tmp_path, *OVERRIDES))
    assert not list(tmp_path.rglob("*.npz"))


def test_cells_that_others_wait_for_come_first(run: RunFolder, tmp_path: Path) -> None:
    config = configuration(tmp_path, *OVERRIDES)
    cells = plan_cells(run, config.suite, {run: run.config()})
    assert [cell.attack for cell in cells] == ["clean", "fgsm", "fgsm", "pgd", "pgd"]
    assert [cell.attack for cell in in_order_of_need(cells)] == ["fgsm", "fgsm", "clean", "pgd", "pgd"]
    assert batches_of(cells[0], 30) == [(0, 30)]
    assert batches_of(cells[1], 30) == [(0, 7), (7, 14), (14, 21), (21, 28), (28, 30)]
    assert batches_of(cells[1], 0) == []


def test_cells_are_computed_here_until_the_processes_are_ready(
    run: RunFolder, tmp_path: Path, pool: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, *OVERRIDES)
    start: Future[int] = Future()
    here: list[str] = []
    fill_cell, spread = evaluation_module.fill_cell, spreading.fill_side_by_side
    left: list[list[str]] = []

    def fill(cell: Cell, *others: Any) -> None:
        fill_cell(cell, *others)
        here.append(cell.attack)
        if len(here) == 2:
            start.set_result(1)

    def fill_others(pool: ProcessPoolExecutor, workers: int, cells: list[Cell], *others: Any, **steps: Any) -> None:
        left.append([cell.attack for cell in cells])
        spread(pool, workers, cells, *others, **steps)

    starting = StartingPool(pool, 1, nothing, [start])
    monkeypatch.setattr(spreading, "starting_pool", lambda *_: nullcontext(starting))
    monkeypatch.setattr(evaluation_module, "fill_cell", fill)
    monkeypatch.setattr(spreading, "fill_side_by_side", fill_others)
    assert evaluate_study(config).computed == CELLS
    assert (here, left) == (["clean", "fgsm"], [["fgsm", "pgd", "pgd"]])


def test_the_cheapest_cells_come_first_until_the_processes_are_ready(
    run: RunFolder, tmp_path: Path, pool: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None that waits for another one; with one process each has its turn."""
    never = StartingPool(pool, 2, nothing, [Future()])
    monkeypatch.setattr(spreading, "starting_pool", lambda *_: nullcontext(never))
    here: list[str] = []

    def fill(cell: Cell, *others: Any) -> None:
        filling.fill_cell(cell, *others)
        here.append(cell.attack)

    monkeypatch.setattr(evaluation_module, "fill_cell", fill)
    noise = "{kind: noise, norm: linf, draws: 1}"
    after = noise.replace("}", ", decisive: true, standing_only: true}")
    overrides = [*OVERRIDES, f"+suite.attacks.noise={noise}", f"+suite.attacks.after={after}"]
    evaluate_study(configuration(tmp_path, *overrides, "workers=1"))
    assert here == ["clean", "fgsm", "fgsm", "pgd", "pgd", "noise", "noise", "after", "after"]
    here.clear()
    shutil.rmtree(run.path / "eval")
    evaluate_study(configuration(tmp_path, *overrides))
    assert sorted(here[:5]) == ["clean", "fgsm", "fgsm", "noise", "noise"]
    assert sorted(here[5:]) == ["after", "after", "pgd", "pgd"] and here[-1] == "after"


@pytest.mark.parametrize(("workers", "large", "most"), [(3, 6, 1), (4, 6, 2), (1, 6, 1), (3, 999, 0)])
def test_large_batches_leave_half_of_the_processes_to_small_ones(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, large: int, most: int
) -> None:
    """Batches are of 7 images but for the last of a cell; the clean images are one. The threads stand for processes:
    how many batches are begun is watched, and one at a time is computed, as they share what a process has alone."""
    cells = plan_cells(run, configuration(tmp_path, *OVERRIDES).suite, {run: run.config()})
    monkeypatch.setattr(spreading, "LARGE_BATCH", {"cpu": large})
    lock, at_once, begun = threading.Lock(), Counter[bool](), list[tuple[int, int]]()
    alone, compute = threading.Lock(), spreading._compute

    def watched(cell: Cell, device: torch.device, standing: np.ndarray, start: int, stop: int) -> Any:
        with lock:
            at_once[stop - start > large] += 1
            begun.append((at_once[True], at_once.total()))
        time.sleep(0.2 if stop - start > large else 0.02)
        try:
            with alone:
                return compute(cell, device, standing, start, stop)
        finally:
            with lock:
                at_once[stop - start > large] -= 1

    monkeypatch.setattr(spreading, "_compute", watched)
    written: list[Cell] = []
    with ThreadPoolExecutor(workers) as threads:
        spreading.fill_side_by_side(
            threads, workers, cells, torch.device("cpu"),  # type: ignore[arg-type]
            fill_here=lambda cell: 1, before_writing=nothing, when_begun=nothing,
            when_done=lambda cell, count: written.append(cell), on_images=nothing,
        )  # fmt: skip
    assert sorted(cell.path for cell in written) == sorted(cell.path for cell in cells)
    assert max(count for count, _ in begun) == most
    assert max(total for _, total in begun) <= workers


def test_cells_that_others_wait_for_come_first_on_a_card_until_the_processes_are_ready(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = StartingPool(nothing, 2, nothing, [Future()])  # type: ignore[arg-type]
    monkeypatch.setattr(spreading, "starting_pool", lambda *_: nullcontext(never))
    monkeypatch.setattr(spreading, "LARGE_BATCH", {"cpu": 512})
    monkeypatch.setattr(spreading, "SPREAD_SECONDS", {"cpu": 0.0})
    here: list[str] = []

    def fill(cell: Cell, *others: Any) -> None:
        filling.fill_cell(cell, *others)
        here.append(cell.attack)

    monkeypatch.setattr(evaluation_module, "fill_cell", fill)
    evaluate_study(configuration(tmp_path, *OVERRIDES))
    assert here == ["fgsm", "fgsm", "clean", "pgd", "pgd"]


def test_processes_that_are_still_starting_are_not_waited_for() -> None:
    began = time.perf_counter()
    with starting_pool(2, partial(time.sleep, 600)) as starting:
        assert not starting.is_ready()
        processes = dict(starting.pool._processes)
    assert len(processes) == 2
    assert_ended(processes)
    assert time.perf_counter() - began < 60


def test_processes_are_ready_once_each_has_prepared_itself(run: RunFolder, tmp_path: Path) -> None:
    """The first that is up may take the calls of both, and is not taken for both."""
    config = configuration(tmp_path, *OVERRIDES)
    cells = plan_cells(run, config.suite, {run: run.config()})
    with starting_pool(2, partial(prepare_worker, cells[0], torch.device("cpu"))) as starting:
        processes = dict(starting.pool._processes)
        while not starting.is_ready():
            wait(starting.starts, 120)
        assert {start.result() for start in starting.starts} == set(processes)
        assert starting.pool.submit(prepared, cells[0].run).result() == (1, 1)


@pytest.mark.parametrize("killed", [False, True])
def test_processes_end_with_an_evaluation_that_fails_while_they_start(
    brief_results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Whether what fails is a cell, or one of them."""
    first = next(iter(iterate_runs(brief_results / "s")))
    run = RunFolder(tmp_path / "s" / "runs" / first.run_id)
    shutil.copytree(first.path, run.path)
    processes: dict[int, Any] = {}
    monkeypatch.setattr(spreading, "SPREAD_SECONDS", {"cpu": -1.0})

    def fill(cell: Cell, *others: Any) -> None:
        (open_pool,) = [item for item in gc.get_objects() if isinstance(item, StartingPool)]
        processes.update(open_pool.pool._processes)
        if not killed:
            raise ValueError("not today")
        for process in processes.values():
            process.kill()
        wait(open_pool.starts, 60)

    monkeypatch.setattr(evaluation_module, "fill_cell", fill)
    message = "ended from outside" if killed else "not today"
    with pytest.raises(UserError, match=message):
        evaluate_study(configuration(tmp_path, *OVERRIDES, "fail_fast=true"))
    assert len(processes) == 2
    assert_ended(processes)
    assert not list(run.path.rglob(".claim*"))


def assert_ended(processes: dict[int, Any]) -> None:
    until = time.monotonic() + 30
    for process in processes.values():
        # A join returns at once while the pool's own thread is about to note the end.
        while process.exitcode is None and time.monotonic() < until:
            process.join(0.1)
        assert process.exitcode is not None


def nothing(*_: Any) -> None:
    """What a process that needs no preparation does."""


def prepared(run: RunFolder) -> tuple[int, int]:
    """Return how many models and test splits a worker process has loaded; called in one."""
    return spreading._model_of.cache_info().currsize, filling._cached_test_split.cache_info().currsize


def test_a_cell_of_which_few_images_stand_is_no_large_one(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on beside a large one, by how many are left of it and not by how many it is about."""
    cells = plan_cells(run, configuration(tmp_path, *OVERRIDES, "suite.batch_size=30").suite, {run: run.config()})
    *others, last = (cell for cell in cells if cell.attack != "clean")
    for cell in others:
        filling.fill_cell(cell, run.load_model(torch.device("cpu")), torch.device("cpu"))
    left = int(filling.read_before(last, torch.device("cpu")).standing.sum())
    assert 0 < left < 30
    for cell in others[:1]:
        cell.path.unlink()
    begun: list[tuple[str, int]] = []
    compute, may_end = spreading._compute, threading.Event()

    def watched(cell: Cell, device: torch.device, standing: np.ndarray, start: int, stop: int) -> Any:
        begun.append((cell.attack, stop - start))
        if cell is last:
            may_end.set()
        assert may_end.wait(30), "the large batch is still at work when the small one begins"
        return compute(cell, device, standing, start, stop)

    monkeypatch.setattr(spreading, "_compute", watched)
    monkeypatch.setattr(spreading, "LARGE_BATCH", {"cpu": left})
    assert others[0] not in last.after
    with ThreadPoolExecutor(2) as threads:
        spreading.fill_side_by_side(
            threads, 2, [others[0], last], torch.device("cpu"),  # type: ignore[arg-type]
            fill_here=lambda cell: 1, before_writing=nothing, when_begun=nothing,
            when_done=lambda cell, count: None, on_images=nothing,
        )  # fmt: skip
    assert sorted(size for _, size in begun) == [left, 30]


def test_the_convergence_checks_are_spread_and_are_those_of_one_process(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = "+suite.sanity={n_samples: 5, n_convergence: 20, steps: 2, restarts: 1, batch_size: 8}"
    config = configuration(tmp_path, *OVERRIDES, checks)
    cells = plan_cells(run, config.suite, {run: run.config()})
    (cell,) = [cell for cell in cells if cell.attack == "convergence"]
    assert batches_of(cell, 20) == [(0, 8), (8, 16), (16, 20)]
    evaluate_study(config)
    spread = load_arrays_file(cell.path)
    shutil.rmtree(run.path / "eval")
    monkeypatch.setattr(spreading, "SPREAD_SECONDS", {"cpu": 1e9})
    evaluate_study(config)
    whole = load_arrays_file(cell.path)
    assert spread["standing"].shape == (3, 20) and 0 < spread["standing"].sum() < 60
    np.testing.assert_array_equal(spread["standing"], whole["standing"])


def test_no_processes_are_started_for_a_single_cell(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, *OVERRIDES)
    evaluate_study(config)
    plan_cells(run, config.suite, {run: run.config()})[-1].path.unlink()
    monkeypatch.setattr(spreading, "starting_pool", None)
    assert evaluate_study(config).computed == 1


def test_a_batch_of_the_convergence_checks_has_the_seed_of_its_place(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a batch of an attack has, so that a restart begins where it begins in one process."""
    checks = "+suite.sanity={n_samples: 5, n_convergence: 20, seed: 3, batch_size: 8}"
    cells = plan_cells(run, configuration(tmp_path, *OVERRIDES, checks).suite, {run: run.config()})
    (cell,) = [cell for cell in cells if cell.attack == "convergence"]
    seen: list[tuple[int, int]] = []

    def watched(model: Any, images: torch.Tensor, labels: torch.Tensor, epsilon: float, config: Any, **_: Any) -> Any:
        seen.append((config.seed, len(images)))
        return {"margin": labels.numpy() >= 0}, 8

    monkeypatch.setattr(filling, "run_convergence", watched)
    for start, stop in batches_of(cell, 20):
        filling.compute_part(cell, torch.nn.Identity(), torch.device("cpu"), np.ones(20, bool), start, stop)
    assert seen == [(3, 8), (11, 8), (19, 4)]
