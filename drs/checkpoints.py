"""The weights of a run: from its config to a model, and between a model and its safetensors file."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from drs.config import TrainConfig
from drs.errors import DamagedFileError, UserError
from drs.files import atomic_write
from drs.integrity import RETRAIN
from drs.models import build_model


def build_model_of(config: TrainConfig) -> nn.Module:
    """Build the untrained model that a config describes; its first layer normalises pixels."""
    data = config.data
    return build_model(
        config.model.name,
        num_classes=data.num_classes,
        channels=data.channels,
        size=data.size,
        mean=data.mean,
        std=data.std,
        **config.model.options,
    )


def load_weights(model: nn.Module, path: Path, architecture: str) -> None:
    """Load a safetensors checkpoint into ``model``.

    Raises:
        DamagedFileError: If the file is missing or unreadable.
        UserError: If it does not hold just the tensors that ``model`` needs.
    """
    if not path.exists():
        raise DamagedFileError(path, f"is missing; {RETRAIN}")
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("architecture", "an unnamed architecture")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(path, f"not a whole safetensors file ({error}); {RETRAIN}") from None
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != given:
        different = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise UserError(
            f"{path}: holds the weights of {found}, but the config describes {architecture}; "
            f"{len(different)} tensors differ, the first is {different[0]}"
        )
    model.load_state_dict(state)


def save_weights(model: nn.Module, path: Path, architecture: str, run_id: str) -> None:
    """Write the weights of ``model`` to a safetensors file, with architecture and run id in its metadata.

    Raises:
        UserError: If the file cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # Written here and not by safetensors, whose errors do not tell a full disk from a damaged file.
    with atomic_write(path) as temporary:
        temporary.write_bytes(serialised(tensors, {"architecture": architecture, "run_id": run_id}))


def serialised(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file; the same tensors and metadata always give the same bytes."""
    content = save(tensors, metadata=metadata)
    # The library writes metadata in an order that differs from call to call.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
