"""Weights & Biases, off by default; the only file that imports wandb.

CSV stays the record: whatever goes wrong here is a warning, and training goes on.
"""

import warnings
from pathlib import Path
from typing import Any, Protocol

from drs.config import TrackingConfig


class Tracker(Protocol):
    """Where a run's metrics go besides ``metrics.csv``."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of one epoch."""

    def finish(self) -> None:
        """Close the run."""


class NoTracker:
    """Tracks nothing."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class WandbTracker:
    """One W&B run: its group is the study, its name the run id."""

    def __init__(self, config: TrackingConfig, study: str, name: str, content: dict[str, Any], folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self.errors = (wandb.errors.Error, OSError)
        self.run = wandb.init(
            project=config.project, group=study, name=name, id=name, config=content, dir=folder,
            mode="online" if config.mode == "online" else "offline", resume="allow",
            settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of one epoch; a failure is a warning."""
        try:
            self.run.log(metrics, step=step)
        except self.errors as error:
            warnings.warn(f"W&B did not take the metrics: {error}", stacklevel=2)

    def finish(self) -> None:
        """Close the run; a failure is a warning."""
        try:
            self.run.finish()
        except self.errors as error:
            warnings.warn(f"W&B did not finish: {error}", stacklevel=2)


def open_tracker(config: TrackingConfig, study: str, name: str, content: dict[str, Any], folder: Path) -> Tracker:
    """Return the tracker that a config asks for; without W&B's consent, one that tracks nothing and a warning."""
    if config.name == "none":
        return NoTracker()
    import wandb

    try:
        return WandbTracker(config, study, name, content, folder)
    except (wandb.errors.Error, OSError) as error:
        warnings.warn(f"W&B is off for this run: {error}", stacklevel=2)
        return NoTracker()
