"""Gradient steps in the Linf ball by three libraries and by ours, on the same model, images, epsilon and steps."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
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
MODULES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "art.estimators"}
"""What tells that a library is there; another package of Python's index is called art too."""
INSTALL = ".venv/bin/python -m pip install -e '.[bench]'"


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing more than the packages that it is in."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def attack_rows(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, *, described: str, target: str
) -> Iterator[Row]:
    """Yield our PGD on cross-entropy and on the margin, each beside every peer; the target is that of the fastest.

    A library that is not installed has a row that says so.

    Args:
        model: In eval mode, on the device of the images.
        images: ``[N, C, H, W]`` in [0,1], attacked in one batch by everybody.
        labels: ``[N]``.
        epsilon: Radius in pixel units.
        described: The model, for the rows.
        target: Of the ratio of images a second, ours over the fastest peer's.
    """
    case = f"PGD, {STEPS} steps, {len(images)} images, epsilon {epsilon:g}, {described}"
    device, threads = images.device.type, torch.get_num_threads()
    present = {name: peer for name, peer in PEERS.items() if is_installed(MODULES[name])}
    own = {"our PGD": _ours("ce"), "our margin PGD": _ours("margin")}
    runs: dict[str, Perturb] = {**present, **own}
    accuracy: dict[str, float] = {}

    def call(name: str, perturb: Perturb) -> Callable[[], None]:
        def run() -> None:
            with isolated(model, 0):
                moved = perturb(model, images, labels, epsilon).detach()
            found = predict(model, moved, name).argmax(dim=1) == labels
            accuracy[name] = float(found.float().mean())

        return run

    seconds = time_in_turn([call(name, perturb) for name, perturb in runs.items()], REPEATS, warmup=1, device=device)
    columns = dict(zip(runs, seconds.T, strict=True))
    rate = {name: len(images) / float(np.median(column)) for name, column in columns.items()}
    fastest = max(present, key=lambda name: rate[name])
    lowest = min(accuracy[name] for name in present)
    standing = ", ".join(f"{name} {100 * accuracy[name]:.1f} %" for name in runs)
    per_look = _seconds_of_a_look(model, images, labels) / len(images)
    for name in own:
        looks = _looks(model, images, labels, epsilon, own[name])
        bound = 1 / (per_look * looks)
        held = accuracy[name] <= lowest
        stronger = "no weaker" if held else "weaker than the strongest of them"
        for peer in PEERS:
            if peer not in present:
                yield Row(
                    "attacks", case, name, peer, "images/s", rate[name], None, None, None, None, REPEATS, "", device,
                    threads, note=f"{peer} is not installed; {INSTALL} installs it",
                )  # fmt: skip
                continue
            ratio, low, high = ratio_of_medians(columns[peer], columns[name])
            yield Row(
                "attacks", case, name, peer, "images/s", rate[name], rate[peer], ratio, low, high, REPEATS,
                target if peer == fastest else "", device, threads, least=bound,
                floor=f"{looks:.1f} of {STEPS + 1} looks an image remain when what has fallen is left alone, each a "
                f"pass through the model and back, {1e3 * per_look:.3g} ms an image; nothing else",
                note=f"{stronger}; standing: {standing}", held=held,
                reason=("" if held else "It leaves more images standing than the strongest of them. ")
                + f"At the floor the ratio would be {bound / rate[peer]:.3g}: a library that takes every step "
                f"looks {(STEPS + 1) / looks:.3g} times as often, and an image that never falls must be looked at in "
                "every step by all of them.",
            )  # fmt: skip


def _look(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Pass once through the model and back to the images."""
    leaf = images.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)


def _seconds_of_a_look(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the median time of a look at all images in one batch."""
    with isolated(model, 0):
        looks = time_in_turn([lambda: _look(model, images, labels)], 3 * REPEATS, device=images.device.type)
    return float(np.median(looks))


SMALL_BATCH = 100


def look_rows(model: nn.Module, images: Tensor, labels: Tensor, *, described: str) -> Iterator[Row]:
    """Yield what was tried to make a look cheaper, each beside one look at all images in one batch.

    Arguments as in ``attack_rows``.
    """

    def whole() -> None:
        _look(model, images, labels)

    def in_parts() -> None:
        for part in torch.arange(len(images), device=images.device).split(SMALL_BATCH):
            _look(model, images[part], labels[part])

    def without_onednn() -> None:
        with torch.backends.mkldnn.flags(enabled=False):
            _look(model, images, labels)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    tried = {
        f"in batches of {SMALL_BATCH}": (in_parts, "whose activations fit a cache better"),
        "without oneDNN": (without_onednn, "PyTorch's own convolutions; their rounding differs too"),
        "a look without its way back": (
            forward,
            "the attack asked for one more for every objective, to confirm the best iterate, and for the gradient of "
            f"the last iterate, which goes nowhere; it does neither any more, of {STEPS + 1} looks",
        ),
    }  # fmt: skip
    with isolated(model, 0):
        calls = [whole, *(call for call, _ in tried.values())]
        seconds = time_in_turn(calls, REPEATS, device=images.device.type)
    for which, (name, (_, note)) in enumerate(tried.items(), start=1):
        ratio, low, high = ratio_of_medians(seconds[:, which], seconds[:, 0])
        yield Row(
            "attacks", f"one look at {len(images)} images, {described}", name, "all in one batch, there and back", "ms",
            1e3 * float(np.median(seconds[:, which])), 1e3 * float(np.median(seconds[:, 0])), ratio, low, high, REPEATS,
            "", images.device.type, torch.get_num_threads(), note=note, tried=True,
        )  # fmt: skip


def _looks(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, perturb: Perturb) -> float:
    """Return how many gradients an attack asks for, per image."""
    asked = 0

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal asked
        asked += len(inputs[0]) if inputs[0].requires_grad else 0

    watch = model.register_forward_pre_hook(count)
    try:
        with isolated(model, 0):
            perturb(model, images, labels, epsilon)
    finally:
        watch.remove()
    return asked / len(images)
