"""The ranges of every config value. Imports no torch."""

import math
import re
from typing import Any

from drs.data_cache import DATASETS
from drs.errors import UserError
from drs.schema import DataConfig, DRSoftmaxConfig, StandardConfig, TrackingConfig, TrainConfig

RESERVED_STUDIES = ("reference", "bench")
STUDY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise ``UserError`` unless ``condition``: the key, its value and what is allowed."""
    if not condition:
        raise UserError(f"{key}={value}: must be {allowed}")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, key, value, f"one of {', '.join(allowed)}")


def check_study(study: str) -> None:
    """Raise ``UserError`` unless ``study`` is one safe path component that does not belong to the project."""
    require(
        bool(STUDY_PATTERN.fullmatch(study)) and study not in RESERVED_STUDIES,
        "study",
        study,
        f"one path component of letters, digits, '.', '_' and '-', and not {' or '.join(RESERVED_STUDIES)}",
    )


def check_device_name(device: str) -> None:
    """Raise ``UserError`` unless ``device`` reads like auto, cpu, cuda, cuda:N or mps."""
    require(bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device)), "device", device, "auto, cpu, cuda, cuda:N or mps")


def check_tracking(tracking: TrackingConfig) -> None:
    """Raise ``UserError`` for an unknown tracker or mode."""
    one_of("tracking.name", tracking.name, ("none", "wandb"))
    one_of("tracking.mode", tracking.mode, ("offline", "online"))


def check_train(config: TrainConfig) -> None:
    """Raise ``UserError`` for a value out of range, naming its key and what is allowed."""
    check_study(config.study)
    check_device_name(config.device)
    check_tracking(config.tracking)
    require(config.epochs >= 1, "epochs", config.epochs, "at least 1")
    require(config.batch_size >= 2, "batch_size", config.batch_size, "at least 2 (batch normalisation needs it)")
    require(config.save_seconds >= 0, "save_seconds", config.save_seconds, "at least 0")
    require(0 <= config.seed < 2**32, "seed", config.seed, "between 0 and 4294967295")
    one_of("precision", config.precision, ("float32", "bfloat16"))
    one_of("data.augment", config.data.augment, ("none", "crop", "crop_flip"))
    require(config.data.validation >= 0, "data.validation", config.data.validation, "at least 0")
    require(config.data.padding >= 0, "data.padding", config.data.padding, "at least 0")
    samples = config.data.train_samples
    require(
        samples is None or samples >= config.batch_size, "data.train_samples", samples, "null or at least batch_size"
    )
    optim = config.optim
    one_of("optim.name", optim.name, ("sgd", "adam", "adamw"))
    one_of("optim.schedule", optim.schedule, ("constant", "cosine", "one_cycle"))
    require(
        math.isfinite(optim.learning_rate) and optim.learning_rate > 0,
        "optim.learning_rate",
        optim.learning_rate,
        "a finite number above 0",
    )
    require(
        math.isfinite(optim.weight_decay) and optim.weight_decay >= 0,
        "optim.weight_decay",
        optim.weight_decay,
        "a finite number, at least 0",
    )
    require(0 <= optim.momentum < 1, "optim.momentum", optim.momentum, "at least 0 and below 1")
    require(not optim.nesterov or optim.momentum > 0, "optim.nesterov", optim.nesterov, "false where momentum is 0")
    require(0 < optim.warmup < 1, "optim.warmup", optim.warmup, "between 0 and 1, exclusive")
    for key in ("beta1", "beta2"):
        require(0 <= getattr(optim, key) < 1, f"optim.{key}", getattr(optim, key), "at least 0 and below 1")
    _check_procedure(config.procedure)
    _check_data(config.data)
    loss = config.loss
    for key in ("weight", "ce_weight", "noise_std"):
        if hasattr(loss, key):
            value = getattr(loss, key)
            require(math.isfinite(value) and value >= 0, f"loss.{key}", value, "a finite number, at least 0")
    if hasattr(loss, "smoothing"):
        require(0 <= loss.smoothing < 1, "loss.smoothing", loss.smoothing, "at least 0 and below 1")
    if hasattr(loss, "alpha"):
        require(math.isfinite(loss.alpha) and loss.alpha > 0, "loss.alpha", loss.alpha, "above 0")
    if isinstance(loss, DRSoftmaxConfig):
        one_of("loss.space", loss.space, ("log_softmax", "softmax", "logits"))
        one_of("loss.reduction", loss.reduction, ("sum", "mean"))
        one_of("loss.center", loss.center, ("non_label", "all_classes"))


def _check_procedure(procedure: Any) -> None:
    if isinstance(procedure, StandardConfig):
        return
    require(procedure.steps >= 1, "procedure.steps", procedure.steps, "at least 1")
    size = procedure.relative_step_size
    require(math.isfinite(size) and size > 0, "procedure.relative_step_size", size, "above 0")
    beta = getattr(procedure, "beta", 0.0)
    require(math.isfinite(beta) and beta >= 0, "procedure.beta", beta, "a finite number, at least 0")


def _check_data(data: DataConfig) -> None:
    """Refuse a shape that contradicts the data set, and pixels that could not be normalised."""
    for number in data.mean:
        require(math.isfinite(number), "data.mean", data.mean, "finite numbers")
    for number in data.std:
        require(math.isfinite(number) and number > 0, "data.std", data.std, "finite numbers above 0")
    known = DATASETS.get(data.name)
    if known is None:
        return
    for key, value in (("size", known.size), ("channels", known.channels), ("num_classes", known.num_classes)):
        require(getattr(data, key) == value, f"data.{key}", getattr(data, key), f"{value} for {data.name}")
