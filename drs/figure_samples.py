"""Single images under attack: clean, perturbation, adversarial, and the softmax before and after."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from drs.figure_style import WIDTH, styled
from drs.marks import MARK

BEFORE, AFTER = "#56B4E9", "#D55E00"  # Okabe and Ito's (2008) sky blue and vermilion: light and dark in grey
ROW_HEIGHT = 0.92  # inches
LINE = 110  # characters of a title
NORMS = {"linf": "L∞", "l2": "L2"}
HEADINGS = ("clean", "perturbation", "adversarial", "softmax (probability)")


@dataclass(frozen=True)
class AttackedSamples:
    """Samples before and after an attack.

    Attributes:
        images: Pixels in [0,1], ``[N, C, H, W]``.
        adversarial: The same after the attack.
        before: Softmax of the clean images, ``[N, K]``.
        after: Softmax of the adversarial ones.
        labels: True classes, ``[N]``.
        attack: The attack's name, such as ``PGD (torchattacks)``.
        norm: The norm of its bound, ``linf`` or ``l2``.
    """

    images: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    before: NDArray[np.float32]
    after: NDArray[np.float32]
    labels: NDArray[np.int64]
    attack: str
    norm: str

    def __len__(self) -> int:
        return len(self.labels)


@styled
def draw_samples(
    models: Mapping[str, AttackedSamples],
    *,
    epsilon: float,
    class_names: Sequence[str] | None = None,
    failed_checks: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Draw a row per sample, model by model; the title names the attack and its bound.

    The perturbation is shown with grey for no change, black for a pixel that is darker by ``epsilon`` or more, and
    white for one that is brighter by as much. The label has a bar with a dark edge; a title in bold says which class
    the attacked image is taken for.

    Args:
        models: The samples of each model, under its name.
        epsilon: The bound of the attack in pixel units.
        class_names: Names of the K classes; their numbers by default.
        failed_checks: Of models that fail sanity checks, the checks' names; such a model is marked, and a title says
            what it fails.

    Returns:
        A figure of the text width.

    Raises:
        ValueError: If there are no samples, or not all were made by one attack.
    """
    rows = [(name, samples, place) for name, samples in models.items() for place in range(len(samples))]
    if not rows:
        raise ValueError("no samples to draw")
    attacks = {(samples.attack, samples.norm) for samples in models.values()}
    if len(attacks) > 1:
        raise ValueError(f"samples of one attack must be drawn together, got those of {sorted(attacks)}")
    ((attack, norm),) = attacks
    failed = {name: checks for name, checks in (failed_checks or {}).items() if name in models and checks}
    names = list(class_names or map(str, range(rows[0][1].before.shape[1])))
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), 4, squeeze=False, width_ratios=[1, 1, 1, 3.2])
    for column, heading in enumerate(HEADINGS):
        axes[0, column].set_title(heading if column != 1 else f"{heading}, ±{epsilon:.3g}", fontsize=8)
    for own, (name, samples, place) in zip(axes, rows, strict=True):
        _draw_images(own[:3], samples, place, epsilon)
        _draw_bars(own[3], samples, place, names)
        marked = f"{name} {MARK}" if name in failed else name
        own[0].set_ylabel(f"{marked}\n{names[samples.labels[place]]}", rotation=0, ha="right", va="center")
        found = int(samples.after[place].argmax())
        held = found == samples.labels[place]
        own[2].set_xlabel(f"still {names[found]}" if held else f"now {names[found]}", weight="bold", labelpad=2)
    titles = [f"attack: {attack}, {NORMS[norm]} bound {epsilon:.3g}"]
    if failed:
        told = "; ".join(f"{name} fails {', '.join(checks)}" for name, checks in failed.items())
        titles += textwrap.wrap(f"{MARK} sanity checks: {told}", LINE)
    figure.suptitle("\n".join(titles))
    figure.legend(*axes[0, 3].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    for axis in axes[:-1, 3]:
        axis.set_xticklabels([])
    axes[-1, 3].set_xlabel("class")
    return figure


def _draw_images(axes: Sequence[Any], samples: AttackedSamples, place: int, epsilon: float) -> None:
    clean, adversarial = samples.images[place], samples.adversarial[place]
    change = np.clip(0.5 + (adversarial - clean) / (2 * epsilon), 0, 1)
    for axis, image in zip(axes, (clean, change, adversarial), strict=True):
        axis.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set(visible=True, color="0.7", linewidth=0.5)


def _draw_bars(axis: Any, samples: AttackedSamples, place: int, names: Sequence[str]) -> None:
    places, width = np.arange(len(names)), 0.4
    label = samples.labels[place]
    for values, colour, shift, name in (
        (samples.before[place], BEFORE, -width / 2, "clean"),
        (samples.after[place], AFTER, width / 2, "adversarial"),
    ):
        edges = ["black" if at == label else "none" for at in places]
        axis.bar(places + shift, values, width, color=colour, edgecolor=edges, linewidth=0.8, label=name)
    axis.set(xticks=places, xticklabels=names, ylim=(0, 1.02), yticks=[0, 0.5, 1])
    axis.grid(visible=False, axis="x")
