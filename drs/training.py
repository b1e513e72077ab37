"""One training, from a typed config to a finished run folder."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from drs.allocator import keep_freed_memory
from drs.checkpoints import build_model_of
from drs.claiming import Claim, ClaimLost, claim
from drs.config import DataConfig, TrainConfig, identity, run_id
from drs.data import LabelledImages, iterate_batches, load_split
from drs.device import choose_device
from drs.errors import DivergedError, Interrupted, UserError
from drs.files import remove_leftovers
from drs.interrupts import deferred_interrupts
from drs.jobs import CLAIM_FILE, ERROR_LOG, TrainingResult, record_failure, result_of, said_before, settled
from drs.keeping import STATE_FILE, Keeper
from drs.losses import ClassificationLoss, build_loss
from drs.optimisation import build_optimizer, build_schedule
from drs.procedures import Procedure, build_procedure
from drs.runs import RunFolder, run_folder
from drs.tracking import open_tracker
from drs.training_progress import FiniteLoss, ProgressBar
from drs.training_state import TrainingState

_Prepared = tuple[torch.device, LabelledImages, LabelledImages]


def train(config: TrainConfig, *, in_sweep: bool = False) -> TrainingResult:
    """Train the model that a config describes, unless its run is settled; go on where an earlier start stopped.

    One process at a time trains a run. SIGINT and SIGTERM let it finish the step, keep its last finished epoch and
    then raise ``Interrupted``; after the last step the run is finished first. A loss that is not finite stops the
    training; the run is recorded as failed with its epoch. Any other error is recorded as well, with its traceback,
    and raised.

    Args:
        config: The training.
        in_sweep: Whether other jobs wait. Then a claim of another machine gets no more than a look, and data, device
            or a batch size that cannot be used are recorded too; otherwise they are raised with nothing written.

    Raises:
        ClaimedElsewhere: If another process is at work on the run.
        UserError: For data, a device or a batch size that cannot be used, or a folder that cannot be written.
    """
    began = time.monotonic()
    folder = run_folder(config)
    if (result := settled(config)) is not None:
        return result
    prepared = None if in_sweep else _prepare(config)
    try:
        with claim(folder.path / CLAIM_FILE, f"run {folder.run_id}", watch=not in_sweep) as held:
            # Another process may have finished it since the first look.
            if (result := settled(config)) is not None:
                return result
            return _train_claimed(config, folder, held, prepared, began)
    except ClaimLost as error:
        return result_of(config, "elsewhere", str(error), began)


def _train_claimed(
    config: TrainConfig, folder: RunFolder, held: Claim, prepared: _Prepared | None, began: float
) -> TrainingResult:
    try:
        remove_leftovers(folder.path)
        if said := said_before(folder):
            print(f"run {folder.run_id}: {said}", flush=True)
        device, training, validation = prepared or _prepare(config)
        held.check()
        folder.write_config(config)
        # What W&B is told comes last, so that a server that does not answer keeps no result from being written.
        with (
            open_tracker(config.tracking, folder.run_id, identity(config), folder.path.parent.parent) as tracker,
            deferred_interrupts() as interrupts,
        ):
            # Not before interrupts are deferred: one in between would leave a run that says it is running.
            folder.write_status(state="running", started=time.time(), epochs=config.epochs)
            keeper = Keeper(folder, held, interrupts, config.save_seconds)
            try:
                model, rows = fit(
                    config, training, validation, device, progress=config.progress, on_epoch=tracker.log, keeper=keeper
                )
            except Interrupted:
                _keep_interrupted(config, keeper, began)
                raise
            result = _finish(config, keeper, model, rows, device, began)
        interrupts.check()  # one that came after the last step; other jobs may wait
        return result
    except DivergedError as error:
        held.check()
        folder.write_status(
            state="failed", reason="diverged", epoch=error.epoch, step=error.step, detail=str(error), **_span(began, [])
        )
        _clear(folder)
        return result_of(config, "diverged", str(error), began)
    except ClaimLost:
        raise
    except Exception as error:
        record_failure(folder, held, error)
        raise


def _finish(
    config: TrainConfig,
    keeper: Keeper,
    model: nn.Module,
    rows: list[dict[str, float]],
    device: torch.device,
    began: float,
) -> TrainingResult:
    """Write what a finished training leaves; the status, which says that it is all there, comes last."""
    folder = keeper.folder
    keeper.claim.check()
    folder.write_metrics(rows)
    folder.save_weights(model, config.model.name)
    seconds = sum(row["seconds"] for row in rows)
    keeper.claim.check()
    folder.write_status(
        state="done", **_span(began, rows[: keeper.resumed]), train_seconds=seconds, epochs=config.epochs,
        device=device.type, torch=torch.__version__, val_accuracy=rows[-1]["val_accuracy"],
        files=folder.describe_files(),
    )  # fmt: skip
    _clear(folder)
    return result_of(config, "done", f"{seconds:.1f} s", began)


def _keep_interrupted(config: TrainConfig, keeper: Keeper, began: float) -> None:
    """Save what an interrupted training has finished; what stands in the way of that does not stop the interrupt."""
    try:
        keeper.save()
        epoch = len(keeper.snapshot.rows) if keeper.snapshot else 0
        keeper.folder.write_status(state="interrupted", epoch=epoch, epochs=config.epochs, **_span(began, []))
    except (ClaimLost, UserError) as error:
        print(f"run {keeper.folder.run_id}: its last epochs are not kept: {error}", file=sys.stderr, flush=True)


def _span(began: float, earlier: list[dict[str, float]]) -> dict[str, float]:
    """Return when a training ended by the clock, and a start that is as long before as it has been at work.

    Args:
        began: When this start began, in ``time.monotonic`` seconds: the clock may jump.
        earlier: The metrics of epochs of earlier starts.
    """
    now = time.time()
    return {"started": now - (time.monotonic() - began) - sum(row["seconds"] for row in earlier), "finished": now}


def _clear(folder: RunFolder) -> None:
    """Delete what only a training that is not settled needs."""
    for name in (STATE_FILE, ERROR_LOG):
        (folder.path / name).unlink(missing_ok=True)


def _prepare(config: TrainConfig) -> _Prepared:
    """Return device, training and validation images; ``UserError`` where they or the model do not fit the config."""
    device = choose_device(config.device)
    training, validation = load_split(config.data, device)
    if len(training) < config.batch_size:
        raise UserError(f"batch_size={config.batch_size}: must be at most the {len(training)} training samples")
    with torch.device("meta"):
        build_model_of(config)  # an architecture that cannot take the images says so before anything is written
    return device, training, validation


def fit(
    config: TrainConfig,
    training: LabelledImages,
    validation: LabelledImages,
    device: torch.device,
    *,
    progress: bool = False,
    on_epoch: Callable[[dict[str, float], int], None] | None = None,
    keeper: Keeper | None = None,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train and return the model in eval mode and a row of metrics per epoch.

    The seed decides initialisation, order, augmentation, input noise and inner attacks; on a CPU with the same number
    of threads the result repeats bit for bit, also where ``keeper`` lets it go on from the end of an epoch. Sets the
    global seed of torch.

    Raises:
        DivergedError: At the first loss that is not finite.
        Interrupted: After a step, if ``keeper`` was asked to end; and what else it raises.
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
    generators = {"order": order, "noise": noise, **procedure.generators()}
    state = TrainingState(run_id(config), model, optimizers, schedules, generators)
    rows = keeper.begin(state) if keeper is not None else []
    with ProgressBar(config, steps, enabled=progress, finished=len(rows)) as bar:
        for epoch in range(len(rows) + 1, config.epochs + 1):
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
                if keeper is not None:
                    keeper.step()
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
            if keeper is not None:
                keeper.epoch(state, rows)
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
        optimizer.zero_grad(set_to_none=True)
        if extra is None:
            value = loss.backpropagate(logits, labels, phase)
        else:
            value = loss(logits, labels, phase) + extra
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
