"""Attacks run batch by batch under the contract of ``drs.attacks.contract``.

Attacks run in float32 with TF32 off, unless a fast search is asked for. They leave the model's modes, its gradients and
every random generator as they were. A gradient that is not finite is an error: its sign is 0, so the model would look
robust. An exception inside an attack is never swallowed; after one of a fast search the attack is on the model, which
raises it if it is the attack's.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from drs.attacks.boundary import bring_to_boundary
from drs.attacks.contract import (
    Attack,
    AttackOutcome,
    CleanLogits,
    check_adversarial,
    check_epsilon,
    check_eval_mode,
    perturbation_norm,
    predict,
)
from drs.attacks.half_precision import HalfPrecision, without_gradient
from drs.attacks.isolation import full_precision, isolated, tensor_cores
from drs.attacks.replay import original, replayed
from drs.attacks.stand_in import is_nearly_fooled, stand_in
from drs.batches import in_batches
from drs.errors import UserError


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
