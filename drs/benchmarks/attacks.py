"""Gradient steps in the Linf ball by four libraries and by ours, on the same model, images, epsilon and steps."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from drs.attacks.contract import isolated, predict
from drs.attacks.projected import ProjectedAttack
from drs.benchmarks.harness import Row, ratio_of_medians, time_in_turn

STEPS = 40
RELATIVE_STEP_SIZE = 0.1
REPEATS = 5

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


def _ours(objective: str) -> Perturb:
    attack = ProjectedAttack(objective, [objective], "linf", STEPS, 1, 1.0, random_start=True)
    return attack.perturb


PEERS: dict[str, Perturb] = {"torchattacks": _torchattacks, "foolbox": _foolbox, "ART": _art}
PACKAGES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "art"}


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def attack_rows(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, *, described: str, target: str
) -> Iterator[Row]:
    """Yield our PGD on cross-entropy and on the margin, each beside the fastest of the peers.

    Args:
        model: In eval mode, on the device of the images.
        images: ``[N, C, H, W]`` in [0,1], attacked in one batch by everybody.
        labels: ``[N]``.
        epsilon: Radius in pixel units.
        described: The model, for the rows.
        target: Of the ratio of images a second, ours over the fastest peer's.
    """
    case = f"PGD, {STEPS} steps, {len(images)} images, epsilon {epsilon:g}, {described}"
    present = {name: peer for name, peer in PEERS.items() if _is_installed(PACKAGES[name])}
    runs: dict[str, Perturb] = {**present, "our PGD": _ours("ce"), "our margin PGD": _ours("margin")}
    accuracy: dict[str, float] = {}

    def call(name: str, perturb: Perturb) -> Callable[[], None]:
        def run() -> None:
            with isolated(model, 0):
                moved = perturb(model, images, labels, epsilon).detach()
            found = predict(model, moved, name).argmax(dim=1) == labels
            accuracy[name] = float(found.float().mean())

        return run

    seconds = time_in_turn([call(name, perturb) for name, perturb in runs.items()], REPEATS, warmup=1)
    columns = dict(zip(runs, seconds.T, strict=True))
    fastest = min(present, key=lambda name: float(np.median(columns[name])))
    lowest = min(accuracy[name] for name in present)
    standing = ", ".join(f"{name} {100 * accuracy[name]:.1f} %" for name in runs)
    missing = "".join(f"; {name} is not installed" for name in PEERS if name not in present)
    for name in ("our PGD", "our margin PGD"):
        ratio, low, high = ratio_of_medians(columns[fastest], columns[name])
        stronger = "no weaker" if accuracy[name] <= lowest else "weaker than the strongest of them"
        yield Row(
            "attacks", case, name, fastest, "images/s", len(images) / float(np.median(columns[name])),
            len(images) / float(np.median(columns[fastest])), ratio, low, high, REPEATS, target, images.device.type,
            torch.get_num_threads(), note=f"{stronger}; standing: {standing}{missing}",
        )  # fmt: skip
