"""Finished runs of a made-up study, written as trainings and evaluations write them but without computing anything.

Logits come from one set of random numbers, shifted by the loss's weight and by the seed, so that statistics and
accuracies vary with both; the arrays of a few seeds are shared by all others, which makes thousands of runs cheap.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from drs.array_files import save_arrays
from drs.attacks import is_bounded
from drs.cells import Cell, plan_cells
from drs.checkpoints import build_model_of
from drs.config import PROJECT_ROOT, EvaluateConfig, TrainConfig, evaluate_config, loss_weight
from drs.runs import RunFolder, run_folder
from drs.sweeper import register_plugins

CLEAN_SAMPLES = {"digits": 500, "mnist": 10000}
VARIANTS = 4
"""How many seeds of a setting have arrays of their own."""


def compose_evaluate(*overrides: str) -> EvaluateConfig:
    """Compose the evaluation config with overrides, as the entrypoint does."""
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return evaluate_config(compose("evaluate", list(overrides)))


def write_runs(jobs: list[TrainConfig], evaluation: EvaluateConfig | None = None) -> list[RunFolder]:
    """Write a finished run for each config and, with an evaluation, every cell of its suite.

    Args:
        jobs: What was trained, all in one study.
        evaluation: The suite whose per-sample arrays are wanted; it has no sanity checks.
    """
    configs = {run_folder(job): job for job in jobs}
    with _without_fsync():
        for position, (run, config) in enumerate(configs.items()):
            _write_run(run, config, started=1.7e9 + 20 * position)
        if evaluation is not None:
            arrays = _Arrays(next(iter(configs)).path.parent / ".arrays")
            for run in configs:
                for cell in plan_cells(run, evaluation.suite, configs):
                    arrays.write(cell)
            shutil.rmtree(arrays.folder)
    return list(configs)


@contextmanager
def _without_fsync() -> Iterator[None]:
    """Leave out what makes a file survive a power failure: it is most of the time of writing thousands."""
    with mock.patch("os.fsync"):
        yield


def _write_run(run: RunFolder, config: TrainConfig, started: float) -> None:
    run.write_config(config)
    rows = [
        {"epoch": epoch, "train_loss": 2.0 / epoch, "train_accuracy": 0.9, "val_loss": 2.2 / epoch,
         "val_accuracy": 0.9, "learning_rate": 0.001, "seconds": 1.5 + 0.001 * config.seed}
        for epoch in range(1, config.epochs + 1)
    ]  # fmt: skip
    run.write_metrics(rows)
    torch.manual_seed(config.seed)
    run.save_weights(build_model_of(config), config.model.name)
    seconds = sum(row["seconds"] for row in rows)
    run.write_status(
        state="done", started=started, finished=started + seconds, train_seconds=seconds, epochs=config.epochs,
        device="cpu", torch=torch.__version__, val_accuracy=0.9,
        files=run.describe_files(),
    )  # fmt: skip


class _Arrays:
    """Array files of cells, made once for each setting, attack and variant of the seed, and copied to the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[object, ...], bytes] = {}

    def write(self, cell: Cell) -> None:
        config = cell.train
        key = (config.data.name, config.model.name, config.loss.name, loss_weight(config.loss), cell.path.name,
               config.seed % VARIANTS)  # fmt: skip
        if key not in self.made:
            path = self.folder / "cell.npz"
            save_arrays(path, **_cell_arrays(cell))
            self.made[key] = path.read_bytes()
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        cell.path.write_bytes(self.made[key])


def _cell_arrays(cell: Cell) -> dict[str, np.ndarray]:
    config = cell.train
    n = cell.n or CLEAN_SAMPLES[config.data.name]
    classes = config.data.num_classes
    base = np.random.default_rng(0)  # the same samples for every run
    labels = base.integers(classes, size=CLEAN_SAMPLES[config.data.name])
    logits = base.normal(size=(len(labels), classes)).astype(np.float32)
    own = np.random.default_rng([round(1e6 * loss_weight(config.loss)), config.seed % VARIANTS])
    logits = logits / np.float32(1 + 40 * loss_weight(config.loss)) + own.normal(0, 0.3, logits.shape).astype("float32")
    margin = own.normal(5.0, 2.5) / 4 + own.normal(4.0, 1.5, len(labels))
    logits[np.arange(len(labels)), labels] += margin.astype(np.float32)
    logits, labels = logits[:n], labels[:n]
    arrays = {"indices": np.arange(n, dtype=np.int32), "labels": labels.astype(np.int16)}
    about = {
        "attack": cell.attack, "config": asdict(cell.config) if cell.config is not None else None,
        "objectives": list(cell.objectives), "source": None, "epsilon_label": cell.epsilon.label, "device": "cpu",
        "torch": torch.__version__, "seconds": 0.5,
    }  # fmt: skip
    if cell.config is None:
        arrays |= {"logits": logits, "distance": np.zeros(n)}
    else:
        bound = cell.epsilon.value if is_bounded(cell.config) else 0.4
        strength = 1.0 if cell.attack in ("fgsm", "cw_torchattacks") else 1.4
        attacked = logits + own.normal(0, 0.5, logits.shape).astype(np.float32)
        loss = own.normal(18 * bound * strength, 2.0, n).astype(np.float32)
        attacked[np.arange(n), labels] -= loss
        wrong = logits.argmax(1) != labels
        attacked[wrong] = logits[wrong]
        distance = np.where(wrong, 0.0, bound if is_bounded(cell.config) else own.gamma(4.0, 0.3, n))
        arrays |= {"logits": attacked, "distance": distance, "attacked": np.ones(n, dtype=bool)}
    return arrays | {"about": np.array(json.dumps(about))}
