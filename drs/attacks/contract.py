"""What every attack must keep, checked on every batch.

Pixels in [0,1] and a model in eval mode go in; what comes back is finite, inside [0,1] and, for an attack with a
bound, within epsilon. Attacks and the predictions that score them run in float32 with TF32 off, unless a fast search
is asked for; predictions are the model's own in float32 even then. Attacks leave the model's modes, its gradients and
every random generator as they were. A gradient that is not finite is an error: its sign is 0, so the model would look
robust. An exception inside an attack is never swallowed; after one of a fast search the attack is on the
model, which raises it if it is the attack's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from drs.attack_config import SLACK
from drs.attacks.boundary import bring_to_boundary
from drs.attacks.half_precision import HalfPrecision, without_gradient
from drs.attacks.isolation import full_precision, isolated, tensor_cores
from drs.attacks.replay import original, replayed
from drs.attacks.stand_in import is_nearly_fooled, stand_in
from drs.batches import in_batches
from drs.errors import UserError

SAME_SUM = 0.01
"""Outputs in [0,1] are probabilities where their row sums differ by less than this share of what they do themselves."""
LEAST_ROWS = 4
"""Of fewer images, logits too may happen to have such sums."""


class Attack(Protocol):
    """An attack on a classifier.

    Attributes:
        name: For messages.
        norm: ``linf`` or ``l2``, the norm it is scored in.
        bounded: Whether it takes an epsilon; without one it looks for a small perturbation of any size.

    An attack whose images end on the decision boundary has a true attribute ``ends_on_boundary``.
    """

    name: str
    norm: str
    bounded: bool

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """Return adversarial images like ``images`` ``[B, C, H, W]``; ``epsilon`` is infinite where not bounded."""


@dataclass(frozen=True)
class AttackOutcome:
    """What an attack made of N samples, all on the CPU.

    Attributes:
        logits: ``[N, K]`` float32, of the adversarial images.
        distance: ``[N]`` float64, the norm of the perturbation in pixel units.
        batch_size: Samples per batch: as asked, or less where a GPU's memory ran out.
    """

    logits: Tensor
    distance: Tensor
    batch_size: int


def perturbation_norm(images: Tensor, adversarial: Tensor, norm: str) -> Tensor:
    """Return the ``linf`` or ``l2`` norm ``[B]`` of the difference of two image batches, float64, pixel units."""
    difference = (adversarial.double() - images.double()).flatten(1)
    return torch.linalg.vector_norm(difference, ord=math.inf if norm == "linf" else 2, dim=1)


def check_pixels(images: Tensor, source: str) -> None:
    """Raise ``UserError`` unless ``images`` is float32 ``[B, C, H, W]``, finite and inside [0,1] (1e-6 slack)."""
    if images.dtype != torch.float32 or images.dim() != 4:
        raise UserError(f"{source}: float32 images [B, C, H, W] are required, not {images.dtype} {list(images.shape)}")
    if not images.numel():
        return
    low, high = (float(value) for value in torch.aminmax(images))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{source}: a pixel is not finite")
    if low < -SLACK or high > 1 + SLACK:
        raise UserError(
            f"{source}: pixels lie in [{low:g}, {high:g}], but must lie in [0, 1]; normalise inside the model"
        )


def check_epsilon(epsilon: float, norm: str, n_pixels: int) -> None:
    """Raise ``UserError`` unless epsilon is above 0 and at most the diameter of [0,1]^n in ``norm``.

    Args:
        epsilon: In pixel units.
        norm: ``linf`` or ``l2``.
        n_pixels: n, the number of values C*H*W of an image.
    """
    if not epsilon > 0:
        raise UserError(f"epsilon={epsilon}: must be above 0")
    if norm == "linf" and epsilon > 1:
        raise UserError(f"epsilon={epsilon}: must be at most 1; pixels lie in [0,1], so write 8/255 rather than 8")
    if norm == "l2" and epsilon > math.sqrt(n_pixels):
        raise UserError(
            f"epsilon={epsilon}: must be at most sqrt({n_pixels}) = {math.sqrt(n_pixels):.4g}; no two images of "
            f"{n_pixels} pixel values in [0,1] are further apart in l2"
        )


def check_eval_mode(model: nn.Module) -> None:
    """Raise ``UserError`` if any module of the model is in training mode."""
    for name, module in model.named_modules():
        if module.training:
            raise UserError(
                f"the model is in training mode (module '{name or 'the model itself'}'); call model.eval() first"
            )


@torch.no_grad()
def check_model(model: nn.Module, images: Tensor) -> None:
    """Raise ``UserError`` for a model that gradient attacks would judge wrongly, on the first 16 images.

    Refused are outputs that are not ``[B, K]`` with K >= 2; probabilities in the place of logits, whose gradients
    vanish where the model is confident, scaled and smoothed ones too; and a forward pass that gives another answer the
    second time. Log-probabilities pass: they are logits up to a shift of each row.
    """
    in_batches(lambda start, stop: _check_answers(model, images[start:stop]), min(16, len(images)), 16, "the model")


def _check_answers(model: nn.Module, few: Tensor) -> None:
    with full_precision():
        raw = model(few)
        if not isinstance(raw, Tensor):
            raise UserError(f"the model returns a {type(raw).__name__}; a tensor of logits [B, K] is needed")
        outputs, again = raw.float(), model(few).float()
    if outputs.dim() != 2 or len(outputs) != len(few) or outputs.shape[1] < 2:
        raise UserError(
            f"the model returns {list(outputs.shape)} for {len(few)} images; logits [B, K], K >= 2, are needed"
        )
    scale = float(outputs.abs().max()) + 1
    if bool((torch.isfinite(outputs) & ((outputs - again).abs() > 1e-4 * scale)).any()):
        raise UserError(
            "the model is stochastic: two forward passes of the same images differ; fix its randomness, or attack the "
            "expectation over it, which these attacks do not do"
        )
    if _are_probabilities(outputs, 1e-4 if raw.dtype in (torch.float32, torch.float64) else 2e-2):
        low, high, sums = float(outputs.min()), float(outputs.max()), outputs.sum(dim=1)
        raise UserError(
            f"the model returns probabilities, or scaled or smoothed ones (values from {low:.3g} to {high:.3g}, and "
            f"each row sums to {float(sums.mean()):.4g}); return logits or log-probabilities"
        )


def _are_probabilities(outputs: Tensor, rounding: float) -> bool:
    """Return whether outputs ``[B, K]`` are probabilities, or nearly: scaled, mixed with a constant, or clamped.

    They lie in [0,1], and their sums hardly differ where they themselves do. Logits that are the same for all images
    pass: a collapsed model has them.
    """
    if bool((outputs < 0).any() | (outputs > 1 + rounding).any()):
        return False
    sums = outputs.sum(dim=1)
    if bool(((sums - 1).abs() < rounding).all()):
        return True
    varied = float((outputs.amax(dim=0) - outputs.amin(dim=0)).max())
    return len(outputs) >= LEAST_ROWS and float(sums.max() - sums.min()) < max(SAME_SUM * varied, rounding) < varied


def check_logits(logits: Tensor, source: str) -> None:
    """Raise ``UserError`` if a logit is not finite: the argmax of NaN is class 0, so a dead model would look robust."""
    bad = ~torch.isfinite(logits).all(dim=1)
    if bool(bad.any()):
        raise UserError(
            f"{source}: {int(bad.sum())} of {len(logits)} samples have logits that are not finite; the model is broken"
        )


def check_adversarial(images: Tensor, adversarial: Tensor, epsilon: float, norm: str, name: str) -> Tensor:
    """Return the ``norm`` of each perturbation ``[B]``, as ``perturbation_norm`` does.

    Raises:
        UserError: Unless the adversarial batch is whole, inside [0,1] and within epsilon (1e-6 slack).
    """
    if adversarial.shape != images.shape:
        raise UserError(f"{name} returned {list(adversarial.shape)} for images {list(images.shape)}")
    check_pixels(adversarial, f"adversarial images of {name}")
    if not images.numel():
        return torch.zeros(len(images), dtype=torch.float64, device=images.device)
    distance = perturbation_norm(images, adversarial, norm)
    largest = float(distance.max())
    if largest > epsilon + SLACK:
        raise UserError(f"{name} left the ball: {norm} distance {largest:.6g} where epsilon is {epsilon:.6g}")
    return distance


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, source: str) -> Tensor:
    """Return finite float32 logits ``[B, K]``; ``UserError`` where one is not finite."""
    with full_precision():
        logits = model(images).float()
    check_logits(logits, source)
    return logits


class CleanLogits:
    """The clean logits of some images, shared by attacks on them; input and model are checked once, when it is made.

    Logits are kept by batch, because their last bits depend on it. Model and images must stay as they are.

    Args:
        model: In eval mode; takes pixels in [0,1] and returns logits.
        images: ``[N, C, H, W]`` float32 in [0,1].

    Raises:
        UserError: For input that breaks the contract.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        check_pixels(images, "the images to attack")
        check_eval_mode(model)
        check_model(model, images)
        self.model, self.images = model, images
        self._batches: dict[tuple[int, int], Tensor] = {}

    def batch(self, start: int, stop: int) -> Tensor:
        """Return logits ``[stop - start, K]``, a copy; ``UserError`` where one is not finite."""
        if (start, stop) not in self._batches:
            self._batches[start, stop] = predict(self.model, self.images[start:stop], "clean images")
        return self._batches[start, stop].clone()


def run_attack(
    attack: Attack,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float = math.inf,
    batch_size: int = 500,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
    clean: CleanLogits | None = None,
    fast_search: bool = False,
    replay: bool = False,
) -> AttackOutcome:
    """Attack the samples the model gets right; the others are failures already and keep their clean logits.

    Args:
        attack: The attack.
        model: In eval mode; takes pixels in [0,1] and returns logits.
        images: ``[N, C, H, W]`` float32 in [0,1].
        labels: ``[N]`` int64, true classes.
        epsilon: The bound in pixel units; an attack without a bound ignores it.
        batch_size: Samples per batch; halved where a GPU's memory runs out.
        seed: Each batch is seeded with it and the position of its first sample.
        on_batch: Called with the number of samples just finished.
        clean: Of this model and these images, where several attacks share them.
        fast_search: Whether the attack searches on the model's stand-in (``drs.attacks.stand_in``), on a card in
            float16, or TF32 where that is not like the model. Its images are judged on the model in float32 in any
            case, so that none falls that does not fool it. A search gives an image up once it has fooled the stand-in;
            what still fools that, or nearly, and not the model is attacked again, on the model and in float32, and so
            is what has no gradient in float16. What ends on the stand-in's boundary is first brought to the model's.
            An attack that returns the clean image where it fooled nothing, as torchattacks' APGD and Square do, does
            not show how near it came: an image at the edge may fall by one search and not by the other. A batch on
            which the stand-in fails is attacked on the model.
        replay: Whether passes of the model over small batches are recorded on a card and replayed
            (``drs.attacks.replay``), for an attack that is to search on the model itself; a fast search does so in any
            case. A batch on which that fails is attacked without.

    Raises:
        UserError: For input that breaks the contract, logits that are not finite, or an attack that does.
        ValueError: If ``clean`` is of another model or of other images.
    """
    if clean is None:
        clean = CleanLogits(model, images)
    elif clean.model is not model or clean.images is not images:
        raise ValueError("the clean logits are of another model or of other images")
    check_eval_mode(model)
    if attack.bounded:
        check_epsilon(epsilon, attack.norm, images.shape[1:].numel())
    else:
        epsilon = math.inf

    recorded = replayed(model, images) if fast_search or replay else model

    def attack_batch(start: int, stop: int) -> tuple[Tensor, Tensor]:
        pixels, truth = images[start:stop], labels[start:stop]
        logits = clean.batch(start, stop)
        distance = torch.zeros(len(pixels), dtype=torch.float64)

        def settled(clean_images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
            norm = perturbation_norm(clean_images, adversarial, attack.norm)
            longest = (epsilon / norm).clamp_min(1).float()
            with full_precision():
                return bring_to_boundary(lambda x: model(x).argmax(dim=1), clean_images, adversarial, labels, longest)

        def attack_those(chosen: Tensor, searched: nn.Module, tf32: bool) -> Tensor:
            with isolated(searched, seed + start, tf32):
                adversarial = attack.perturb(searched, pixels[chosen].clone(), truth[chosen], epsilon).detach()
            if original(searched) is not model and getattr(attack, "ends_on_boundary", False):
                adversarial = settled(pixels[chosen], adversarial, truth[chosen])
            moved = check_adversarial(pixels[chosen], adversarial, epsilon, attack.norm, attack.name)
            logits[chosen] = predict(model, adversarial, f"adversarial images of {attack.name}")
            distance[chosen.cpu()] = moved.cpu()
            return adversarial

        def search_first(chosen: Tensor) -> Tensor:
            """Search on the stand-in; return which of the chosen are to be attacked on the model."""
            found = stand_in(model, pixels)
            searched = recorded if found is model else found
            try:
                adversarial = attack_those(chosen, searched, True)
                with tensor_cores(True):
                    with torch.no_grad():
                        given_up = is_nearly_fooled(searched(adversarial).float(), logits[chosen], truth[chosen])
                    if isinstance(original(searched), HalfPrecision):
                        given_up |= without_gradient(searched, pixels[chosen])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the attack on the model raises what is not the stand-in's fault
                if not isinstance(error, UserError):
                    print(f"{attack.name}: on the model itself; on its copy: {error}".splitlines()[0], flush=True)
                return torch.ones_like(chosen, dtype=torch.bool)
            return given_up & (logits[chosen].argmax(dim=1) == truth[chosen])

        def search_on_model(chosen: Tensor) -> None:
            if recorded is not model:
                try:
                    attack_those(chosen, recorded, False)
                    return
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    if not isinstance(error, UserError):
                        print(f"{attack.name}: without recorded passes: {error}".splitlines()[0], flush=True)
            attack_those(chosen, model, False)

        standing = (logits.argmax(dim=1) == truth).nonzero().squeeze(1)
        if len(standing) and fast_search:
            standing = standing[search_first(standing)]
        if len(standing):
            search_on_model(standing)
        if on_batch is not None:
            on_batch(len(pixels))
        return logits.cpu(), distance

    parts, used = in_batches(attack_batch, len(images), batch_size, attack.name)
    found, distances = zip(*parts, strict=True)
    return AttackOutcome(torch.cat(found), torch.cat(distances), used)
