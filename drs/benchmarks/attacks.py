"""Gradient steps in the Linf ball by three libraries and by ours, on the same model, images, epsilon and steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drs.attacks import climbing
from drs.attacks.contract import predict
from drs.attacks.isolation import isolated, seeded
from drs.attacks.projected import ProjectedAttack
from drs.benchmarks.harness import Machine, Row, count_flops, ratio_of_medians, time_in_turn
from drs.benchmarks.peers import INSTALL, MODULES, PEERS, STEPS, Perturb, is_installed

REPEATS = 5
SMALL_BATCH = 100


def _ours(objective: str) -> Perturb:
    attack = ProjectedAttack(objective, [objective], "linf", STEPS, 1, 1.0, random_start=True)
    return attack.perturb


@dataclass
class _Contest:
    """Everybody's attack on the same images, and what came of it.

    Attributes:
        model: In eval mode, on the device of the images.
        images: ``[N, C, H, W]`` in [0,1].
        labels: ``[N]``.
        epsilon: Radius in pixel units.
        accuracy: Of the model under each attack, by its name.
        failed: What each library raised that did, by its name.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    epsilon: float
    accuracy: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def run_own(self, name: str, perturb: Perturb) -> None:
        """Run one of our attacks as an evaluation does."""
        with isolated(self.model, 0):
            moved = perturb(self.model, self.images, self.labels, self.epsilon).detach()
        self._score(name, moved)

    def run_peer(self, name: str, perturb: Perturb) -> None:
        """Run a library's attack in the same precision, without our watch on the gradients; once failed, do nothing."""
        if name in self.failed:
            return
        try:
            with seeded(self.model, 0):
                moved = perturb(self.model, self.images, self.labels, self.epsilon).detach()
            self._score(name, moved)
        except Exception as error:  # whatever a library raises costs its own rows only
            self.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _score(self, name: str, moved: Tensor) -> None:
        found = predict(self.model, moved, name).argmax(dim=1) == self.labels
        self.accuracy[name] = float(found.float().mean())


def attack_rows(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    machine: Machine,
    *,
    described: str,
    target: str,
) -> Iterator[Row]:
    """Yield our PGD on cross-entropy and on the margin, each beside every peer; the target is that of the fastest.

    A library that is not installed, or that fails, has rows that say so. Where none is left, the first of them has the
    target, so that it counts as not measured.

    Args:
        model: In eval mode, on the device of the images.
        images: ``[N, C, H, W]`` in [0,1], attacked in one batch by everybody.
        labels: ``[N]``.
        epsilon: Radius in pixel units.
        machine: What the device can do at best, for the floors.
        described: The model, for the rows.
        target: Of the ratio of images a second, ours over the fastest peer's.
    """
    contest = _Contest(model, images, labels, epsilon)
    own = {"our PGD": _ours("ce"), "our margin PGD": _ours("margin")}
    installed = {name: peer for name, peer in PEERS.items() if is_installed(MODULES[name])}
    runs = [partial(contest.run_peer, name, peer) for name, peer in installed.items()]
    runs += [partial(contest.run_own, name, attack) for name, attack in own.items()]
    device = images.device.type
    seconds = time_in_turn(runs, REPEATS, warmup=1, device=device)
    columns = dict(zip([*installed, *own], seconds.T, strict=True))
    rate = {name: len(images) / float(np.median(column)) for name, column in columns.items()}
    measured = [name for name in installed if name not in contest.failed]
    decisive = max(measured, key=lambda name: rate[name], default=next(iter(PEERS)))
    for name, attack in own.items():
        row = Row(
            "attacks", f"PGD, {STEPS} steps, {len(images)} images, epsilon {epsilon:g}, {described}", name, "",
            "images/s", rate[name], None, None, None, None, REPEATS, "", device, torch.get_num_threads(),
        )  # fmt: skip
        looks = _measure_looks(contest, attack, machine)
        lowest = min((contest.accuracy[peer] for peer in measured), default=1.0)
        held = contest.accuracy[name] <= lowest
        standing = ", ".join(f"{each} {100 * contest.accuracy[each]:.1f} %" for each in [*measured, *own])
        for peer in PEERS:
            row = replace(row, theirs=peer, target=target if peer == decisive else "")
            if peer not in measured:
                failure = contest.failed.get(peer)
                yield replace(
                    row, note=f"{peer} failed with {failure}" if failure
                    else f"{peer} is not installed; {INSTALL} installs it",
                )  # fmt: skip
                continue
            ratio, low, high = ratio_of_medians(columns[peer], columns[name])
            yield replace(
                row, theirs_median=rate[peer], ratio=ratio, low=low, high=high, least=looks.most, floor=looks.floor,
                held=held,
                note=f"{'no weaker' if held else 'weaker than the strongest of them'}; standing: {standing}",
                reason=("" if held else "It leaves more images standing than the strongest of them. ")
                + looks.reason(rate[name], rate[peer]),
            )  # fmt: skip


@dataclass(frozen=True)
class _Looks:
    """What an attack's looks at an image cost: passes through the model and back to the image.

    Attributes:
        remaining: Looks an image that remain when what has fallen is left alone, as we do.
        fewest: The same, were it left alone at once; we do that on a CPU only.
        operations: Multiplications and additions of a look at one image.
        seconds: Of our own look at one image, in one batch with all others.
        machine: What the device can do at best.
    """

    remaining: float
    fewest: float
    operations: float
    seconds: float
    machine: Machine

    @property
    def arithmetic(self) -> float:
        """Seconds that the operations of a look at one image take at the best rate."""
        return self.operations / (1e9 * self.machine.gigaflops)

    @property
    def most(self) -> float:
        """Images a second that no implementation can go beyond."""
        return float(1 / (self.fewest * self.arithmetic))

    @property
    def floor(self) -> str:
        """The floor in words."""
        return (
            f"{self.fewest:.1f} of {STEPS} looks an image remain when what has fallen is left alone, each "
            f"{self.operations / 1e6:.3g} million multiplications and additions through the model and back, at "
            f"{self.machine.gigaflops:.3g} GFLOP/s"
        )

    def reason(self, rate: float, theirs: float) -> str:
        """Return what the distance to a target is made of.

        Args:
            rate: Ours, images a second.
            theirs: A library's.
        """
        spent = self.remaining * self.seconds * rate
        return (
            f"At the floor the ratio would be {self.most / theirs:.3g}; but everybody pays for the same pass through "
            f"the model and back, and it takes longer than its arithmetic. At the time of our own pass "
            f"({1e3 * self.seconds:.3g} ms an image, {self.seconds / self.arithmetic:.3g} times its arithmetic) the "
            f"ratio would be {1 / (self.remaining * self.seconds) / theirs:.3g}, since a library that takes every step "
            f"looks {STEPS / self.remaining:.3g} times as often ({STEPS} times, we {self.remaining:.1f}); such passes "
            f"come to {100 * spent:.0f} % of our time. An image that never falls must be looked at in every step by "
            "all of them."
        )


def _measure_looks(contest: _Contest, attack: Perturb, machine: Machine) -> _Looks:
    """Count the looks of an attack and the operations of one, and time one."""
    model, images, labels = contest.model, contest.images, contest.labels
    one_pass = partial(look, model, images, labels)
    with seeded(model, 0):
        operations = count_flops(one_pass)
        seconds = np.median(time_in_turn([one_pass], 3 * REPEATS, device=images.device.type))
    run = partial(attack, model, images, labels, contest.epsilon)
    with seeded(model, 0):
        remaining = count_looks(model, run) / len(images)
    before, climbing.DROP_AT_ONCE = climbing.DROP_AT_ONCE, True
    try:
        with seeded(model, 0):
            fewest = count_looks(model, run) / len(images)
    finally:
        climbing.DROP_AT_ONCE = before
    return _Looks(remaining, fewest, operations / len(images), float(seconds) / len(images), machine)


def count_looks(model: nn.Module, function: Callable[[], object]) -> int:
    """Return for how many images, counted at every pass, a call asks the model for a gradient."""
    asked = 0

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal asked
        asked += len(inputs[0]) if torch.is_grad_enabled() and inputs[0].requires_grad else 0

    watch = model.register_forward_pre_hook(count)
    try:
        function()
    finally:
        watch.remove()
    return asked


def look(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Pass once through the model and back to the images."""
    leaf = images.clone().requires_grad_()
    # Not torch.autograd.grad, which operations cannot be counted in.
    F.cross_entropy(model(leaf), labels, reduction="sum").backward(inputs=[leaf])


def look_rows(model: nn.Module, images: Tensor, labels: Tensor, *, described: str) -> Iterator[Row]:
    """Yield what was tried to make a look cheaper, each beside one look at all images in one batch.

    Arguments as in ``attack_rows``.
    """
    device = images.device.type
    tried = ways_to_look(model, images, labels, device)
    with seeded(model, 0):
        calls = (call for call, _ in tried.values())
        seconds = time_in_turn([lambda: look(model, images, labels), *calls], REPEATS, device=device)
    for which, (name, (_, note)) in enumerate(tried.items(), start=1):
        ratio, low, high = ratio_of_medians(seconds[:, which], seconds[:, 0])
        yield Row(
            "attacks", f"one look at {len(images)} images, {described}", name, "all in one batch, there and back", "ms",
            1e3 * float(np.median(seconds[:, which])), 1e3 * float(np.median(seconds[:, 0])), ratio, low, high, REPEATS,
            "", device, torch.get_num_threads(), note=note, tried=True,
        )  # fmt: skip


def ways_to_look(
    model: nn.Module, images: Tensor, labels: Tensor, device: str
) -> dict[str, tuple[Callable[[], None], str]]:
    """Return other ways to look at images, each with a note, by name; oneDNN plays a part on ``cpu`` alone."""

    def in_parts() -> None:
        for part in torch.arange(len(images), device=images.device).split(SMALL_BATCH):
            look(model, images[part], labels[part])

    def without_onednn() -> None:
        with torch.backends.mkldnn.flags(enabled=False):
            look(model, images, labels)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    ways = {
        f"in batches of {SMALL_BATCH}": (in_parts, "whose activations fit a cache better"),
        "without oneDNN": (without_onednn, "PyTorch's own convolutions; their rounding differs too"),
        "a look without its way back": (
            forward,
            "the attack asked for one more for every objective, to confirm the best iterate, and for the gradient of "
            f"the last iterate, which goes nowhere; it does neither any more, of {STEPS + 1} looks",
        ),
    }  # fmt: skip
    return {name: way for name, way in ways.items() if device == "cpu" or name != "without oneDNN"}
