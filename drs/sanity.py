"""Sanity checks of a model's evaluation: a figure, a threshold, and whether it passes.

After Carlini et al. 2019 (arXiv 1902.06705), Croce and Hein 2020 (arXiv 2003.01690), Pintor et al. 2022 (arXiv
2106.09947) and Mosbach et al. 2018 (arXiv 1810.12042). A failed check does not say that a model is fragile; it says
that some number about it cannot be trusted. ``drs.sanity_checks`` has the thresholds.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from drs.attack_config import AttackConfig
from drs.attacks.probes import FACTORS, LARGE_EPSILON
from drs.cells import CONVERGENCE, SANITY, Cell, standing_at
from drs.model_rows import wilson
from drs.sanity_checks import CHECKS, Check

Arrays = dict[Path, dict[str, np.ndarray]]
GRADIENT_ATTACKS = ("fgsm", "pgd", "margin_pgd", "targeted_pgd", "adaptive", "apgd_ce", "apgd_t", "fab_t", "fmn_linf")
PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


def sanity_rows(planned: list[Cell], arrays: Arrays) -> list[dict[str, Any]]:
    """Judge one model; a row per check.

    Args:
        planned: The model's cells, as ``drs.cells.plan_cells`` lists them.
        arrays: What they hold.

    Returns:
        Rows of ``check, figure, ci_low, ci_high, threshold, passed, n, epsilon_label, detail``; none where the suite
        has no checks. ``n`` counts images, and Wilson's 95 % interval of a figure that is a share of them is over
        them; other figures have none. A check whose cells are not there has ``passed`` "not run".
    """
    cell = next((cell for cell in planned if cell.attack == SANITY), None)
    if cell is None:
        return []
    probes = _probes(arrays[cell.path])
    figures = probe_figures(probes, arrays[cell.path]["gradient_norm"]) | _cell_figures(cell, planned, arrays)
    for other in planned:
        if other.attack == CONVERGENCE:
            figures |= convergence_figures(_probes(arrays[other.path]))
    figures["falls_with_epsilon"] = _fall(planned, arrays, probes)
    rows = []
    for name, check in CHECKS.items():
        figure, n, detail = figures.get(name, (math.nan, 0, "its attack was not run"))
        passed = NOT_RUN if math.isnan(figure) else PASS if check.passes(figure) else FAIL
        low, high = _interval(check, figure, n)
        rows.append({
            "check": name, "figure": figure, "ci_low": low, "ci_high": high, "threshold": check.threshold,
            "passed": passed, "n": n, "epsilon_label": cell.epsilon.label, "detail": detail,
        })  # fmt: skip
    return rows


def failed_checks(rows: list[dict[str, Any]]) -> str:
    """Return the names of the failed checks that mark a model, joined by semicolons."""
    return ";".join(row["check"] for row in rows if row["passed"] == FAIL and CHECKS[row["check"]].marks)


def _probes(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = json.loads(str(arrays["about"]))["probes"]
    return dict(zip(names, arrays["standing"], strict=True))


def _interval(check: Check, figure: float, n: int) -> tuple[float, float]:
    if math.isnan(figure) or not check.share or not n:
        return math.nan, math.nan
    return wilson(round(figure * n), n)


Figure = tuple[float, int, str]


def convergence_figures(probes: dict[str, np.ndarray]) -> dict[str, Figure]:
    """Return by how much margin PGD changes with twice the steps and with twice the restarts."""
    figures = {}
    for name in ("more_steps", "more_restarts"):
        before, after = (float(probes[probe].mean()) for probe in ("margin", name))
        detail = f"margin {100 * before:.1f} %, {name} {100 * after:.1f} %"
        figures[name] = abs(before - after), len(probes[name]), detail
    return figures


def probe_figures(probes: dict[str, np.ndarray], gradient_norm: np.ndarray) -> dict[str, Figure]:
    n = len(probes["clean"])
    accuracy = {name: float(standing.mean()) for name, standing in probes.items()}

    def listed(names: tuple[str, ...]) -> str:
        return ", ".join(f"{name} {100 * accuracy[name]:.1f} %" for name in names)

    objectives = ("ce_climbs", "margin_climbs", "targeted")
    scaled = ("ce", *(f"scaled_{factor:g}" for factor in FACTORS), "normalised")
    variants = (*scaled, "shifted")
    spread = max(accuracy[name] for name in objectives) - min(accuracy[name] for name in objectives)
    rescaling = max(abs(accuracy["ce"] - accuracy[name]) for name in scaled)
    # A gradient knows nothing of a shift but what float32 rounds: image by image, so that none makes up for another.
    shift = float((probes["ce"] != probes["shifted"]).mean())
    # Here only falls count: another objective, or other logits of the same classifier, must not reveal a better attack.
    gap = accuracy["ce_climbs"] - min(accuracy[name] for name in objectives)
    fall = accuracy["ce"] - min(accuracy[name] for name in variants)
    right = probes["clean"]
    changed = float((probes["epsilon_0"] != probes["clean"]).mean())
    zero = float((gradient_norm[right] == 0).mean()) if right.any() else 0.0
    regained = float((~probes["ce_best"] & probes["ce_last"]).mean())
    return {
        "eps0_equals_clean": (changed, n, listed(("clean", "epsilon_0"))),
        "unbounded_succeeds": (accuracy["unbounded"], n, listed(("unbounded",))),
        **convergence_figures(probes),
        "objective_spread": (spread, n, listed(objectives)),
        "objective_gap": (gap, n, listed(objectives)),
        "logit_shift": (shift, n, listed(("ce", "shifted"))),
        "logit_rescaling": (rescaling, n, listed(scaled)),
        "logit_shift_and_scale": (fall, n, listed(variants)),
        "zero_gradient": (zero, int(right.sum()), "over samples that are right without an attack"),
        "best_iterate": (regained, n, listed(("ce_best", "ce_last"))),
    }  # fmt: skip


def _cell_figures(sanity: Cell, planned: list[Cell], arrays: Arrays) -> dict[str, Figure]:
    """Compare attacks of the suite at the checks' epsilon, sample by sample over those that both attacked."""
    epsilon = sanity.epsilon
    found: dict[str, np.ndarray] = {}
    for cell in planned:
        here = cell.epsilon == epsilon or math.isinf(cell.epsilon.value)
        if here and isinstance(cell.config, AttackConfig) and cell.config.norm == "linf":
            found[cell.attack] = standing_at(arrays[cell.path], epsilon.value)
    by_gradient = [found[name] for name in GRADIENT_ATTACKS if name in found]

    def only(attack: str, others: list[np.ndarray], of: str) -> Figure | None:
        """Share of the samples that fall to an attack and to none of the others."""
        if attack not in found or not others:
            return None
        n = len(found[attack])
        kept = np.logical_and.reduce([_padded(other, n) for other in others])
        fooled = int((~found[attack] & kept).sum())
        return fooled / n, n, f"{fooled} of {n} samples fall to {attack} and not to {of}"

    pgd = [found["pgd"]] if "pgd" in found else []
    figures = {
        "pgd_beats_fgsm": only("fgsm", pgd, "pgd"),
        "square_not_stronger": _new_falls("square", planned, arrays, epsilon.value),
        "transfer_not_stronger": only("transfer", by_gradient, "any gradient attack"),
        "noise_weaker": only("noise", pgd, "pgd"),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _padded(standing: np.ndarray, n: int) -> np.ndarray:
    """Return the first n samples; those that an attack on a subset never saw count as standing."""
    return np.concatenate([standing[:n], np.ones(max(0, n - len(standing)), dtype=bool)])


def _new_falls(attack: str, planned: list[Cell], arrays: Arrays, epsilon: float) -> Figure | None:
    """Share of the samples that fall to an attack which ran on what all before it had left standing."""
    cells = [cell for cell in planned if cell.attack == attack and cell.epsilon.value == epsilon and cell.after]
    if not cells:
        return None
    found = arrays[cells[0].path]
    n, tried = len(found["labels"]), int(found["attacked"].sum())
    fooled = int((found["attacked"] & ~standing_at(found, epsilon)).sum())
    wrong = int((found["attacked"] & (found["distance"] == 0) & ~standing_at(found, epsilon)).sum())
    return (fooled - wrong) / n, n, f"{fooled - wrong} of the {tried - wrong} samples that had stood until then fall"


def _fall(planned: list[Cell], arrays: Arrays, probes: dict[str, np.ndarray]) -> Figure:
    cells = [cell for cell in planned if cell.attack == "pgd"]
    accuracies = [float(standing_at(arrays[cell.path], cell.epsilon.value).mean()) for cell in cells]
    rises = [after - before for before, after in zip(accuracies, accuracies[1:], strict=False)]
    classes = arrays[planned[0].path]["logits"].shape[1]
    left = float(probes["large"].mean())
    figure = max([*rises, left - 1 / classes, 0.0])
    listed = ", ".join(f"{100 * value:.1f} %" for value in accuracies)
    detail = f"PGD over the epsilons {listed}; {100 * left:.1f} % at {LARGE_EPSILON:g}"
    n = min([len(probes["large"]), *(len(arrays[cell.path]["labels"]) for cell in cells)])
    return figure, n, detail
