"""All that decides how a training goes on after an epoch: taken from it, put back into it, and kept in a file.

The file is a safetensors file, whose metadata hold the rest as JSON: nothing in it can be executed.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from drs.checkpoints import serialised
from drs.files import atomic_write

FORMAT = "1"


class StateError(Exception):
    """A state that a training cannot go on from; the message says why in a few words."""


@dataclass(frozen=True)
class Snapshot:
    """A training as it was after an epoch.

    Attributes:
        run_id: The run that it belongs to.
        setting: What else has to be the same for the result to be the same: torch's version and the kind of device.
        rows: The metrics of each epoch so far.
        tensors: Weights, the optimisers' moments and the states of all random generators, on the CPU.
        values: What is left of optimisers and schedules, as JSON has it.
    """

    run_id: str
    setting: dict[str, str]
    rows: list[dict[str, float]]
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class TrainingState:
    """The objects that change while a model trains.

    Args:
        run_id: The run that they belong to.
        model: The model, on its device.
        optimizers: One for each phase of the loss.
        schedules: One for each optimiser.
        generators: The random generators that the training owns, by name; torch's global ones come on top.
    """

    def __init__(
        self,
        run_id: str,
        model: nn.Module,
        optimizers: list[Optimizer],
        schedules: list[LRScheduler],
        generators: dict[str, torch.Generator],
    ) -> None:
        self.run_id = run_id
        self.model = model
        self.optimizers = optimizers
        self.schedules = schedules
        self.generators = generators
        self.device = next(model.parameters()).device
        self.setting = {"torch": torch.__version__, "device": self.device.type}

    def capture(self, rows: list[dict[str, float]]) -> Snapshot:
        """Return a copy of everything; ``rows`` are the metrics of the epochs so far."""
        tensors = {f"model.{name}": _copy(value) for name, value in self.model.state_dict().items()}
        values: dict[str, Any] = {"optimizers": [], "schedules": []}
        for position, (optimizer, schedule) in enumerate(zip(self.optimizers, self.schedules, strict=True)):
            moments: dict[str, dict[str, Any]] = {}
            state = optimizer.state_dict()
            for index, entries in state["state"].items():
                for name, value in entries.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer.{position}.{index}.{name}"] = _copy(value)
                    else:
                        moments.setdefault(str(index), {})[name] = value
            rates = [{key: group[key] for key in ("lr", "initial_lr")} for group in state["param_groups"]]
            values["optimizers"].append({"moments": moments, "groups": rates})
            values["schedules"].append(schedule.state_dict())
        tensors["generator.global"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, generator in self.generators.items():
            tensors[f"generator.{name}"] = generator.get_state()
        # Schedules hold lists that go on changing.
        return Snapshot(self.run_id, self.setting, list(rows), tensors, json.loads(json.dumps(values)))

    def check(self, snapshot: Snapshot) -> None:
        """Raise ``StateError`` unless this training can go on from ``snapshot``, and end as if never interrupted."""
        if snapshot.run_id != self.run_id:
            raise StateError(f"it belongs to run {snapshot.run_id}")
        for key, value in self.setting.items():
            if snapshot.setting.get(key) != value:
                raise StateError(f"it was saved with {key} {snapshot.setting.get(key)}, and here it is {value}")

    def restore(self, snapshot: Snapshot) -> None:
        """Put every object back into the state of ``snapshot``.

        Raises:
            StateError: If it is of another training or another setting; then nothing has changed.
        """
        self.check(snapshot)
        tensors = snapshot.tensors
        weights = {name: tensors[f"model.{name}"] for name in self.model.state_dict()}
        self.model.load_state_dict(weights)
        for position, (optimizer, values) in enumerate(
            zip(self.optimizers, snapshot.values["optimizers"], strict=True)
        ):
            optimizer.load_state_dict(self._optimizer_state(position, optimizer, values, tensors))
        for schedule, values in zip(self.schedules, snapshot.values["schedules"], strict=True):
            schedule.load_state_dict(dict(values))
        torch.set_rng_state(tensors["generator.global"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["generator.cuda"], self.device)
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"generator.{name}"])

    @staticmethod
    def _optimizer_state(
        position: int, optimizer: Optimizer, values: dict[str, Any], tensors: dict[str, Tensor]
    ) -> dict[str, Any]:
        current = optimizer.state_dict()
        groups = [{**now, **then} for now, then in zip(current["param_groups"], values["groups"], strict=True)]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Any]] = {int(index): dict(rest) for index, rest in values["moments"].items()}
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer" and rest.startswith(f"{position}."):
                _, index, name = rest.split(".", 2)
                parameter = parameters[int(index)]
                if value.shape == parameter.shape:
                    # Laid out in memory as the weights are, as the optimiser itself would have made it: another
                    # layout takes another path through the arithmetic.
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                state.setdefault(int(index), {})[name] = value
        return {"state": state, "param_groups": groups}


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot, with a checksum over all of it.

    Raises:
        UserError: If the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "run_id": snapshot.run_id,
        "setting": json.dumps(snapshot.setting, sort_keys=True),
        "rows": json.dumps(snapshot.rows),
        "values": json.dumps(snapshot.values, sort_keys=True),
    }
    content["sha256"] = _checksum(snapshot.tensors, content)
    with atomic_write(path) as temporary:
        temporary.write_bytes(serialised(snapshot.tensors, content))


def load_snapshot(path: Path) -> Snapshot:
    """Read a snapshot.

    Raises:
        StateError: If the file is not whole or not a snapshot.
    """
    try:
        with safe_open(path, framework="pt") as file:
            content = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"it is not a whole safetensors file ({error})") from None
    if content.get("format") != FORMAT:
        raise StateError(f"its format is {content.get('format')}, and {FORMAT} is needed")
    if content.pop("sha256", None) != _checksum(tensors, content):
        raise StateError("its checksum does not fit its content")
    return Snapshot(
        run_id=content["run_id"],
        setting=json.loads(content["setting"]),
        rows=json.loads(content["rows"]),
        tensors=tensors,
        values=json.loads(content["values"]),
    )


def _checksum(tensors: dict[str, Tensor], content: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
