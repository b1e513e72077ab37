"""Slurm's queue as the launcher sees it: what may be asked of it, and what has become of the jobs in it.

Only ``sbatch``, ``squeue``, ``scontrol`` and ``scancel`` are used. Accounting (``sacct``), which many clusters have and
small ones lack, is not needed.
"""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drs.errors import UserError


@dataclass
class SlurmConfig:
    """``hydra.launcher`` of ``hydra/launcher=slurm``: what each training asks of the cluster.

    Attributes:
        partition: Where the jobs run; the cluster's default where it is null, as for ``account``, ``qos`` and
            ``constraint``.
        gpus_per_node: GPUs of each training; null asks for none.
        cpus_per_task: Cores of each training, which are also its threads.
        mem_gb: Memory of each training in GiB; the partition's default where it is null.
        timeout_min: Time limit in minutes. A training that is about to reach it is saved, goes back into the queue and
            goes on from there.
        signal_delay_s: Seconds before that limit at which the training is told to; Slurm may do so a minute earlier.
        max_num_timeout: How many times a training may reach the limit and go on.
        array_parallelism: Trainings that run at a time.
        requeue: Let a job go back into the queue when it is preempted, its node fails or its time is over.
        setup: Shell commands that a job runs first, such as ``module load cuda``.
        additional_parameters: Other options of ``sbatch``, by their long names.
    """

    _target_: str = "hydra_plugins.drs_slurm_launcher.SlurmLauncher"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int = 1
    mem_gb: float | None = None
    timeout_min: int = 60
    signal_delay_s: int = 120
    max_num_timeout: int = 10
    array_parallelism: int = 256
    requeue: bool = True
    setup: list[str] = field(default_factory=list)
    additional_parameters: dict[str, Any] = field(default_factory=dict)


OURS = {
    "array", "chdir", "error", "export", "job-name", "mem", "no-requeue", "open-mode", "output", "signal", "time",
}  # fmt: skip
"""Options of sbatch that are set here, besides those that have a key of their own."""


def check_slurm(config: SlurmConfig) -> None:
    """Raise ``UserError`` for a value that cannot be asked of Slurm, naming its key and what is allowed."""
    for key, least in (
        ("gpus_per_node", 1), ("cpus_per_task", 1), ("timeout_min", 1), ("signal_delay_s", 1), ("max_num_timeout", 0),
        ("array_parallelism", 1),
    ):  # fmt: skip
        value = getattr(config, key)
        if value is not None and value < least:
            null = "null or " if getattr(SlurmConfig, key) is None else ""
            raise UserError(f"hydra.launcher.{key}={value}: must be {null}at least {least}")
    if config.mem_gb is not None and not 0.01 <= config.mem_gb < 1e6:
        raise UserError(f"hydra.launcher.mem_gb={config.mem_gb}: must be null or GiB of memory, such as 8")
    if config.signal_delay_s >= 60 * config.timeout_min:
        raise UserError(
            f"hydra.launcher.signal_delay_s={config.signal_delay_s}: must be less than the time limit, "
            f"{60 * config.timeout_min} s (hydra.launcher.timeout_min={config.timeout_min})"
        )
    for key in ("partition", "account", "qos", "constraint"):
        value = getattr(config, key)
        if value is not None and (not value or any(character.isspace() for character in value)):
            raise UserError(f"hydra.launcher.{key}={value!r}: must be null or a name without spaces")
    own = {key.replace("_", "-") for key in vars(config)}
    for name in config.additional_parameters:
        key = f"hydra.launcher.additional_parameters.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            raise UserError(f"{key}: must be the long name of an option of sbatch, such as nice or mail-type")
        if name.replace("_", "-") in OURS | own:
            raise UserError(f"{key}: is set by the launcher itself; see drs/slurm.py for its keys")


def private_folder(path: Path) -> Path:
    """Make a folder that only its owner can use, and return it.

    The jobs' descriptions lie in it as pickles, and whoever could write them could run programs as the user.

    Raises:
        UserError: If it exists and another user owns it or can write to it, or if it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); Slurm's jobs need it") from None
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise UserError(
            f"{path}: others can write to this folder, and Slurm's jobs run what is in it; delete it and start again"
        )
    return path


def check_installed() -> None:
    """Raise ``UserError`` where Slurm's commands are missing."""
    missing = [name for name in ("sbatch", "srun", "squeue", "scontrol", "scancel") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"hydra/launcher=slurm: there is no {missing[0]} here; start the sweep on a cluster's login node, or take "
            "hydra/launcher=joblib"
        )


WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "RESIZING"}
RUNNING = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED"}


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job: its state in capitals, and why it waits."""

    state: str
    reason: str

    @property
    def alive(self) -> bool:
        """Whether the job runs or may still run."""
        return self.state in WAITING or self.state in RUNNING


class QueueError(Exception):
    """Slurm does not answer; it may do so later."""


def queue(names: Iterable[str]) -> dict[str, JobState]:
    """Return the state of every job with one of these names, by job id (``12`` or ``12_3``).

    Slurm forgets a job some minutes after its end, so that one which is missing has ended.

    Raises:
        QueueError: If Slurm does not answer.
    """
    wanted = ",".join(names)
    if not wanted:
        return {}
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--name={wanted}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QueueError(str(error)) from None
    if done.returncode:
        raise QueueError(" ".join(done.stderr.split()))
    states = {}
    for line in done.stdout.splitlines():
        job, _, rest = line.strip().partition("|")
        state, _, reason = rest.partition("|")
        states[job] = JobState(state, reason)
    return states


def cancel(jobs: Iterable[str]) -> None:
    """Ask Slurm to end jobs; those that have ended already are no error."""
    ids = list(jobs)
    if ids:
        subprocess.run(["scancel", *ids], capture_output=True, timeout=60)


def state_of_this_job() -> str:
    """Return what Slurm says of the job that this process belongs to, in capitals; empty where it does not answer."""
    job = os.environ.get("SLURM_JOB_ID", "")
    command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
