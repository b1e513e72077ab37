"""What is shown of an evaluation while it runs: what is at work, and the time left by the cells' expected costs."""

import io
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from brief_study import CELLS, TRAINING, configuration
from conftest import compose_train

from drs import evaluation as evaluation_module
from drs import evaluation_progress
from drs.array_files import load_arrays_file, save_arrays
from drs.cell_costs import CellCosts, plain_cost
from drs.cell_states import CellStates
from drs.cells import Cell, plan_cells
from drs.evaluation import evaluate_study
from drs.evaluation_progress import Progress, TimeLeft
from drs.filling import fill_cell
from drs.runs import RunFolder

AT_WORK = r"run (\d)/(\d) digits mlp ce seed \d (\S+) \(cell (\d)/5, (\d+)/(\d+) images\)"
LINE = re.compile(rf"{AT_WORK}(; {AT_WORK})*: \d+ s passed(, about \d+ s left)?")


def planned(folder: Path, *seeds: int) -> dict[RunFolder, list[Cell]]:
    """Return the cells of some runs that were never trained."""
    suite = configuration(folder).suite
    configs = {
        RunFolder(folder / str(seed)): compose_train(*TRAINING, f"seed={seed}", f"results_dir={folder}")
        for seed in seeds
    }
    return {run: plan_cells(run, suite, {run: config}) for run, config in configs.items()}


class Known:
    """Costs that are given."""

    in_seconds = False

    def __init__(self, costs: list[float]) -> None:
        self.costs = np.array(costs)

    def learn(self, cells: Iterable[Cell]) -> None:
        """Learn nothing."""

    def expected(self, attacked: np.ndarray) -> np.ndarray:
        """Return what is given."""
        return self.costs


def time_left(todo: dict[RunFolder, list[Cell]], costs: list[float], lanes: int = 1) -> TimeLeft:
    return TimeLeft(CellStates(todo), Known(costs), lanes, 0.0)  # type: ignore[arg-type]


def test_time_left_weighs_cells_by_their_cost_and_counts_down(tmp_path: Path) -> None:
    todo = planned(tmp_path, 0)
    ((run, cells),) = todo.items()
    left = time_left(todo, [2.0, 3.0, 5.0, 30.0, 10.0])
    assert left.seconds(0.0) is None
    watch = left.states.watch(run)
    watch.begun(cells[0])
    left.look(0.5)
    for cell in cells[:2]:
        watch.begun(cell)
        watch.done(cell)
    left.look(20.0)
    assert left.seconds(20.0) == pytest.approx(180), "5 of 50 took 20 s"
    watch.begun(cells[3])
    watch.images(cells[3], 0, 40)
    left.look(50.0)
    assert left.seconds(50.0) == pytest.approx(150), "nothing was finished in between"
    left.look(1000.0)
    assert left.seconds(1000.0) == pytest.approx(60), "what has not begun takes as long as before"
    watch.images(cells[3], 20, 40)
    left.look(100.0)
    assert left.seconds(100.0) == pytest.approx(150), "20 of 50 took 100 s"
    watch.keep(cells[4:])
    left.look(110.0)
    assert left.seconds(110.0) == pytest.approx(20 * 10, rel=0.11), "another evaluation had the third"


def test_time_left_is_that_of_the_longest_run_where_it_outlasts_the_others(tmp_path: Path) -> None:
    todo = planned(tmp_path, 0, 1)
    first, second = todo
    left = time_left(todo, [1.0] * 5 + [1.0, 7.0, 4.0, 4.0, 4.0], lanes=2)
    watches = [left.states.watch(run) for run in todo]
    watches[0].begun(todo[first][0])
    left.look(0.0)
    for cell in todo[first]:
        watches[0].done(cell)
    watches[1].done(todo[second][0])
    left.look(3.0)
    assert left.seconds(3.0) == pytest.approx(19 * 3 / 6 * 2), "6 took 3 s in two processes; 19 are left for one"
    left.states.end_run(second)
    left.look(4.0)
    assert left.seconds(4.0) == 0, "a run that failed leaves nothing to do"


def recorded(cell: Cell, seconds: float) -> Cell:
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(cell.path, about=np.array(json.dumps({"seconds": seconds})))
    return cell


def test_expected_costs_are_the_seconds_of_the_same_attack_on_the_same_data_and_model(tmp_path: Path) -> None:
    todo = planned(tmp_path, 0, 1, 2)
    earlier, broken, cells = todo.values()
    costs = CellCosts(cells, "cpu")
    none = np.zeros(CELLS)
    plain = costs.expected(none)
    assert not costs.in_seconds
    assert plain.tolist() == [plain_cost(cell, "cpu") for cell in cells]
    costs.learn([recorded(earlier[1], 4.0), recorded(broken[1], 8.0), recorded(earlier[3], 40.0), earlier[4]])
    damaged = recorded(broken[3], 1e6).path
    damaged.write_bytes(damaged.read_bytes()[:-9])
    costs.learn([broken[3]])
    expected = costs.expected(none)
    assert costs.in_seconds
    assert (expected[1], expected[3]) == (6.0, 40.0)
    scale = (6 + 40) / (plain[1] + plain[3])
    np.testing.assert_allclose(expected[[0, 2, 4]], plain[[0, 2, 4]] * scale)


def strong_costs(folder: Path, *overrides: str) -> dict[str, float]:
    suite = configuration(folder, "suite=strong", "suite.n_samples.digits=120", *overrides).suite
    configs = {RunFolder(folder / str(seed)): compose_train(*TRAINING, f"seed={seed}") for seed in range(2)}
    return {cell.title: plain_cost(cell, "cpu") for cell in plan_cells(next(iter(configs)), suite, configs)}


def test_plain_costs_are_passes_times_images_and_a_share_for_each_call(tmp_path: Path) -> None:
    costs = strong_costs(tmp_path, "suite.batch_size=100")
    around, images = 1.2, 120 + 2 * 20
    assert costs["fgsm@0.1"] == pytest.approx((1 + around) * images)
    assert costs["pgd@0.1"] == pytest.approx((3 + around) * images)
    assert costs["targeted_pgd@0.1"] == pytest.approx((0.7 * 9 * 20 + around) * images)
    assert costs["apgd_t@0.1"] == pytest.approx((9 * 100 + around) * (60 + 20)), "half of them may stand"
    assert costs["clean"] == pytest.approx(0.4 * (500 + 20)), "digits has 500 test images"


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("margin_pgd", "restarts=4"),
        ("square", "n_queries=10000"),
        ("noise", "draws=20"),
        ("fmn_l2", "steps=200"),
        ("hop_skip_jump", "steps=64"),
        ("sanity", "steps=100"),
    ],
)
def test_plain_costs_follow_the_settings_of_every_attack(tmp_path: Path, name: str, override: str) -> None:
    key = "suite.sanity" if name == "sanity" else f"suite.attacks.{name}"
    less, more = strong_costs(tmp_path), strong_costs(tmp_path, f"{key}.{override}")
    changed = {title: more[title] / less[title] for title in less if more[title] != less[title]}
    assert {title.partition("@")[0] for title in changed} == {name, *(["convergence"] if name == "sanity" else [])}
    assert all(1.4 < ratio < 2.8 for ratio in changed.values()), changed


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look a hundred times a second, and print a line as often as ten times."""
    for name, seconds in (("TICK", 0.01), ("FIRST", 0.05), ("LINE", 0.1), ("LEAST", 0.1)):
        monkeypatch.setattr(evaluation_progress, f"{name}_SECONDS", seconds)


@pytest.fixture
def results(brief_results: Path, tmp_path: Path) -> Path:
    shutil.copytree(brief_results, tmp_path / "results")
    return tmp_path / "results"


def test_without_a_terminal_lines_tell_what_is_at_work_and_change_no_result(
    results: Path, often: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = evaluate_study(configuration(results))
    assert len(capsys.readouterr().out.splitlines()) == 1
    before = {cell.path: load_arrays_file(cell.path) for cell in silent.cells}
    for path in before:
        path.unlink()

    told: list[str] = []

    def tell(line: str, *, flush: bool) -> None:
        print(line, flush=flush)
        told.append(line)

    def slowly(cell: Cell, *arguments: object) -> float:
        seconds = fill_cell(cell, *arguments)  # type: ignore[arg-type]
        count, until = len(told), time.monotonic() + 10
        while len(told) == count and time.monotonic() < until:
            time.sleep(0.01)
        return seconds

    monkeypatch.setattr(evaluation_module, "fill_cell", slowly)
    monkeypatch.setattr(evaluation_progress, "print", tell, raising=False)
    began = time.monotonic()
    found = evaluate_study(configuration(results, "progress=true"))
    took = time.monotonic() - began
    lines = capsys.readouterr().out.splitlines()
    ends = [line for line in lines if line.startswith("evaluated run")]
    assert [line.partition(" (")[0] for line in ends] == [f"evaluated run {number}/3" for number in (1, 2, 3)]
    assert re.search(r"about \d+ s left$", ends[0]) and ends[2].endswith(" s)"), "nothing is left at the end"
    work = [line for line in lines[1:] if line not in ends]
    assert 3 * CELLS <= len(work) <= took / 0.1 and not [line for line in work if not LINE.fullmatch(line)], lines
    seen = [match.groups()[:6] for line in work if (match := LINE.fullmatch(line))]
    assert {groups[0] for groups in seen} == {"1", "2", "3"} and {groups[1] for groups in seen} == {"3"}
    assert all(title.startswith(("clean", "fgsm@0", "pgd@0")) for _, _, title, *_ in seen)
    assert any(int(done) == int(total) > 0 for *_, done, total in seen)
    assert found.computed == 3 * CELLS
    for path, arrays in before.items():
        for name, array in load_arrays_file(path).items():
            assert name == "about" or np.array_equal(array, arrays[name])


def test_what_ends_soon_prints_no_more_than_its_runs(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation_progress, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(evaluation_progress, "FIRST_SECONDS", 60.0)  # whatever else keeps this machine busy
    evaluate_study(configuration(results, "progress=true"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["s:", "evaluated", "evaluated", "evaluated"]


def test_no_line_follows_another_too_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("TICK", 0.01), ("FIRST", 0.1), ("LINE", 0.1), ("LEAST", 60.0)):
        monkeypatch.setattr(evaluation_progress, f"{name}_SECONDS", seconds)
    todo = planned(tmp_path, 0, 1)
    first, second = todo
    with Progress(todo, [], "cpu", 1, enabled=True) as progress:
        progress.finished(first, "evaluated", 1.0)
        progress.states.watch(second).begun(todo[second][0])
        time.sleep(0.3)
    assert len(capsys.readouterr().out.splitlines()) == 1


class Terminal(io.StringIO):
    """A terminal that keeps what it is sent."""

    def isatty(self) -> bool:
        """Say that this is one."""
        return True


def test_bar_of_a_terminal_moves_by_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((run, cells),) = planned(tmp_path, 0).items()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(evaluation_progress, "CellCosts", lambda *_: Known([1.0, 1.0, 1.0, 6.0, 1.0]))
    progress = Progress({run: cells}, [], "cpu", 1, enabled=True)
    watch = progress.states.watch(run)
    watch.begun(cells[0])
    progress._seconds_left(progress.began)
    for cell in cells[:3]:
        watch.done(cell)
    watch.begun(cells[3])
    watch.images(cells[3], 10, 30)
    progress._move_bar(50.0, progress._seconds_left(progress.began + 50))
    progress.finished(run, "evaluated", 50.0)
    shown = terminal.getvalue().split("\r")[-1]
    progress.bar.close()
    assert "attacks  50%|" in shown, "3 of 10, and a third of 6"
    assert "about 50 s left, run 1/1 pgd@0.1 (cell 4/5, 10/30 images)" in shown
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("often")
def test_bar_moves_by_itself_and_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((run, cells),) = planned(tmp_path, 0).items()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress({run: cells}, [], "cpu", 1, enabled=True) as progress:
        progress.states.watch(run).begun(cells[0])
        until = time.monotonic() + 10
        while "run 1/1 clean" not in terminal.getvalue():
            assert time.monotonic() < until
            time.sleep(0.01)
    assert not progress._thread.is_alive() and terminal.getvalue().split("\r")[-2].strip() == ""


def test_memory_is_shared_and_each_run_has_its_own_part(results: Path) -> None:
    todo = planned(results, 0, 1)
    states = CellStates(todo)
    first, second = todo
    states.watch(second).begun(todo[second][1])
    states.watch(second).images(todo[second][1], 3, 9)
    states.watch(first).done(todo[first][4])
    states.watch(first).begun(todo[second][0])  # none of its cells
    state, images, total = states.read()
    assert state.tolist() == [0, 0, 0, 0, 2, 0, 1, 0, 0, 0]
    assert (images[6], total[6]) == (3, 9)
    states.end_run(first)
    assert states.read()[0].tolist() == [3, 3, 3, 3, 2, 0, 1, 0, 0, 0]
