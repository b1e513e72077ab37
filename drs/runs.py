"""The folder of one training: written atomically, done only when its status says so.

Importing this does not import torch, so that a run that is done can be skipped, and a study looked at, in no time.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from drs.config import TrainConfig, project_path, run_id, train_config
from drs.config_checks import check_study
from drs.errors import UserError
from drs.files import atomic_write

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class RunFolder:
    """One training's folder, ``results/<study>/runs/<run_id>``."""

    path: Path

    @property
    def run_id(self) -> str:
        """The run's id, which is also the folder's name."""
        return self.path.name

    def status(self) -> dict[str, Any]:
        """Return ``status.json`` (``state`` is running, done or failed), or an empty dict where there is none.

        Raises:
            UserError: If the file is not a JSON object.
        """
        path = self.path / "status.json"
        if not path.exists():
            return {}
        try:
            status = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); delete the run's folder to train it again") from None
        if not isinstance(status, dict):
            raise UserError(f"{path}: a JSON object is required; delete the run's folder to train it again")
        return status

    def write_status(self, **content: Any) -> None:
        """Replace ``status.json``."""
        write_json(self.path / "status.json", content)

    def config(self) -> TrainConfig:
        """Return the run's own config; ``UserError`` where it is missing or does not fit the schema."""
        path = self.path / "config.yaml"
        if not path.exists():
            raise UserError(f"{path} is missing; delete the run's folder to train it again")
        try:
            return train_config(OmegaConf.load(path))  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def write_config(self, config: TrainConfig) -> None:
        """Write ``config.yaml``, every value of it."""
        with atomic_write(self.path / "config.yaml") as temporary:
            temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write ``metrics.csv``, a row per epoch."""
        text = StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(self.path / "metrics.csv") as temporary:
            temporary.write_text(text.getvalue())

    def save_weights(self, model: "nn.Module", architecture: str) -> None:
        """Write ``checkpoint.safetensors`` with the architecture's name in its metadata."""
        from drs.checkpoints import save_weights

        save_weights(model, self.path / "checkpoint.safetensors", architecture, self.run_id)

    def load_model(self, device: "torch.device") -> "nn.Module":
        """Return the trained model in eval mode, taking pixels in [0,1], ``[B, C, H, W]``.

        Raises:
            UserError: If the checkpoint is missing, unreadable or of another architecture.
        """
        import torch

        from drs.checkpoints import build_model_of, load_weights

        config = self.config()
        model = build_model_of(config)
        load_weights(model, self.path / "checkpoint.safetensors", config.model.name)
        return model.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def run_folder(config: TrainConfig) -> RunFolder:
    """Return the folder of the run that a config describes, which need not exist yet."""
    return RunFolder(study_folder(config.results_dir, config.study) / "runs" / run_id(config))


def study_folder(results_dir: str, study: str) -> Path:
    """Return ``results/<study>``; ``UserError`` for a name that is not one path component."""
    check_study(study)
    return project_path(results_dir) / study


def iterate_runs(study: Path) -> Iterator[RunFolder]:
    """Yield the run folders of a study, ordered by id."""
    runs = study / "runs"
    if runs.is_dir():
        for path in sorted(runs.iterdir()):
            if path.is_dir() and (path / "status.json").exists():
                yield RunFolder(path)


def finished_runs(study: Path) -> list[RunFolder]:
    """Return the runs that are done.

    Raises:
        UserError: If the study does not exist or has no finished run.
    """
    if not (study / "runs").is_dir():
        others = sorted(path.parent.name for path in study.parent.glob("*/runs")) if study.parent.is_dir() else []
        known = f"studies there: {', '.join(others)}" if others else "there is no study there yet"
        raise UserError(
            f"study={study.name}: no runs under {study}; {known}; train one with scripts/train.py study={study.name}"
        )
    runs = list(iterate_runs(study))
    done = [run for run in runs if run.status().get("state") == "done"]
    if not done:
        states = [str(run.status().get("state")) for run in runs]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "it has no run"
        raise UserError(f"study={study.name}: no finished run under {study} ({counts}); train one first")
    return done


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text)
