"""The optimiser and the learning-rate schedule that a config describes."""

import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from drs.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build SGD, Adam or AdamW over all parameters, in the form that updates each of them in one pass."""
    parameters = list(model.parameters())
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    betas = (config.beta1, config.beta2)
    return kind(parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=True)


def build_schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LRScheduler:
    """Build the learning-rate schedule: constant, cosine to 0, or one linear cycle from 0 to the peak to 0."""

    def factor(step: int) -> float:
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1.0)))
        peak = config.warmup * total_steps
        position = step + 1
        return position / peak if position < peak else max(0.0, (total_steps - step) / (total_steps - peak + 1))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
