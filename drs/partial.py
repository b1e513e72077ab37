"""Rows of models -> Spearman's partial correlation of softmax statistics with accuracy, given controls.

The ranks of a statistic and of an accuracy are each regressed on the ranks of the controls; the coefficient is the
correlation of the residuals. It asks whether a statistic says more about robustness than the controls do already. As
in ``drs.correlation`` the unit of a coefficient is the trained model, and intervals and p-values are over settings, of
which seeds are replicates.
"""

import zlib
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from drs.clusters import Index, jackknife_interval, membership, setting_index, setting_means, setting_orders
from drs.coefficients import Array, bca_interval, chunks, coefficients, draw_counts, permutation_p
from drs.correlation import benjamini_hochberg
from drs.selection import accuracy_columns, group_models, standard_models

CONTROLS = {"clean_accuracy": "clean_accuracy", "margin": "stat.margin", "logit_norm": "stat.logit_norm"}
CONTROL_SETS: tuple[tuple[str, ...], ...] = (tuple(CONTROLS), *((name,) for name in CONTROLS))
ALL_CONTROLS = "+".join(CONTROLS)
SPARE_MODELS = 5  # models needed beyond the number of controls, and settings for a p-value
COLUMNS = [
    "data", "model", "statistic", "attack", "controls", "n_models", "coefficient", "ci_low", "ci_high", "p_value",
    "q_value", "n_settings", "settings_coefficient",
]  # fmt: skip
_NUMBERS = ("coefficient", "ci_low", "ci_high", "p_value", "settings_coefficient")
_COLLINEAR = 1e-9  # a column of ranks with less than this share of its variance left is a function of the controls


def finite_values(models: pd.DataFrame, columns: list[str]) -> Array:
    """Return columns of numbers as ``[n, C]`` float64; what is missing or infinite becomes NaN."""
    values = models[columns].apply(pd.to_numeric, errors="raise").to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def mean_accuracies(models: pd.DataFrame) -> dict[str, str]:
    """Return attack name -> column of the accuracies that average over epsilons, ``pgd@mean`` say."""
    return {name: column for name, column in accuracy_columns(models).items() if name.endswith("@mean")}


def partial_from_correlations(correlations: Array, n_controls: int, n_left: int) -> Array:
    """Return partial correlations from correlation matrices, by removing one control after the other.

    Removing a variable c from a covariance matrix leaves ``r_ab - r_ac r_cb / r_cc`` (the Schur complement); what is
    left after all controls is the covariance of the residuals of their joint regression.

    Args:
        correlations: ``[B, C, C]``; the controls come first, then the left columns, then the right ones.
        n_controls: How many of the C are controls.
        n_left: How many of the others are left columns.

    Returns:
        ``[B, left, right]``. NaN where controls are collinear, a column is constant, or a column is a function of the
        controls.
    """
    left = correlations
    for _ in range(n_controls):
        pivot = left[:, :1, :1]
        pivot = np.where(pivot > _COLLINEAR, pivot, np.nan)
        left = left[:, 1:, 1:] - left[:, 1:, :1] * left[:, :1, 1:] / pivot
    variance = np.diagonal(left, axis1=1, axis2=2)
    deviation = np.sqrt(np.where(variance > _COLLINEAR, variance, np.nan))
    scaled = left[:, :n_left, n_left:] / deviation[:, :n_left, None] / deviation[:, None, n_left:]
    return np.clip(scaled, -1.0, 1.0)


def freedman_lane(controls: Array, left: Array, right: Array, orders: NDArray[np.int64]) -> Array:
    """Return the partial correlations of ranks after the residuals of the right side were put in random orders.

    The ranks of each right column are regressed on those of the controls; the residuals are permuted, added to the
    fitted ranks, and the sum is regressed anew (Freedman and Lane 1983, J. Bus. Econ. Stat. 1, 292-298). Under no
    partial relation the residuals are exchangeable, nearly, while the relation with the controls stays as it is. The
    sums are not ranked again: ranks serve as the data of a linear model.

    Args:
        controls: ``[n, C]`` finite values.
        left: ``[n, S]`` finite values.
        right: ``[n, A]`` finite values.
        orders: ``[M, n]``.

    Returns:
        ``[M, S, A]``, meaningless where the coefficient itself does not exist.
    """
    ranks = [rankdata(side, axis=0) for side in (controls, left, right)]
    centred = [side - side.mean(axis=0) for side in ranks]
    basis = np.linalg.qr(np.column_stack([np.ones(len(controls)), centred[0]]))[0]
    left_residuals, right_residuals = (side - basis @ (basis.T @ side) for side in centred[1:])
    together = np.concatenate([left_residuals, basis], axis=1)
    # The fitted part is orthogonal to the left residuals and vanishes in the second regression: only what the basis
    # explains of the permuted residuals has to be taken off their length.
    parts = [together.T @ right_residuals[orders[chunk]] for chunk in chunks(len(orders), right_residuals.size)]
    products = np.concatenate(parts)
    numerator, explained = products[:, : left.shape[1]], products[:, left.shape[1] :]
    squares = np.maximum((right_residuals**2).sum(axis=0) - (explained**2).sum(axis=1), 0.0)
    lengths = np.sqrt((left_residuals**2).sum(axis=0))[None, :, None] * np.sqrt(squares)[:, None, :]
    return np.divide(numerator, lengths, out=np.zeros_like(numerator), where=lengths > 0)


def _interval(observed: Array, draws: Array, left_out: Array, n_settings: int) -> tuple[Array, Array]:
    """Return the interval of a bootstrap over models if there are draws, else of a jackknife over settings."""
    if not len(draws):
        counts = np.full(observed.shape, float(n_settings))
        return jackknife_interval(observed, [left_out], [counts])
    known = np.isfinite(left_out)
    mean = np.where(known, left_out, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return bca_interval(observed, draws, mean - left_out)


def _part(
    values: tuple[Array, Array, Array],
    index: Index,
    sets: list[list[int]],
    n_bootstrap: int,
    n_permutations: int,
    seed: list[int],
) -> list[dict[str, Array]]:
    """Return ``_NUMBERS`` ``[S, A]`` for each set of controls, of complete rows, whose settings ``index`` numbers."""
    controls, left, right = values
    n, n_left = len(controls), left.shape[1]
    first = controls.shape[1]
    rng = np.random.default_rng(seed)
    every, members = np.column_stack(values), membership(index)
    k = len(members)
    means = [setting_means(side, members) for side in (every, *values)]
    counts = {"observed": np.ones((1, n)), "draws": draw_counts(n, n_bootstrap if k == n else 0, rng)}
    counts["left_out"] = 1 - members if k > 1 else np.empty((0, n))
    spearman = {
        name: coefficients(every, every, own, ("spearman",))["spearman"] for name, own in counts.items() if len(own)
    }
    spearman["settings"] = coefficients(means[0], means[0], methods=("spearman",))["spearman"]
    orders = setting_orders(k, n_permutations, rng)
    none = np.empty((0, n_left, right.shape[1]))
    results = []
    for chosen in sets:
        missing = np.full((n_left, right.shape[1]), np.nan)
        result = dict.fromkeys(_NUMBERS, missing)
        results.append(result)
        if n < len(chosen) + SPARE_MODELS:
            continue
        picked = [*chosen, *range(first, every.shape[1])]
        found = {
            name: partial_from_correlations(matrices[:, picked][:, :, picked], len(chosen), n_left)
            for name, matrices in spearman.items()
        }
        observed = result["coefficient"] = found["observed"][0]
        draws, left_out = (found.get(name, none) for name in ("draws", "left_out"))
        result["ci_low"], result["ci_high"] = _interval(observed, draws, left_out, k)
        if k >= len(chosen) + SPARE_MODELS:
            settings = result["settings_coefficient"] = found["settings"][0]
            permuted = freedman_lane(means[1][:, chosen], means[2], means[3], orders)
            result["p_value"] = permutation_p(settings, permuted)
    return results


def _group_rows(
    rows: pd.DataFrame,
    statistics: list[str],
    attacks: dict[str, str],
    sets: list[tuple[str, ...]],
    draws: tuple[int, int],
    seed: list[int],
) -> pd.DataFrame:
    names = [name for name in CONTROLS if any(name in chosen for chosen in sets)]
    controls = finite_values(rows, [CONTROLS[name] for name in names])
    left = finite_values(rows, [f"stat.{name}" for name in statistics])
    right = finite_values(rows, list(attacks.values()))
    has_controls = ~np.isnan(controls).any(axis=1)
    indices = [[names.index(name) for name in chosen] for chosen in sets]
    shape = (len(sets), len(statistics), len(attacks))
    table = {name: np.full(shape, np.nan) for name in _NUMBERS}
    n_models, n_settings = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    index = setting_index(rows)
    # Columns that miss the same models are resampled together.
    patterns = [np.unique(np.isnan(side), axis=1, return_inverse=True)[1].ravel() for side in (left, right)]
    for i, j in product(np.unique(patterns[0]), np.unique(patterns[1])):
        own_left, own_right = np.flatnonzero(patterns[0] == i), np.flatnonzero(patterns[1] == j)
        kept = has_controls & ~np.isnan(left[:, own_left[0]]) & ~np.isnan(right[:, own_right[0]])
        n_models[:, own_left[:, None], own_right] = kept.sum()
        n_settings[:, own_left[:, None], own_right] = len(np.unique(index[kept]))
        if kept.sum() < 1 + SPARE_MODELS:
            continue
        values = controls[kept], left[kept][:, own_left], right[kept][:, own_right]
        parts = _part(values, index[kept], indices, *draws, seed)
        for position, part in enumerate(parts):
            for name, numbers in part.items():
                table[name][position, own_left[:, None], own_right] = numbers
    names_of = pd.MultiIndex.from_product(
        [["+".join(chosen) for chosen in sets], statistics, list(attacks)], names=["controls", "statistic", "attack"]
    )
    columns = {"n_models": n_models, "n_settings": n_settings, **table}
    result = pd.DataFrame({name: v.ravel() for name, v in columns.items()}, index=names_of).reset_index()
    return result[result["n_models"] > 0]


def partial_correlation_table(
    models: pd.DataFrame, *, n_bootstrap: int = 2000, n_permutations: int = 4999, seed: int = 0
) -> pd.DataFrame:
    """Correlate every statistic with every mean robust accuracy given the controls, in each group of models.

    Args:
        models: A row per model: ``data``, ``model``, ``stat.<statistic>``, ``acc.<attack>@mean``, the controls
            (the columns in ``CONTROLS``), and optionally ``excluded`` and ``procedure``. Only usable models of the
            standard procedure count. ``loss`` and ``loss_weight`` say which models share a setting; without them each
            is a setting of its own.
        n_bootstrap: Resamples of models for the 95 % intervals (bias-corrected and accelerated), ranked anew, of groups
            in which every setting has one model; those of other groups leave out one setting at a time
            (``drs.clusters.jackknife_interval``).
        n_permutations: Random orders of the settings' means for the two-sided p (``freedman_lane``); of up to
            ``drs.clusters.ALL_ORDERS`` settings, all.
        seed: Of the resamples; a group's numbers do not depend on which other groups there are.

    Returns:
        ``COLUMNS``, a row per group (dataset and architecture), statistic that is not itself a control, attack, and
        set of controls: all three, and each alone; a set whose columns are absent has no row. A model without one
        of the controls counts nowhere, so that the sets of controls describe the same models. With fewer than
        ``n_controls + SPARE_MODELS`` models, or where the regression is degenerate (collinear controls, a constant
        column, a statistic that the controls determine), the numbers are NaN and stay out of the correction; where that
        happens in more than half of the resamples, there is no interval. With fewer than ``n_controls + SPARE_MODELS``
        settings there is no p, which tests ``settings_coefficient``, the coefficient of the settings' means.
        ``q_value`` is Benjamini-Hochberg over the whole table.
    """
    usable = standard_models(models)
    statistics = [str(column).removeprefix("stat.") for column in models if str(column).startswith("stat.")]
    statistics = [name for name in statistics if name not in CONTROLS]
    attacks = mean_accuracies(models)
    tables = []
    for data, model, rows in group_models(usable):
        present = {name for name, column in CONTROLS.items() if column in rows and rows[column].notna().any()}
        sets = [chosen for chosen in CONTROL_SETS if present.issuperset(chosen)]
        if not (statistics and attacks and sets):
            continue
        own_seed = [seed, zlib.crc32(f"{data}/{model}".encode())]
        table = _group_rows(rows, statistics, attacks, sets, (n_bootstrap, n_permutations), own_seed)
        tables.append(table.assign(data=data, model=model))
    if not tables:
        return pd.DataFrame({column: pd.Series(dtype=object if column in COLUMNS[:5] else float) for column in COLUMNS})
    result = pd.concat(tables, ignore_index=True)
    result["q_value"] = benjamini_hochberg(result["p_value"])
    return result[COLUMNS]
