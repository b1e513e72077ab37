"""The attacks behind the sanity checks of a model: variants of one attack that should agree.

After Carlini et al. 2019 (arXiv 1902.06705, section 5) and Mosbach et al. 2018 (arXiv 1810.12042): an attack that finds
what there is to find does not gain from more steps or restarts, nor from another objective, nor from logits that are
shifted or rescaled.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drs.attack_config import ConvergenceConfig, SanityConfig
from drs.attacks.climbing import climb
from drs.attacks.contract import check_eval_mode, check_pixels, predict
from drs.attacks.isolation import isolated
from drs.attacks.objectives import FAMILIES
from drs.attacks.projected import ProjectedAttack
from drs.attacks.running import run_attack
from drs.batches import in_batches

LARGE_EPSILON = 0.5
"""At this Linf radius every image can be turned to grey, so no more than chance may be left."""
SHIFT = 100.0
FACTORS = (0.1, 10.0)


class Rescaled(nn.Module):
    """A model whose logits are multiplied by a factor and shifted: the same classifier.

    Args:
        model: Pixels in, logits out.
        factor: Above 0.
        shift: Added to every logit.
    """

    def __init__(self, model: nn.Module, factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.factor = factor
        self.shift = shift
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        """Return the rescaled logits ``[B, K]``."""
        logits: Tensor = self.model(images).float() * self.factor + self.shift
        return logits


@dataclass(frozen=True)
class Probes:
    """Which of N samples stand after each probe.

    Attributes:
        standing: Probe name -> ``[N]`` bool, still classified right.
        gradient_norm: ``[N]`` float64, largest absolute entry of the gradient of cross-entropy at the clean image.
        batch_size: Samples per batch: as asked, or the least that a probe went down to where a GPU's memory ran out.
    """

    standing: dict[str, np.ndarray]
    gradient_norm: np.ndarray
    batch_size: int


def run_probes(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, config: SanityConfig, *, fast_search: bool = False
) -> Probes:
    """Run every probe in Linf.

    The probes: ``clean``; ``epsilon_0`` (margin PGD with a ball of no size); ``ce`` and ``margin`` PGD;
    ``ce_climbs``, ``margin_climbs`` and ``targeted``, which climb equally often, K-1 times for each restart: on
    cross-entropy and on the margin, at first from the clean image and then from random starts, and on the margin to
    each of the other classes in turn, at first all from the clean image; ``ce_best`` and ``ce_last``
    (the best and the last iterate of one climb of cross-entropy from the clean image, on which nothing is dropped);
    ``more_steps`` and ``more_restarts`` (``margin`` with twice of each; ``run_convergence`` has them for more images);
    ``scaled_<factor>``, ``normalised`` and ``shifted`` (``ce`` on logits multiplied by a factor, multiplied by
    ``drs.attacks.objectives.logit_scale``, and shifted); ``large`` and ``unbounded`` (``margin`` within 0.5 and 1).

    Args:
        model: In eval mode; pixels in [0,1] in, logits out.
        images: ``[N, C, H, W]``.
        labels: ``[N]``.
        epsilon: Radius of the probes that do not name their own, pixel units.
        config: Steps, restarts, batch size and seed.
        fast_search: See ``drs.attacks.running.run_attack``; for the probes of the model as it is. What looks at each
            iterate, and what attacks rescaled logits, is on the model.

    Raises:
        UserError: Where the contract of ``drs.attacks.contract`` is broken.
    """
    check_pixels(images, "the images to attack")
    check_eval_mode(model)

    sizes = []
    climbs = config.restarts * (predict(model, images[:1], "clean images").shape[1] - 1)

    def stands(
        objective: str, *, radius: float = epsilon, steps: int = config.steps, restarts: int = config.restarts,
        target: nn.Module = model,
    ) -> np.ndarray:  # fmt: skip
        found, size = _standing(
            target, images, labels, radius, objective, steps, restarts, config,
            fast_search=fast_search and target is model, replay=fast_search,
        )  # fmt: skip
        sizes.append(size)
        return found

    standing = {}
    parts, size = in_batches(
        lambda start, stop: _batch_probes(model, images[start:stop], labels[start:stop], epsilon, config),
        len(images), config.batch_size, "the sanity checks",
    )  # fmt: skip
    sizes.append(size)
    for name in ("clean", "epsilon_0", "ce_best", "ce_last"):
        standing[name] = np.concatenate([part[name] for part in parts])
    standing["ce"] = stands("ce")
    standing["margin"] = stands("margin")
    standing["ce_climbs"] = stands("ce", restarts=climbs)
    standing["margin_climbs"] = stands("margin", restarts=climbs)
    standing["targeted"] = stands("targeted_margin")
    standing["more_steps"] = stands("margin", steps=2 * config.steps)
    standing["more_restarts"] = stands("margin", restarts=2 * config.restarts)
    for factor in FACTORS:
        standing[f"scaled_{factor:g}"] = stands("ce", target=Rescaled(model, factor))
    standing["normalised"] = stands("scaled_ce")
    standing["shifted"] = stands("ce", target=Rescaled(model, 1.0, SHIFT))
    standing["large"] = stands("margin", radius=LARGE_EPSILON)
    standing["unbounded"] = stands("margin", radius=1.0)
    return Probes(standing, np.concatenate([part["gradient_norm"] for part in parts]), min(sizes))


def run_convergence(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    config: ConvergenceConfig,
    *,
    fast_search: bool = False,
) -> tuple[dict[str, np.ndarray], int]:
    """Return which of N samples stand margin PGD, and that with twice the steps and with twice the restarts.

    Args:
        model: In eval mode; pixels in [0,1] in, logits out.
        images: ``[N, C, H, W]``.
        labels: ``[N]``.
        epsilon: Radius in Linf, pixel units.
        config: Steps, restarts, batch size and seed.
        fast_search: See ``drs.attacks.running.run_attack``.

    Returns:
        ``margin``, ``more_steps`` and ``more_restarts`` as in ``run_probes``, ``[N]`` bool each; the batch size, less
        than asked where a GPU's memory ran out.

    Raises:
        UserError: Where the contract of ``drs.attacks.contract`` is broken.
    """
    check_pixels(images, "the images to attack")
    budgets = {
        "margin": (config.steps, config.restarts),
        "more_steps": (2 * config.steps, config.restarts),
        "more_restarts": (config.steps, 2 * config.restarts),
    }
    found = {
        name: _standing(
            model, images, labels, epsilon, "margin", *budget, config, fast_search=fast_search, replay=fast_search
        )
        for name, budget in budgets.items()
    }
    return {name: standing for name, (standing, _) in found.items()}, min(size for _, size in found.values())


def _standing(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, objective: str, steps: int, restarts: int,
    config: SanityConfig | ConvergenceConfig, *, fast_search: bool, replay: bool,
) -> tuple[np.ndarray, int]:  # fmt: skip
    """Return which samples stand PGD on an objective, and the batch size used."""
    attack = ProjectedAttack(f"probe on {objective}", [objective], "linf", steps, restarts, config.relative_step_size)
    outcome = run_attack(
        attack, model, images, labels, epsilon=epsilon, batch_size=config.batch_size, seed=config.seed,
        fast_search=fast_search, replay=replay,
    )  # fmt: skip
    return (outcome.logits.argmax(dim=1) == labels.cpu()).numpy(), outcome.batch_size


def _batch_probes(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, config: SanityConfig
) -> dict[str, np.ndarray]:
    right = predict(model, images, "clean images").argmax(dim=1) == labels
    result = {name: right.clone() for name in ("clean", "epsilon_0", "ce_best", "ce_last")}
    gradient = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    index = right.nonzero().squeeze(1)
    if len(index):
        centre, truth = images[index], labels[index]
        with isolated(model, config.seed):
            moved = centre.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(F.cross_entropy(model(moved).float(), truth, reduction="sum"), moved)
            gradient[index] = slope.flatten(1).abs().amax(dim=1).double()
            attack = ProjectedAttack("epsilon 0", ["margin"], "linf", 2, 1, config.relative_step_size)
            same = attack.perturb(model, centre, truth, 0.0)
            (objective,) = FAMILIES["ce"](centre, truth)
            _, fallen, last_fallen, _ = climb(
                model, centre, truth, epsilon, objective, norm="linf", steps=config.steps,
                relative_step_size=config.relative_step_size, start=centre, drop_fallen=False,
            )  # fmt: skip
        result["epsilon_0"][index] = predict(model, same, "images moved by 0").argmax(dim=1) == truth
        result["ce_best"][index] = ~fallen
        result["ce_last"][index] = ~last_fallen
    return {name: value.cpu().numpy() for name, value in result.items()} | {"gradient_norm": gradient.cpu().numpy()}
