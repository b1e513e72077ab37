"""The paper suite as this project runs it beside the same attacks called through torchattacks by hand."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from drs.attack_config import AttackConfig, CWTorchattacksConfig, FGSMConfig, PGDConfig, is_bounded
from drs.attacks import build_attack, run_attack
from drs.attacks.contract import CleanLogits, predict
from drs.attacks.isolation import full_precision, seeded
from drs.benchmarks.attacks import count_looks, look
from drs.benchmarks.harness import Machine, Row, count_flops, ratio_of_medians, time_in_turn

BY_HAND = (FGSMConfig, PGDConfig, CWTorchattacksConfig)
"""The attacks of the paper suite that torchattacks has."""
REPEATS = 3
OURS, THEIRS = "the suite", "torchattacks by hand"
SHARED, BARE = "clean logits shared over the cells", "the attacks alone"
TRIED = {
    SHARED: "the images are predicted, and the model is checked, once for all cells; no number changes",
    BARE: "the same calls with the weights frozen, but no check, and no prediction of the clean images: all of them "
    "are attacked",
}


@dataclass
class _Suite:
    """The cells of a suite on one model, and the ways to compute them.

    Attributes:
        model: In eval mode, on the device of the images.
        images: ``[N, C, H, W]`` in [0,1].
        labels: ``[N]``.
        batch_size: Samples per batch.
        cells: Name, attack and epsilon of each cell; infinite without a bound.
        standing: The share of images that each cell left standing when it was last computed, by the way.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    batch_size: int
    cells: list[tuple[str, AttackConfig, float]]
    standing: dict[str, list[float]] = field(default_factory=dict)

    def ours(self, way: str = OURS) -> None:
        """Compute every cell as an evaluation does; ``SHARED`` with the clean logits of the first."""
        self.standing[way] = []
        clean = CleanLogits(self.model, self.images) if way == SHARED else None
        for _, config, epsilon in self.cells:
            outcome = run_attack(
                build_attack(config), self.model, self.images, self.labels, epsilon=epsilon,
                batch_size=self.batch_size, seed=0, clean=clean,
            )  # fmt: skip
            right = outcome.logits.argmax(dim=1) == self.labels.cpu()
            self.standing[way].append(float(right.float().mean()))

    def theirs(self) -> None:
        """Compute every cell as a user of torchattacks does, in the precision that ours have."""
        torch.manual_seed(0)
        with full_precision():
            self._by_hand(THEIRS)

    def bare(self) -> None:
        """Compute every cell by hand with the weights frozen, as ours has them."""
        with seeded(self.model, 0):
            self._by_hand(BARE)

    def _by_hand(self, way: str) -> None:
        self.standing[way] = []
        for _, config, epsilon in self.cells:
            attack = _by_hand(config, self.model, epsilon)
            right = 0
            for part in torch.arange(len(self.images), device=self.images.device).split(self.batch_size):
                moved = attack(self.images[part], self.labels[part])
                with torch.no_grad():
                    right += int((self.model(moved).argmax(dim=1) == self.labels[part]).sum())
            self.standing[way].append(right / len(self.images))
        self.model.zero_grad(set_to_none=True)  # torchattacks' CW leaves gradients of the weights behind

    def beside(self, way: str) -> str:
        """Return what each cell left standing one way and by hand, in words."""
        return ", ".join(
            f"{name}{f' at {epsilon:g}' if np.isfinite(epsilon) else ''} {100 * one:.1f} and {100 * other:.1f} %"
            for (name, _, epsilon), one, other in zip(
                self.cells, self.standing[way], self.standing[THEIRS], strict=True
            )
        )


def suite_rows(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: dict[str, AttackConfig],
    epsilons: Sequence[float],
    batch_size: int,
    machine: Machine,
    *,
    described: str,
    target: str,
) -> Iterator[Row]:
    """Yield the paper suite as this project runs it beside the same attacks called through torchattacks.

    Then what was tried to make it faster, each beside the same calls by hand.

    Args:
        model: In eval mode, on the device of the images.
        images: ``[N, C, H, W]`` in [0,1].
        labels: ``[N]``.
        attacks: Of the suite, by name; those that torchattacks lacks are left out on both sides.
        epsilons: Of the bounded ones, in pixel units.
        batch_size: Samples per batch, on both sides.
        machine: What the device can do at best, for the floor.
        described: The model, for the rows.
        target: Of the ratio of times, theirs over ours.
    """
    shared = {name: config for name, config in attacks.items() if isinstance(config, BY_HAND)}
    cells: list[tuple[str, AttackConfig, float]] = [
        (name, config, epsilon)
        for name, config in shared.items()
        for epsilon in (epsilons if is_bounded(config) else [float("inf")])
    ]
    suite = _Suite(model, images, labels, batch_size, cells)
    ways: dict[str, Callable[[], None]] = {
        OURS: suite.ours, THEIRS: suite.theirs, SHARED: partial(suite.ours, SHARED), BARE: suite.bare,
    }  # fmt: skip
    device = images.device.type
    # The first call on a card pays for its start.
    seconds = time_in_turn(list(ways.values()), REPEATS, warmup=int(device == "cuda"), device=device)
    taken = dict(zip(ways, seconds.T, strict=True))
    medians = {way: float(np.median(column)) for way, column in taken.items()}
    left_out = ", ".join(name for name in attacks if name not in shared)
    steps = _measure_steps(suite, machine)
    row = Row(
        "attacks", f"paper suite, {len(images)} images, batches of {batch_size}, {described}", OURS, THEIRS, "s",
        medians[OURS], medians[THEIRS], *ratio_of_medians(taken[THEIRS], taken[OURS]), REPEATS, target, device,
        torch.get_num_threads(), least=steps.least, floor=steps.floor, reason=steps.reason(medians),
        note=f"standing with us and by hand: {suite.beside(OURS)}; without {left_out}, which torchattacks does not "
        "have",
    )  # fmt: skip
    yield row
    for way, note in TRIED.items():
        ratio, low, high = ratio_of_medians(taken[THEIRS], taken[way])
        yield replace(
            row, ours=way, ours_median=medians[way], ratio=ratio, low=low, high=high, target="", tried=True, floor="",
            reason="", note=f"{note}; standing this way and by hand: {suite.beside(way)}",
        )  # fmt: skip


@dataclass(frozen=True)
class _Steps:
    """The gradient steps of all cells of a suite.

    Attributes:
        ours: Gradients that we ask for, an image.
        theirs: By hand.
        repeated: Of ours, those that are asked for again, at the clean images.
        n: Images.
        operations: Multiplications and additions of a pass through the model and back, an image.
        seconds: Of such a pass, an image, in batches as the suite has them.
        machine: What the device can do at best.
    """

    ours: float
    theirs: float
    repeated: float
    n: int
    operations: float
    seconds: float
    machine: Machine

    @property
    def arithmetic(self) -> float:
        """Seconds that the operations of a pass of one image take at the best rate."""
        return self.operations / (1e9 * self.machine.gigaflops)

    @property
    def least(self) -> float:
        """Seconds that no implementation of these attacks can do without."""
        return float((self.ours - self.repeated) * self.n * self.arithmetic)

    @property
    def floor(self) -> str:
        """The floor in words."""
        return (
            f"{self.ours - self.repeated:.1f} gradients an image in all cells, where what the model has wrong is left "
            f"alone and the gradient at the clean images is made once, each {self.operations / 1e6:.3g} million "
            f"multiplications and additions through the model and back, at {self.machine.gigaflops:.3g} GFLOP/s"
        )

    def reason(self, medians: dict[str, float]) -> str:
        """Return what keeps us from being faster, from the median seconds of each way."""
        ours, theirs, shared, bare = (medians[way] for way in (OURS, THEIRS, SHARED, BARE))
        spent = self.ours * self.n * self.seconds
        return (
            "The suite's FGSM, PGD and CW are torchattacks' own, because that is what users of the paper's tool run. "
            "Images that have fallen cannot be dropped: torchattacks' FGSM and PGD return the last iterate of every "
            "step on every image, and its CW steps and stops on the loss of the whole batch. So we ask for "
            f"{self.ours:.1f} gradients an image, and {self.theirs:.1f} are asked for by hand. At the floor the ratio "
            f"would be {theirs / self.least:.3g}; but both pay for the same pass, {1e3 * self.seconds:.3g} ms an "
            f"image, {self.seconds / self.arithmetic:.3g} times its arithmetic, and such passes come to "
            f"{100 * spent / ours:.0f} % of our {ours:.3g} s. What could be left out is small: {self.repeated:.1f} "
            "gradients an image are the one at the clean image again, which FGSM asks for at each epsilon; clean "
            f"logits and checks shared over the cells change the time by {100 * (shared / ours - 1):+.1f} %; and the "
            f"attacks alone, without any check and with the weights frozen, take {bare:.3g} s, where by hand it is "
            f"{theirs:.3g} s."
        )


def _measure_steps(suite: _Suite, machine: Machine) -> _Steps:
    """Count the gradients of a suite on both sides and the operations of one, and time one."""
    model, images, labels = suite.model, suite.images, suite.labels
    n = min(suite.batch_size, len(images))

    def one_pass() -> None:
        look(model, images[:n], labels[:n])

    with seeded(model, 0):
        operations = count_flops(one_pass)
        seconds = float(np.median(time_in_turn([one_pass], 5 * REPEATS, device=images.device.type)))
    at_clean = sum(_starts_at_the_clean_image(config) for _, config, _ in suite.cells)
    right = float((predict(model, images, "clean images").argmax(dim=1) == labels).float().mean())
    return _Steps(
        count_looks(model, suite.ours) / len(images), count_looks(model, suite.theirs) / len(images),
        max(at_clean - 1, 0) * right, len(images), operations / n, seconds / n, machine,
    )  # fmt: skip


def _starts_at_the_clean_image(config: AttackConfig) -> bool:
    """Return whether the first gradient that an attack asks for is that of cross-entropy at the clean image."""
    return isinstance(config, FGSMConfig) or (isinstance(config, PGDConfig) and not config.random_start)


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
