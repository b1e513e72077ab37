"""Outcomes image by image for made-up studies, as image_outcomes.csv has them."""

import numpy as np
import pandas as pd

from drs.image_outcomes import COMPARED, DECISIVE_PGD, outcome_rows

NAMES = ["run_id", "data", "model", "loss", "loss_weight", "seed"]
LEVELS = 10000
"""Epsilons of an attack whose images are all alike: a share is met within half of one part in so many."""


def even_outcomes(models: pd.DataFrame, n_images: int = 3) -> pd.DataFrame:
    """Let every image of a model withstand the same share of epsilons, so that images add nothing to an interval."""
    rows = []
    for model in models.to_dict("records"):
        named = {name: model[name] for name in NAMES} | {"excluded": model.get("excluded")}
        for attack in (*COMPARED, DECISIVE_PGD):
            share = model.get(f"acc.{attack}", np.nan)
            if np.isfinite(share):
                letter = chr(ord("A") + round(LEVELS * min(1.0, max(0.0, share))))
                rows.append(
                    {**named, "attack": attack, "n": n_images, "n_epsilons": LEVELS, "standing": n_images * letter}
                )
    return pd.DataFrame(rows)


def outcomes_of_worst_case(table: pd.DataFrame) -> pd.DataFrame:
    """Return even outcomes with the means of worst_case.csv in Linf."""
    rows = table[table["norm"] == "linf"].rename(columns={"pgd": f"acc.{DECISIVE_PGD}", "worst": "acc.worst_linf@mean"})
    return even_outcomes(rows)


def outcomes_of(standing: dict[tuple[str, float], np.ndarray], attack: str, *, data: str = "mnist") -> pd.DataFrame:
    """Return a table from which images each model leaves standing: by loss and weight ``[S, E, N]`` of an attack."""
    rows = []
    for (loss, weight), values in standing.items():
        for seed, epsilons in enumerate(values):
            named = {"run_id": f"{data}-{weight:g}-{seed}", "data": data, "model": "lenet", "loss": loss,
                     "loss_weight": weight, "seed": seed, "excluded": None}  # fmt: skip
            rows += [{**named, **row} for row in outcome_rows({attack: list(epsilons)})]
    return pd.DataFrame(rows)
