"""Trainings that are interrupted and go on: the same bytes in the end as without, and what is said and kept."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import compose_train

import drs
from drs import interrupts, keeping, training
from drs.claiming import ClaimLost, claim
from drs.config import PROJECT_ROOT, TrainConfig
from drs.errors import DivergedError, Interrupted, UserError
from drs.interrupts import deferred_interrupts, interrupt_on_termination, whole_imports
from drs.jobs import CLAIM_FILE, run_job
from drs.keeping import STATE_FILE, Keeper
from drs.runs import RunFolder, run_folder
from drs.training import train
from drs.training_state import StateError, load_snapshot, save_snapshot

KINDS = {
    "dr_softmax, augmented": ["loss=dr_softmax", "data.augment=crop_flip", "data.padding=1"],
    "cot, two optimisers": ["loss=cot", "optim=sgd", "optim.schedule=cosine"],
    "noise, no momentum": [
        "loss=logit_squeezing", "loss.noise_std=0.1", "optim=sgd", "optim.momentum=0", "optim.nesterov=false",
    ],
    "adversarial": ["loss=ce", "procedure=adversarial", "procedure.epsilon=0.1", "procedure.steps=2"],
    "trades": ["loss=ce", "procedure=trades", "procedure.epsilon=0.1", "procedure.steps=2", "optim=adamw"],
    "batch norm, channels last": ["loss=label_smoothing", "model=smallcnn", "model.options.width=4"],
    "bfloat16": ["loss=gce", "precision=bfloat16"],
}  # fmt: skip


def small(folder: Path, *overrides: str) -> TrainConfig:
    return compose_train(
        "data=digits", "model=mlp", "epochs=4", "batch_size=64", "data.train_samples=320", f"results_dir={folder}",
        f"data.cache={folder}/data", "progress=false", "save_seconds=0", "study=s", *overrides,
    )  # fmt: skip


def stop_in_epoch(monkeypatch: pytest.MonkeyPatch, epochs: list[int]) -> None:
    """Interrupt a training in the middle of each of ``epochs``, counted from 1, as a signal does."""
    steps = 5  # of 64 samples in 320
    taken = 0
    stops = [(epoch - 1) * steps + 3 for epoch in epochs]
    original = Keeper.step

    def step(self: Keeper) -> None:
        nonlocal taken
        taken += 1
        if stops and taken == stops[0]:
            stops.pop(0)
            taken = taken // steps * steps  # the next start takes the steps of this epoch again
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    monkeypatch.setattr(Keeper, "step", step)


def content(folder: RunFolder) -> tuple[bytes, dict[str, Any]]:
    metrics = pd.read_csv(folder.path / "metrics.csv").drop(columns="seconds")
    return (folder.path / "checkpoint.safetensors").read_bytes(), metrics.to_dict("list")


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_training_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    undisturbed, disturbed = (small(tmp_path / name, *KINDS[kind]) for name in ("undisturbed", "disturbed"))
    train(undisturbed)
    stop_in_epoch(monkeypatch, [1, 2, 4])
    for kept in (0, 1, 3):
        with pytest.raises(Interrupted) as caught:
            train(disturbed)
        assert caught.value.number == signal.SIGTERM
        torch.rand(7)  # what runs in between must not matter
        status = run_folder(disturbed).status()
        assert (status["state"], status["epoch"]) == ("interrupted", kept)
    result = train(disturbed)
    assert result.state == "done"
    folder = run_folder(disturbed)
    assert content(folder) == content(run_folder(undisturbed))
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "checkpoint.safetensors", "config.yaml", "metrics.csv", "status.json",
    ]  # fmt: skip
    seconds = pd.read_csv(folder.path / "metrics.csv")["seconds"]
    assert folder.status()["train_seconds"] == pytest.approx(seconds.sum())


def test_what_is_said_and_kept_between_two_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path)
    folder = run_folder(config)
    stop_in_epoch(monkeypatch, [3])
    with pytest.raises(Interrupted):
        train(config)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "config.yaml", "metrics.csv", STATE_FILE, "status.json",
    ]  # fmt: skip
    assert pd.read_csv(folder.path / "metrics.csv")["epoch"].tolist() == [1, 2]
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out
    assert f"run {folder.run_id}: was interrupted\nrun {folder.run_id}: goes on after epoch 2\n" in said


@pytest.mark.parametrize("earlier", [None, "interrupted"])
def test_interrupt_before_the_first_step_leaves_no_run_that_says_it_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: str | None
) -> None:
    folder = interrupted(tmp_path, monkeypatch) if earlier else run_folder(small(tmp_path))

    def end(*_: Any) -> None:
        raise Interrupted(signal.SIGTERM)  # as a signal does while a tracker waits for its server

    with monkeypatch.context() as patch:
        patch.setattr(training, "open_tracker", end)
        with pytest.raises(Interrupted):
            train(small(tmp_path))
    assert folder.status().get("state") == earlier
    assert train(small(tmp_path)).state == "done"


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> RunFolder:
    config = small(tmp_path, *overrides)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, [3])
        with pytest.raises(Interrupted):
            train(config)
    return run_folder(config)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # in a tensor
    path.write_bytes(content)


def _other_rows(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"train_loss", b"train_lost"))


def _other_torch(path: Path) -> None:
    snapshot = load_snapshot(path)
    snapshot.setting["torch"] = "1.0"
    save_snapshot(path, snapshot)


def _pickle(path: Path) -> None:
    torch.save({"rows": [1]}, path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "it is not a whole safetensors file"),
        (_flip, "its checksum does not fit its content"),
        (_other_rows, "its checksum does not fit its content"),
        (_other_torch, f"it was saved with torch 1.0, and here it is {torch.__version__}"),
        (_pickle, "it is not a whole safetensors file"),
    ],
)
def test_damaged_state_is_said_and_the_training_starts_anew(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    damage(folder.path / STATE_FILE)
    train(small(tmp_path))
    out = capsys.readouterr().out
    assert f"run {folder.run_id}: starts anew; {folder.path / STATE_FILE} cannot be used: {said}" in out
    other = small(tmp_path / "undisturbed")
    train(other)
    assert content(folder) == content(run_folder(other))


def test_state_of_another_run_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = interrupted(tmp_path, monkeypatch, "seed=1")
    target = run_folder(small(tmp_path))
    target.path.mkdir(parents=True)
    (target.path / STATE_FILE).write_bytes((source.path / STATE_FILE).read_bytes())
    train(small(tmp_path))
    assert f"cannot be used: it belongs to run {source.run_id}" in capsys.readouterr().out


def test_every_single_flipped_byte_of_a_state_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    path, damaged = folder.path / STATE_FILE, tmp_path / "damaged"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    before = load_snapshot(path)
    for position in [*range(0, header, 7), *range(header, len(whole), len(whole) // 40)]:
        content = bytearray(whole)
        content[position] ^= 4
        damaged.write_bytes(content)
        try:
            after = load_snapshot(damaged)
        except StateError:
            continue
        assert (after.rows, after.values, after.run_id) == (before.rows, before.values, before.run_id), position
        assert all(torch.equal(after.tensors[name], value) for name, value in before.tensors.items()), position


def test_state_is_written_every_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = keeping.save_snapshot
    monkeypatch.setattr(
        keeping, "save_snapshot", lambda path, snapshot: (written.append(len(snapshot.rows)), original(path, snapshot))
    )
    train(small(tmp_path / "often", "save_seconds=0"))
    assert written == [1, 2, 3, 4]
    train(small(tmp_path / "seldom", "save_seconds=1000"))
    assert written == [1, 2, 3, 4]
    written.clear()
    monkeypatch.setattr(keeping, "SAVE_SHARE", 1e-9)
    train(small(tmp_path / "slow disk", "save_seconds=1e-6"))
    assert written == [1], "the first write shows what one costs"


def test_owner_that_was_succeeded_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path)
    folder = run_folder(config)
    original = Keeper.epoch

    def epoch(self: Keeper, state: Any, rows: list[dict[str, float]]) -> None:
        if len(rows) == 3:
            (folder.path / CLAIM_FILE).unlink()
            with claim(folder.path / CLAIM_FILE, "another's"):
                original(self, state, rows)
        original(self, state, rows)

    monkeypatch.setattr(Keeper, "epoch", epoch)
    result = train(config)
    assert result.state == "elsewhere"
    assert len(pd.read_csv(folder.path / "metrics.csv")) == 2
    assert folder.status()["state"] == "running"
    assert not (folder.path / "checkpoint.safetensors").exists()


def test_failed_run_is_retried_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path)
    folder = run_folder(config)
    with monkeypatch.context() as patch:
        patch.setattr(training, "measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    status = folder.status()
    assert (status["state"], status["reason"]) == ("failed", "error")
    assert status["error"] == "ZeroDivisionError: division by zero"
    assert "test_resume.py" in status["traceback"]
    assert (folder.path / "error.log").read_text() == status["traceback"]
    assert train(config).state == "done"
    assert f"run {folder.run_id}: retrying: failed before with ZeroDivisionError: division by zero" in (
        capsys.readouterr().out
    )
    assert not (folder.path / "error.log").exists()


def test_run_of_another_process_is_left_alone(tmp_path: Path) -> None:
    config = small(tmp_path)
    folder = run_folder(config)
    said = rf"^run {folder.run_id}: process {os.getpid()} on \S+ is at work on it"
    with claim(folder.path / CLAIM_FILE, "x"), pytest.raises(UserError, match=said):
        train(config)
    assert not folder.status()


TRAIN = [sys.executable, str(PROJECT_ROOT / "scripts" / "train.py"), "data=digits", "model=mlp", "loss=ce", "study=s"]


def test_termination_of_the_entrypoint_saves_and_exits(tmp_path: Path) -> None:
    environment = {**os.environ, "DRS_RESULTS": str(tmp_path), "DRS_CACHE": str(tmp_path / "data")}
    command = [*TRAIN, "epochs=100000", "save_seconds=0.1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not list(tmp_path.glob("s/runs/*/" + STATE_FILE)) and time.monotonic() < end:
            time.sleep(0.05)
        process.terminate()
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, errors) == (143, "interrupted\n")
    (folder,) = (tmp_path / "s" / "runs").iterdir()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "interrupted"
    metrics = pd.read_csv(folder / "metrics.csv")
    assert status["epoch"] == len(metrics) == len(load_snapshot(folder / STATE_FILE).rows) > 0
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.csv", STATE_FILE, "status.json"]


@pytest.fixture
def keyboard() -> Iterator[None]:
    """Let SIGINT be heard, which a shell has its background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_request_to_end_disturbs_nothing_unless_it_comes_from_the_keyboard(keyboard: None) -> None:
    with deferred_interrupts() as deferred:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            deferred.check()
        assert caught.value.number == signal.SIGTERM
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert caught.value.number == signal.SIGINT


@pytest.fixture
def termination() -> Iterator[None]:
    """Have SIGTERM raise ``Interrupted``, as the scripts do."""
    before = signal.getsignal(signal.SIGTERM)
    interrupt_on_termination()
    yield
    signal.signal(signal.SIGTERM, before)


def lose_an_interrupt() -> None:
    """Send a signal while what it raises is dropped, as a compiled module's import of another one does."""
    with suppress(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)


def test_interrupt_that_is_lost_ends_a_training_at_its_first_step(tmp_path: Path, termination: None) -> None:
    lose_an_interrupt()
    config = small(tmp_path)
    with pytest.raises(Interrupted) as caught:
        train(config)
    assert caught.value.number == signal.SIGTERM
    status = run_folder(config).status()
    assert (status["state"], status["epoch"]) == ("interrupted", 0)


def test_interrupt_after_the_last_step_lets_a_training_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, termination: None
) -> None:
    original = RunFolder.save_weights

    def save(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(*arguments)

    monkeypatch.setattr(RunFolder, "save_weights", save)
    with pytest.raises(Interrupted):
        train(small(tmp_path))
    assert run_folder(small(tmp_path)).status()["state"] == "done"


@pytest.mark.parametrize("error", [DivergedError(1, 1, math.nan), RuntimeError("broken"), ClaimLost("x")])
def test_interrupt_before_an_error_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, termination: None, error: Exception
) -> None:
    def save(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_weights", save)
        assert run_job(small(tmp_path), in_sweep=True).state in ("diverged", "failed", "elsewhere")
    with pytest.raises(Interrupted):
        run_job(small(tmp_path, "seed=1"), in_sweep=True)
    assert run_job(small(tmp_path, "seed=1"), in_sweep=True).state == "done", "it has been told, once"


def test_interrupt_from_the_keyboard_is_not_lost_either(keyboard: None, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    interrupt_on_termination()
    signal.signal(signal.SIGTERM, before)
    for _ in range(2):
        with suppress(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("each time that the keys are pressed, they are heard")
    with pytest.raises(Interrupted) as caught:
        train(small(tmp_path))
    assert caught.value.number == signal.SIGINT


def test_import_that_fails_hides_no_interrupt(termination: None) -> None:
    with pytest.raises(Interrupted), whole_imports():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ImportError("of something else")


def test_imports_are_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, termination: None) -> None:
    done = False
    with pytest.raises(Interrupted) as caught, whole_imports():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        done = True
    assert done and caught.value.number == signal.SIGTERM

    class Finder:
        """Is asked to end while the training's module is looked for."""

        def find_spec(self, name: str, *_: Any) -> None:
            if name == "drs.training":
                monkeypatch.setattr(interrupts, "_requested", False)
                lose_an_interrupt()

    monkeypatch.delitem(sys.modules, "drs.training")
    monkeypatch.setattr(drs, "training", training)  # what is imported anew takes its place there too
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(Interrupted):
        run_job(small(tmp_path), in_sweep=True)
    assert "drs.training" in sys.modules
    assert not run_folder(small(tmp_path)).path.exists()
