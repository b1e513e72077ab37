"""Attacks of a second library, for comparison with those of the suite; see ``drs.agreement``.

ART is the adversarial-robustness-toolbox, an optional package: nothing of it is imported before an attack is made.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import foolbox
import numpy as np
import torch
import torchattacks
from foolbox.criteria import Misclassification
from numpy.typing import NDArray
from torch import Tensor, nn

from drs.attacks.autoattack import count_classes
from drs.attacks.carlini_wagner import TorchattacksCarliniWagner
from drs.attacks.decision_based import HopSkipJump
from drs.attacks.gradient_sign import call_torchattacks
from drs.attacks.minimal_norm import settle

P_INIT = 0.8
"""Share of the pixels in the first square, torchattacks' default too."""
FALL = 1e4
"""By how much a constant that has no gradient makes CW's cost fall from one step to the next."""


class ArtSquare:
    """Square (Andriushchenko et al. 2020, arXiv 1912.00049) in Linf, ART's implementation, on the margin.

    It makes the draws that torchattacks' makes with the same seed. In either library all images of a batch get the same
    squares and signs, so that with other draws the share that stands differs by several points from run to run.

    Args:
        n_queries: Squares per sample.
        restarts: Of the search.
        seed: Of the search; each batch starts from it.
    """

    name = "Square (ART)"
    norm = "linf"
    bounded = True

    def __init__(self, n_queries: int, restarts: int, seed: int) -> None:
        self.options = {"max_iter": n_queries, "nb_restarts": restarts, "p_init": P_INIT}
        self.seed = seed

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``."""
        module = importlib.import_module("art.attacks.evasion.square_attack")
        attack = module.SquareAttack(
            _art_classifier(model, images), norm=np.inf, eps=epsilon, batch_size=len(images), verbose=False,
            **self.options,
        )  # fmt: skip
        with _draws_of_torch(module, self.seed):
            moved = attack.generate(images.cpu().numpy(), labels.cpu().numpy())
        return torch.from_numpy(moved).to(images)


class _TorchDraws:
    """The two draws of ART's Square, made as torchattacks' Square makes them."""

    def __init__(self, seed: int) -> None:
        # ART's loaders of data draw from torch's global generator, so this is one of its own.
        self.generator = torch.Generator().manual_seed(seed)

    def choice(self, values: Sequence[float], size: Sequence[int]) -> NDArray[np.float64]:
        low, high = values
        return np.where(torch.rand(*size, generator=self.generator).numpy() > 0.5, high, low)

    def randint(self, low: int, high: int) -> int:
        return low + int((high - low) * torch.rand(1, generator=self.generator))


class _NumpyWithDraws:
    """numpy, but for its random numbers."""

    def __init__(self, random: _TorchDraws) -> None:
        self.random = random

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def _draws_of_torch(module: Any, seed: int) -> Iterator[None]:
    module.np = _NumpyWithDraws(_TorchDraws(seed))
    try:
        yield
    finally:
        module.np = np


class ArtHopSkipJump(HopSkipJump):
    """HopSkipJump in Linf, ART's implementation, made to solve the problem that ``HopSkipJump`` does.

    Five things are set alike. The starts are those of ``HopSkipJump``: ART's own are of noise alone, which a model may
    give the label. The threshold of the binary search, which sets the radius of the noise too, is 1/d^2 for d pixel
    values, as in the paper and in foolbox; ART's is 0.01/d. ART ends with a step off the boundary, of up to
    1/sqrt(steps) of the norm, and is brought back to it here. And ART takes the radius of the noise from the norm
    before a search for the boundary, foolbox from that after it, as is done here. Queries are counted alike by both.
    """

    def __init__(self, steps: int, initial_gradient_eval_steps: int, max_gradient_eval_steps: int) -> None:
        super().__init__("linf", steps, initial_gradient_eval_steps, max_gradient_eval_steps)
        self.name = "HopSkipJump linf (ART)"
        self.options = {
            "max_iter": steps, "init_eval": initial_gradient_eval_steps, "max_eval": max_gradient_eval_steps,
        }  # fmt: skip

    @torch.no_grad()
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``; where nothing was found the clean image comes back."""
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        starts, begun = self._starts(model, wrapped, images, torch.arange(len(images), device=images.device), labels)
        attack = importlib.import_module("art.attacks.evasion").HopSkipJump(
            _art_classifier(model, images), norm=np.inf, batch_size=1000, verbose=False, **self.options
        )
        attack.theta = 1 / images[0].numel() ** 2
        _measure_noise_at_boundary(attack)
        result = images.clone()
        if bool(begun.any()):
            clean, truth = images[begun].cpu().numpy(), labels[begun].cpu().numpy()
            with _NumpySeed():
                moved = attack.generate(clean, truth, x_adv_init=starts[begun].cpu().numpy())
            ends = [
                attack._binary_search(end, image, int(label), np.inf, 0, 1)
                for end, image, label in zip(moved, clean, truth, strict=True)
            ]
            result[begun] = torch.from_numpy(np.stack(ends)).to(images)
        return settle(model, images, result, labels)


def _measure_noise_at_boundary(attack: Any) -> None:
    """Have ART's HopSkipJump take the radius of its noise from the sample that it puts the noise on."""
    measure, update = attack._compute_delta, attack._compute_update
    original: dict[str, Any] = {}

    def remember(*, current_sample: Any, original_sample: Any, **bounds: float) -> float:
        original["original_sample"] = original_sample
        return float(measure(current_sample=current_sample, original_sample=original_sample, **bounds))

    def from_boundary(*, current_sample: Any, delta: float, clip_min: float, clip_max: float, **rest: Any) -> Any:
        bounds = {"clip_min": clip_min, "clip_max": clip_max}
        delta = measure(current_sample=current_sample, **original, **bounds)
        return update(current_sample=current_sample, delta=delta, **bounds, **rest)

    attack._compute_delta, attack._compute_update = remember, from_boundary


class _NumpySeed:
    """Seeds numpy's global generator, which ART draws from, by torch's, and restores it."""

    def __enter__(self) -> None:
        self.state = np.random.get_state()
        np.random.seed(int(torch.randint(2**31, ())))

    def __exit__(self, *_: object) -> None:
        np.random.set_state(self.state)


class _InFloat32(nn.Module):
    """A model that takes float64 pixels too, as ART's HopSkipJump makes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.float())
        return logits


def _art_classifier(model: nn.Module, images: Tensor) -> Any:
    return importlib.import_module("art.estimators.classification").PyTorchClassifier(
        _InFloat32(model), loss=nn.CrossEntropyLoss(), input_shape=tuple(images.shape[1:]),
        nb_classes=count_classes(model, images), clip_values=(0, 1), device_type="gpu" if images.is_cuda else "cpu",
    )  # fmt: skip


class _CarliniWagnerToTheEnd(torchattacks.CW):
    """torchattacks' CW without its early stop: the cost that it looks at falls by a constant from step to step."""

    looks = 0

    def f(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the misclassification term ``[B]``, less a constant."""
        self.looks += 1
        term: Tensor = super().f(outputs, labels) - FALL * self.looks
        return term


class SoundCarliniWagner(TorchattacksCarliniWagner):
    """torchattacks' CW where its label mask and its early stop do no harm.

    Its logits must be positive (see ``ShiftedLogits``), and no pixel may be 0 or 1.
    """

    name = "CW (torchattacks), to the end"

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``."""
        options = {"c": self.c, "kappa": self.confidence, "steps": self.steps, "lr": self.learning_rate}
        return call_torchattacks(_CarliniWagnerToTheEnd(model, **options), images, labels)


class FoolboxCarliniWagner(TorchattacksCarliniWagner):
    """foolbox's CW with one constant and the pixel range [0,1]: the objective and the steps of torchattacks'."""

    name = "CW (foolbox), one constant"

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """See ``drs.attacks.contract.Attack``; where nothing was found the clean image comes back."""
        attack = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=1, steps=self.steps, stepsize=self.learning_rate, confidence=self.confidence,
            initial_const=self.c, abort_early=False,
        )  # fmt: skip
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        moved: Tensor = attack.run(wrapped, images, Misclassification(labels))
        nothing = ~moved.flatten(1).any(dim=1)  # foolbox returns black images there
        return torch.where(nothing.reshape(-1, 1, 1, 1), images, moved)


class ShiftedLogits(nn.Module):
    """A model whose logits are all larger by a constant, which changes no prediction and no margin.

    Args:
        model: Taken in eval mode.
        shift: Added to each logit.
    """

    def __init__(self, model: nn.Module, shift: float) -> None:
        super().__init__()
        self.model, self.shift = model, shift
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]``."""
        logits: Tensor = self.model(images) + self.shift
        return logits
