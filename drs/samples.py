"""A few images attacked one model at a time, with all that a picture of them needs."""

import torch
from torch import nn

from drs.attacks.contract import Attack, check_adversarial, check_eval_mode, check_model, predict
from drs.attacks.isolation import isolated
from drs.data import LabelledImages
from drs.figure_samples import AttackedSamples


def attack_samples(
    model: nn.Module, samples: LabelledImages, attack: Attack, epsilon: float, *, seed: int = 0
) -> AttackedSamples:
    """Attack every sample, also those that the model gets wrong already.

    Args:
        model: In eval mode; takes pixels in [0,1] and returns logits.
        samples: N images with their labels, on the model's device.
        attack: A bounded attack, as ``drs.attacks.build_attack`` makes it.
        epsilon: Its bound in pixel units.
        seed: Of what is random in the attack.

    Raises:
        UserError: If the model or the attack breaks the contract of ``drs.attacks.run_attack``.
    """
    images = samples.pixels()
    check_eval_mode(model)
    check_model(model, images)
    with isolated(model, seed):
        adversarial = attack.perturb(model, images.clone(), samples.labels, epsilon).detach()
    check_adversarial(images, adversarial, epsilon, attack.norm, attack.name)
    before, after = (
        torch.softmax(predict(model, given, name), dim=1).cpu().numpy()
        for given, name in ((images, "clean images"), (adversarial, f"adversarial images of {attack.name}"))
    )
    pixels, moved, labels = (values.cpu().numpy() for values in (images, adversarial, samples.labels))
    return AttackedSamples(pixels, moved, before, after, labels, attack.name, attack.norm)
