"""How a batch becomes a loss: standard training, PGD adversarial training, TRADES; each with any loss.

The inner attack runs in eval mode, so that it leaves the statistics of batch normalisation alone, and draws from a
generator of its own, so that order, augmentation and noise are those of standard training with the same seed. It runs
at the precision of the training, but for the first step of TRADES, which needs float32 (see ``Trades.images``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drs.schema import AdversarialConfig, StandardConfig, TradesConfig

Forward = Callable[[Tensor], Tensor]
TRADES_START = 1e-3
"""Standard deviation of the Gaussian start of TRADES in pixel units, as in the authors' code."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def reach(images: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest pixels, each ``[B, C, H, W]``, of the Linf ball around ``images`` within [0,1].

    A pixel that training noise has put outside [0,1] may stay there, and is never moved further out.
    """
    return (
        torch.maximum(images - epsilon, images.clamp(max=0)),
        torch.minimum(images + epsilon, images.clamp(min=1)),
    )


def ascend(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    start: Tensor,
    epsilon: float,
    steps: int,
    relative_step_size: float,
) -> Tensor:
    """Return the last of ``steps`` signed gradient steps on ``objective`` in the Linf ball around ``images``.

    Args:
        objective: Adversarial images ``[B, C, H, W]`` -> scalar, to be raised.
        images: Pixels in [0,1], or as ``reach`` says.
        start: Where to begin, inside the ball.
        epsilon: Radius in pixel units.
        steps: Gradient steps.
        relative_step_size: Step as a share of epsilon.
    """
    low, high = reach(images, epsilon)
    moved = start
    for _ in range(steps):
        moved = moved.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(moved), moved)
        moved = (moved.detach() + relative_step_size * epsilon * gradient.sign()).clamp(low, high)
    return moved.detach()


class Procedure:
    """Standard training: the loss of the batch as it is."""

    generator: torch.Generator | None = None

    def generators(self) -> dict[str, torch.Generator]:
        """Return the random generators that a training must keep to go on as if never interrupted, by name."""
        return {} if self.generator is None else {"procedure": self.generator}

    def images(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the images ``[B, C, H, W]`` that the loss is taken on."""
        return images

    def regulariser(self, forward: Forward, logits: Tensor) -> Tensor | None:
        """Return what is added to the loss of ``logits`` ``[B, K]``, if anything."""
        return None


class AdversarialTraining(Procedure):
    """The loss on adversarial images only, Madry et al. 2018 (arXiv 1706.06083, eq. 2.1).

    The inner attack raises cross-entropy whatever the loss, so that with another loss only what is minimised differs.

    Args:
        config: Radius, steps and start.
        generator: Of the random starts, on the device of the images.
    """

    def __init__(self, config: AdversarialConfig, generator: torch.Generator) -> None:
        self.config = config
        self.generator = generator

    def images(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """See ``Procedure``."""
        config, start = self.config, images
        if config.random_start:
            noise = torch.rand(images.shape, generator=self.generator, device=images.device)
            start = (images + (2 * noise - 1) * config.epsilon).clamp(*reach(images, config.epsilon))
        with evaluating(model):
            return ascend(
                lambda moved: F.cross_entropy(model(moved).float(), labels, reduction="sum"),
                images, start, config.epsilon, config.steps, config.relative_step_size,
            )  # fmt: skip


class Trades(Procedure):
    """TRADES, Zhang et al. 2019 (arXiv 1901.08573, eq. 3 and algorithm 1).

    The loss on clean images plus ``beta`` times the mean divergence of the adversarial from the clean prediction,
    ``KL(p(x) || p(x'))``.

    Args:
        config: Radius, steps and beta.
        generator: Of the starts, on the device of the images.
    """

    def __init__(self, config: TradesConfig, generator: torch.Generator) -> None:
        self.config = config
        self.generator = generator
        self.adversarial: Tensor | None = None

    def images(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """See ``Procedure``; the adversarial images are kept for ``regulariser``."""
        config = self.config
        noise = torch.randn(images.shape, generator=self.generator, device=images.device)
        moved = (images + TRADES_START * noise).clamp(*reach(images, config.epsilon))

        def divergence(moved: Tensor) -> Tensor:
            return F.kl_div(F.log_softmax(model(moved).float(), dim=1), clean, reduction="sum")

        with evaluating(model):
            # At the start the two predictions all but agree. In half precision their difference, which decides the
            # direction of the first step, is mostly rounding, and the divergence found at the end a good tenth lower.
            with torch.autocast(images.device.type, enabled=False):
                with torch.no_grad():
                    clean = F.softmax(model(images).float(), dim=1)
                moved = ascend(divergence, images, moved, config.epsilon, 1, config.relative_step_size)
            self.adversarial = ascend(
                divergence, images, moved, config.epsilon, config.steps - 1, config.relative_step_size
            )
        return images

    def regulariser(self, forward: Forward, logits: Tensor) -> Tensor | None:
        """See ``Procedure``."""
        assert self.adversarial is not None
        adversarial = F.log_softmax(forward(self.adversarial).float(), dim=1)
        # A probability that underflows to 0 would make the gradient NaN: of p log p, torch differentiates both factors.
        clean = F.softmax(logits.float(), dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return self.config.beta * F.kl_div(adversarial, clean, reduction="batchmean")


def build_procedure(
    config: StandardConfig | AdversarialConfig | TradesConfig, seed: int, device: torch.device
) -> Procedure:
    """Build the procedure that a config describes, its generator seeded with the run's seed."""
    generator = torch.Generator(device).manual_seed(seed)
    if isinstance(config, AdversarialConfig):
        return AdversarialTraining(config, generator)
    if isinstance(config, TradesConfig):
        return Trades(config, generator)
    return Procedure()
