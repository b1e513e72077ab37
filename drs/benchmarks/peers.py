"""Other libraries' gradient steps in the Linf ball, each called as its users call it."""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

STEPS = 40
RELATIVE_STEP_SIZE = 0.1

Perturb = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


def _torchattacks(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    import torchattacks

    attack = torchattacks.PGD(model, eps=epsilon, alpha=RELATIVE_STEP_SIZE * epsilon, steps=STEPS)
    result: Tensor = attack(images, labels)
    return result


def _foolbox(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    attack = foolbox.attacks.LinfPGD(rel_stepsize=RELATIVE_STEP_SIZE, steps=STEPS)
    _, moved, _ = attack(wrapped, images, labels, epsilons=epsilon)
    result: Tensor = moved
    return result


def _art(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    # It is not among the pinned packages; who has it gets the comparison.
    evasion = importlib.import_module("art.attacks.evasion")
    classification = importlib.import_module("art.estimators.classification")
    classes = int(model(images[:1]).shape[1])
    shape = tuple(images.shape[1:])
    wrapped = classification.PyTorchClassifier(
        model, loss=nn.CrossEntropyLoss(), input_shape=shape, nb_classes=classes, clip_values=(0, 1),
        device_type="gpu" if images.is_cuda else "cpu",
    )  # fmt: skip
    attack = evasion.ProjectedGradientDescentPyTorch(
        wrapped, eps=epsilon, eps_step=RELATIVE_STEP_SIZE * epsilon, max_iter=STEPS, num_random_init=1,
        batch_size=len(images), verbose=False,
    )  # fmt: skip
    return torch.from_numpy(attack.generate(images.cpu().numpy(), labels.cpu().numpy())).to(images.device)


PEERS: dict[str, Perturb] = {"torchattacks": _torchattacks, "foolbox": _foolbox, "ART": _art}
MODULES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "art.estimators"}
"""What tells that a library is there; another package of Python's index is called art too."""
INSTALL = ".venv/bin/python -m pip install -e '.[bench]'"


def is_installed(module: str) -> bool:
    """Return whether a module is there, without importing more than the packages that it is in.

    Packages that are there and cannot be imported count as installed: who calls them learns why.
    """
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
    except Exception:  # whatever the package that it is in raises
        return True
