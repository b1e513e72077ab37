"""A real Slurm cluster of one node on this machine, for as long as a test needs it.

Debian's packages, a folder of its own for everything that they write, ports on the loopback interface alone. It needs
root, as Slurm's daemons start jobs for users; on a machine that runs Slurm already it does not touch that.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun")
PACKAGES = ("slurm-wlm", "munge")
START_SECONDS = 120

# Two partitions on the same node: jobs of the second one send those of the first back into the queue.
CONFIG = """
ClusterName=drs-{token}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=20
MinJobAge=300
MailProg=/bin/true
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 PriorityTier=1 GraceTime={grace} State=UP
PartitionName=urgent Nodes={host} MaxTime=60 PriorityTier=10 State=UP
"""


class ClusterError(Exception):
    """The cluster cannot be had or does not do as it should."""


def install() -> None:
    """Install Debian's Slurm where it is missing.

    Raises:
        ClusterError: If that cannot be done here.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(f"{missing[0]} is missing; on Debian, as root: apt-get install {' '.join(PACKAGES)}")
    print(f"installing {' and '.join(PACKAGES)}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"apt-get {' '.join(command)}: {' '.join((done.stderr or done.stdout).split())[-400:]}")


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path
    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        """Run one of Slurm's commands and return what it prints.

        Raises:
            ClusterError: If it fails.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return a job's state in capitals."""
        return self.ask("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}")


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until ``condition`` holds; ``ClusterError`` naming ``what`` after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise ClusterError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.2)


@contextmanager
def cluster(*, cpus: int = 2, memory_mb: int = 8000, grace_seconds: int = 10) -> Iterator[Cluster]:
    """Start a cluster, and end it and all that it started with the block, whatever happens in it.

    Raises:
        ClusterError: If it does not start.
    """
    if os.geteuid() != 0:
        raise ClusterError("Slurm's daemons need root to start jobs")
    folder = Path(tempfile.mkdtemp(prefix="drs-slurm-"))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    started = Cluster(folder, environment)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        folder.chmod(0o755)
        _write_config(folder, cpus, memory_mb, grace_seconds)
        munge = ["--force", "--foreground", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
        munge += [
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munge.seed",
        ]
        daemons.append(_daemon(folder, environment, "munged", *munge))
        wait_until((folder / "munge.socket").exists, START_SECONDS, "munged")
        daemons.append(_daemon(folder, environment, "slurmctld", "-D", "-c"))
        daemons.append(_daemon(folder, environment, "slurmd", "-D"))

        def idle() -> bool:
            for daemon in daemons:
                if daemon.poll() is not None:
                    raise ClusterError(f"{daemon.args[0]} has ended: {_last_lines(folder)}")  # type: ignore[index]
            with contextlib.suppress(ClusterError):
                return "idle" in started.ask("sinfo", "--noheader", "--format=%T")
            return False

        wait_until(idle, START_SECONDS, "an idle node")
        yield started
    finally:
        _stop(started, daemons)


def _write_config(folder: Path, cpus: int, memory_mb: int, grace_seconds: int) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").touch(mode=0o400)
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            token=secrets.token_hex(3), host=socket.gethostname().partition(".")[0], folder=folder, cpus=cpus,
            memory=memory_mb, grace=grace_seconds, controller_port=_free_port(), node_port=_free_port(),
        )
    )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _daemon(folder: Path, environment: dict[str, str], *command: str) -> "subprocess.Popen[bytes]":
    # A session of its own: an interrupt of the terminal is for this program, which then ends the daemons in order.
    with (folder / f"{command[0]}.out").open("wb") as output:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def _last_lines(folder: Path) -> str:
    lines = [line for path in sorted(folder.glob("*.out")) for line in path.read_text(errors="replace").splitlines()]
    return "; ".join(lines[-3:])


def _stop(running: Cluster, daemons: "list[subprocess.Popen[bytes]]") -> None:
    """End jobs, daemons and what is left of them, and delete the folder."""
    if len(daemons) == 3 and all(daemon.poll() is None for daemon in daemons):
        with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
            jobs = running.ask("squeue", "--noheader", "--format=%A").split()
            if jobs:
                running.ask("scancel", "--signal=KILL", "--full", *jobs)
                running.ask("scancel", *jobs)
                wait_until(lambda: not running.ask("squeue", "--noheader"), 30, "the end of the jobs")
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait(15)
    # A job's step has a process of its own, which outlives the node's daemon on purpose.
    for process in left_processes(running.folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, 9)
    shutil.rmtree(running.folder, ignore_errors=True)


def left_processes(folder: Path) -> list[int]:
    """Return the processes that belong to the cluster in ``folder``: its name is in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURM_CONF={folder}/".encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found
