"""Whether library attacks agree with a second implementation where both solve the same problem.

The same problem is the same norm, radius, images and criterion: the share of images that stand up, in %, to any
perturbation which the attack found inside the ball. An attack on cross-entropy is compared with one on cross-entropy,
as the margin is another objective, with other optima; a search for the smallest perturbation, with attacks on the
margin at the radius itself. The library's attack has the settings of the strong suite, but sees all of the images;
``CHANGES`` says what is set otherwise.

Two questions are apart. Whether the library's attack is run right: it must agree with the second implementation. And
whether it is as strong as another attack: FAB is a heuristic that stops short of the smallest norms, in the
library and as written here after the paper, so it is held to the latter, and what both miss of PGD is told beside.

A random search is compared with the same search by another library, on average over several seeds. Square makes the
same draws in both; HopSkipJump draws for itself, and its median norms are told as well. torchattacks' CW has defects
(``drs.attacks.carlini_wagner``), so it is compared twice: for agreement with foolbox's at the same constant where they
do no harm, and for strength as the suite runs it, with foolbox's that has none of them.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from drs.attack_config import SLACK, AttackConfig, CWConfig, FABConfig, ProjectedConfig
from drs.attacks import Attack, build_attack, run_attack
from drs.attacks.second_library import (
    ArtHopSkipJump,
    ArtSquare,
    FoolboxCarliniWagner,
    ShiftedLogits,
    SoundCarliniWagner,
)
from drs.benchmarks.peers import INSTALL, MODULES, is_installed
from drs.errors import UserError
from drs.markdown import NONE, escape, fixed, table
from drs.suite_config import SuiteConfig, decisive_epsilons

POINTS = 1.0
"""What two implementations may differ by, in points of robust accuracy."""
CROSS_ENTROPY = "PGD on cross-entropy"
MARGIN = "PGD on the margin, class by class"
MARGIN_L2 = "PGD on margin and cross-entropy"
FAB = "FAB of this project"
ART_SQUARE = "Square of ART"
ART_HOP_SKIP_JUMP = "HopSkipJump of ART"
FIXED_CW = "CW of foolbox, same constant"
SOUND_CW = "cw_torchattacks, sound"
WIDE_CW = "CW of foolbox, same constant, wider pixel range"
SECOND: dict[str, AttackConfig | Callable[[Any], Attack]] = {
    CROSS_ENTROPY: ProjectedConfig("projected", "linf", objectives=["ce"], steps=100, restarts=3),
    MARGIN: ProjectedConfig("projected", "linf", objectives=["targeted_margin"], steps=100),
    MARGIN_L2: ProjectedConfig(
        "projected", "l2", objectives=["margin", "ce"], steps=60, restarts=3, relative_step_size=0.5
    ),
    FAB: FABConfig("fab", "linf", steps=100, final_steps=0),
    ART_SQUARE: lambda config: ArtSquare(config.n_queries, config.restarts, config.seed),
    ART_HOP_SKIP_JUMP: lambda config: ArtHopSkipJump(
        config.steps, config.initial_gradient_eval_steps, config.max_gradient_eval_steps
    ),
    SOUND_CW: lambda config: SoundCarliniWagner(config.c, config.confidence, config.steps, config.learning_rate),
    FIXED_CW: lambda config: FoolboxCarliniWagner(config.c, config.confidence, config.steps, config.learning_rate),
    WIDE_CW: lambda config: build_attack(
        CWConfig(
            "cw", "l2", binary_search_steps=1, steps=config.steps, step_sizes=[config.learning_rate],
            confidence=config.confidence, initial_const=config.c, targets=1,
        )
    ),
}  # fmt: skip
"""The second implementations. Ours, without the libraries' code: attacks at a radius, and FAB with the steps of the
suite's and, like the library's, without a final search; FMN shares a part with them, as the starts of its searches come
from a climb of ours. And other libraries', made from the config of the suite's attack. ``SOUND_CW`` is that attack, to
be run where its defects do no harm."""
PAIRS = {
    "apgd_ce": CROSS_ENTROPY, "apgd_t": MARGIN, "fab_t": FAB, "fmn_linf": MARGIN, "fmn_l2": MARGIN_L2,
    "cw": MARGIN_L2, "square": ART_SQUARE, "hop_skip_jump": ART_HOP_SKIP_JUMP, "cw_torchattacks": FIXED_CW,
}  # fmt: skip
"""A library attack of the strong suite -> what must agree with it, as it solves the same problem."""
STRONGER = {"fab_t": MARGIN, "cw_torchattacks": WIDE_CW}
"""A library attack -> an attack of another kind that finds more, shown beside it; they need not agree."""
NEED_ART = ("square", "hop_skip_jump")
"""Attacks whose second implementation is in an optional package."""
CHANGES: dict[str, dict[str, Any]] = {"square": {"n_queries": 500}, "hop_skip_jump": {"steps": 16}}
"""Settings of an attack that are not the suite's, because of what they cost; both implementations have them."""
IMAGES = {"hop_skip_jump": 200}
"""The most images for an attack that makes thousands of queries for each."""
SEEDS = {"square": 3, "hop_skip_jump": 18}
"""Over how many seeds a random search is averaged."""
INSIDE = 0.01
"""By how much pixels are drawn inside (0,1) for torchattacks' CW, which cannot move those at the ends."""
SHIFT = 100.0
"""By how much logits are raised for it, so that the runner-up's is not below the 0 which it reads for the label's."""


@dataclass(frozen=True)
class Agreement:
    """A library attack beside the second implementation, on one model at one radius.

    Attributes:
        model: The model's name.
        norm: ``linf`` or ``l2``.
        epsilon: The radius as the suite writes it.
        attack: The attack's name in the suite, or ``SOUND_CW``.
        second: A key of ``SECOND``.
        standing: What the attack leaves standing, in %, for each seed.
        standing_second: What the second implementation does.
        required: Whether the two must agree; if not, the difference tells what the attack misses of a stronger one.
        n: Images.
        medians: For two random searches for the smallest perturbation, the median norm of what each found, on average
            over the seeds.
    """

    model: str
    norm: str
    epsilon: str
    attack: str
    second: str
    standing: Sequence[float]
    standing_second: Sequence[float]
    required: bool = True
    n: int = 0
    medians: tuple[float, float] | None = None

    @property
    def difference(self) -> float:
        """Return by how many points the library's attack is the weaker one, on average over the seeds."""
        return _mean(self.standing) - _mean(self.standing_second)

    @property
    def half_width(self) -> float:
        """Return half of the 95 % interval of the difference over the seeds, by Student's t; NaN for one seed."""
        apart = [one - other for one, other in zip(self.standing, self.standing_second, strict=True)]
        if len(apart) == 1:
            return math.nan
        return float(stdtrit(len(apart) - 1, 0.975)) * statistics.stdev(apart) / math.sqrt(len(apart))

    @property
    def agrees(self) -> bool:
        """Return whether the two differ by no more than ``POINTS``."""
        return abs(self.difference) <= POINTS + 1e-9


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def without_missing(attacks: Iterable[str]) -> tuple[list[str], str]:
    """Return the attacks whose second implementation is installed, and a line on those left out, or nothing."""
    chosen = list(attacks)
    missing = [] if is_installed(MODULES["ART"]) else [attack for attack in chosen if attack in NEED_ART]
    if not missing:
        return chosen, ""
    return (
        [attack for attack in chosen if attack not in missing],
        f"left out: {', '.join(missing)}; the second implementation is ART's, which is not installed; {INSTALL}",
    )


def check_known(attacks: Iterable[str]) -> None:
    """Raise ``UserError`` for an attack that is not in ``PAIRS``."""
    for attack in attacks:
        if attack not in PAIRS:
            raise UserError(f"{attack}: has no second implementation here; one of {', '.join(PAIRS)} has")


def compare(
    name: str, data: str, model: nn.Module, images: Tensor, labels: Tensor, suite: SuiteConfig, attacks: Iterable[str]
) -> Iterator[Agreement]:
    """Yield an agreement for each attack and decisive radius of the suite, one as soon as it is there.

    Where a stronger attack is known, it follows at the same radius, as not required.

    Args:
        name: The model's name.
        data: The data set's name, by which the suite has its radii.
        model: In eval mode; pixels in [0,1] in, logits out.
        images: ``[N, C, H, W]`` float32 in [0,1]; the first ``IMAGES`` of them for an attack that is named there.
        labels: ``[N]`` int64.
        suite: Where attacks, radii and the batch size come from.
        attacks: Keys of ``PAIRS``.

    Raises:
        UserError: For an attack that is not in ``PAIRS`` or not in the suite.
    """
    chosen = list(attacks)
    check_known(chosen)
    for attack in chosen:
        if attack not in suite.attacks:
            raise UserError(f"{attack}: the {suite.name} suite has no such attack")
    as_is = _Standing(model, images, labels, suite.batch_size)
    sound = _Standing(ShiftedLogits(model, SHIFT), INSIDE + (1 - 2 * INSIDE) * images, labels, suite.batch_size)
    for attack in chosen:
        config = replace(suite.attacks[attack], **CHANGES.get(attack, {}))
        configs = [replace(config, seed=config.seed + seed) for seed in range(SEEDS.get(attack, 1))]
        n = min(IMAGES.get(attack, len(images)), len(images))
        for epsilon in decisive_epsilons(suite, data, config.norm):
            for seconds, required in ((PAIRS, True), (STRONGER, False)):
                if attack not in seconds:
                    continue
                second = seconds[attack]
                problem, library = (sound, SOUND_CW) if second == FIXED_CW else (as_is, attack)
                found = [problem.after(library, one, epsilon.value, n) for one in configs]
                found_second = [problem.after(second, one, epsilon.value, n) for one in configs]
                medians = None
                if attack in IMAGES:
                    medians = (_mean([one.median for one in found]), _mean([one.median for one in found_second]))
                yield Agreement(
                    name, config.norm, epsilon.label, library, second, [one.percent(epsilon.value) for one in found],
                    [one.percent(epsilon.value) for one in found_second], required, n, medians,
                )  # fmt: skip


@dataclass(frozen=True)
class _Found:
    """What an attack made of N images: whether the model is still right ``[N]``, and the perturbations' norms."""

    right: Tensor
    distance: Tensor

    def percent(self, epsilon: float) -> float:
        """Return the share of images, in %, that the model still gets right within ``epsilon``."""
        return 100 * float((self.right | (self.distance > epsilon + SLACK)).double().mean())

    @property
    def median(self) -> float:
        """Return the median norm over the images, infinite where nothing was found."""
        return float(self.distance.masked_fill(self.right, torch.inf).median())


class _Standing:
    """What attacks leave standing of some images; an attack that several ask for is made once."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.model, self.images, self.labels, self.batch_size = model, images, labels, batch_size
        self._found: dict[str, _Found] = {}

    def after(self, name: str, config: AttackConfig, epsilon: float, n: int) -> _Found:
        """Attack the first ``n`` images by a key of ``SECOND``, made from the library's config, or by the library."""
        made = SECOND.get(name, config)
        attack = build_attack(made) if isinstance(made, AttackConfig) else made(config)
        # A search for the smallest perturbation does not ask for the radius.
        key = f"{name if callable(made) else made}{config if callable(made) else ''}{n}{epsilon * attack.bounded}"
        if key not in self._found:
            seed = config.seed if callable(made) else made.seed
            outcome = run_attack(
                attack, self.model, self.images[:n], self.labels[:n], epsilon=epsilon, batch_size=self.batch_size,
                seed=seed,
            )  # fmt: skip
            self._found[key] = _Found(outcome.logits.argmax(dim=1) == self.labels[:n].cpu(), outcome.distance)
        return self._found[key]


def agreement_table(rows: Iterable[Agreement]) -> str:
    """Lay agreements out as a Markdown table.

    Both columns of robust accuracy are in %; the difference is in points, with half of its 95 % interval over the seeds
    where there are several.
    """
    headers = ["model", "problem", "n", "attack", "beside", "for", "attack %", "beside %", "points", "agree",
               "over seeds", "median norms"]  # fmt: skip
    cells = (
        [escape(row.model), f"{row.norm} {row.epsilon}", str(row.n), escape(row.attack), escape(row.second),
         "agreement" if row.required else "strength", fixed(_mean(row.standing)), fixed(_mean(row.standing_second)),
         fixed(row.difference, sign=True) + _margin(row), "yes" if row.agrees else "no", _ranges(row),
         " / ".join(fixed(norm, 4) for norm in row.medians) if row.medians else NONE]
        for row in rows
    )  # fmt: skip
    return table(headers, cells, align="llrlllrrrlll")


def _margin(row: Agreement) -> str:
    return "" if math.isnan(row.half_width) else f" ± {fixed(row.half_width)}"


def _ranges(row: Agreement) -> str:
    """Return how many seeds, and the smallest and largest share of the attack and of the second; a dash for one."""
    if len(row.standing) == 1:
        return NONE
    ranges = (f"{fixed(min(shares))} to {fixed(max(shares))}" for shares in (row.standing, row.standing_second))
    return f"{len(row.standing)}: {' / '.join(ranges)}"
