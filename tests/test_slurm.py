"""The launcher for Slurm as far as it needs no cluster, which ``make test-slurm`` starts: its settings and mistakes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import compose_train

from drs.config import PROJECT_ROOT
from drs.errors import UserError
from drs.runs import RunFolder, run_folder
from drs.slurm import SlurmConfig, check_slurm, private_folder
from drs.slurm_training import SlurmTraining

TRAIN = [sys.executable, str(PROJECT_ROOT / "scripts" / "train.py"), "-m", "data=digits", "model=mlp", "study=s"]


def sweep(folder: Path, *arguments: str, path: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "DRS_RESULTS": str(folder)} | ({"PATH": path} if path is not None else {})
    command = [*TRAIN, "hydra/launcher=slurm", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("hydra.launcher.mem_gb=lots", "lots"),
        ("hydra.launcher.mem_gb=0", "hydra.launcher.mem_gb=0"),
        ("hydra.launcher.memory=8", "memory"),
    ],
)
def test_a_wrong_setting_ends_in_one_line(tmp_path: Path, argument: str, said: str) -> None:
    done = sweep(tmp_path, argument)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_without_slurm_the_launcher_says_so(tmp_path: Path) -> None:
    done = sweep(tmp_path, path="")
    assert done.returncode == 2
    assert done.stderr.startswith("error: hydra/launcher=slurm: there is no sbatch here; ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus_per_node": 0}, r"gpus_per_node=0: must be null or at least 1"),
        ({"cpus_per_task": 0}, r"cpus_per_task=0: must be at least 1"),
        ({"timeout_min": 1, "signal_delay_s": 60}, r"signal_delay_s=60: must be less than the time limit, 60 s"),
        ({"partition": "two words"}, r"partition='two words': must be null or a name without spaces"),
        ({"additional_parameters": {"time": 5}}, r"additional_parameters\.time: is set by the launcher itself"),
        ({"additional_parameters": {"mem_gb": 5}}, r"additional_parameters\.mem_gb: is set by the launcher itself"),
        ({"additional_parameters": {"nice=5\n#": 5}}, r"must be the long name of an option of sbatch"),
    ],
)
def test_what_cannot_be_asked_of_slurm(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_slurm(SlurmConfig(**settings))  # type: ignore[arg-type]


def test_defaults_can_be_asked_of_slurm() -> None:
    check_slurm(SlurmConfig())


def test_folder_of_the_jobs_is_its_owners_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "study" / ".slurm")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder(folder) == folder
    folder.chmod(0o770)
    with pytest.raises(UserError, match="others can write to this folder"):
        private_folder(folder)


def test_training_that_is_finished_when_it_is_asked_to_end_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    config = compose_train("data=digits", "model=mlp", "epochs=1", "progress=false", f"results_dir={tmp_path}")
    original = RunFolder.save_weights

    def save(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)  # near the time limit
        original(*arguments)

    monkeypatch.setattr(RunFolder, "save_weights", save)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        result = SlurmTraining(config, str(tmp_path), requeue=False, max_num_timeout=0)()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert result.state == "done" and run_folder(config).status()["state"] == "done"
