"""A Hydra sweeper over a union of grids, as an experiment needs it, with one table at the end.

Hydra's own sweeper takes one Cartesian product. A study has several: CIFAR-10 goes with another model than MNIST,
and cross-entropy has no weight. ``grid`` in an experiment file is a list of products; each is a mapping from an
override key to a value or to values separated by commas. Overrides on the command line win over the grid's.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import ListConfig, OmegaConf

from drs.composition import Composer
from drs.config import PROJECT_ROOT, TrainConfig
from drs.errors import UserError


def register_plugins() -> None:
    """Tell Hydra of the sweeper and of the resolver that starts a sweep where a config has a grid."""
    plugins = str(Path(__file__).parent / "plugins")
    if plugins not in sys.path:
        # Hydra takes plugins from the namespace package hydra_plugins alone.
        sys.path.append(plugins)
    ConfigStore.instance().store(
        group="hydra/sweeper",
        name="grid",
        node={"_target_": "hydra_plugins.drs_grid_sweeper.GridSweeper", "max_batch_size": None, "grid": "${grid}"},
    )
    OmegaConf.register_new_resolver("drs.mode", _mode, replace=True)


def _mode(grid: ListConfig | None) -> RunMode | None:
    return RunMode.MULTIRUN if grid else None


def expand_grid(grid: Sequence[dict[str, Any]], arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job: the union of the grid's products, each narrowed by ``arguments``.

    Args:
        grid: Mappings from an override key to a value, or to several in Hydra's sweep syntax; an empty grid is one
            product of nothing, so that the arguments alone decide.
        arguments: Overrides of the command line, which replace a product's own value of the same key.
    """
    parser = OverridesParser.create()
    jobs: dict[tuple[str, ...], list[str]] = {}
    for product in grid or [{}]:
        overrides = parser.parse_overrides([*(f"{key}={value}" for key, value in product.items()), *arguments])
        for job in BasicSweeper.split_arguments(overrides, None)[0]:
            jobs.setdefault(tuple(job), list(job))
    return list(jobs.values())


def grid_jobs(experiment: str, *arguments: str) -> list[tuple[list[str], TrainConfig]]:
    """Return overrides and config of every training of an experiment, in the order in which a sweep takes them.

    Raises:
        UserError: For an experiment that does not exist or a config that does not fit the schema.
    """
    known = sorted(path.stem for path in (PROJECT_ROOT / "configs" / "experiment").glob("*.yaml"))
    if experiment not in known:
        raise UserError(f"experiment={experiment}: unknown; it is one of {', '.join(known)}")
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        base = [f"experiment={experiment}", *arguments]
        grid = OmegaConf.to_container(compose("train", base).grid)
        jobs = expand_grid(grid, base)  # type: ignore[arg-type]
        loader: Any = GlobalHydra.instance().config_loader()
        composer = Composer(lambda job: compose("train", job), loader.repository.group_exists)
        return [(job, composer.train_config(job)) for job in jobs]


def job_error(job: JobReturn) -> Exception:
    """Return what stopped a failed job; the notes of a defect, which is no mistake of the user's, say which job."""
    try:
        # Only the job's own accessor gives its error out, and it prints a line of its own as it raises it.
        with redirect_stderr(StringIO()):
            _ = job.return_value
    except UserError as error:
        return error
    except Exception as error:
        error.add_note(f"Overrides of the job: {' '.join(job.overrides or [])}")
        return error
    raise ValueError("the job has not failed")


def launch_in_turn(
    launcher: BasicLauncher, jobs: Sequence[Sequence[str]], first: int, *, fail_fast: bool
) -> list[JobReturn]:
    """Run jobs one after the other and return a result for each, in order.

    Args:
        launcher: Hydra's own, set up.
        jobs: Their overrides.
        first: The number of the first.
        fail_fast: Stop at the first that fails; the status of those after it stays UNKNOWN.
    """
    returns: list[JobReturn] = []
    for position, job in enumerate(jobs):
        returns += launcher.launch([job], initial_job_idx=first + position)
        if fail_fast and has_failed(returns[-1]):
            break
    return returns + [JobReturn() for _ in range(len(jobs) - len(returns))]


def has_failed(job: JobReturn) -> bool:
    """Return whether a job raised an error, or returned one as its result."""
    if job.status == JobStatus.COMPLETED:
        return bool(job.return_value.state == "failed")
    return bool(job.status == JobStatus.FAILED)


def core_count() -> int:
    """Return how many cores this process may use: affinity and a container's limit count."""
    from joblib import cpu_count  # takes time to import, which a single training need not spend

    return int(cpu_count())


def worker_count(n_jobs: object, n_tasks: int) -> int:
    """Return how many jobs to run at a time: ``n_jobs``, -1 meaning one for each core, and at most ``n_tasks``.

    Raises:
        UserError: Unless ``n_jobs`` is -1 or a whole number above 0.
    """
    if not isinstance(n_jobs, int) or isinstance(n_jobs, bool) or not (n_jobs == -1 or n_jobs > 0):
        raise UserError(f"hydra.launcher.n_jobs={n_jobs}: must be a number of jobs, or -1 for one on each core")
    return max(1, min(core_count() if n_jobs == -1 else n_jobs, n_tasks))


def threads_each(workers: int) -> int:
    """Return the threads of each worker: its share of the cores, at least 1, unless OMP_NUM_THREADS sets them."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdecimal() and int(chosen) else max(1, core_count() // workers)


def threads_text(threads: int) -> str:
    """Write a number of threads as ``one thread each`` or ``3 threads each``."""
    return "one thread each" if threads == 1 else f"{threads} threads each"
