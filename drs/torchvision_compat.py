"""Import torchvision beside a CPU build of torch.

PyPI's torchvision for Linux is built against CUDA torch. Beside a CPU build of torch its compiled operators do not
load, and ``import torchvision`` stops with ``operator torchvision::nms does not exist``, although data sets,
transforms and classification models use no compiled operator. Declaring the two operators that torchvision
registers shapes for lets the import pass; calling one still fails, as it should. Where torchvision loads by itself
nothing is done.
"""

from types import ModuleType

import torch

from drs.errors import UserError


class NoTorchvision(UserError):
    """torchvision is not installed, as on a machine that brings torch alone."""


def import_torchvision() -> ModuleType:
    """Return the ``torchvision`` module with ``datasets`` and ``models`` loaded.

    Raises:
        NoTorchvision: If it is not installed.
    """
    try:
        import torchvision
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise NoTorchvision(
            "torchvision is not installed: models resnet18 and vgg16_bn, and data from its files or its download, "
            "need it; nothing else does"
        ) from None
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        _declare_operators()
        import torchvision
    import torchvision.datasets
    import torchvision.models

    module: ModuleType = torchvision
    return module


def _declare_operators() -> None:
    import sys

    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # The declarations last as long as the library object.
    _declare_operators.library = library  # type: ignore[attr-defined]
