"""Weights & Biases through its real client: what it records offline, and that its failures stop nothing."""

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import pandas as pd
import pytest
import wandb
from conftest import SMOKE, compose_train
from test_launchers import members, wait_for
from wandb.proto.wandb_internal_pb2 import Record

from drs.config import PROJECT_ROOT, TrainConfig, identity, run_id
from drs.runs import run_folder
from drs.schema import TrackingConfig
from drs.tracking import WandbTracker, log_evaluation, open_tracker
from drs.training import train

OFFLINE = TrackingConfig("wandb")
BLOCK = 32768


@pytest.fixture(autouse=True)
def clean_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of its own without a login, and an end to W&B's process after each test; yields the home."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home))
    # Set by the code under test; setting them here lets monkeypatch put them back.
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield home
    wandb.teardown()


def small(tmp_path: Path, *overrides: str) -> TrainConfig:
    return compose_train(
        "data=digits", "model=mlp", "epochs=3", "batch_size=64", f"results_dir={tmp_path}/results", "study=s",
        f"data.cache={tmp_path}/data", "progress=false", "tracking=wandb", *overrides,
    )  # fmt: skip


@dataclass
class Recorded:
    """What one ``.wandb`` file holds."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def records(path: Path) -> Iterator[Record]:
    """Yield the records of a ``.wandb`` file: a log of LevelDB's format after a header of 7 bytes."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read(path: Path) -> Recorded:
    found = Recorded()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            row: dict[str, Any] = {"step": record.history.step.num}
            for item in record.history.item:
                first, *rest = item.nested_key
                if rest:
                    row.setdefault(first, {})["/".join(rest)] = json.loads(item.value_json)
                else:
                    row[first] = json.loads(item.value_json)
            found.history.append(row)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def recorded(study: Path) -> list[Recorded]:
    wandb.teardown()  # its process writes the end of a file after the run has been closed
    return [read(path) for path in sorted(study.glob("wandb/offline-run-*/*.wandb"))]


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = capsys.readouterr()
    assert "wandb" not in text.out
    return text.err.splitlines()


def test_training_is_recorded_as_the_csv_has_it(
    tmp_path: Path, clean_wandb: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, "data.validation=50")
    result = train(config)
    assert (result.state, warnings_of(capsys)) == ("done", [])
    study = tmp_path / "results" / "s"
    (found,) = recorded(study)
    assert (found.run.run_group, found.run.display_name, found.run.run_id) == (
        "s",
        run_id(config),
        f"s-{run_id(config)}",
    )
    assert (found.run.job_type, found.run.project) == ("training", config.tracking.project)
    assert {key: value for key, value in found.config.items() if key != "_wandb"} == identity(config)
    metrics = pd.read_csv(Path(result.folder) / "metrics.csv")
    assert [row["step"] for row in found.history] == metrics["epoch"].tolist() == [1, 2, 3]
    for row, expected in zip(found.history, metrics.to_dict("records"), strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert found.exit_code == 0
    assert wandb.run is None, "the job's run is closed"
    assert list(clean_wandb.rglob("*")) == [], "wandb wrote to the user's home"
    assert sorted(path.name for path in study.iterdir()) == ["runs", "wandb"]
    assert not [path for path in (study / "runs").rglob("*") if "wandb" in path.name]


def test_diverged_and_stopped_trainings_are_closed_as_failed(tmp_path: Path) -> None:
    assert train(small(tmp_path, "loss.weight=1e30", "optim=sgd", "optim.learning_rate=100")).state == "diverged"
    config = small(tmp_path, "seed=1")
    with open_tracker(OFFLINE, "first", {}, tmp_path / "results" / "s") as tracker:
        tracker.log({"loss": 1.0}, 1)
    with pytest.raises(KeyboardInterrupt), open_tracker(OFFLINE, "other", identity(config), tmp_path / "results" / "s"):
        raise KeyboardInterrupt
    codes = {found.run.display_name[:5]: found.exit_code for found in recorded(tmp_path / "results" / "s")}
    assert sorted(codes.values()) == [0, 1, 1] and codes["first"] == 0


def test_interrupted_training_goes_on_in_the_same_run(tmp_path: Path) -> None:
    study = tmp_path / "s"
    for steps in ((1, 2), (3, 4)):
        with open_tracker(OFFLINE, "abc", {"seed": 0}, study) as tracker:
            for step in steps:
                tracker.log({"loss": 1 / step}, step)
        time.sleep(1.1)  # wandb's folders carry the second
    found = recorded(study)
    assert [part.run.run_id for part in found] == ["s-abc", "s-abc"]
    assert [row["step"] for part in found for row in part.history] == [1, 2, 3, 4]


def test_evaluation_is_recorded_with_tables_and_figures(tmp_path: Path, clean_wandb: Path) -> None:
    study = tmp_path / "laptop"
    shutil.copytree(PROJECT_ROOT / "results" / "reference" / "laptop", study)
    log_evaluation(OFFLINE, study)
    (found,) = recorded(study)
    assert (found.run.run_group, found.run.display_name, found.run.job_type) == ("laptop", "evaluation", "evaluation")
    row = found.history[-1]
    figures = {path.stem for path in (study / "figures").glob("*.png")}
    assert {key.removeprefix("figures/") for key in row if key.startswith("figures/")} == figures and figures
    (files,) = study.glob("wandb/offline-run-*/files")
    for name in ("models", "claims"):
        table = json.loads((files / row[f"tables/{name}"]["path"]).read_text())
        expected = pd.read_csv(study / "tables" / f"{name}.csv")
        assert table["columns"] == list(expected)
        assert len(table["data"]) == len(expected)
    for name in figures:
        assert (files / row[f"figures/{name}"]["path"]).read_bytes() == (study / "figures" / f"{name}.png").read_bytes()
    assert list(clean_wandb.rglob("*")) == []


def failing(tmp_path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Train with a W&B that cannot work; return its one line of warning."""
    config = small(tmp_path, *overrides)
    capsys.readouterr()
    began = time.monotonic()
    assert train(config).state == "done"
    assert time.monotonic() - began < 20
    (line,) = warnings_of(capsys)
    assert line.startswith("warning: W&B ")
    assert len(pd.read_csv(run_folder(config).path / "metrics.csv")) == 3
    return line


def test_without_a_login_it_neither_asks_nor_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 - a prompt would end in EOFError
    assert "no login" in failing(tmp_path, capsys, "tracking.mode=online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert "API key must have" in failing(tmp_path, capsys, "tracking.mode=online", "seed=1")


def test_without_a_network_training_goes_on_within_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "connection refused" in failing(tmp_path, capsys, "tracking.mode=online")


def test_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results" / "s").mkdir(parents=True)
    (tmp_path / "results" / "s" / "wandb").write_text("in the way")
    assert str(tmp_path / "results" / "s" / "wandb") in failing(tmp_path, capsys)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system that is full")
def test_full_disk_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results" / "s" / "wandb"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        assert "No space left on device" in failing(tmp_path, capsys)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def services(process: int) -> list[int]:
    """Return the living service processes of a process; they start a session of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"wandb-core") and words[words.index(b"--pid") + 1] == str(process).encode():
                found.append(int(path.parent.name))
    return found


def only_service(process: int) -> int:
    """Return the service of a process, once an earlier one has ended and what it starts itself has its own name."""
    assert wait_for(lambda: len(services(process)) == 1, 20), services(process)
    return services(process)[0]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_killed_service_is_told_once_and_the_next_run_gets_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "s"
    with open_tracker(OFFLINE, "first", {}, study) as tracker:
        tracker.log({"loss": 1.0}, 1)
        os.kill(only_service(os.getpid()), signal.SIGKILL)
        time.sleep(0.5)
        for step in (2, 3):
            tracker.log({"loss": 1.0}, step)
    (line,) = warnings_of(capsys)
    assert line.startswith("warning: W&B did not take the metrics: ")
    with open_tracker(OFFLINE, "second", {}, study) as tracker:
        assert isinstance(tracker, WandbTracker)
        tracker.log({"loss": 1.0}, 1)
    assert warnings_of(capsys) == []
    assert [len(found.history) for found in recorded(study) if found.run and found.run.display_name == "second"] == [1]


def running_from(folder: Path) -> list[str]:
    """Return the W&B services that keep their files under ``folder``, whoever started them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"WANDB_CACHE_DIR={folder}".encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_parallel_sweep_records_every_run_and_leaves_no_process(tmp_path: Path, clean_wandb: Path) -> None:
    sweep = [
        "-m", "data=digits", "model=mlp", "loss=ce", "study=s", "seed=0,1", "batch_size=64", "epochs=2",
        f"results_dir={tmp_path}/results", f"data.cache={tmp_path}/data", "tracking=wandb", "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    ]  # fmt: skip
    process = forked.start("train.py", *sweep, out=tmp_path / "out")
    ended = process.wait(120)
    assert ended.returncode == 0 and "wandb" not in ended.stdout + ended.stderr, ended
    assert wait_for(lambda: not members(process.pid) and not running_from(tmp_path), 10)
    found = recorded(tmp_path / "results" / "s")
    assert [(len(part.history), part.exit_code) for part in found] == [(2, 0), (2, 0)]
    assert {part.run.display_name for part in found} == {path.name for path in (tmp_path / "results/s/runs").iterdir()}
    assert list(clean_wandb.rglob("*")) == []


KILLED = """
import time
from pathlib import Path
from drs.schema import TrackingConfig
from drs.tracking import open_tracker
open_tracker(TrackingConfig("wandb"), "a", {{}}, Path({study!r}))
Path({study!r}, "open").touch()
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_service_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED.format(study=str(tmp_path / "s"))]
    with subprocess.Popen(command, cwd=PROJECT_ROOT) as process:
        try:
            assert wait_for((tmp_path / "s" / "open").exists, 60)
            only_service(process.pid)
        finally:
            process.kill()
    assert wait_for(lambda: not services(process.pid), 20)


def test_without_tracking_wandb_is_not_imported(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from drs.schema import TrackingConfig
from drs.tracking import log_evaluation, open_tracker
with open_tracker(TrackingConfig("none"), "a", {}, Path("s")) as tracker:
    tracker.log({"loss": 1.0}, 1)
log_evaluation(TrackingConfig("none"), Path("s"))
assert "wandb" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert not (tmp_path / "s").exists()


def test_only_one_file_imports_wandb() -> None:
    importers = set()
    for folder in ("drs", "scripts"):
        for path in (PROJECT_ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                importers |= {path.name for name in names if name.partition(".")[0] == "wandb"}
    assert importers == {"tracking.py"}


def test_evaluation_script_records_its_study(smoke_results: Path, tmp_path: Path) -> None:
    environment = {"DRS_RESULTS": str(smoke_results), "DRS_CACHE": str(smoke_results.parent / "data")}
    try:
        done = forked.run("evaluate.py", *SMOKE, "tracking=wandb", out=tmp_path / "out", environment=environment)
        assert (done.returncode, done.stderr) == (0, "")
        (found,) = recorded(smoke_results / "smoke")
    finally:
        shutil.rmtree(smoke_results / "smoke" / "wandb", ignore_errors=True)
    assert {"tables/models", "tables/claims"} <= found.history[-1].keys()
