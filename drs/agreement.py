"""Whether library attacks agree with a second implementation where both solve the same problem.

The same problem is the same norm, radius, images and criterion: the share of images that stand up, in %, to any
perturbation which the attack found inside the ball. An attack on cross-entropy is compared with one on cross-entropy,
as the margin is another objective, with other optima; a search for the smallest perturbation, with attacks on the
margin at the radius itself. The library's attack has the settings of the strong suite, but sees all of the images.

Two questions are apart. Whether the library's attack is run right: it must agree with the second implementation. And
whether it is as strong as another attack: FAB is a heuristic that stops short of the smallest norms, in the
library and as written here after the paper, so it is held to the latter, and what both miss of PGD is told beside.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from drs.attack_config import SLACK, AttackConfig, FABConfig, ProjectedConfig
from drs.attacks import build_attack, is_bounded, run_attack
from drs.errors import UserError
from drs.markdown import escape, fixed, table
from drs.suite_config import SuiteConfig, decisive_epsilons

POINTS = 1.0
"""What two implementations may differ by, in points of robust accuracy."""
CROSS_ENTROPY = "PGD on cross-entropy"
MARGIN = "PGD on the margin, class by class"
MARGIN_L2 = "PGD on margin and cross-entropy"
FAB = "FAB of this project"
SECOND: dict[str, AttackConfig] = {
    CROSS_ENTROPY: ProjectedConfig("projected", "linf", objectives=["ce"], steps=100, restarts=3),
    MARGIN: ProjectedConfig("projected", "linf", objectives=["targeted_margin"], steps=100),
    MARGIN_L2: ProjectedConfig(
        "projected", "l2", objectives=["margin", "ce"], steps=60, restarts=3, relative_step_size=0.5
    ),
    FAB: FABConfig("fab", "linf", steps=100, final_steps=0),
}
"""The second implementations, ours, without the libraries' code: attacks at a radius, and FAB with the steps of the
suite's and, like the library's, without a final search. FMN shares a part with them: the starts of its searches come
from a climb of ours."""
PAIRS = {
    "apgd_ce": CROSS_ENTROPY, "apgd_t": MARGIN, "fab_t": FAB, "fmn_linf": MARGIN, "fmn_l2": MARGIN_L2,
    "cw": MARGIN_L2,
}  # fmt: skip
"""A library attack of the strong suite -> what must agree with it, as it solves the same problem."""
STRONGER = {"fab_t": MARGIN}
"""A library attack -> an attack of another kind that finds more, shown beside it; they need not agree."""


@dataclass(frozen=True)
class Agreement:
    """A library attack beside the second implementation, on one model at one radius.

    Attributes:
        model: The model's name.
        norm: ``linf`` or ``l2``.
        epsilon: The radius as the suite writes it.
        attack: The attack's name in the suite.
        second: A key of ``SECOND``.
        standing: What the attack leaves standing, in %.
        standing_second: What the second implementation does.
        required: Whether the two must agree; if not, the difference tells what the attack misses of a stronger one.
    """

    model: str
    norm: str
    epsilon: str
    attack: str
    second: str
    standing: float
    standing_second: float
    required: bool = True

    @property
    def difference(self) -> float:
        """Return by how many points the library's attack is the weaker one."""
        return self.standing - self.standing_second

    @property
    def agrees(self) -> bool:
        """Return whether the two differ by no more than ``POINTS``."""
        return abs(self.difference) <= POINTS + 1e-9


def compare(
    name: str, data: str, model: nn.Module, images: Tensor, labels: Tensor, suite: SuiteConfig, attacks: Iterable[str]
) -> Iterator[Agreement]:
    """Yield an agreement for each attack and decisive radius of the suite, one as soon as it is there.

    Where a stronger attack is known, it follows at the same radius, as not required.

    Args:
        name: The model's name.
        data: The data set's name, by which the suite has its radii.
        model: In eval mode; pixels in [0,1] in, logits out.
        images: ``[N, C, H, W]`` float32 in [0,1].
        labels: ``[N]`` int64.
        suite: Where attacks, radii and the batch size come from.
        attacks: Keys of ``PAIRS``.

    Raises:
        UserError: For an attack that is not in ``PAIRS`` or not in the suite.
    """
    chosen = list(attacks)
    for attack in chosen:
        if attack not in PAIRS:
            raise UserError(f"{attack}: has no second implementation here; one of {', '.join(PAIRS)} has")
        if attack not in suite.attacks:
            raise UserError(f"{attack}: the {suite.name} suite has no such attack")
    standing = _Standing(model, images, labels, suite.batch_size)
    for attack in chosen:
        config = suite.attacks[attack]
        for epsilon in decisive_epsilons(suite, data, config.norm):
            left = standing.percent(config, epsilon.value)
            for seconds, required in ((PAIRS, True), (STRONGER, False)):
                if attack in seconds:
                    second = seconds[attack]
                    yield Agreement(
                        name, config.norm, epsilon.label, attack, second, left,
                        standing.percent(SECOND[second], epsilon.value), required,
                    )  # fmt: skip


class _Standing:
    """What attacks leave standing of some images; an attack that several ask for is made once."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.model, self.images, self.labels, self.batch_size = model, images, labels, batch_size
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def percent(self, config: AttackConfig, epsilon: float) -> float:
        """Return the share of images, in %, that the model still gets right within ``epsilon``."""
        right, distance = self._attacked(config, epsilon)
        return 100 * float((right | (distance > epsilon + SLACK)).double().mean())

    def _attacked(self, config: AttackConfig, epsilon: float) -> tuple[Tensor, Tensor]:
        # A search for the smallest perturbation does not ask for the radius.
        key = f"{config}{epsilon if is_bounded(config) else ''}"
        if key not in self._found:
            outcome = run_attack(
                build_attack(config), self.model, self.images, self.labels, epsilon=epsilon,
                batch_size=self.batch_size, seed=config.seed,
            )  # fmt: skip
            self._found[key] = outcome.logits.argmax(dim=1) == self.labels.cpu(), outcome.distance
        return self._found[key]


def agreement_table(rows: Iterable[Agreement]) -> str:
    """Lay agreements out as a Markdown table; both columns of robust accuracy are in %, the difference in points."""
    headers = ["model", "problem", "attack", "beside", "for", "attack %", "beside %", "points", "within one"]
    cells = (
        [escape(row.model), f"{row.norm} {row.epsilon}", escape(row.attack), escape(row.second),
         "agreement" if row.required else "strength", fixed(row.standing), fixed(row.standing_second),
         fixed(row.difference, sign=True), "yes" if row.agrees else "no"]
        for row in rows
    )  # fmt: skip
    return table(headers, cells, align="lllllrrrl")
