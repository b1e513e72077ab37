"""The folder of one training: written atomically, done only when its status says so.

Importing this does not import torch, so that a run that is done can be skipped, and a study looked at, in no time.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from drs.config import TrainConfig, plain_train_config, project_path, run_id, train_config
from drs.config_checks import check_study
from drs.errors import DamagedFileError, UserError
from drs.files import atomic_write
from drs.integrity import CHECKPOINT, RETRAIN, check_files, describe_files, has_changed, with_checksum
from drs.plain_yaml import read_plain_mapping

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
            DamagedFileError: If the file is not a JSON object with the checksum that it was written with.
        """
        path = self.path / "status.json"
        if not path.exists():
            return {}
        try:
            status = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise DamagedFileError(path, f"not JSON ({reason}); {RETRAIN}") from None
        if not isinstance(status, dict):
            raise DamagedFileError(path, f"a JSON object is required; {RETRAIN}")
        if has_changed(status):
            raise DamagedFileError(path, f"its content has changed since it was written; {RETRAIN}")
        return status

    def write_status(self, **content: Any) -> None:
        """Replace ``status.json``, with its checksum."""
        write_json(self.path / "status.json", with_checksum(content))

    def config(self) -> TrainConfig:
        """Return the run's own config; ``UserError`` where it is missing or does not fit the schema.

        Where the data lies is a matter of the machine: ``DRS_CACHE`` and ``DRS_DATA``, where set, take the place of the
        folders that the run was trained from.
        """
        path = self.path / "config.yaml"
        if not path.exists():
            raise DamagedFileError(path, f"is missing; {RETRAIN}")
        try:
            if "${" in path.read_text():
                # An interpolation could put what this machine's environment holds into a config of elsewhere.
                raise DamagedFileError(path, f"holds an interpolation, but values are what was written; {RETRAIN}")
            plain = read_plain_mapping(path)
            found = train_config(OmegaConf.load(path)) if plain is None else plain_train_config(plain)  # type: ignore[arg-type]
        except DamagedFileError:
            raise
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (OSError, ValueError, AttributeError, RecursionError, YAMLError, OmegaConfBaseException) as error:
            reason = " ".join(str(error).split())[:300]
            raise DamagedFileError(path, f"not a config ({reason}); {RETRAIN}") from None
        cache, root = os.environ.get("DRS_CACHE"), os.environ.get("DRS_DATA")
        data = replace(found.data, cache=cache or found.data.cache, root=root or found.data.root)
        return replace(found, data=data)

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

    def describe_files(self) -> dict[str, dict[str, Any]]:
        """Return size and SHA-256 of the files that a finished training leaves, for its status."""
        return describe_files(self.path)

    def save_weights(self, model: "nn.Module", architecture: str) -> None:
        """Write ``checkpoint.safetensors`` with the architecture's name in its metadata."""
        from drs.checkpoints import save_weights

        save_weights(model, self.path / "checkpoint.safetensors", architecture, self.run_id)

    def load_model(self, device: "torch.device") -> "nn.Module":
        """Return the trained model in eval mode, taking pixels in [0,1], ``[B, C, H, W]``.

        Raises:
            DamagedFileError: If the checkpoint is missing, unreadable or not the one that was written.
            UserError: If it is of another architecture.
        """
        import torch

        from drs.checkpoints import build_model_of, load_weights

        check_files(self.path, self.status().get("files", {}), (CHECKPOINT,))
        config = self.config()
        model = build_model_of(config)
        load_weights(model, self.path / "checkpoint.safetensors", config.model.name)
        return model.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def run_folder(config: TrainConfig) -> RunFolder:
    """Return the folder of the run that a config describes, which need not exist yet."""
    return RunFolder(study_folder(config.results_dir, config.study) / "runs" / run_id(config))


def study_folder(results_dir: str, study: str) -> Path:
    """Return ``results/<study>``.

    The results folder itself may be a link to another disk; a study may not, so that no name leads out of it.

    Raises:
        UserError: For a name that is not one path component, or a study that is a link to somewhere else.
    """
    check_study(study)
    folder = project_path(results_dir) / study
    if folder.is_symlink() and folder.resolve().parent != folder.parent:
        raise UserError(
            f"study={study}: {folder} is a link to {folder.resolve()}, outside of {folder.parent}; name the folder "
            "that it is in as results_dir=FOLDER instead"
        )
    return folder


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
