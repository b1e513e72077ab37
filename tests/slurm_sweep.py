"""A real sweep on a real Slurm cluster of one node: what ``make test-slurm`` runs. Takes about two minutes.

Six trainings go through ``hydra/launcher=slurm``. One of them cannot work, one is cancelled, one requeued, one
preempted by a job of a partition that comes first, and one told that its time is over. The same command then goes on
with the cancelled one. All end with the weights that a training without Slurm gives.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import pandas as pd
from slurm_cluster import Cluster, ClusterError, cluster, install, left_processes, wait_until

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from drs.files import sha256_of  # noqa: E402

STUDY = "slurm"
EPOCHS = 150
PATIENCE = 900.0
"""Seconds after which something counts as hanging; a busy machine takes its time."""
COMMON = ["data=digits", "model=mlp", "loss=ce", f"study={STUDY}", "save_seconds=0.2"]
GRID = f'grid=[{{seed: "0,1,2,3,4", epochs: {EPOCHS}}}, {{seed: 5, epochs: 2, batch_size: 5000}}]'
LAUNCHER = [
    "hydra/launcher=slurm", "hydra.launcher.partition=main", "hydra.launcher.mem_gb=1.5",
    "hydra.launcher.timeout_min=30", "hydra.launcher.signal_delay_s=60",
]  # fmt: skip
SEED = "seed {}"
CANCELLED, REQUEUED, PREEMPTED, OUT_OF_TIME = 0, 1, 2, 3


class Failed(Exception):
    """Something is not as it has to be."""


@dataclass
class Checks:
    """What was found to hold, for the summary at the end."""

    passed: list[str] = field(default_factory=list)

    def hold(self, condition: bool, what: str, found: object = "") -> None:
        """Note that ``what`` holds, or end the test, showing what was found instead."""
        if not condition:
            raise Failed(f"not so: {what}\n{found}")
        self.passed.append(what)
        print(f"  ok: {what}", flush=True)


class Study:
    """The study in a folder of its own, and the sweep as a user starts it."""

    def __init__(self, folder: Path, running: Cluster) -> None:
        self.folder = folder
        self.cluster = running
        self.environment = {**running.environment, "DRS_RESULTS": str(folder), "OMP_NUM_THREADS": "1"}

    def start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), *COMMON, GRID, *LAUNCHER]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def run(self, script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
        return subprocess.run(
            command,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=PATIENCE,
        )

    def run_folder(self, seed: int, *, results: Path | None = None) -> Path | None:
        for path in ((results or self.folder) / STUDY / "runs").glob("*/config.yaml"):
            if f"\nseed: {seed}\n" in path.read_text():
                return path.parent
        return None

    def state(self, seed: int) -> str:
        from json import loads

        folder = self.run_folder(seed)
        path = folder / "status.json" if folder else None
        return str(loads(path.read_text())["state"]) if path and path.exists() else ""

    def epochs(self, seed: int) -> int:
        """Return how many epochs of a training are saved."""
        folder = self.run_folder(seed)
        path = folder / "metrics.csv" if folder else None
        return len(pd.read_csv(path)) if path and path.exists() else 0

    def job(self, seed: int) -> str:
        """Return the newest job of a training; the jobs of the grid are numbered as it has them."""
        jobs = self.cluster.ask("squeue", "--noheader", "--array", "--format=%i").split()
        found = [job for job in jobs if job.endswith(f"_{seed}")]
        return found[-1] if found else ""

    def signal(self, seed: int, name: str) -> "subprocess.Popen[bytes]":
        """Send a signal to a training, as Slurm does before its time is over.

        The command tries again and again where the job goes back into the queue meanwhile; it is not waited for.
        """
        raw = self.cluster.ask("squeue", "--noheader", "--format=%A", f"--jobs={self.job(seed)}")
        return subprocess.Popen(["scancel", f"--signal={name}", raw], env=self.environment)

    def log(self, seed: int) -> str:
        """Return what the jobs of a training printed."""
        return "".join(
            path.read_text() for path in sorted((self.folder / STUDY / ".slurm").glob(f"*_{seed}_0_log.out"))
        )

    def wait_for_training(self, seed: int) -> int:
        """Wait until a training is in the middle, and return how many epochs of it are saved."""
        wait_until(lambda: self.state(seed) == "running" and 0 < self.epochs(seed) < EPOCHS, PATIENCE, f"seed {seed}")
        return self.epochs(seed)


def run_test(study: Study, checks: Checks, say: Callable[[str], None]) -> None:
    """Run the whole test."""
    slurm = study.cluster.ask
    say("a sweep of six trainings, two at a time")
    sweep = study.start()
    try:
        study.wait_for_training(CANCELLED)
        slurm("scancel", study.job(CANCELLED))
        say(f"seed {CANCELLED} cancelled in the middle")

        before = study.wait_for_training(REQUEUED)
        slurm("scontrol", "requeue", study.job(REQUEUED))
        say(f"seed {REQUEUED} requeued after epoch {before} or later")

        study.wait_for_training(OUT_OF_TIME)
        signalling = study.signal(OUT_OF_TIME, "USR2")
        wait_until(lambda: "back into the queue" in study.log(OUT_OF_TIME), PATIENCE, f"seed {OUT_OF_TIME} to be saved")
        signalling.kill()
        signalling.wait()
        say(f"seed {OUT_OF_TIME} told that its time is over")

        study.wait_for_training(PREEMPTED)
        urgent = slurm("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null",
                       "--wrap=sleep 3")  # fmt: skip
        say(f"seed {PREEMPTED} preempted by job {urgent} of another partition")
        out, err = sweep.communicate(timeout=PATIENCE)
    finally:
        if sweep.poll() is None:
            sweep.send_signal(signal.SIGTERM)
            sweep.wait(60)
    print("    | " + "\n    | ".join([*out.splitlines(), *err.splitlines()]), flush=True)
    table = {
        line.split(" seed ")[1].split()[0]: line
        for line in out.splitlines()
        if " seed " in line and line[:12].isalnum()
    }

    checks.hold(sweep.returncode == 1, "a sweep with failed trainings ends with status 1", sweep.returncode)
    checks.hold("batch_size=5000: must be at most" in table.get("5", ""), "the table says why a training failed", out)
    checks.hold("CANCELLED" in table.get("0", "") and "is saved" in table.get("0", ""),
                "the table says that a job was cancelled, and what of it is saved", out)  # fmt: skip
    checks.hold(err.startswith("error: 2 of 6 trainings failed") and err.count("\n") == 1,
                "the error is one line", err)  # fmt: skip
    cancelled_after = study.epochs(CANCELLED)
    checks.hold(study.state(CANCELLED) == "interrupted" and 0 < cancelled_after < EPOCHS,
                f"the cancelled training is saved: epoch {cancelled_after} of {EPOCHS}",
                study.state(CANCELLED))  # fmt: skip
    for seed, what in ((REQUEUED, "requeued"), (OUT_OF_TIME, "timed-out"), (PREEMPTED, "preempted")):
        log = study.log(seed)
        checks.hold(study.state(seed) == "done" and "goes on after epoch" in log,
                    f"the {what} training went on where it was, in the same sweep: " + _epoch(log), log)  # fmt: skip

    say("the same command again")
    again = study.start()
    out, err = again.communicate(timeout=PATIENCE)
    print("    | " + "\n    | ".join([*out.splitlines(), *err.splitlines()]), flush=True)
    log = study.log(CANCELLED)
    checks.hold(f"goes on after epoch {cancelled_after}" in log + study.log(0),
                f"the cancelled training goes on after epoch {cancelled_after}", log)  # fmt: skip
    checks.hold("1 done, 4 skipped (finished before), 0 diverged, 1 stopped by an error" in out,
                "nothing finished is done again, and what failed is tried again", out)  # fmt: skip
    checks.hold(
        again.returncode == 1 and err.startswith("error: 1 of 6 trainings failed"), "it ends with status 1", err
    )

    say("the same trainings without Slurm")
    other = study.folder / "alone"
    done = study.run("train.py", "-m", *COMMON, "seed=0,1,2,3", f"epochs={EPOCHS}", DRS_RESULTS=str(other))
    if done.returncode:
        raise Failed(done.stderr)
    for seed in range(4):
        mine, theirs = (study.run_folder(seed, results=place) for place in (study.folder, other))
        assert mine is not None and theirs is not None
        same = sha256_of(mine / "checkpoint.safetensors") == sha256_of(theirs / "checkpoint.safetensors")
        checks.hold(same, f"seed {seed}: the same weights, bit for bit, as a training without Slurm")

    say("the evaluation")
    done = study.run("evaluate.py", f"study={STUDY}", "suite.n_samples.digits=50")
    checks.hold(done.returncode == 0, "the study is evaluated", done.stdout + done.stderr)
    models = pd.read_csv(study.folder / STUDY / "tables" / "models.csv")
    checks.hold(len(models) == 5, "the tables have the five models", models)


def _epoch(log: str) -> str:
    return "after epoch " + log.partition("goes on after epoch ")[2].split()[0]


def main() -> int:
    """Run the test and print what was found."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    checks, outcome, cluster_folder = Checks(), "passed", None

    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {what}", flush=True)

    folder = Path(tempfile.mkdtemp(prefix="drs-slurm-study-"))
    try:
        install()
        with cluster() as running:
            cluster_folder = running.folder
            say(f"{running.ask('sinfo', '--version')}: one node, two partitions, {running.ask('sinfo', '-h', '-o%C')}")
            run_test(Study(folder, running), checks, say)
    except (ClusterError, Failed, subprocess.TimeoutExpired) as error:
        outcome = f"FAILED: {error}"
    except KeyboardInterrupt:
        outcome = "interrupted"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    left = left_processes(cluster_folder) if cluster_folder else []
    if left or (cluster_folder and cluster_folder.exists()):
        outcome = f"FAILED: the cluster has left processes {left} or the folder {cluster_folder}"
    else:
        say("the cluster is gone, and so are its files and processes")
    print(f"\nmake test-slurm: {outcome}; {len(checks.passed)} checks hold, {time.monotonic() - began:.0f} s")
    for what in checks.passed:
        print(f"  {what}")
    return {"passed": 0, "interrupted": 130}.get(outcome, 1)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    os.environ.pop("SLURM_CONF", None)
    sys.exit(main())
