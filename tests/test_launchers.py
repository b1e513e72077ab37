"""A sweep in several processes: the same results as in one, threads, output, errors and interrupts."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forked
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from drs.config import PROJECT_ROOT
from drs.errors import UserError
from drs.sweeper import core_count, register_plugins, threads_each, threads_text, worker_count

PARALLEL = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
SCRIPT = str(PROJECT_ROOT / "scripts" / "train.py")
TRAIN = ["-m", "data=digits", "model=mlp", "loss=ce", "epochs=2", "study=s"]
GRID = ["seed=0,1", "batch_size=64,128,5000"]
REASON = "batch_size=5000: must be at most the 1197 training samples"
MISTAKE = f"error: 2 of 6 trainings failed, the first with: {REASON}\n"

# An entrypoint of the same make as scripts/train.py, whose jobs do something else.
APP = f"""
import os, signal, sys, time
sys.path.insert(0, {str(PROJECT_ROOT)!r})
import hydra
from drs.entrypoint import report_mistakes, run_entrypoint
from drs.jobs import TrainingResult

@hydra.main(version_base="1.3", config_path={str(PROJECT_ROOT / "configs")!r}, config_name="train")
@report_mistakes
def main(config):
    seed = config.seed
    {{body}}
    return TrainingResult("0" * 12, "done", "", "")

run_entrypoint(main)
"""


def environment(folder: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**kept, "DRS_RESULTS": str(folder), "DRS_CACHE": str(folder / "data"), **variables}


@dataclass
class Ended:
    """How a command ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


def run(folder: Path, *arguments: str, **variables: str) -> Ended:
    """Run a Python script with a terminal as its standard error, as a user has it."""

    def command(terminal: int) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *arguments], env=environment(folder, **variables), stdout=subprocess.PIPE,
            stderr=terminal, text=True, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout

    return with_a_terminal(folder, command)


def train(folder: Path, *arguments: str) -> Ended:
    """Run scripts/train.py in a process that is forked, with a terminal as its standard error."""

    def command(terminal: int) -> tuple[int, str]:
        done = forked.run(
            "train.py", *TRAIN, *arguments, out=folder / "out", before=lambda: os.dup2(terminal, 2),
            environment={"DRS_RESULTS": str(folder), "DRS_CACHE": str(folder / "data"), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return done.returncode, done.stdout

    return with_a_terminal(folder, command)


def with_a_terminal(folder: Path, command: Callable[[int], tuple[int, str]]) -> Ended:
    """Call ``command`` with a terminal, and collect what is printed there."""
    folder.mkdir(exist_ok=True)
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    chunks: list[bytes] = []
    reader = threading.Thread(target=_read, args=(master, chunks))
    reader.start()
    try:
        status, out = command(terminal)
    finally:
        os.close(terminal)
        reader.join()
        os.close(master)
    return Ended(status, out, b"".join(chunks).decode().replace("\r\n", "\n"))


def _read(terminal: int, chunks: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # Linux ends the reading of a closed terminal with an error
        while chunk := os.read(terminal, 65536):
            chunks.append(chunk)


def app(folder: Path, body: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "app.py"
    path.write_text(APP.format(body=body))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def parallel(folder: Path) -> Ended:
    """Four trainings, two at a time, and two that cannot be."""
    return run(folder / "parallel", SCRIPT, *TRAIN, *GRID, *PARALLEL, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def serial(folder: Path) -> Ended:
    """The same one after the other."""
    return train(folder / "serial", *GRID)


@pytest.fixture(scope="module")
def resumed(folder: Path, parallel: Ended) -> Ended:
    """A second call in the folder of ``parallel``."""
    return train(folder / "parallel", *GRID)


def results(folder: Path) -> dict[str, dict[str, object]]:
    """Return metrics, but for their times, and weights of each finished run; those that failed say why."""
    found: dict[str, dict[str, object]] = {}
    for path in sorted((folder / "s" / "runs").iterdir()):
        status = json.loads((path / "status.json").read_text())
        if status["state"] == "failed":
            assert status["error"] == REASON and "UserError" in status["traceback"]
            continue
        assert status["state"] == "done"
        metrics = pd.read_csv(path / "metrics.csv").drop(columns="seconds")
        weights = load_file(path / "checkpoint.safetensors")
        found[path.name] = {"metrics": metrics.to_dict("list")} | {
            key: value.tolist() for key, value in weights.items()
        }
    return found


def test_parallel_runs_equal_serial_ones(folder: Path, parallel: Ended, serial: Ended) -> None:
    assert (parallel.status, parallel.err) == (1, MISTAKE)
    found = results(folder / "parallel")
    assert len(found) == 4
    assert found == results(folder / "serial")


def test_each_finished_job_is_one_line_and_there_is_no_bar(parallel: Ended, serial: Ended) -> None:
    lines = [line for line in parallel.out.splitlines() if "from scikit-learn" not in line]
    text = parallel.out
    assert lines[:2] == ["6 trainings", "2 at a time, one thread each"]
    assert [int(number) for number in re.findall(r"^job (\d) of 6", text, re.MULTILINE)] == [1, 2, 3, 4, 5, 6]
    assert len(re.findall(r"digits mlp ce seed [01]: epoch 2/2, loss [\d.]+, .*\([0-9a-f]{12}\)$", text, re.M)) == 4
    assert re.search(r"^job [1-5] of 6, (about \d+|less than 1) min left: ", text, re.MULTILINE)
    assert re.search(r"^job 6 of 6: ", text, re.MULTILINE), "none is left"
    assert lines[-1] == "4 done, 0 skipped (finished before), 0 diverged, 2 stopped by an error"
    assert "%|" not in parallel.err
    assert "%|" in serial.err, "where one training runs at a time a terminal shows its bar"


def test_second_call_skips_what_is_done(resumed: Ended) -> None:
    assert "6 trainings, 4 of them finished before" in resumed.out.splitlines()
    assert "skipped: run" not in resumed.out, "one line for all of them"
    assert "0 done, 4 skipped (finished before), 0 diverged, 2 stopped by an error" in resumed.out


def test_mistake_in_a_job_is_one_line_and_the_other_jobs_run(parallel: Ended, serial: Ended, resumed: Ended) -> None:
    assert len(re.findall(r"^job \d of 6.*: failed: run [0-9a-f]{12} \(batch_size=5000: ", parallel.out, re.M)) == 2
    assert len(re.findall(rf"^[0-9a-f]{{12}}  digits mlp ce seed [01]  failed .*{REASON}$", parallel.out, re.M)) == 2
    for ended in (serial, resumed):
        assert ended.status == 1
        assert re.sub(r"\r[^\n]*\r", "", ended.err) == MISTAKE
    assert "4 done, 0 skipped (finished before), 0 diverged, 2 stopped by an error" in serial.out


def test_workers_share_the_cores_and_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    body = "import torch; print('threads', torch.get_num_threads(), os.getpid()); 1 / (2 - seed)"
    done = run(tmp_path, app(tmp_path, body), "-m", "seed=0,1,2,3", *PARALLEL)
    printed = re.findall(r"threads (\d+) (\d+)", done.out)
    assert len(printed) == 4
    assert {int(threads) for threads, _ in printed} == {max(1, core_count() // 2)}
    assert len({process for _, process in printed}) == 2
    assert done.status == 1
    assert "ZeroDivisionError: division by zero" in done.err
    assert "1 / (2 - seed)" in done.err or ", in main" in done.err, "the worker's own frames"
    assert "Overrides of the job: seed=2" in done.err


def test_worker_that_the_system_ends_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, app(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"), "-m", "seed=0,1", *PARALLEL)
    assert done.status == 2
    assert done.err.startswith("error: hydra.launcher.n_jobs=2: the system ended one of 2 workers")
    assert done.err.count("\n") == 1


def members(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_no_worker_outlives_a_sweep_that_is_killed(tmp_path: Path) -> None:
    sleeper = app(tmp_path, "open(f'{config.results_dir}/seed-{seed}', 'w').close(); time.sleep(600)")
    process = subprocess.Popen(
        [sys.executable, sleeper, "-m", "seed=0,1,2", *PARALLEL], env=environment(tmp_path, OMP_NUM_THREADS="1"),
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        assert wait_for(lambda: len(list(tmp_path.glob("seed-*"))) == 2, 120)
        assert len(members(process.pid)) >= 3
        process.kill()
        process.wait(20)
        assert wait_for(lambda: not members(process.pid), 10), members(process.pid)
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)
        process.wait(20)


def test_joblib_is_our_launcher_and_serial_the_default() -> None:
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        default = compose("train", return_hydra_config=True).hydra.launcher
        chosen = compose("train", ["hydra/launcher=joblib"], return_hydra_config=True).hydra.launcher
    assert default["_target_"].endswith("BasicLauncher")
    assert dict(chosen) == {"_target_": "hydra_plugins.drs_joblib_launcher.ParallelLauncher", "n_jobs": -1}


@pytest.mark.parametrize(
    ("n_jobs", "n_tasks", "expected"), [(2, 8, 2), (4, 3, 3), (1, 8, 1), (5, 0, 1), (-1, 1, 1), (-1, 10**6, None)]
)
def test_number_of_workers(n_jobs: int, n_tasks: int, expected: int | None) -> None:
    assert worker_count(n_jobs, n_tasks) == (core_count() if expected is None else expected)


@pytest.mark.parametrize("n_jobs", [0, -2, 1.5, "2", None, True])
def test_no_number_of_workers(n_jobs: object) -> None:
    with pytest.raises(UserError, match=rf"hydra\.launcher\.n_jobs={n_jobs}: must be a number of jobs, or -1"):
        worker_count(n_jobs, 8)


def test_cores_are_those_that_the_process_may_use() -> None:
    core = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{core}}}); from drs.sweeper import core_count; print(core_count())"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert 1 <= core_count() <= len(os.sched_getaffinity(0))


def test_threads_are_a_share_of_the_cores_unless_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_each(1) == core_count()
    assert threads_each(10**6) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_each(2) == 3
    assert (threads_text(1), threads_text(3)) == ("one thread each", "3 threads each")
