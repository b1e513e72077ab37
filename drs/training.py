"""One training, from a typed config to a finished run folder."""

import functools
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from drs.allocator import keep_freed_memory
from drs.checkpoints import build_model_of
from drs.config import DataConfig, OptimConfig, TrainConfig, identity, project_path
from drs.data import LabelledImages, iterate_batches, load_training_split
from drs.device import choose_device
from drs.errors import DivergedError, UserError
from drs.losses import ClassificationLoss, build_loss
from drs.procedures import Procedure, build_procedure
from drs.runs import run_folder
from drs.tracking import open_tracker
from drs.training_progress import FiniteLoss, ProgressBar


@dataclass(frozen=True)
class TrainingResult:
    """What became of one training: ``state`` is done, skipped or failed; ``detail`` says why in one line."""

    run_id: str
    state: str
    detail: str
    folder: str


def train(config: TrainConfig) -> TrainingResult:
    """Train the model that a config describes, unless its run is already done.

    A loss that is not finite stops the training; the run is recorded as failed with its epoch.

    Raises:
        UserError: For data, a device or a batch size that cannot be used.
    """
    folder = run_folder(config)
    status = folder.status()
    if status.get("state") == "done":
        return TrainingResult(folder.run_id, "skipped", "already done", str(folder.path))
    if status.get("reason") == "diverged":
        # The same seed would diverge again: this is the run's result, not an accident.
        return TrainingResult(folder.run_id, "failed", f"diverged before: {status.get('detail')}", str(folder.path))
    device = choose_device(config.device)
    training, validation = load_split(config.data, device)
    if len(training) < config.batch_size:
        raise UserError(f"batch_size={config.batch_size}: must be at most the {len(training)} training samples")
    started = time.time()
    folder.write_config(config)
    folder.write_status(state="running", started=started)
    tracker = open_tracker(config.tracking, config.study, folder.run_id, identity(config), folder.path)
    try:
        model, rows = fit(config, training, validation, device, progress=config.progress, on_epoch=tracker.log)
    except DivergedError as error:
        folder.write_status(
            state="failed", reason="diverged", epoch=error.epoch, step=error.step, started=started, detail=str(error)
        )
        return TrainingResult(folder.run_id, "failed", f"diverged: {error}", str(folder.path))
    finally:
        tracker.finish()
    seconds = sum(row["seconds"] for row in rows)
    folder.write_metrics(rows)
    folder.save_weights(model, config.model.name)
    folder.write_status(
        state="done", started=started, finished=time.time(), train_seconds=seconds, epochs=config.epochs,
        device=device.type, torch=torch.__version__, val_accuracy=rows[-1]["val_accuracy"],
    )  # fmt: skip
    return TrainingResult(folder.run_id, "done", f"{seconds:.1f} s", str(folder.path))


@functools.lru_cache(maxsize=1)
def _cached_split(
    name: str, validation: int, train_samples: int | None, root: str | None, cache: str, device: torch.device
) -> tuple[LabelledImages, LabelledImages]:
    training, held_out = load_training_split(
        name, validation=validation, train_samples=train_samples, root=root, cache=cache, device=device
    )
    return training, held_out


def load_split(config: DataConfig, device: torch.device) -> tuple[LabelledImages, LabelledImages]:
    """Return the training and validation images of a data config; a sweep loads the same data once."""
    return _cached_split(
        config.name, config.validation, config.train_samples, config.root, str(project_path(config.cache)), device
    )


def fit(
    config: TrainConfig,
    training: LabelledImages,
    validation: LabelledImages,
    device: torch.device,
    *,
    progress: bool = False,
    on_epoch: Callable[[dict[str, float], int], None] | None = None,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train and return the model in eval mode and a row of metrics per epoch.

    The seed decides initialisation, order, augmentation, input noise and inner attacks; on a CPU with the same number
    of threads the result repeats bit for bit. Sets the global seed of torch.

    Raises:
        DivergedError: At the first loss that is not finite.
    """
    keep_freed_memory()
    torch.manual_seed(config.seed)
    model = build_model_of(config).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    options = {key: value for key, value in asdict(config.loss).items() if key != "name"}
    loss = build_loss(config.loss.name, **options)
    check_labels(training, config.data)
    loss.validate = False  # the labels have been checked; doing so in each step costs time and, on a GPU, a wait
    steps = len(training) // config.batch_size
    optimizers = [build_optimizer(model, config.optim) for _ in range(loss.phases)]
    schedules = [build_schedule(optimizer, config.optim, steps * config.epochs) for optimizer in optimizers]
    forward = torch.compile(model) if config.compile else model
    order = torch.Generator().manual_seed(config.seed)
    noise = torch.Generator(device).manual_seed(config.seed)
    procedure = build_procedure(config.procedure, config.seed, device)
    rows = []
    with ProgressBar(config, steps, enabled=progress) as bar:
        for epoch in range(1, config.epochs + 1):
            began = time.perf_counter()
            model.train()
            guard = FiniteLoss(epoch, steps, device)
            correct = torch.zeros((), device=device)
            batches = iterate_batches(
                training, config.batch_size, generator=order, augment=config.data.augment,
                padding=config.data.padding, drop_last=True,
            )  # fmt: skip
            for images, labels in batches:
                if loss.noise_std:
                    images = images + loss.noise_std * torch.randn(images.shape, generator=noise, device=device)
                images = images.contiguous(memory_format=torch.channels_last)
                with autocast(device, config.precision):
                    images = procedure.images(model, images, labels)
                value, logits = _step(forward, loss, optimizers, schedules, images, labels, config.precision, procedure)
                guard.record(value)
                correct += (logits.argmax(dim=1) == labels).sum()
                bar.step(epoch, guard)
            guard.check()
            seen = steps * config.batch_size
            val_loss, val_accuracy = measure(model, validation, config.precision)
            row = {
                "epoch": epoch,
                "train_loss": guard.mean(),
                "train_accuracy": float(correct) / seen,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "learning_rate": float(optimizers[0].param_groups[0]["lr"]),
                "seconds": time.perf_counter() - began,
            }
            rows.append(row)
            bar.epoch(row)
            if on_epoch is not None:
                on_epoch(row, epoch)
    return model.eval(), rows


def check_labels(data: LabelledImages, config: DataConfig) -> None:
    """Raise ``UserError`` if a label is not a class of the config."""
    highest = int(data.labels.max())
    if highest >= config.num_classes:
        raise UserError(f"data.num_classes={config.num_classes}: {config.name} has the label {highest}")


def _step(
    forward: Callable[[Tensor], Tensor],
    loss: ClassificationLoss,
    optimizers: list[Optimizer],
    schedules: list[LRScheduler],
    images: Tensor,
    labels: Tensor,
    precision: str,
    procedure: Procedure,
) -> tuple[Tensor, Tensor]:
    """Take one optimisation step per phase of the loss; return the first phase's loss and logits.

    The first phase carries what the procedure adds; all of them see the images that it chose.
    """
    first: tuple[Tensor, Tensor] | None = None
    for phase, (optimizer, schedule) in enumerate(zip(optimizers, schedules, strict=True)):
        with autocast(images.device, precision):
            logits = forward(images)
            extra = procedure.regulariser(forward, logits) if phase == 0 else None
        value = loss(logits, labels, phase)
        if extra is not None:
            value = value + extra
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()
        if first is None:
            first = value.detach(), logits.detach()
    assert first is not None
    return first


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision, ``float32`` or ``bfloat16``."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build SGD, Adam or AdamW over all parameters, in the form that updates each of them in one pass."""
    parameters = list(model.parameters())
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    betas = (config.beta1, config.beta2)
    return kind(parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=True)


def build_schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LRScheduler:
    """Build the learning-rate schedule: constant, cosine to 0, or one linear cycle from 0 to the peak to 0."""

    def factor(step: int) -> float:
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1.0)))
        peak = config.warmup * total_steps
        position = step + 1
        return position / peak if position < peak else max(0.0, (total_steps - step) / (total_steps - peak + 1))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def measure(model: nn.Module, data: LabelledImages, precision: str = "float32") -> tuple[float, float]:
    """Return mean cross-entropy and accuracy in eval mode (NaN for both where ``data`` is empty)."""
    if not len(data):
        return math.nan, math.nan
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for indices in torch.arange(len(data)).split(1000):
        images = data.pixels(indices).contiguous(memory_format=torch.channels_last)
        labels = data.labels[indices.to(data.labels.device)]
        with autocast(images.device, precision):
            logits = model(images)
        total[0] += float(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
        total[1] += float((logits.argmax(dim=1) == labels).sum())
    mean_loss, accuracy = (total / len(data)).tolist()
    return mean_loss, accuracy
