"""The dataclasses of the configs: what a training and an evaluation are made of. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any

from drs.suite_config import SuiteConfig


@dataclass
class DataConfig:
    """A data set: what it holds, how it is normalised, augmented and split, and where to look for it."""

    name: str
    num_classes: int
    channels: int
    size: int
    mean: list[float]
    std: list[float]
    validation: int
    train_samples: int | None = None
    augment: str = "none"
    padding: int = 4
    root: str | None = None
    cache: str = "data"


@dataclass
class ModelConfig:
    """An architecture of ``drs.models`` and its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class CrossEntropyConfig:
    """See ``drs.losses.CrossEntropyLoss``."""

    name: str


@dataclass
class DRSoftmaxConfig:
    """See ``drs.losses.DRSoftmaxLoss``."""

    name: str
    weight: float
    ce_weight: float = 1.0
    space: str = "log_softmax"
    reduction: str = "sum"
    center: str = "non_label"


@dataclass
class LabelSmoothingConfig:
    """See ``drs.losses.LabelSmoothingLoss``."""

    name: str
    smoothing: float


@dataclass
class GuidedComplementEntropyConfig:
    """See ``drs.losses.GuidedComplementEntropyLoss``."""

    name: str
    alpha: float


@dataclass
class ComplementObjectiveConfig:
    """See ``drs.losses.ComplementObjectiveLoss``."""

    name: str


@dataclass
class LogitSqueezingConfig:
    """See ``drs.losses.LogitSqueezingLoss``."""

    name: str
    weight: float
    noise_std: float = 0.0


@dataclass
class ConfidencePenaltyConfig:
    """See ``drs.losses.ConfidencePenaltyLoss``."""

    name: str
    weight: float


LOSS_SCHEMAS: dict[str, type] = {
    "ce": CrossEntropyConfig,
    "dr_softmax": DRSoftmaxConfig,
    "label_smoothing": LabelSmoothingConfig,
    "gce": GuidedComplementEntropyConfig,
    "cot": ComplementObjectiveConfig,
    "logit_squeezing": LogitSqueezingConfig,
    "confidence_penalty": ConfidencePenaltyConfig,
}


@dataclass
class StandardConfig:
    """Standard training."""

    name: str = "standard"


@dataclass
class AdversarialConfig:
    """See ``drs.procedures.AdversarialTraining``; epsilon in pixel units, a number once the config is converted."""

    name: str
    epsilon: Any
    steps: int = 7
    relative_step_size: float = 0.25
    random_start: bool = True


@dataclass
class TradesConfig:
    """See ``drs.procedures.Trades``; epsilon in pixel units, a number once the config is converted."""

    name: str
    epsilon: Any
    steps: int = 7
    relative_step_size: float = 0.25
    beta: float = 6.0


PROCEDURE_SCHEMAS: dict[str, type] = {
    "standard": StandardConfig,
    "adversarial": AdversarialConfig,
    "trades": TradesConfig,
}


@dataclass
class OptimConfig:
    """An optimiser and its learning-rate schedule, stepped once per optimisation step."""

    name: str
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    schedule: str = "one_cycle"
    warmup: float = 0.2


@dataclass
class TrackingConfig:
    """Where metrics go besides ``metrics.csv``."""

    name: str
    project: str = "distribution-restrained-softmax"
    mode: str = "offline"


@dataclass
class TrainConfig:
    """One training. What decides its result is in ``identity``; the rest is where and how it runs."""

    data: DataConfig
    model: ModelConfig
    loss: Any
    optim: OptimConfig
    tracking: TrackingConfig
    epochs: int
    batch_size: int
    seed: int
    study: str
    procedure: Any = field(default_factory=StandardConfig)
    precision: str = "float32"
    compile: bool = False
    device: str = "auto"
    results_dir: str = "results"
    progress: bool = True
    save_seconds: float = 5.0
    fail_fast: bool = False
    grid: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class EvaluateConfig:
    """One evaluation of every finished run of a study."""

    study: str
    suite: SuiteConfig
    tracking: TrackingConfig
    device: str = "auto"
    results_dir: str = "results"
    progress: bool = True
    timing: bool = True
    report: bool = True
    workers: int | None = None
    fail_fast: bool = False
    grid: list[dict[str, Any]] = field(default_factory=list)
