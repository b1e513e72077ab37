"""Coefficients in many orders at once, against every order compared anew."""

import numpy as np
import pandas as pd
import pytest

from drs import pair_grid
from drs.pair_grid import AXES, GRANULATED, Grid, axis_pairs, coefficient, draw_orders, model_grid, pair_signs

LEFT, RIGHT = ["stat.spread", "stat.margin"], ["clean_accuracy", "acc.pgd@mean", "acc.cw@mean"]


def _models(weights: dict[str, int], n_seeds: int) -> pd.DataFrame:
    rng = np.random.default_rng([n_seeds, *weights.values()])
    settings = [(loss, 0.001 * weight) for loss, count in weights.items() for weight in range(count)]
    rows = [{"loss": loss, "loss_weight": weight, "seed": seed} for loss, weight in settings for seed in range(n_seeds)]
    models = pd.DataFrame(rows)
    columns = {name: rng.normal(size=len(models)) for name in (*LEFT, *RIGHT)}
    # With ties, and with values that only rounding tells apart.
    columns["stat.margin"] = rng.integers(3, size=len(models)) * 1.0
    columns["acc.cw@mean"] = rng.choice([0.3, 0.1 + 0.2, 0.4], size=len(models))
    return models.assign(**columns)


def _incomplete(statistics: bool, accuracies: bool) -> pd.DataFrame:
    models = _models({"ce": 1, "dr_softmax": 4, "gce": 2}, 4).drop(index=[2, 9, 17])
    if statistics:
        models.loc[[5, 12], "stat.spread"] = np.nan
    if accuracies:
        models.loc[[6, 20, 21], "acc.pgd@mean"] = [np.nan, np.inf, np.nan]
    return models


CASES = {
    "several losses": _models({"ce": 1, "dr_softmax": 5, "gce": 3}, 4),
    "one loss": _models({"dr_softmax": 6}, 3),
    "one seed": _models({"ce": 1, "dr_softmax": 6}, 1),
    "one setting": _models({"dr_softmax": 1}, 5),
    "a weight of one seed": _models({"ce": 1, "dr_softmax": 4}, 3).iloc[:-2],
    "models never trained": _incomplete(statistics=False, accuracies=False),
    "statistics missing": _incomplete(statistics=True, accuracies=False),
    "accuracies missing": _incomplete(statistics=False, accuracies=True),
    "statistics of a whole grid missing": _models({"ce": 2, "dr_softmax": 3}, 3).assign(
        **{"stat.spread": [np.nan, *range(14)]}
    ),
}


def _anew(grid: Grid, axis: str, orders: pair_grid.Orders) -> np.ndarray:
    pairs = axis_pairs(grid, axis)
    left = pair_signs(grid.left, pairs)
    places = (orders.rows[:, :, None] * grid.n_settings + orders.columns[:, None, :]).reshape(len(orders), -1)
    return np.array([coefficient(left, pair_signs(grid.right[order], pairs), pairs) for order in places])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at_once", [1, 100, 250_000])
def test_orders_give_the_very_numbers_of_a_comparison_anew(
    case: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_grid, "_SIGNS_AT_ONCE", at_once)
    grid = model_grid(CASES[case], LEFT, RIGHT)
    for drawn in (*AXES, GRANULATED, "loss"):
        orders = draw_orders(grid, drawn, 40, np.random.default_rng(0))
        for axis in AXES if drawn == GRANULATED else (drawn,):
            pairs = axis_pairs(grid, axis)
            found = pair_grid.permuted_coefficients(grid, pair_signs(grid.left, pairs), pairs, orders)
            np.testing.assert_array_equal(found, _anew(grid, axis, orders))
            if case == "several losses":
                assert len(np.unique(found[:, 0, 0])) > 5


def test_orders_move_weights_within_a_loss_and_seeds_as_wholes() -> None:
    grid = model_grid(CASES["several losses"], LEFT, RIGHT)
    rng = np.random.default_rng(0)
    found = {axis: draw_orders(grid, axis, 30, rng) for axis in (*AXES, GRANULATED, "loss")}
    for axis, orders in found.items():
        assert (np.sort(orders.rows) == np.arange(4)).all() and (np.sort(orders.columns) == np.arange(9)).all()
        stays = grid.losses[orders.columns] == grid.losses
        assert stays.all() == (axis != "loss")
        assert (orders.rows == np.arange(4)).all() == (axis in ("weight", "loss"))
        assert (orders.columns == np.arange(9)).all() == (axis == "seed")
