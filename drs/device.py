"""Which device a config means."""

import torch

from drs.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` names.

    Raises:
        UserError: If this machine lacks it; nothing else is taken in its place.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device={name}: this machine has {count} CUDA devices; use device=cpu or device=auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={name}: this machine has no MPS device; use device=cpu or device=auto")
    return device
