"""Whether the runs that tables take for seeds of one setting differ in their seed alone.

A setting is a data set, an architecture, a loss with its procedure, and the loss's weight. Runs of one are averaged,
paired by seed and counted as replicates, so that what else varies among them would pass for chance.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from drs.config import TrainConfig, identity, loss_label, loss_weight
from drs.errors import UserError
from drs.runs import RunFolder


def check_settings(configs: Mapping[RunFolder, TrainConfig]) -> None:
    """Raise ``UserError`` where two runs of a study have the same setting and differ in more than the seed."""
    first: dict[tuple[object, ...], tuple[RunFolder, dict[str, Any]]] = {}
    for run, config in configs.items():
        setting = config.data.name, config.model.name, loss_label(config), loss_weight(config.loss)
        own = {key: value for key, value in identity(config).items() if key != "seed"}
        other, theirs = first.setdefault(setting, (run, own))
        differing = [f"{key}={_shown(a)} and {_shown(b)}" for key, a, b in _differences(theirs, own)]
        if differing:
            weight = f" {setting[3]:g}" if setting[3] else ""
            raise UserError(
                f"runs {other.run_id} and {run.run_id} would count as seeds of one setting, {setting[0]} {setting[1]} "
                f"{setting[2]}{weight}, but differ in {', '.join(differing)}; a study tells settings apart by data, "
                "model, loss, procedure and the loss's weight alone: move the runs of one into a study of their own, "
                f"{run.path.parent.parent.parent}/OTHER/runs"
            )


def _differences(one: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys that two configs differ in, with both values; None where one has no such key."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            yield from _differences(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif one != other:
        yield prefix, one, other


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
