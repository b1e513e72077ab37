"""What every loss shares: the checks of its input, its precision, and what the training loop needs of it."""

import math

import torch
from torch import Tensor, nn


def check_targets(logits: Tensor, labels: Tensor) -> None:
    """Raise ``ValueError`` unless ``logits`` is ``[B, K]`` with K >= 2 and ``labels`` is ``[B]`` within 0..K-1.

    On an accelerator the check of the values waits for the device.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be [B, K] and labels [B], but they are {list(logits.shape)} and {list(labels.shape)}; "
            "flatten leading dimensions first"
        )
    if logits.shape[1] < 2:
        raise ValueError(f"a classifier needs at least 2 classes, but logits have {logits.shape[1]}")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, but their type is {labels.dtype}")
    if labels.numel():
        low, high = (int(value) for value in torch.aminmax(labels))
        if low < 0 or high >= logits.shape[1]:
            bad = low if low < 0 else high
            raise ValueError(f"label {bad} is outside 0..{logits.shape[1] - 1}")


def full_precision(logits: Tensor) -> Tensor:
    """Return float32 logits; float64 ones stay as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def row_dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product ``[B]`` of the rows of two ``[B, K]`` tensors without a third one."""
    # linalg.vecdot builds the [B, K] product first; a batched matrix product does not.
    return torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).view(-1)


def check_switch(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; it is one of {', '.join(allowed)}")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ``ValueError`` unless ``value`` is finite and between ``low`` and ``high``."""
    if not (math.isfinite(value) and low <= value <= high):
        bound = f"at least {low}" if math.isinf(high) else f"between {low} and {high}"
        raise ValueError(f"{name}={value} must be {bound}")


class ClassificationLoss(nn.Module):
    """What the training loop needs of a loss; ``compute`` is what a subclass defines.

    Attributes:
        adaptive_objectives: What an attacker who knows this loss would climb, keys of
            ``drs.attacks.objectives.FAMILIES``. The default suits a loss that flattens or shrinks logits: the
            margin to each class in turn, and cross-entropy on logits rescaled so that the runner-up stands out.
        phases: How many optimisation steps a batch gets (2 for complement objective training, else 1).
        noise_std: Standard deviation, in pixel units, of Gaussian noise that training adds to the input.
        validate: Whether ``forward`` checks shapes and label values. On an accelerator the check waits for the
            device; a training loop that has checked its data set once may turn it off.
    """

    adaptive_objectives: tuple[str, ...] = ("targeted_margin", "scaled_ce")
    phases: int = 1
    noise_std: float = 0.0
    validate: bool = True

    def forward(self, logits: Tensor, labels: Tensor, phase: int = 0) -> Tensor:
        """Return the scalar loss of logits ``[B, K]`` and labels ``[B]``; ``ValueError`` on bad shapes or labels."""
        if self.validate:
            check_targets(logits, labels)
        logits, labels = full_precision(logits), labels.long()
        if not torch.is_autocast_enabled(logits.device.type):  # entering the context takes as long as a small loss
            return self.compute(logits, labels, phase)
        with torch.autocast(logits.device.type, enabled=False):
            return self.compute(logits, labels, phase)

    def backpropagate(self, logits: Tensor, labels: Tensor, phase: int = 0) -> Tensor:
        """Compute the loss, add its gradient to that of every leaf behind the logits, and return the detached value.

        The same as ``forward`` and then ``backward`` on what it returns; a loss that knows its derivative may take a
        shorter way, on which hooks of the module are not called.
        """
        value: Tensor = self(logits, labels, phase)
        value.backward()
        return value.detach()

    def compute(self, logits: Tensor, labels: Tensor, phase: int) -> Tensor:
        """Return the scalar loss of checked float32 or float64 logits."""
        raise TypeError(f"{type(self).__name__} does not define compute")
