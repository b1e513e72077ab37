"""Where Hydra looks for plugins: the sweeper that ``drs.sweeper`` configures."""

from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import ListConfig, OmegaConf

from drs.composition import Composer
from drs.config import run_id
from drs.errors import UserError
from drs.sweep_outcome import Job, run_sweep
from drs.sweeper import expand_grid, launch_in_turn


class GridSweeper(BasicSweeper):
    """Checks every job's config before the first one starts, then hands those without a result to Hydra's launcher."""

    def __init__(self, max_batch_size: int | None, grid: list[dict[str, Any]] | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size)
        self.grid = grid or []

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep to its end and return its jobs' results (``drs.sweep_outcome``)."""
        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        grid = OmegaConf.to_container(self.grid) if isinstance(self.grid, ListConfig) else self.grid
        loader: Any = self.hydra_context.config_loader
        composer = Composer(lambda job: loader.load_sweep_config(self.config, job), loader.repository.group_exists)
        jobs: dict[str, Job] = {}
        for overrides in expand_grid(grid, arguments):
            config = composer.train_config(overrides)
            same = jobs.setdefault(run_id(config), Job(overrides, config)).config
            for key in ("study", "results_dir"):
                if getattr(same, key) != getattr(config, key):
                    raise UserError(
                        f"{key}={getattr(same, key)} and {key}={getattr(config, key)} in one sweep ask for the same "
                        f"training, run {run_id(config)}, twice; sweep each by itself"
                    )
        fail_fast = any(job.config.fail_fast for job in jobs.values())
        return run_sweep(jobs, lambda overrides: self._launch(overrides, fail_fast), fail_fast=fail_fast)

    def _launch(self, overrides: list[list[str]], fail_fast: bool) -> Any:
        launcher: Any = self.launcher
        if isinstance(launcher, BasicLauncher):
            return launch_in_turn(launcher, overrides, 0, fail_fast=fail_fast)
        launcher.fail_fast = fail_fast
        return launcher.launch(overrides, initial_job_idx=0)
