"""The paper suite as this project runs it beside the same attacks called through torchattacks by hand."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from drs.attack_config import AttackConfig, CWTorchattacksConfig, FGSMConfig, PGDConfig, is_bounded
from drs.attacks import build_attack, run_attack
from drs.benchmarks.harness import Row, ratio_of_medians, time_in_turn

BY_HAND = (FGSMConfig, PGDConfig, CWTorchattacksConfig)
"""The attacks of the paper suite that torchattacks has."""


def suite_rows(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: dict[str, AttackConfig],
    epsilons: Sequence[float],
    batch_size: int,
    *,
    described: str,
    target: str,
) -> Iterator[Row]:
    """Yield the paper suite as this project runs it beside the same attacks called through torchattacks.

    Args:
        model: In eval mode, on the device of the images.
        images: ``[N, C, H, W]`` in [0,1].
        labels: ``[N]``.
        attacks: Of the suite, by name; those that torchattacks lacks are left out on both sides.
        epsilons: Of the bounded ones, in pixel units.
        batch_size: Samples per batch, on both sides.
        described: The model, for the row.
        target: Of the ratio of times, theirs over ours.
    """
    shared = {name: config for name, config in attacks.items() if isinstance(config, BY_HAND)}
    cells = [
        (name, config, epsilon)
        for name, config in shared.items()
        for epsilon in (epsilons if is_bounded(config) else [float("inf")])
    ]
    standing: dict[str, list[float]] = {"ours": [], "theirs": []}

    def ours() -> None:
        standing["ours"] = []
        for _, config, epsilon in cells:
            outcome = run_attack(
                build_attack(config), model, images, labels, epsilon=epsilon, batch_size=batch_size, seed=0
            )
            right = outcome.logits.argmax(dim=1) == labels.cpu()
            standing["ours"].append(float(right.float().mean()))

    def theirs() -> None:
        standing["theirs"] = []
        torch.manual_seed(0)
        for _, config, epsilon in cells:
            attack = _by_hand(config, model, epsilon)
            right = 0
            for part in torch.arange(len(images), device=images.device).split(batch_size):
                moved = attack(images[part], labels[part])
                with torch.no_grad():
                    right += int((model(moved).argmax(dim=1) == labels[part]).sum())
            standing["theirs"].append(right / len(images))

    seconds = time_in_turn([ours, theirs], 3, warmup=0, device=images.device.type)
    medians = np.median(seconds, axis=0)
    compared = ", ".join(
        f"{name}{f' at {epsilon:g}' if np.isfinite(epsilon) else ''} {100 * one:.1f} and {100 * other:.1f} %"
        for (name, _, epsilon), one, other in zip(cells, standing["ours"], standing["theirs"], strict=True)
    )
    left_out = ", ".join(name for name in attacks if name not in shared)
    yield Row(
        "attacks", f"paper suite, {len(images)} images, batches of {batch_size}, {described}", "the suite",
        "torchattacks by hand", "s", float(medians[0]), float(medians[1]),
        *ratio_of_medians(seconds[:, 1], seconds[:, 0]), 3, target, images.device.type, torch.get_num_threads(),
        note=f"standing with us and by hand: {compared}; without {left_out}, which torchattacks does not have",
        reason="The suite's FGSM, PGD and CW are torchattacks' own, because that is what users of the paper's tool "
        "run: each takes every step on every image and returns its last iterate, so that nothing can be left out "
        "without changing what is reported.",
    )  # fmt: skip


def _by_hand(config: AttackConfig, model: nn.Module, epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what a user of torchattacks would build."""
    import torchattacks

    result: Callable[[Tensor, Tensor], Tensor]
    if isinstance(config, FGSMConfig):
        result = torchattacks.FGSM(model, eps=epsilon)
    elif isinstance(config, PGDConfig):
        result = torchattacks.PGD(
            model, eps=epsilon, alpha=config.relative_step_size * epsilon, steps=config.steps,
            random_start=config.random_start,
        )  # fmt: skip
    else:
        assert isinstance(config, CWTorchattacksConfig)
        result = torchattacks.CW(
            model, c=config.c, kappa=config.confidence, steps=config.steps, lr=config.learning_rate
        )
    return result
