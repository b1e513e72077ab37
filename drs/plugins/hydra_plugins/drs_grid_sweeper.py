"""Where Hydra looks for plugins: the sweeper that ``drs.sweeper`` configures."""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobStatus
from omegaconf import ListConfig, OmegaConf

from drs.config import run_id, train_config
from drs.sweeper import expand_grid, job_error


class GridSweeper(BasicSweeper):
    """Checks every job's config before the first one starts, then hands all jobs to Hydra's launcher."""

    def __init__(self, max_batch_size: int | None, grid: list[dict[str, Any]] | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size)
        self.grid = grid or []

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep and return its jobs' results; the last line printed counts done, skipped and failed."""
        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        grid = OmegaConf.to_container(self.grid) if isinstance(self.grid, ListConfig) else self.grid
        jobs = expand_grid(grid, arguments)
        seen: dict[str, list[str]] = {}
        for job in jobs:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
            seen.setdefault(run_id(train_config(config)), job)
        print(f"{len(seen)} trainings", flush=True)
        returns = self.launcher.launch(list(seen.values()), initial_job_idx=0)
        errors = [job for job in returns if job.status == JobStatus.FAILED]
        results = [job.return_value for job in returns if job.status == JobStatus.COMPLETED]
        states = [result.state for result in results]
        failed = [result for result in results if result.state == "failed"]
        print(
            f"{states.count('done')} done, {states.count('skipped')} skipped (finished before), "
            f"{len(failed)} diverged, {len(errors)} stopped by an error",
            flush=True,
        )
        for result in failed:
            print(f"  {result.detail} ({result.folder})")
        if errors:
            raise job_error(errors[0])
        return results
