"""What is watched while a model trains: whether the loss is finite, and how far the training is."""

import sys

import torch
from torch import Tensor
from tqdm import tqdm

from drs.config import TrainConfig, run_id
from drs.errors import DivergedError
from drs.jobs import short_title

CHECK_EVERY = {"cpu": 1}
"""After how many steps the loss is looked at; on an accelerator each look waits for the device."""
CHECK_EVERY_DEFAULT = 25


class FiniteLoss:
    """The losses of one epoch, kept on the device and looked at every so often."""

    def __init__(self, epoch: int, steps: int, device: torch.device) -> None:
        self.epoch = epoch
        self.values = torch.zeros(steps, device=device)
        self.count = 0
        self.every = CHECK_EVERY.get(device.type, CHECK_EVERY_DEFAULT)

    def record(self, value: Tensor) -> None:
        """Keep the loss of the next step, and look at the losses if it is time."""
        self.values[self.count] = value
        self.count += 1
        if self.count % self.every == 0:
            self.check()

    def check(self) -> None:
        """Raise ``DivergedError`` at the first of the recent losses that is not finite."""
        start = max(0, self.count - self.every)
        recent = self.values[start : self.count]
        finite = torch.isfinite(recent)
        if not bool(finite.all()):
            step = int((~finite).nonzero()[0, 0])
            raise DivergedError(self.epoch, start + step + 1, float(recent[step]))

    def mean(self) -> float:
        """Return the mean of the losses so far."""
        return float(self.values[: self.count].double().mean())

    def latest(self) -> float:
        """Return the last loss."""
        return float(self.values[self.count - 1])


class ProgressBar:
    """Loss, accuracy and time left; a bar in a terminal, one line at the end elsewhere."""

    def __init__(self, config: TrainConfig, steps: int, *, enabled: bool, finished: int = 0) -> None:
        self.title = short_title(config)
        self.enabled = enabled
        self.terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(
            total=steps * config.epochs, initial=steps * finished, desc=self.title, leave=False,
            disable=not self.terminal, mininterval=0.2, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip
        self.run_id = run_id(config)
        self.epochs = config.epochs
        self.accuracy = ""

    def __enter__(self) -> "ProgressBar":
        return self

    def step(self, epoch: int, guard: FiniteLoss) -> None:
        """Move the bar by a step."""
        if self.terminal:
            if guard.count % CHECK_EVERY_DEFAULT == 0 or guard.count == len(guard.values):
                self.bar.set_postfix_str(
                    f"epoch {epoch}/{self.epochs} loss {guard.latest():.3f}{self.accuracy}", refresh=False
                )
            self.bar.update()

    def epoch(self, row: dict[str, float]) -> None:
        """Take note of the metrics of a finished epoch."""
        self.accuracy = f" val acc {row['val_accuracy']:.1%}"
        self.last = row

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.enabled and hasattr(self, "last"):
            row = self.last
            print(
                f"{self.title}: epoch {int(row['epoch'])}/{self.epochs}, loss {row['train_loss']:.4f}, "
                f"train accuracy {row['train_accuracy']:.2%}, validation accuracy {row['val_accuracy']:.2%} "
                f"({self.run_id})",
                flush=True,
            )
