"""Pairs of columns of models -> their coefficients, as they are, resampled, without each setting, and permuted.

``drs.correlation`` says what intervals and p-values are made of; this is how, for many pairs at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from drs.clusters import MIN_TESTED, Index, jackknife_interval, membership, setting_means, setting_orders
from drs.coefficients import (
    METHODS,
    Array,
    bca_interval,
    coefficients,
    draw_counts,
    permutation_p,
    permuted_coefficients,
)

MIN_GROUP = 4  # fewer models than this give no coefficient
SIDES = ("two-sided", "greater")


@dataclass(frozen=True)
class Resampled:
    """Coefficients of S x A pairs of columns, and what they become in resamples and in orders of the settings.

    A group has one entry in the lists, of its k settings; pooled groups have one each.
    """

    n: Array  # models, [S, A]
    n_settings: list[Array]  # [S, A]
    observed: dict[str, Array]  # method -> [S, A]
    draws: dict[str, Array]  # method -> [B, S, A]; B = 0 where a setting has several models
    left_out: list[dict[str, Array]]  # method -> [k, S, A]
    settings: dict[str, Array]  # method -> [S, A], of the settings' means
    permuted: dict[str, Array]  # method -> [M, S, A], of the settings' means
    p_values: dict[str, dict[str, Array]]  # side -> method -> [S, A]

    def interval(self, method: str) -> tuple[Array, Array]:
        """Return the 95 % interval: of a bootstrap over models if there are draws, else a jackknife over settings."""
        observed, left_out = self.observed[method], [own[method] for own in self.left_out]
        if not len(self.draws[method]):
            return jackknife_interval(observed, left_out, self.n_settings)
        influence = []
        for values in left_out:
            number = np.maximum(np.isfinite(values).sum(axis=0), 1)
            influence.append(np.nan_to_num(values).sum(axis=0) / number - values)
        return bca_interval(observed, self.draws[method], np.concatenate(influence))

    def n_draws(self, method: str) -> Array:
        """Count the resamples, or the left-out settings, that have a coefficient."""
        parts = [self.draws[method]] if len(self.draws[method]) else [own[method] for own in self.left_out]
        return np.asarray(sum(np.isfinite(part).sum(axis=0) for part in parts))

    def of_accuracies(self, picked: list[int]) -> "Resampled":
        """Return what is known of some of the A accuracies."""

        def of(part: dict[str, Array]) -> dict[str, Array]:
            return {method: values[..., picked] for method, values in part.items()}

        return Resampled(
            self.n[:, picked], [count[:, picked] for count in self.n_settings], of(self.observed), of(self.draws),
            [of(own) for own in self.left_out], of(self.settings), of(self.permuted),
            {side: of(own) for side, own in self.p_values.items()},
        )  # fmt: skip


def over_settings(
    left: Array, right: Array, n_permutations: int, rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array], dict[str, dict[str, Array]]]:
    """Return coefficients of settings' means, those of random orders (at random of all, where all are tried), and p."""
    observed = {method: values[0] for method, values in coefficients(left, right).items()}
    permuted = permuted_coefficients(left, right, setting_orders(len(left), n_permutations, rng))
    p_values = {side: {m: permutation_p(observed[m], permuted[m], alternative=side) for m in METHODS} for side in SIDES}
    if len(permuted[METHODS[0]]) != n_permutations:
        picked = rng.integers(len(permuted[METHODS[0]]) + 1, size=n_permutations)
        permuted = {m: np.concatenate([observed[m][None], permuted[m]])[picked] for m in METHODS}
    return observed, permuted, p_values


def _patterns(left: Array, right: Array) -> Iterator[tuple[Index, Index]]:
    """Yield the columns of either side that miss the same models, which are resampled together."""
    patterns = [np.unique(np.isnan(side), axis=1, return_inverse=True)[1].ravel() for side in (left, right)]
    for i in np.unique(patterns[0]):
        for j in np.unique(patterns[1]):
            yield np.flatnonzero(patterns[0] == i), np.flatnonzero(patterns[1] == j)


def resample(
    left: Array,
    right: Array,
    index: Index,
    n_bootstrap: int,
    n_permutations: int,
    seed: list[int],
    methods: Sequence[str] = METHODS,
) -> Resampled:
    """Resample the rows of one group, of which ``index`` numbers the settings ``[n]`` from 0."""
    rng = np.random.default_rng(seed)
    shape, n_settings = (left.shape[1], right.shape[1]), int(index.max(initial=-1)) + 1
    present = ~np.isnan(left)[:, :, None] & ~np.isnan(right)[:, None, :]
    n_draws = n_bootstrap if n_settings == len(index) else 0
    lengths = {"observed": 1, "draws": n_draws, "left_out": n_settings}
    parts = {part: {m: np.full((length, *shape), np.nan) for m in methods} for part, length in lengths.items()}
    settings = {m: np.full(shape, np.nan) for m in METHODS}
    permuted = {m: np.full((n_permutations, *shape), np.nan) for m in METHODS}
    p_values = {side: {m: np.full(shape, np.nan) for m in METHODS} for side in SIDES}
    counted = np.zeros(shape)
    for rows_s, rows_a in _patterns(left, right):
        place = rows_s[:, None], rows_a
        complete = np.flatnonzero(present[:, rows_s[0], rows_a[0]])
        n, own = len(complete), np.unique(index[complete])
        counted[place] = len(own)
        if n < MIN_GROUP:
            continue
        x, y = left[np.ix_(complete, rows_s)], right[np.ix_(complete, rows_a)]
        members = membership(index[complete])
        counts = {"observed": np.ones((1, n))}
        if n_draws:
            counts["draws"] = draw_counts(n, n_draws, rng)
        if len(own) > 1:
            counts["left_out"] = 1 - members
        for part, drawn in counts.items():
            rows = own if part == "left_out" else np.arange(len(drawn))
            for method, values in coefficients(x, y, drawn, methods).items():
                parts[part][method][np.ix_(rows, rows_s, rows_a)] = values
        if len(own) < MIN_TESTED:
            continue
        found = over_settings(setting_means(x, members), setting_means(y, members), n_permutations, rng)
        for method in METHODS:
            settings[method][place], permuted[method][:, *place] = found[0][method], found[1][method]
            for side in SIDES:
                p_values[side][method][place] = found[2][side][method]
    return Resampled(
        present.sum(axis=0).astype(float), [counted], {m: values[0] for m, values in parts["observed"].items()},
        parts["draws"], [parts["left_out"]], settings, permuted, p_values,
    )  # fmt: skip


def _shares(groups: list[Resampled], coefficient: list[Array]) -> list[Array]:
    """Return the weight ``[S, A]`` of each group, its share of the models of those that have a coefficient.

    A group in which a column is constant does not enter; fewer than two groups give no pooled coefficient (NaN).
    """
    enters = [np.isfinite(values) for values in coefficient]
    counts = [np.where(exists, group.n, 0.0) for exists, group in zip(enters, groups, strict=True)]
    enough = sum(exists.astype(int) for exists in enters) >= 2
    return [count / np.where(enough, sum(counts), np.nan) for count in counts]


def pool(groups: list[Resampled]) -> Resampled:
    """Average the groups' coefficients, weighted by their numbers of models.

    That is the coefficient of values (Pearson) or ranks (Spearman) standardised within each group. Resamples and orders
    are drawn within groups, and a setting is left out of its own group.
    """
    share = _shares(groups, [group.observed["spearman"] for group in groups])
    share_tested = _shares(groups, [group.settings["spearman"] for group in groups])
    enters = [weight > 0 for weight in share]

    def average(each: list[Array], weights: list[Array]) -> Array:
        return np.asarray(sum(np.where(w == 0, 0.0, w * v) for w, v in zip(weights, each, strict=True)))

    observed = {m: average([g.observed[m] for g in groups], share) for m in METHODS}
    settings = {m: average([g.settings[m] for g in groups], share_tested) for m in METHODS}
    permuted = {m: average([g.permuted[m] for g in groups], share_tested) for m in METHODS}
    bootstrapped = all(len(group.draws[METHODS[0]]) for group in groups)
    none = np.empty((0, *share[0].shape))
    left_out = [
        {m: observed[m] + np.where(w > 0, w, np.nan) * (g.left_out[0][m] - g.observed[m]) for m in METHODS}
        for g, w in zip(groups, share, strict=True)
    ]
    return Resampled(
        n=np.asarray(sum(np.where(own, g.n, 0.0) for own, g in zip(enters, groups, strict=True))),
        n_settings=[np.where(own, g.n_settings[0], 0.0) for own, g in zip(enters, groups, strict=True)],
        observed=observed,
        draws={m: average([g.draws[m] for g in groups], share) if bootstrapped else none for m in METHODS},
        left_out=left_out,
        settings=settings,
        permuted=permuted,
        p_values={"two-sided": {m: permutation_p(settings[m], permuted[m]) for m in METHODS}},
    )
