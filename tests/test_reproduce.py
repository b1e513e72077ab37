"""scripts/reproduce.py: its plan, how it fails, and what it ends with. The whole pipeline has a test of its own."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import compose_train
from synthetic import PROVENANCE, study_tables, write_study

from drs.durations import duration
from drs.errors import UserError
from drs.runs import run_folder
from drs.sweeper import core_count, threads_each, threads_text

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
assert SPEC is not None and SPEC.loader is not None
reproduce = importlib.util.module_from_spec(SPEC)
sys.modules["reproduce"] = reproduce
SPEC.loader.exec_module(reproduce)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRS_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def test_plan_of_smoke(results: Path, tmp_path: Path) -> None:
    plan = reproduce.make_plan("smoke")
    assert not results.exists(), "planning writes nothing"
    text = reproduce.plan_text(plan, tmp_path / "reference", width=100)
    lines = [line.strip() for line in text.splitlines()]
    assert " ".join(lines).startswith(f"Experiment smoke, into {results / 'smoke'} ")
    assert "digits/mlp ce: 2 seeds = 2 trainings of 15 epochs" in lines
    assert "digits/mlp dr_softmax: 3 weights (0.001, 0.005, 0.02) x 2 seeds = 6 trainings of 15 epochs" in lines
    assert "trainings: 8, of which 8 are left" in lines
    assert "fgsm (linf), pgd (linf), cw_torchattacks (l2), cw (l2, at most 60 images)" in text
    assert "digits: 200 test images; epsilons linf 0.05, 0.1, 0.2, 0.3; l2 0.25, 0.5, 1.0, 2.0" in lines
    assert "expected time: unknown, there is no reference timing of this experiment" in lines
    assert all(len(line) <= 100 for line in text.splitlines() if str(results) not in line)


def test_plan_names_the_procedure_of_a_training() -> None:
    jobs = [compose_train("data=mnist", "model=lenet", "epochs=3", *job) for job in (
        ("loss=ce",), ("loss=ce", "procedure=adversarial", "procedure.epsilon=0.1"),
        ("loss=dr_softmax", "procedure=adversarial", "procedure.epsilon=0.1"),
        ("loss=ce", "procedure=trades", "procedure.epsilon=0.1"),
    )]  # fmt: skip
    lines = reproduce._training_lines("mnist/lenet", jobs)
    names = ("ce", "adversarial", "adversarial+dr_softmax", "trades")
    assert lines == [f"  mnist/lenet {name}: 1 training of 3 epochs" for name in names]


def test_plan_knows_what_is_done_and_how_long_it_took(results: Path, tmp_path: Path) -> None:
    jobs = reproduce.make_plan("smoke").jobs
    for job in jobs[:3]:
        run_folder(job).write_status(state="done")
    run_folder(jobs[3]).write_status(state="failed", reason="diverged")
    write_study(tmp_path / "reference" / "smoke")
    plan = reproduce.make_plan("smoke")
    text = reproduce.plan_text(plan, tmp_path / "reference", width=200)
    assert "trainings: 8, of which 4 are left (1 diverged, 3 done)" in text
    assert PROVENANCE["wall_seconds"] == {"train": 741.5, "attack": 432.1}
    assert "19 min 34 s (train 12 min 22 s, attack 7 min 12 s) on Some | CPU, 2 cores" in text


def test_trainings_run_side_by_side_without_a_gpu(results: Path, tmp_path: Path) -> None:
    plan = reproduce.make_plan("smoke")
    workers = reproduce.training_workers(plan)
    assert workers == (1 if torch.cuda.is_available() else min(4, core_count(), 8))
    assert reproduce.training_workers(replace(plan, jobs=plan.jobs[:1])) == 1
    text = reproduce.plan_text(plan, tmp_path, 100, workers=2)
    assert f"  trainings run 2 at a time, {threads_text(threads_each(2))}\n" in text
    assert "at a time" not in reproduce.plan_text(plan, tmp_path, 100, workers=1)
    assert reproduce.training_arguments(plan, 1) == ["experiment=smoke"]
    assert reproduce.training_arguments(plan, 3) == [
        "experiment=smoke", "hydra/launcher=joblib", "hydra.launcher.n_jobs=3"
    ]  # fmt: skip


def test_default_follows_the_machine() -> None:
    expected = ["mnist", "cifar10"] if torch.cuda.is_available() else ["laptop"]
    assert reproduce.default_experiments() == expected


def test_claims_fit_the_terminal(tmp_path: Path) -> None:
    tables = study_tables()
    study = write_study(tmp_path / "tiny", tables)
    wide = reproduce.claims_text(study, width=120).splitlines()
    assert wide[1].startswith("C1  Post-attack results correlate") and wide[1].endswith("(effect: Spearman's rho)")
    overall = next(line for line in wide if line.startswith("    overall"))
    assert " ".join(overall.split()) == "overall supported against weak attacks only 0.042 [−0.012, 0.123] n=23"
    assert len([line for line in wide if line.endswith("n=23")]) == len(tables["claims"])
    assert [line[:2] for line in wide if line[0] == "C" and line[1].isdigit()] == ["C1", "C2", "C3", "C4", "C5"]
    narrow = reproduce.claims_text(study, width=60).splitlines()
    assert max(map(len, narrow)) <= 60
    assert " ".join(" ".join(narrow).split()) == " ".join(" ".join(wide).split())


def test_study_without_claims_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"claims\.csv is missing; evaluate"):
        reproduce.claims_text(tmp_path, width=80)


def test_outputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curves.png").touch()
    assert "1 in" in reproduce.outputs_text(tmp_path) and "curves.png" in reproduce.outputs_text(tmp_path)


def test_a_failing_step_ends_the_program_with_its_status(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        reproduce.run_step("fetch_data.py", "no_such_set")
    assert stopped.value.code == 2
    text = capfd.readouterr()
    assert text.out.startswith("-- fetch_data.py no_such_set\n")
    assert text.err.startswith("error: ") and "no_such_set" in text.err, "the step's own output passes through"
    assert text.err.splitlines()[-1].startswith("error: fetch_data.py failed with exit status 2")


# A step that ends half a second after it was interrupted, as one that has workers to end.
# Both take interrupts even where the tests run in the background, which ignores them.
SLOW_STEP = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    print("ended by itself", flush=True)
    sys.exit(130)
"""
CALLER = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
import reproduce
from drs.interrupts import interrupt_on_termination
reproduce.SCRIPTS = Path(sys.argv[2])
interrupt_on_termination()
try:
    reproduce.run_step("slow.py")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)]
)
def test_an_interrupted_step_ends_its_own_processes_first(
    tmp_path: Path, number: signal.Signals, whole_group: bool
) -> None:
    # Only what a terminal interrupts hears of SIGINT by itself; in the background it is ignored.
    ignored = SLOW_STEP.replace("signal.signal(signal.SIGINT, signal.default_int_handler)", "", 1)
    (tmp_path / "slow.py").write_text(SLOW_STEP if whole_group else ignored)
    caller = CALLER if whole_group else CALLER.replace("try:", "reproduce.GRACE_SECONDS = 1.0\ntry:")
    process = subprocess.Popen(
        [sys.executable, "-c", caller, str(ROOT / "scripts"), str(tmp_path)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline() != "started\n":
        assert process.poll() is None
    # A terminal interrupts every process in it; a program that ends this one alone does not.
    (os.killpg if whole_group else os.kill)(process.pid, number)
    assert process.wait(20) == 130
    assert process.stdout.read() == "ended by itself\n"


def test_unknown_experiment_is_one_line(results: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "--experiment", "nope"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: experiment=nope: unknown") and done.stderr.count("\n") == 1


def test_damaged_trainings_are_planned_again(results: Path) -> None:
    jobs = reproduce.make_plan("smoke").jobs
    for job in jobs[:3]:
        run_folder(job).write_status(state="done")
    (run_folder(jobs[0]).path / "status.json").write_text(json.dumps({"state": "done"})[:-4])
    lost = {"checkpoint.safetensors": {"bytes": 1, "sha256": "0"}}
    run_folder(jobs[1]).write_status(state="done", files=lost)
    plan = reproduce.make_plan("smoke")
    assert plan.states == {"damaged": 2, "done": 1, "new": 5} and plan.n_left == 7


@pytest.mark.parametrize(
    ("seconds", "text", "rough"),
    [
        (0.4, "0 s", "0 s"),
        (59.6, "1 min 00 s", "1 min"),
        (754.5, "12 min 34 s", "13 min"),
        (3569.0, "59 min 29 s", "59 min"),
        (3590.0, "59 min 50 s", "1 h 00 min"),
        (3720, "1 h 02 min", "1 h 02 min"),
    ],
)
def test_duration(seconds: float, text: str, rough: str) -> None:
    assert duration(seconds) == text
    assert duration(seconds, rough=True) == rough
