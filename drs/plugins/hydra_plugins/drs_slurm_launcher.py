"""The launcher behind ``hydra/launcher=slurm``: each training of a sweep is a job of a Slurm cluster.

submitit writes the batch script and carries the training to the node and its result back. hydra-submitit-launcher,
which does that for Hydra, is not used: it raises the first job's error in place of the sweep's table, it asks ``sacct``
how jobs fare, which a small cluster lacks, and its signal handler stops a training without saving it.
"""

import pickle
import re
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from drs.composition import Composer
from drs.config import PROJECT_ROOT, TrainConfig
from drs.errors import UserError
from drs.jobs import TrainingResult, result_of
from drs.processes import GRACE_SECONDS
from drs.runs import run_folder
from drs.slurm import JobState, QueueError, SlurmConfig, cancel, check_installed, check_slurm, private_folder, queue
from drs.sweeper import has_failed

ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmConfig)

POLL_SECONDS = 2.0
RESULT_SECONDS = 20.0
"""How long a result may be on its way from the node after its job has ended; shared file systems show it late."""
ARRAY_JOBS = 1000
"""Slurm's own limit on the jobs of one array, unless a cluster sets another."""
FOLDER = ".slurm"


@dataclass
class _Submitted:
    """A job in the queue."""

    id: str
    config: TrainConfig
    result: Path
    log: Path
    ended: float | None = None


class SlurmLauncher(Launcher):
    """Submits all jobs of a sweep at once, waits for them, and prints as each one ends.

    Attributes:
        fail_fast: Whether the first job that fails cancels the others.
    """

    fail_fast = False

    def __init__(self, **options: Any) -> None:
        plain: dict[str, Any] = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }
        self.options = SlurmConfig(**plain)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See ``hydra.plugins.launcher.Launcher``; a setting that cannot be asked of Slurm is a ``UserError``."""
        check_slurm(self.options)
        loader: Any = hydra_context.config_loader
        self.composer = Composer(lambda job: loader.load_sweep_config(config, job), loader.repository.group_exists)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs and return their results in the order of ``job_overrides``.

        A failed job stops no other, unless ``fail_fast`` is set: then those that it stopped have the status UNKNOWN.
        An interrupt cancels the jobs, whose trainings are saved.

        Raises:
            UserError: If there is no Slurm here, or if it refuses the jobs.
        """
        if not job_overrides:
            return []
        check_installed()
        configs = [self.composer.train_config(list(job)) for job in job_overrides]
        folder = private_folder(run_folder(configs[0]).path.parent.parent / FOLDER)
        name = f"drs-{re.sub(r'[^A-Za-z0-9_.-]', '_', configs[0].study)}-{secrets.token_hex(3)}"
        jobs: list[_Submitted] = []
        results: dict[int, JobReturn] = {}
        try:
            chunks = [configs[start : start + ARRAY_JOBS] for start in range(0, len(configs), ARRAY_JOBS)]
            for chunk in chunks:
                jobs += self._submit(chunk, folder, name, max(1, self.options.array_parallelism // len(chunks)))
            print(f"{len(jobs)} jobs in Slurm's queue under the name {name}; their logs are in {folder}", flush=True)
            self._wait(name, jobs, results)
        finally:
            left = [job for place, job in enumerate(jobs) if place not in results]
            if left:
                _cancel(name, left)
        return [results.get(place, JobReturn()) for place in range(len(jobs))]

    def _submit(self, configs: Sequence[TrainConfig], folder: Path, name: str, parallel: int) -> list[_Submitted]:
        import submitit
        from submitit.core.utils import FailedJobError

        from drs.slurm_training import SlurmTraining

        options = self.options
        executor = submitit.SlurmExecutor(folder, max_num_timeout=options.max_num_timeout)
        own = {
            key: value
            for key in ("partition", "account", "qos", "constraint", "gpus_per_node")
            if (value := getattr(options, key)) is not None
        }
        if options.mem_gb is not None:
            own["mem"] = f"{round(options.mem_gb * 1024)}M"
        threads = options.cpus_per_task
        executor.update_parameters(
            **own, job_name=name, time=options.timeout_min, cpus_per_task=threads, array_parallelism=parallel,
            signal_delay_s=options.signal_delay_s, srun_args=[f"--cpus-per-task={threads}"],
            setup=[
                f"export PYTHONPATH={shlex.quote(str(PROJECT_ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
                f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}",
                *options.setup,
            ],
            additional_parameters={
                "requeue" if options.requeue else "no-requeue": True, **options.additional_parameters,
            },
        )  # fmt: skip
        tasks = [SlurmTraining(config, str(folder), options.requeue, options.max_num_timeout) for config in configs]
        try:
            with executor.batch():
                submitted = [executor.submit(task) for task in tasks]
        except FailedJobError as error:
            said = " ".join(str(error).partition("sbatch: error: ")[2].split()) or " ".join(str(error).split())
            raise UserError(f"hydra/launcher=slurm: sbatch refuses the jobs: {said}") from None
        return [
            _Submitted(job.job_id, config, job.paths.result_pickle, job.paths.stdout)
            for job, config in zip(submitted, configs, strict=True)
        ]

    def _wait(self, name: str, jobs: Sequence[_Submitted], results: dict[int, JobReturn]) -> None:
        """Wait for the jobs and fill ``results``, by place in ``jobs``."""
        states: dict[str, JobState] = {}
        told = ""
        while len(results) < len(jobs):
            try:
                states, silent = queue([name]), ""
            except QueueError as error:
                silent = f"Slurm does not answer, asking it again: {error}"
                if silent != told:
                    print(silent, file=sys.stderr, flush=True)
            told = silent
            for place, job in enumerate(jobs):
                if place in results or (found := _ended(job, states, known=not silent)) is None:
                    continue
                results[place] = JobReturn(status=JobStatus.COMPLETED)
                results[place].return_value = found
                print(f"job {len(results)} of {len(jobs)}: run {found.run_id} {found.state}{_said(found)}", flush=True)
                if self.fail_fast and has_failed(results[place]):
                    return
            if len(results) < len(jobs):
                time.sleep(POLL_SECONDS)


def _ended(job: _Submitted, states: dict[str, JobState], *, known: bool) -> TrainingResult | None:
    """Return what became of a job, or None while it has not ended."""
    if job.result.exists():
        kind, value = pickle.loads(job.result.read_bytes())  # of a folder that only this user can write to
        if kind == "success":
            result: TrainingResult = value
            return result
        return _failed(job, value.strip().splitlines()[-1].removeprefix("drs.slurm_training.TimedOut: "))
    state = states.get(job.id)
    if not known or (state is not None and state.alive):
        job.ended = None
        return None
    job.ended = job.ended or time.monotonic()
    if time.monotonic() - job.ended < (POLL_SECONDS if state and state.state == "CANCELLED" else RESULT_SECONDS):
        return None
    return _failed(job, _why(job, state))


def _failed(job: _Submitted, why: str) -> TrainingResult:
    """Return the result of a job that left none; how long it took is not known."""
    return replace(result_of(job.config, "failed", why, time.monotonic()), seconds=0.0)


def _why(job: _Submitted, state: JobState | None) -> str:
    said = f"Slurm's job {job.id} ended as {state.state}" if state else f"Slurm's job {job.id} is gone"
    status = run_folder(job.config).status()
    if status.get("state") == "interrupted":
        return f"{said}; epoch {status.get('epoch')} of {status.get('epochs')} is saved, and the same command goes on"
    return f"{said} without a result; see {job.log}"


def _said(result: TrainingResult) -> str:
    return f" ({result.detail})" if result.detail else ""


def _cancel(name: str, jobs: Sequence[_Submitted]) -> None:
    """Cancel jobs, and give their trainings the time to be saved."""
    cancel(job.id for job in jobs)
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end:
        try:
            states = queue([name])
        except QueueError:
            return
        if not any(states[job.id].alive for job in jobs if job.id in states):
            return
        time.sleep(0.5)
