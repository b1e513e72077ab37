"""A hard-label attack: it sees which class a model predicts, and neither scores nor gradients."""

import warnings
from typing import Any

import foolbox
import torch
from torch import Tensor, nn

from drs.attacks.minimal_norm import other_class_images, settle
from drs.batches import in_batches

AT_ONCE = 10
"""Samples searched together: each needs hundreds of noisy copies of itself in memory."""
QUERIES_AT_ONCE = 512
"""Queries that the model gets in one batch, about."""


class RepeatedMisclassification(foolbox.criteria.Criterion):
    """Misclassification of images of the labels ``[B]``, or of R copies of each: all first copies, all second, ..."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.labels = labels

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.labels!r})"

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        """Return bool ``[R*B]`` for outputs ``[R*B, K]``, both wrapped as foolbox wraps tensors."""
        fooled = outputs.raw.argmax(dim=-1).view(-1, len(self.labels)) != self.labels
        return type(outputs)(fooled.flatten())


class SamplewiseHopSkipJump(foolbox.attacks.HopSkipJumpAttack):
    """foolbox's attack with an estimate of the gradient for each sample by itself, as the paper has it.

    foolbox 3.3.4 takes norms over the whole batch where it makes the noise and where it scales the estimate: the noise
    is shorter than its radius by about the square root of the batch size, and in L2 so is every step. And it asks for
    the class of one noisy copy of each sample at a time, hundreds of times in a row; here they come in large batches.
    The criterion must be a ``RepeatedMisclassification``.
    """

    def approximate_gradients(self, is_adversarial: Any, x_advs: Any, steps: int, delta: Any) -> Any:
        """Return the estimates ``[B, C, H, W]``, each of L2 norm 1 (arXiv 1904.02144, with the mean as baseline).

        Args:
            is_adversarial: Takes images ``[R*B, C, H, W]``, returns bool ``[R*B]``.
            x_advs: ``[B, C, H, W]`` on the decision boundary.
            steps: Noisy copies S of each sample.
            delta: ``[B]``, the length of the noise.
        """
        wrap, count, shape = type(x_advs), len(x_advs), (steps, *x_advs.shape)
        noise = (x_advs.normal(shape) if self.constraint == "l2" else x_advs.uniform(shape, -1, 1)).raw
        centre, radius = x_advs.raw, delta.raw.view(-1, 1, 1, 1)
        length = torch.linalg.vector_norm(noise.flatten(2), dim=2).view(steps, count, 1, 1, 1)
        noisy = (centre + radius * (noise / (length + 1e-12))).clamp(0, 1)
        # An answer does not depend on what is beside it, so a batch that does not fit may be halved.
        answers, _ = in_batches(
            lambda start, stop: is_adversarial(wrap(noisy[start:stop].flatten(0, 1))).raw.view(-1, count),
            steps, max(1, QUERIES_AT_ONCE // count), "queries of HopSkipJump",
        )  # fmt: skip
        signs = 2.0 * torch.cat(answers).to(centre.dtype) - 1
        mean = signs.mean(dim=0)
        # Where all copies are on one side their mean is no baseline: it would leave nothing.
        weights = torch.where(mean.abs() == 1, signs, signs - mean).view(steps, count, 1, 1, 1)
        gradients = (weights * ((noisy - centre) / (radius + 1e-8))).mean(dim=0)
        norms = torch.linalg.vector_norm(gradients.flatten(1), dim=1).view(-1, 1, 1, 1)
        return wrap(gradients / (norms + 1e-12))


class HopSkipJump:
    """HopSkipJump (Chen et al. 2020, arXiv 1904.02144), foolbox's implementation.

    A search needs a misclassified image to start from: the clean image blended with noise until the model errs, or,
    where the model gives all noise the label, another image of the batch. A sample without either counts as standing.

    Args:
        norm: ``linf`` or ``l2``.
        steps: Boundary steps.
        initial_gradient_eval_steps: Queries for the first estimate of the gradient.
        max_gradient_eval_steps: The most for any.
    """

    bounded = False

    def __init__(self, norm: str, steps: int, initial_gradient_eval_steps: int, max_gradient_eval_steps: int) -> None:
        self.norm = norm
        self.name = f"HopSkipJump {norm} (foolbox)"
        self.start = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(directions=100, steps=50)
        self.attack = SamplewiseHopSkipJump(
            init_attack=self.start,
            steps=steps,
            initial_gradient_eval_steps=initial_gradient_eval_steps,
            max_gradient_eval_steps=max_gradient_eval_steps,
            constraint="linf" if norm == "linf" else "l2",
            tensorboard=False,
        )

    @torch.no_grad()
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``; where nothing was found the clean image comes back."""
        images = images.contiguous()
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        result = images.clone()
        for part in torch.arange(len(images), device=images.device).split(AT_ONCE):
            starts, begun = self._starts(model, wrapped, images, part, labels[part])
            part, starts = part[begun], starts[begun]
            if len(part):
                criterion = RepeatedMisclassification(labels[part])
                result[part] = self.attack.run(wrapped, images[part], criterion, starting_points=starts)
        return settle(model, images, result, labels)

    def _starts(
        self, model: nn.Module, wrapped: foolbox.PyTorchModel, images: Tensor, part: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a first image for each sample of a part, and whether the model puts it into another class."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*failed to draw sufficient random inputs")
            starts = self.start.run(wrapped, images[part], foolbox.criteria.Misclassification(labels))
        lost = model(starts).argmax(dim=1) == labels
        if bool(lost.any()):
            starts[lost], _ = other_class_images(model, images, labels[lost])
        return starts, model(starts).argmax(dim=1) != labels
