"""Architectures; each takes pixels in [0,1] and normalises them in its first layer."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drs.errors import UserError
from drs.torchvision_compat import import_torchvision


class Normalize(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel.

    Args:
        mean: One value per channel, in pixel units.
        std: One value per channel, in pixel units, above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
            raise UserError(
                f"data.mean={list(mean)}, data.std={list(std)}: must be as many finite numbers each, and std above 0"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised images ``[B, C, H, W]``."""
        return (images - self.mean) / self.std


def mlp(num_classes: int, channels: int, size: int, width: int = 256) -> nn.Module:
    """Two hidden layers of ``width`` ReLU units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size * size, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, num_classes),
    )


def lenet(num_classes: int, channels: int, size: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling; images below 32 pixels are padded by 2, as there.

    The ReLU comes after the pooling, with which it commutes, and so has a quarter of the values to go through.
    """
    padding = 2 if size < 32 else 0
    side = ((size + 2 * padding - 4) // 2 - 4) // 2
    if side < 1:
        raise UserError(f"model=lenet: needs images of at least 12 pixels, but data.size={size}; use model=mlp")
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=padding),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(6, 16, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * side * side, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


def _conv(inputs: int, outputs: int, *, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
    # The largest of some values that are cut off at 0 is their largest, cut off at 0: the cheaper order.
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []), nn.ReLU())


def smallcnn(num_classes: int, channels: int, size: int, width: int = 16) -> nn.Module:
    """Five 3x3 convolutions with batch normalisation, for CIFAR on a CPU."""
    if size < 8:
        raise UserError(f"model=smallcnn: needs images of at least 8 pixels, but data.size={size}; use model=mlp")
    return nn.Sequential(
        _conv(channels, width, pool=True),
        _conv(width, 2 * width, pool=True),
        _conv(2 * width, 2 * width),
        _conv(2 * width, 4 * width, pool=True),
        _conv(4 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features)


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return self.factor * logits


def resnet9(num_classes: int, channels: int, size: int, width: int = 64, logit_scale: float = 0.125) -> nn.Module:
    """The nine-layer network of the DAWNBench fast-training entries (Page 2018, "How to Train Your ResNet").

    ``logit_scale`` is theirs, 1/8: it keeps the first logits small.
    """
    if size < 8:
        raise UserError(f"model=resnet9: needs images of at least 8 pixels, but data.size={size}; use model=mlp")
    return nn.Sequential(
        _conv(channels, width),
        _conv(width, 2 * width, pool=True),
        _Residual(2 * width),
        _conv(2 * width, 4 * width, pool=True),
        _conv(4 * width, 8 * width, pool=True),
        _Residual(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes, bias=False),
        _Scale(logit_scale),
    )


def resnet18(num_classes: int, channels: int, size: int) -> nn.Module:
    """torchvision's ResNet-18 (He et al. 2016) with the CIFAR stem: 3x3 convolution of stride 1, no max-pooling."""
    network: nn.Module = import_torchvision().models.resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def vgg16_bn(num_classes: int, channels: int, size: int) -> nn.Module:
    """torchvision's VGG-16 with batch normalisation (Simonyan and Zisserman 2015), for CIFAR: one linear classifier."""
    if size < 32:
        raise UserError(f"model=vgg16_bn: needs images of at least 32 pixels, but data.size={size}; use model=mlp")
    # Only the features: building the whole would fill 480 MB of ImageNet's classifier to throw them away.
    vgg = import_torchvision().models.vgg
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)
    if channels != 3:
        features[0] = nn.Conv2d(channels, 64, 3, padding=1)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet": lenet,
    "smallcnn": smallcnn,
    "resnet9": resnet9,
    "resnet18": resnet18,
    "vgg16_bn": vgg16_bn,
}


def build_model(
    name: str,
    *,
    num_classes: int,
    channels: int,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    **options: Any,
) -> nn.Module:
    """Build an untrained classifier of pixels in [0,1], ``[B, channels, size, size]``, to logits ``[B, num_classes]``.

    Initialisation draws from torch's global generator.

    Raises:
        UserError: For an unknown name or option, or images too small for the architecture.
    """
    if name not in MODELS:
        raise UserError(f"model.name={name}: unknown; it is one of {', '.join(MODELS)}")
    if len(mean) != channels:
        raise UserError(f"data.mean={list(mean)}: must have a value for each of data.channels={channels}")
    _check_options(name, options)
    network = MODELS[name](num_classes=num_classes, channels=channels, size=size, **options)
    return nn.Sequential(Normalize(mean, std), network)


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Raise ``UserError`` unless each option is one of the architecture's, of its default's type and above 0."""
    parameters = inspect.signature(MODELS[name]).parameters.values()
    defaults = {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}
    for key, value in options.items():
        if key not in defaults:
            known = f"it has {', '.join(defaults)}" if defaults else "it has no options"
            raise UserError(f"model.options.{key}={value}: {name} has no such option; {known}")
        whole = isinstance(defaults[key], int)
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or not 0 < value < math.inf:
            wanted = "a whole number" if whole else "a number"
            raise UserError(f"model.options.{key}={value}: must be {wanted} above 0, such as {defaults[key]}")


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
