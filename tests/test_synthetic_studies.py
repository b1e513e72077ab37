"""Studies with a known answer: what the statistics of a report promise, measured.

Each band is the nominal value with three standard errors of the simulation on either side. Measured beforehand with
more studies (500 plain, 400 partial; one standard error is one point), 95 % intervals held the truth in

- plain Spearman, n = 24: 97, 93, 93 and 95 % at r = 0, 0.5, 0.8 and 0.95 (n = 12: 95 to 98 %; n = 48: 95 to 96 %);
- partial Spearman given three controls, n = 24: 95 to 97 %; n = 12: 98 to 99 %, too wide; n = 48: 94 to 97 %.
"""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from drs.correlation import correlate, correlation_table
from drs.granulated import granulated_table
from drs.partial import ALL_CONTROLS, partial_correlation_table


def _rank_correlation(correlation: np.ndarray | float) -> np.ndarray:
    """Return Spearman's coefficients of a normal distribution, from Pearson's (Pearson 1907)."""
    return np.asarray(6 / np.pi * np.arcsin(np.asarray(correlation) / 2))


def _partial(correlations: np.ndarray) -> float:
    """Return the partial correlation of the last two variables given the others, from the inverse matrix."""
    precision = np.linalg.inv(correlations)
    return float(-precision[-2, -1] / np.sqrt(precision[-2, -2] * precision[-1, -1]))


def _band(share: float, studies: int) -> tuple[float, float]:
    error = 3 * np.sqrt(share * (1 - share) / studies)
    return share - error, share + error


@pytest.mark.parametrize("relation", [0.0, 0.5, 0.8])
def test_intervals_of_correlations_cover(relation: float) -> None:
    """n = 24; one standard error of 200 studies is 1.5 points, so 90.4 to 99.6 % pass."""
    true, rng, studies, covered = float(_rank_correlation(relation)), np.random.default_rng(11), 200, 0
    for _ in range(studies):
        x, noise = rng.normal(size=(2, 24))
        models = pd.DataFrame({"stat.spread": x, "acc.a@mean": relation * x + np.sqrt(1 - relation**2) * noise})
        found = correlate(models, "stat.spread", "acc.a@mean", n_bootstrap=800, n_permutations=1)
        covered += found.ci_low <= true <= found.ci_high
    low, high = _band(0.95, studies)
    assert low <= covered / studies <= high


@pytest.mark.parametrize("relation", [0.0, pytest.param(0.5, marks=pytest.mark.slow), 0.8])
def test_intervals_and_p_values_of_partial_correlations_hold(relation: float) -> None:
    """n = 24; statistic and accuracy load on three related controls, and what is left correlates at ``relation``."""
    loads, related = np.array([[0.4, 0.3, 0.2], [0.3, 0.3, 0.3]]), np.full((3, 3), 0.5) + 0.5 * np.eye(3)
    left_over = 0.5 * np.array([[1, relation], [relation, 1]])
    covariance = np.block([[related, related @ loads.T], [loads @ related, loads @ related @ loads.T + left_over]])
    scale = np.sqrt(np.diag(covariance))
    correlations = covariance / np.outer(scale, scale)
    ranks = _rank_correlation(correlations)
    truths = {ALL_CONTROLS: _partial(ranks), "margin": _partial(ranks[np.ix_([1, 3, 4], [1, 3, 4])])}
    assert truths["margin"] > truths[ALL_CONTROLS] + 0.02, "one control leaves some of what the others make"
    names = ["clean_accuracy", "stat.margin", "stat.logit_norm", "stat.spread", "acc.a@mean"]
    rng, studies = np.random.default_rng(12), 120
    covered, rejected = dict.fromkeys(truths, 0), 0
    for _ in range(studies):
        values = rng.multivariate_normal(np.zeros(5), correlations, size=24)
        models = pd.DataFrame(values, columns=names).assign(data="mnist", model="net")
        table = partial_correlation_table(models, n_bootstrap=400, n_permutations=99).set_index("controls")
        for controls, true in truths.items():
            covered[controls] += table["ci_low"][controls] <= true <= table["ci_high"][controls]
        rejected += table["p_value"][ALL_CONTROLS] <= 0.05
    low, high = _band(0.95, studies)
    for controls, count in covered.items():
        assert low <= count / studies <= high, controls
    if relation == 0:  # the partial rank correlation is then 0.01 rather than 0, which 24 models cannot tell apart
        assert rejected / studies <= _band(0.05, studies)[1]
    else:
        assert rejected / studies > 0.4


def test_the_correction_holds_the_false_discovery_rate() -> None:
    """Five true relations among forty tests: of what q < 0.2 finds, 0.2 * 35 / 40 is false on average."""
    level, studies, rng = 0.2, 90, np.random.default_rng(13)
    corrected, uncorrected, power = [], [], []
    for _ in range(studies):
        accuracy = rng.normal(size=24)
        columns = {f"stat.null{i}": rng.normal(size=24) for i in range(15)}
        columns |= {f"stat.true{i}": accuracy + rng.normal(size=24) for i in range(5)}
        columns |= {"acc.a@mean": accuracy, "clean_accuracy": rng.normal(size=24)}
        models = pd.DataFrame({"data": "mnist", "model": "net", **columns})
        table = correlation_table(models, n_bootstrap=2, n_permutations=499)
        table = table[table["method"] == "spearman"]
        true = table["statistic"].str.startswith("true") & (table["attack"] == "a@mean")
        assert (len(table), true.sum()) == (40, 5)
        for chosen, rates in ((table["q_value"] < level, corrected), (table["p_value"] < level, uncorrected)):
            rates.append((chosen & ~true).sum() / max(chosen.sum(), 1))
        power.append((table["q_value"] < level)[true].mean())
    expected, error = level * 35 / 40, np.std(corrected) / np.sqrt(studies)
    assert abs(np.mean(corrected) - expected) < 3 * error
    assert error < 0.02, "the simulation is large enough to tell"
    assert np.mean(uncorrected) > 2 * level, "without a correction the rate is far higher"
    assert np.mean(power) > 0.8


def _two_clusters(rng: np.random.Generator) -> pd.DataFrame:
    """Cross-entropy and three weights of another loss, eight seeds; nothing but the loss matters."""
    rows = []
    for loss, weight in (("ce", 0.0), ("dr_softmax", 0.001), ("dr_softmax", 0.005), ("dr_softmax", 0.02)):
        for seed in range(8):
            shift = 0.0 if loss == "ce" else 20.0
            rows.append({"data": "mnist", "model": "net", "loss": loss, "loss_weight": weight, "seed": seed,
                         "stat.spread": -shift + rng.normal(), "acc.a@mean": shift + rng.normal()})  # fmt: skip
    return pd.DataFrame(rows)


def test_two_clusters_make_a_plain_correlation_and_no_granulated_one() -> None:
    rng, studies, found, small_p = np.random.default_rng(14), 40, [], 0
    for _ in range(studies):
        models = _two_clusters(rng)
        pearson = correlate(models, "stat.spread", "acc.a@mean", method="pearson", n_bootstrap=2, n_permutations=99)
        spearman = correlate(models, "stat.spread", "acc.a@mean", n_bootstrap=2, n_permutations=99)
        assert pearson.coefficient < -0.97
        # Ranks spread out inside a cluster, so that clusters of 8 and 24 give -0.56 on average, never -1.
        assert spearman.coefficient < -0.3
        assert spearman.p_value >= 2 / 24, "four settings, of which three are alike, say no more"
        table = granulated_table(models, n_permutations=99).set_index("axis")
        assert table["coefficient"]["loss"] == -1
        found.append(table["coefficient"]["granulated"])
        small_p += table["p_value"]["granulated"] <= 0.05
    error = np.std(found) / np.sqrt(studies)
    assert abs(np.mean(found)) < 3 * error
    assert np.std(found) < 0.2, "single studies come out near 0, too"
    assert small_p / studies <= _band(0.05, studies)[1]


@pytest.mark.parametrize("noise", [pytest.param(0.5, marks=pytest.mark.slow), 3.0])
def test_intervals_of_granulated_coefficients_cover(noise: float) -> None:
    """Six weights with fixed effects, four seeds; the truth is that of 20,000 seeds.

    From above, too: of the intervals for 50 % (t of 0.75 in place of t of 0.975, about a quarter as wide), which held
    the truth in 50 to 52 % of 200 studies on the axis ``weight`` and in 54 to 60 % on the others, where a jackknife of
    signs is somewhat too wide. Intervals twice as wide would hold it in about 78 %.
    """
    rng, studies = np.random.default_rng(15), 100
    effects = np.array([[0, 1, 2, 3, 4, 5], [0, 1.5, 0.7, 2, 1.2, 3]])

    def draw(seeds: int) -> np.ndarray:
        """Statistic and accuracy ``[2, seeds, 6]``; each seed shifts all its models, both columns alike."""
        shared = rng.normal(size=seeds)[None, :, None]
        return np.asarray(effects[:, None, :] + noise * (0.7 * shared + rng.normal(size=(2, seeds, 6))))

    many = draw(20_000)
    first, second = np.triu_indices(6, 1)
    weight = np.sign(many[..., first] - many[..., second]).prod(axis=0).mean()
    seed = np.sign(many[:, ::2] - many[:, 1::2]).prod(axis=0).mean()
    truths = {"weight": weight, "seed": seed, "granulated": (weight + seed) / 2}
    names = {"data": "mnist", "model": "net", "loss": "dr_softmax", "seed": np.repeat(np.arange(4), 6)}
    held: dict[str, list[bool]] = {axis: [] for axis in truths}
    inner: dict[str, list[bool]] = {axis: [] for axis in truths}
    narrower = stats.t.ppf(0.75, 3) / stats.t.ppf(0.975, 3)
    for _ in range(studies):
        x, y = draw(4)
        columns = {"loss_weight": np.tile(np.arange(6.0), 4), "stat.spread": x.ravel(), "acc.a@mean": y.ravel()}
        table = granulated_table(pd.DataFrame({**names, **columns}), n_permutations=1).set_index("axis")
        for axis, true in truths.items():
            if np.isfinite(table["ci_low"][axis]):
                coefficient, low, high = table.loc[axis, ["coefficient", "ci_low", "ci_high"]]
                held[axis].append(low <= true <= high)
                half = max(high - coefficient, coefficient - low)  # a bound beyond 1 or -1 is cut off
                inner[axis].append(abs(coefficient - true) <= narrower * half)
    for axis, hits in held.items():
        assert len(hits) > 0.8 * studies
        assert np.mean(hits) >= _band(0.95, len(hits))[0], axis
        assert _band(0.5, len(hits))[0] <= np.mean(inner[axis]) <= (0.65 if axis == "weight" else 0.72), axis


def test_a_relation_through_clean_accuracy_alone_leaves_no_partial_correlation() -> None:
    """Statistic and accuracy correlate with clean accuracy at 0.9, and with each other through it alone."""
    rng, plain, partial, beyond = np.random.default_rng(16), [], [], 0
    true = _partial(_rank_correlation(np.array([[1, 0.9, 0.9], [0.9, 1, 0.81], [0.9, 0.81, 1]])))
    assert 0 < true < 0.03  # 0 of values, and nearly so of ranks
    studies = 60
    for _ in range(studies):
        clean, *noise = rng.normal(size=(5, 24))
        spread, accuracy = (0.9 * clean + np.sqrt(0.19) * own for own in noise[:2])
        models = pd.DataFrame({"data": "mnist", "model": "net", "clean_accuracy": clean, "stat.margin": noise[2],
                               "stat.logit_norm": noise[3], "stat.spread": spread, "acc.a@mean": accuracy})  # fmt: skip
        table = partial_correlation_table(models, n_bootstrap=2, n_permutations=99).set_index("controls")
        plain.append(float(stats.spearmanr(spread, accuracy)[0]))
        partial.append(table["coefficient"][["clean_accuracy", ALL_CONTROLS]].to_numpy())
        assert table["coefficient"]["margin"] > 0.4, "another control takes nothing away"
        beyond += table["p_value"][ALL_CONTROLS] <= 0.05
    assert np.mean(plain) > 0.7
    errors = np.std(partial, axis=0) / np.sqrt(studies)
    assert (np.abs(np.mean(partial, axis=0) - true) < 3 * errors).all()
    assert (errors < 0.05).all()
    assert beyond / studies <= _band(0.05, studies)[1]
