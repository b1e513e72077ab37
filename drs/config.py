"""The schema of every config: types, ranges, and the identity of a run. Imports no torch.

YAML carries values and dataclasses carry the schema. An entrypoint converts its composed config once, with
``train_config`` or ``evaluate_config``, and passes the typed object on.
"""

import copy
import difflib
import functools
import hashlib
import json
from dataclasses import MISSING, Field, asdict, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from drs.attack_config import AttackConfig, SanityConfig, attack_schema
from drs.config_checks import check_device_name, check_study, check_tracking, check_train, require
from drs.errors import UserError
from drs.plain_yaml import is_plain
from drs.schema import (
    LOSS_SCHEMAS,
    PROCEDURE_SCHEMAS,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    StandardConfig,
    TrackingConfig,
    TrainConfig,
)
from drs.suite_config import SuiteConfig, check_suite, parse_epsilon

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def typed(schema: type, section: Any, where: str = "") -> Any:
    """Convert one section of a composed config to its dataclass.

    Args:
        schema: The dataclass.
        section: A mapping of plain values.
        where: The section's key with a trailing dot, for messages.

    Raises:
        UserError: For an unknown or missing key, or a value of the wrong type, naming key and value.
    """
    if not isinstance(section, dict):
        raise UserError(f"{where.rstrip('.')}={section!r}: a mapping is required")
    known = [item.name for item in fields(schema)]
    for key in section:
        if key not in known:
            raise UserError(unknown_key(f"{where}{key}", [f"{where}{name}" for name in known]))
    for item in fields(schema):
        if item.name not in section and item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"{where}{item.name} is missing; the config needs a value for it")
    if all(_fits(item, section[item.name]) for item in fields(schema) if item.name in section):
        return schema(**copy.deepcopy(section))
    # Anything else is a value to convert, such as 1 for a float, or a mistake to name.
    for key, value in section.items():
        try:
            OmegaConf.merge(OmegaConf.structured(schema), {key: value})
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{where}{key}={value}: {reason}") from None
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), section))


_EXACT: dict[object, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    float: (float,),
    bool: (bool,),
    str | None: (str, type(None)),
    int | None: (int, type(None)),
}


def _fits(item: Field[Any], value: object) -> bool:
    """Return whether a value is of its field's type as it is, so that OmegaConf, which is slow, would keep it."""
    if item.type == list[float]:
        return type(value) is list and all(type(number) is float for number in value)
    if item.type == dict[str, Any]:
        return type(value) is dict and is_plain(value)
    if item.type == list[dict[str, Any]]:
        return type(value) is list and all(type(part) is dict and is_plain(part) for part in value)
    kinds = _EXACT.get(item.type)
    return is_plain(value) if item.type is Any else kinds is not None and type(value) in kinds and is_plain(value)


def unknown_key(key: str, known: list[str]) -> str:
    """Return the one-line message for a misspelled key, with the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown key '{key}'; {hint}known here: {', '.join(sorted(known))}"


def plain_config(config: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain values, without Hydra's own section; ``UserError`` if it cannot be resolved."""
    try:
        # Hydra's own section, there when a sweep is planned, holds values that only a running job has.
        ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        plain = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is missing; the config needs a value for it") from None
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def train_config(config: DictConfig) -> TrainConfig:
    """Convert and check the composed config of ``scripts/train.py``.

    Raises:
        UserError: Naming the key, its value and what is allowed.
    """
    return plain_train_config(plain_config(config))


def plain_train_config(plain: dict[str, Any]) -> TrainConfig:
    """Convert and check a training's config of plain values, as ``train_config`` does; ``plain`` stays as it is."""
    plain = dict(plain)
    plain.pop("suite", None)  # belongs to the evaluation of the same experiment
    sections = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "tracking": TrackingConfig}
    for key, schema in sections.items():
        plain[key] = typed(schema, plain.get(key), f"{key}.")
    loss = plain.get("loss") or {}
    name = loss.get("name") if isinstance(loss, dict) else None
    if name not in LOSS_SCHEMAS:
        raise UserError(f"loss.name={name}: unknown; it is one of {', '.join(LOSS_SCHEMAS)}")
    plain["loss"] = typed(LOSS_SCHEMAS[name], loss, "loss.")
    plain["procedure"] = _procedure(plain.get("procedure", {"name": "standard"}))
    nested = {key: plain.pop(key) for key in [*sections, "loss", "procedure"]}
    # The nested sections are converted already; empty ones stand in while the flat keys are checked.
    flat = typed(_flat(TrainConfig, frozenset(nested)), plain)
    result = TrainConfig(**nested, **{item.name: getattr(flat, item.name) for item in fields(flat)})
    check_train(result)
    return result


def _procedure(section: Any) -> Any:
    name = section.get("name") if isinstance(section, dict) else section
    if name not in PROCEDURE_SCHEMAS:
        raise UserError(f"procedure.name={name}: unknown; it is one of {', '.join(PROCEDURE_SCHEMAS)}")
    result = typed(PROCEDURE_SCHEMAS[name], section, "procedure.")
    if hasattr(result, "epsilon"):
        result.epsilon = parse_epsilon(result.epsilon, "linf", "procedure.epsilon").value
    return result


def evaluate_config(config: DictConfig) -> EvaluateConfig:
    """Convert and check the composed config of ``scripts/evaluate.py``.

    Raises:
        UserError: Naming the key, its value and what is allowed.
    """
    plain = plain_config(config)
    suite = plain.get("suite")
    if not isinstance(suite, dict):
        raise UserError(f"suite={suite!r}: name one of the files in configs/suite, such as suite=paper")
    attacks: dict[str, AttackConfig] = {}
    for name, section in (suite.get("attacks") or {}).items():
        attacks[name] = typed(attack_schema(name, section), section, f"suite.attacks.{name}.")
    sanity = suite.get("sanity")
    parts: dict[str, Any] = {
        "attacks": attacks,
        "sanity": None if sanity is None else typed(SanityConfig, sanity, "suite.sanity."),
    }
    flat_suite = typed(
        _flat(SuiteConfig, frozenset(parts)), {k: v for k, v in suite.items() if k not in parts}, "suite."
    )
    nested: dict[str, Any] = {
        "suite": SuiteConfig(**parts, **{item.name: getattr(flat_suite, item.name) for item in fields(flat_suite)}),
        "tracking": typed(TrackingConfig, plain.get("tracking"), "tracking."),
    }
    flat = typed(_flat(EvaluateConfig, frozenset(nested)), {k: v for k, v in plain.items() if k not in nested})
    result = EvaluateConfig(**nested, **{item.name: getattr(flat, item.name) for item in fields(flat)})
    check_study(result.study)
    check_device_name(result.device)
    check_tracking(result.tracking)
    check_suite(result.suite)
    require(result.workers is None or result.workers >= 1, "workers", result.workers, "null or at least 1")
    return result


@functools.cache
def _flat(schema: type, nested: frozenset[str]) -> type:
    """Return ``schema`` without the keys that are converted on their own."""
    kept = []
    for item in fields(schema):
        if item.name not in nested:
            if item.default_factory is not MISSING:
                kept.append((item.name, item.type, field(default_factory=item.default_factory)))
            elif item.default is not MISSING:
                kept.append((item.name, item.type, field(default=item.default)))
            else:
                kept.append((item.name, item.type, field()))
    return make_dataclass(schema.__name__, kept)


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return what decides the result of a training: data, model, loss, optimisation and seed.

    Device, paths, logging, compilation and the study's name are left out: they do not belong to the experiment.
    """
    data = asdict(config.data)
    for key in ("root", "cache"):
        del data[key]
    # Standard training is what a run without a procedure means, so it does not enter a run's id.
    standard = isinstance(config.procedure, StandardConfig)
    return {
        **({} if standard else {"procedure": asdict(config.procedure)}),
        "data": data,
        "model": asdict(config.model),
        "loss": asdict(config.loss),
        "optim": asdict(config.optim),
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "seed": config.seed,
    }


def fingerprint(content: Any, length: int = 12) -> str:
    """Return the first hex digits of the SHA-256 of ``content`` as canonical JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


def run_id(config: TrainConfig) -> str:
    """Return the 12 hex digits that name a run: a hash of its ``identity``."""
    return fingerprint(identity(config))


def loss_weight(loss: Any) -> float:
    """Return the number that a loss is swept over (weight, smoothing or alpha), 0 where it has none."""
    for key in ("weight", "smoothing", "alpha"):
        if hasattr(loss, key):
            return float(getattr(loss, key))
    return 0.0


def procedure_name(config: TrainConfig) -> str:
    """Return ``standard``, ``adversarial`` or ``trades``."""
    return str(config.procedure.name)


def loss_label(config: TrainConfig) -> str:
    """Return the name under which tables list a loss and the procedure that it was trained with.

    The loss's own name for standard training; the procedure's for cross-entropy; both, joined by a plus, otherwise.
    """
    loss, procedure = str(config.loss.name), procedure_name(config)
    if procedure == "standard":
        return loss
    return procedure if loss == "ce" else f"{procedure}+{loss}"


def project_path(path: str) -> Path:
    """Resolve a path of a config: absolute ones stay, others start at the project's folder."""
    return (PROJECT_ROOT / path).resolve()
