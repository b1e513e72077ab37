"""One training as a job of Slurm: what the node runs, and what it does when Slurm ends it.

Slurm tells a training of its end beforehand: by SIGUSR2 before the time limit, by SIGTERM when it is preempted,
requeued or cancelled. In each case the last finished epoch is saved. A job that ran out of time, or that is preempted,
goes back into the queue, and when it starts again the training goes on.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from drs.config import TrainConfig
from drs.errors import Interrupted
from drs.interrupts import interrupt_on_termination
from drs.jobs import TrainingResult, run_job, settled
from drs.slurm import state_of_this_job


class TimedOut(Exception):
    """A training has reached its time limit as often as it may."""


@dataclass
class SlurmTraining:
    """A training that submitit runs on a node.

    Attributes:
        config: The training.
        folder: Where submitit keeps the job's files.
        requeue: Whether the job may go back into the queue.
        max_num_timeout: How many times it may do so for the time limit.
    """

    config: TrainConfig
    folder: str
    requeue: bool
    max_num_timeout: int

    def __call__(self) -> TrainingResult:
        """Train, and return what became of it.

        Raises:
            TimedOut: If the time limit was reached too often; the training is saved.
            SystemExit: If Slurm ends the job in another way, or starts it again later: there is no result then.
        """
        self._out_of_time = False
        # submitit's own handlers would stop the training in the middle of a step, without saving it.
        interrupt_on_termination()
        signal.signal(signal.SIGUSR2, self._near_the_limit)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        try:
            return run_job(self.config, in_sweep=True)
        except Interrupted:
            result = settled(self.config)
            if result is not None and result.state == "skipped":  # it came after the last step
                return replace(result, state="done", detail="finished when it was asked to end")
            self._end()

    def _near_the_limit(self, _: int, __: FrameType | None) -> None:
        self._out_of_time = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _end(self) -> NoReturn:
        job = os.environ["SLURM_JOB_ID"]
        if self._out_of_time:
            count = self._count_timeout(job)
            if not self.requeue or count > self.max_num_timeout:
                raise TimedOut(
                    f"reached the time limit {'once' if count == 1 else f'{count} times'}; what it has done is saved, "
                    "and the same command goes on from there"
                )
        # A job that is cancelled or requeued has left the state RUNNING. One that is preempted has not, and would be
        # taken as failed if it ended before its time of grace does.
        if self.requeue and (self._out_of_time or state_of_this_job() == "RUNNING"):
            print("saved; back into the queue", flush=True)
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
            if done.returncode:
                print(
                    f"cannot be put back into the queue: {' '.join(done.stderr.split())}", file=sys.stderr, flush=True
                )
        else:
            print("saved; ended by Slurm", flush=True)
        sys.exit(128 + signal.SIGTERM)

    def _count_timeout(self, job: str) -> int:
        path = Path(self.folder) / f"{job}_timeouts"
        with path.open("a") as file:
            file.write("reached the time limit\n")
        return len(path.read_text().splitlines())
