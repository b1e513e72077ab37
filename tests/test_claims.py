"""Every claim is driven to every verdict that it can take, through the tables that a study makes."""

import math
import re
from itertools import product

import numpy as np
import pandas as pd
import pytest
from outcomes import even_outcomes, outcomes_of
from scipy import stats

from drs.claims import COLUMNS, RULES, decide_claims, paired_difference_table
from drs.correlation import correlation_table
from drs.verdicts import (
    ALPHA,
    INCONCLUSIVE,
    MEANINGFUL_CORRELATION,
    MEANINGFUL_GAIN,
    MIN_MODELS,
    MIN_PAIRS,
    MIN_SETTINGS,
    NOT_SUPPORTED,
    PRIMARY_STATISTIC,
    PRIMARY_WEIGHT,
    STATEMENTS,
    SUPPORTED,
    TIME_BUDGET,
    WEAK_ONLY,
)

WEIGHTS = (0.0, 0.0005, 0.001, 0.005, 0.02, 0.1)
WEAK = ("fgsm@mean", "pgd@mean")
WORST = ("worst_linf@mean", "worst_l2@mean")
VERDICTS = (SUPPORTED, WEAK_ONLY, NOT_SUPPORTED, INCONCLUSIVE)


def _group(
    weak: float = 0.0,
    worst: float = 0.0,
    clean: float = 0.0,
    *,
    noise: float = 0.01,
    weights: tuple[float, ...] = WEIGHTS,
    seeds: int = 4,
    data: str = "mnist",
    rng_seed: int = 0,
) -> pd.DataFrame:
    """Models whose statistic falls by 1 from weight to weight, and whose accuracies rise by the steps given."""
    rng = np.random.default_rng(rng_seed)
    rows = []
    for (step, weight), seed in product(enumerate(weights), range(seeds)):
        row = {
            "run_id": f"{data}-{weight:g}-{seed}", "data": data, "model": "lenet",
            "loss": "dr_softmax" if weight else "ce", "loss_weight": weight, "seed": seed,
            f"stat.{PRIMARY_STATISTIC}": 8 - step + rng.normal(0, 0.2),
            "stat.nonlabel_cv": 2 - 0.2 * step + rng.normal(0, 0.05),
            "stat.nonlabel_entropy": 0.5 + 0.05 * step + rng.normal(0, 0.02),
            "clean_accuracy": 0.9 + clean * step + rng.normal(0, noise),
            "acc.cw@mean": 0.3 + worst * step + rng.normal(0, noise),
            "norm.cw": 1.2 + rng.normal(0, 0.01), "excluded": None,
        }  # fmt: skip
        row |= {f"acc.{name}": 0.4 + weak * step + rng.normal(0, noise) for name in WEAK}
        row |= {f"acc.{name}": 0.3 + worst * step + rng.normal(0, noise) for name in WORST}
        rows.append(row)
    return pd.DataFrame(rows)


def _timing(low: float = 1.01, high: float = 1.03, data: str = "mnist", **changes: object) -> pd.DataFrame:
    row = {"data": data, "model": "lenet", "loss": "dr_softmax", "loss_weight": 0.005, "baseline": "ce",
           "batch_size": 128, "n_pairs": 60, "baseline_ms": 10.0, "loss_ms": 10.2, "ratio": (low + high) / 2,
           "ci_low": low, "ci_high": high, "device": "cpu"}  # fmt: skip
    return pd.DataFrame([row | changes])


def _landing(data: str = "mnist", excluded: object = None) -> pd.DataFrame:
    return pd.DataFrame([
        {"data": data, "model": "lenet", "attack": attack, "runner_up_rate": rate, "chance": 1 / 9,
         "matrix_correlation": 0.8, "excluded": excluded}
        for attack, rate in (("pgd", 0.7), ("pgd", 0.6), ("pgd", 0.62), ("fgsm", 0.1))
    ])  # fmt: skip


def _decide(models: pd.DataFrame, *, strong: bool = True, timing: pd.DataFrame | None = None) -> pd.DataFrame:
    correlations = correlation_table(models, n_bootstrap=500, n_permutations=499)
    return decide_claims(
        models, correlations, _timing() if timing is None else timing, _landing(), strong_suite=strong,
        outcomes=even_outcomes(models),
    )  # fmt: skip


def _claim(claims: pd.DataFrame, claim: str, data: str = "mnist") -> pd.Series:
    rows = claims[(claims["claim"] == claim) & (claims["data"] == data)]
    assert len(rows) == 1
    return rows.iloc[0]


def _cluster(weights: tuple[float, ...] = WEIGHTS, seeds: int = 5) -> pd.DataFrame:
    """CE apart from DR-softmax in statistic and accuracy, with the opposite relation among DR-softmax models."""
    models = _group(weights=weights, seeds=seeds, noise=0.001)
    step = models["loss_weight"].map({weight: i for i, weight in enumerate(weights)})
    models["stat.nonlabel_var_log"] += 100 * (step == 0)
    for name in (*WEAK, *WORST):
        models[f"acc.{name}"] += 0.3 * (step > 0) - 0.001 * step
    # Many settings beside CE, so that their distance dominates the coefficient whichever is left out.
    many = pd.concat([models[step == 0].assign(loss=f"other{i}") for i in range(1, 9)])
    for name in (PRIMARY_STATISTIC,):
        many[f"stat.{name}"] += np.random.default_rng(0).normal(0, 0.1, len(many))
    return pd.concat([models, many], ignore_index=True)


# --- C1


@pytest.mark.parametrize(
    ("weak", "worst", "strong", "verdict"),
    [
        (0.03, 0.03, True, SUPPORTED),
        (-0.03, -0.03, True, SUPPORTED),  # the claim has no direction
        (0.03, 0.0, True, WEAK_ONLY),
        (0.03, 0.03, False, WEAK_ONLY),
        (0.0, 0.03, True, INCONCLUSIVE),
    ],
)
def test_correlation_with_robustness(weak: float, worst: float, strong: bool, verdict: str) -> None:
    row = _claim(_decide(_group(weak, worst), strong=strong), "C1")
    assert row["verdict"] == verdict
    assert row["n"] == 24
    if strong and worst:
        assert np.sign(row["effect"]) == -np.sign(worst)
    assert ("strong attacks were not run" in row["evidence"]) == (not strong)


def test_no_correlation_with_robustness_in_a_large_study_is_not_supported() -> None:
    row = _claim(_decide(_group(weights=tuple(0.001 * i for i in range(25)), seeds=3, rng_seed=1)), "C1")
    assert row["verdict"] == NOT_SUPPORTED
    assert row["evidence"].count("the interval lies within ±0.5 for") == 2


def test_no_correlation_in_a_small_study_is_inconclusive() -> None:
    row = _claim(_decide(_group(noise=0.05, seeds=2, rng_seed=3)), "C1")
    assert row["verdict"] == INCONCLUSIVE
    assert re.match(
        r"Weak attacks inconclusive \(FGSM -?0.\d\d, PGD -?0.\d\d: not shown over all models for FGSM and PGD, and not "
        r"ruled out\), worst case inconclusive \(worst case Linf .* not shown over all models for worst case Linf and",
        row["evidence"],
    )


def test_a_cluster_of_ce_and_one_of_dr_do_not_make_a_correlation() -> None:
    row = _claim(_decide(_cluster()), "C1")
    assert row["effect"] < -0.5
    assert row["ci_high"] < 0
    assert row["verdict"] == NOT_SUPPORTED
    assert "the difference between losses makes it" in row["evidence"]


def test_too_few_weights_to_tell_clusters_apart_is_inconclusive() -> None:
    models = _cluster(weights=(0.0, 0.001, 0.005), seeds=8)
    others = _group(weights=(0.0,), seeds=2).iloc[:2]
    named = [others.assign(loss=name) for name in ("label_smoothing", "gce", "logit_squeezing")]
    assert _claim(_decide(pd.concat([models, *named], ignore_index=True)), "C1")["verdict"] == INCONCLUSIVE


def test_seeds_do_not_replace_settings() -> None:
    row = _claim(_decide(_group(0.03, 0.03, weights=(0.0, 0.001, 0.005, 0.02), seeds=8)), "C1")
    assert row["verdict"] == INCONCLUSIVE
    assert f"4 settings of loss and weight; {MIN_SETTINGS} are needed" in row["evidence"]
    assert 2 / math.factorial(MIN_SETTINGS) < ALPHA < 2 / math.factorial(MIN_SETTINGS - 1)


def test_a_setting_out_of_order_breaks_the_correlation_over_settings() -> None:
    models = _group(0.03, 0.03)
    for name in (*WEAK, *WORST):
        models.loc[models["loss_weight"] == 0.1, f"acc.{name}"] -= 0.07
    row = _claim(_decide(models), "C1")
    assert row["verdict"] == INCONCLUSIVE
    assert "ot shown over all models for FGSM and PGD" in row["evidence"]
    assert "ot shown over all models for worst case Linf and worst case L2" in row["evidence"]


def test_weak_attacks_and_the_worst_case_have_a_verdict_each() -> None:
    """Nothing under weak attacks, and a large coefficient under the worst case that a single setting hides."""
    models = _group(0.0, 0.03, weights=tuple(0.001 * i for i in range(25)), seeds=3, rng_seed=1)
    for name in WORST:
        models.loc[models["loss_weight"] == 0.024, f"acc.{name}"] = 0.1
        models[f"acc.{name}"] += np.random.default_rng(3).normal(0, 0.35, 25)[
            models["loss_weight"].rank(method="dense").astype(int) - 1
        ]
    claims = _decide(pd.concat([models, models.assign(data="cifar10")], ignore_index=True))
    row = _claim(claims, "C1")
    assert row["verdict"] == INCONCLUSIVE
    assert row["effect"] < -0.3
    assert row["evidence"].startswith("Weak attacks not supported (FGSM ")
    assert f"worst case inconclusive (worst case Linf {row['effect']:.2f}, worst case L2 " in row["evidence"]
    overall = _claim(claims, "C1", "all")
    assert overall["verdict"] == INCONCLUSIVE
    each = "weak attacks not supported, worst case inconclusive"
    expected = f"W{each[1:]}. By group: mnist/lenet inconclusive (n too small): {each}; cifar10/lenet "
    assert overall["evidence"].startswith(expected)


@pytest.mark.parametrize("seeds", [1, 2])
def test_correlation_needs_enough_models(seeds: int) -> None:
    row = _claim(_decide(_group(0.05, 0.05, noise=1e-4, seeds=seeds)), "C1")
    assert (row["verdict"] == INCONCLUSIVE) == (seeds == 1)
    assert (f"6 usable models; {MIN_MODELS} are needed" in row["evidence"]) == (seeds == 1)


def test_landing_is_part_of_the_evidence() -> None:
    models = _group(0.03, 0.03)
    correlations = correlation_table(models, n_bootstrap=50, n_permutations=49)
    claims = decide_claims(models, correlations, _timing(), _landing(), strong_suite=True)
    assert "62 % of the flips go to the runner-up class (chance 11 %)" in _claim(claims, "C1")["evidence"]
    assert "correlate by 0.80 (medians over 3 cells" in _claim(claims, "C1")["evidence"]
    gone = decide_claims(models, correlations, _timing(), _landing(excluded="near chance"), strong_suite=True)
    assert "was not measured" in _claim(gone, "C1")["evidence"]


# --- C2


@pytest.mark.parametrize(
    ("weak", "worst", "strong", "noise", "verdict"),
    [
        (0.03, 0.03, True, 0.005, SUPPORTED),
        (0.03, 0.0, True, 0.005, WEAK_ONLY),
        (0.03, 0.03, False, 0.005, WEAK_ONLY),
        (-0.03, -0.03, True, 0.005, NOT_SUPPORTED),
        (0.0, 0.0, False, 0.002, NOT_SUPPORTED),
        (0.0, 0.0, True, 0.05, INCONCLUSIVE),
        (-0.03, 0.03, True, 0.005, INCONCLUSIVE),
    ],
)
def test_robustness(weak: float, worst: float, strong: bool, noise: float, verdict: str) -> None:
    models = _group(weak, worst, noise=noise)
    row = _claim(_decide(models, strong=strong), "C2")
    assert row["verdict"] == verdict
    assert row["n"] == 4
    column = "acc.worst_linf@mean" if strong else "acc.pgd@mean"
    by_seed = models.pivot(index="seed", columns="loss_weight", values=column)
    test = stats.ttest_rel(by_seed[PRIMARY_WEIGHT], by_seed[0.0])
    assert row["effect"] == pytest.approx((by_seed[PRIMARY_WEIGHT] - by_seed[0.0]).mean())
    assert row[["ci_low", "ci_high"]].tolist() == pytest.approx(list(test.confidence_interval(0.95)), abs=2e-4)
    assert row["n_images"] == 3


def _on_images(gain: float, images: float, attack: str) -> pd.DataFrame:
    """Return six pairs on 200 images and 400 epsilons, a gain with little noise over seeds and as much over images."""
    rng = np.random.default_rng(0)
    of_image = np.where(np.arange(200) % 2, images, -images)
    levels = (np.arange(400)[:, None] + 0.5) / 400
    shares = {"ce": np.full((6, 200), 0.4), "dr_softmax": 0.4 + gain + of_image + rng.normal(0, 0.004, (6, 1))}
    standing = {(loss, PRIMARY_WEIGHT * (loss != "ce")): levels < of_loss[:, None] for loss, of_loss in shares.items()}
    return outcomes_of(standing, attack)


@pytest.mark.parametrize(
    ("wide", "verdict", "reason"),
    [
        ((), SUPPORTED, "Gains for FGSM and PGD and for both worst cases"),
        (("worst_l2@mean",), WEAK_ONLY, "no gain shown for worst case L2"),
        (("pgd@mean", *WORST), INCONCLUSIVE, "No gain shown for PGD, worst case Linf and worst case L2"),
    ],
)
def test_images_that_differ_make_a_gain_less_sure(wide: tuple[str, ...], verdict: str, reason: str) -> None:
    models = _group(seeds=6, weights=(0.0, PRIMARY_WEIGHT)).set_index("run_id")
    tables = [_on_images(0.03, 0.38 if name in wide else 0.0, name) for name in (*WEAK, *WORST)]
    for table in tables:
        counts = table["standing"].map(lambda text: np.mean([ord(letter) - ord("A") for letter in text]))
        models["acc." + table["attack"].iloc[0]] = pd.Series(counts.to_numpy() / 400, table["run_id"])
    models, outcomes, nothing = models.reset_index(), pd.concat(tables, ignore_index=True), pd.DataFrame()
    row = _claim(decide_claims(models, nothing, nothing, nothing, strong_suite=True, outcomes=outcomes), "C2")
    assert row["verdict"] == verdict
    assert reason in row["evidence"]
    assert (row["n"], row["n_images"]) == (6, 200)
    differences = paired_difference_table(models, outcomes).set_index("attack")
    assert (differences.loc[[*WEAK, *WORST], "ci_low"] > 0).all(), "over seeds alone each gain is shown"
    crossed = differences.loc["worst_linf@mean", ["crossed_low", "crossed_high"]]
    assert row[["ci_low", "ci_high"]].tolist() == crossed.tolist()
    assert bool(re.search(r"worst case L2 \S+ \[[^]]*\] \(over seeds alone \[", row["evidence"])) == bool(wide)
    assert "images (here FGSM 200, PGD 200, worst case Linf 200, worst case L2 200)" in row["evidence"]


def test_robustness_without_outcomes_of_images_is_open() -> None:
    models, nothing = _group(0.03, 0.03), pd.DataFrame()
    row = _claim(decide_claims(models, nothing, nothing, nothing, strong_suite=True), "C2")
    assert row["verdict"] == INCONCLUSIVE
    assert "no outcomes of single images" in row["evidence"]
    assert row["effect"] == pytest.approx(0.09, abs=0.02) and math.isnan(row["ci_low"])


def test_robustness_needs_enough_pairs() -> None:
    row = _claim(_decide(_group(0.05, 0.05, noise=1e-4, seeds=2)), "C2")
    assert row["verdict"] == INCONCLUSIVE
    assert f"2 pairs of seeds; {MIN_PAIRS} are needed" in row["evidence"]


def test_robustness_is_read_at_the_published_weight() -> None:
    models = _group(0.0, 0.0, noise=0.002)
    for name in (*WEAK, *WORST):
        models.loc[~models["loss_weight"].isin([0.0, PRIMARY_WEIGHT]), f"acc.{name}"] += 0.5
    assert _claim(_decide(models), "C2")["verdict"] == NOT_SUPPORTED


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (lambda m: m["loss"] != "ce", "No usable model with cross-entropy"),
        (lambda m: m["loss_weight"] != PRIMARY_WEIGHT, "No usable model with DR-softmax at weight 0.005"),
        (lambda m: (m["loss"] == "ce") == (m["seed"] < 2), "No seed in common"),
    ],
)
def test_robustness_without_pairs(keep: object, reason: str) -> None:
    models = _group(0.03, 0.03)
    row = _claim(_decide(models[keep(models)]), "C2")  # type: ignore[operator]
    assert row["verdict"] == INCONCLUSIVE
    assert reason in row["evidence"]
    assert math.isnan(row["effect"])


def test_evidence_gives_accuracy_norm_and_the_correct_attack() -> None:
    models = _group(0.03, 0.03, clean=-0.01, noise=1e-4)
    models.loc[models["loss_weight"] == PRIMARY_WEIGHT, "norm.cw"] += 0.5
    text = _claim(_decide(models), "C2")["evidence"]
    for part in (
        "PGD +9.0 [9.0, 9.0]",
        "CW +9.0",
        "clean -3.0 [-3.0, -3.0]",
        "minimal norm: L2 by CW +0.49",
        "over 4 pairs",
    ):
        assert part in text


# --- C3


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.0, 1.049, SUPPORTED), (1.051, 1.2, NOT_SUPPORTED), (1.0, 1.2, INCONCLUSIVE), (1.0, math.nan, INCONCLUSIVE)],
)
def test_time(low: float, high: float, verdict: str) -> None:
    row = _claim(_decide(_group(), timing=_timing(low, high, ratio=1.04)), "C3")
    assert row["verdict"] == verdict
    assert row["effect"] == 1.04
    assert row["n"] == 60
    assert "60 interleaved pairs on cpu" in row["evidence"]


@pytest.mark.parametrize(
    "timing",
    [pd.DataFrame(), _timing().iloc[:0], _timing(data="cifar10"), _timing(loss_weight=0.02), _timing(baseline="gce"),
     _timing(ratio=math.nan)],
)  # fmt: skip
def test_time_without_a_measurement(timing: pd.DataFrame) -> None:
    row = _claim(_decide(_group(), timing=timing), "C3")
    assert row["verdict"] == INCONCLUSIVE
    assert "no training step was timed at weight 0.005" in row["evidence"].lower()


@pytest.mark.parametrize("column", ["ratio", "ci_low", "n_pairs", "device"])
def test_time_from_an_incomplete_table(column: str) -> None:
    row = _claim(_decide(_group(), timing=_timing().drop(columns=column)), "C3")
    assert row["verdict"] == INCONCLUSIVE
    assert f"The timing table lacks {column}." in row["evidence"]


def test_the_slowest_of_several_measurements_counts() -> None:
    timing = pd.concat([_timing(), _timing(1.2, 1.3, batch_size=512), _timing()], ignore_index=True)
    row = _claim(_decide(_group(), timing=timing), "C3")
    assert row["verdict"] == NOT_SUPPORTED
    assert "batches of 512" in row["evidence"]
    assert "the slowest of 3 measurements" in row["evidence"]


# --- C4


@pytest.mark.parametrize(
    ("clean", "verdict"),
    [(-0.03, NOT_SUPPORTED), (0.03, SUPPORTED)],  # the statistic falls from weight to weight
)
def test_clean_accuracy(clean: float, verdict: str) -> None:
    row = _claim(_decide(_group(clean=clean)), "C4")
    assert row["verdict"] == verdict
    assert np.sign(row["effect"]) == -np.sign(clean)
    assert "nonlabel_cv" in row["evidence"]
    assert "nonlabel_entropy" in row["evidence"]


def test_no_correlation_with_clean_accuracy_in_a_large_study_supports() -> None:
    models = _group(weights=tuple(0.001 * i for i in range(11)), seeds=6, rng_seed=1)
    row = _claim(_decide(models), "C4")
    assert row["verdict"] == SUPPORTED
    assert 0 < row["ci_high"] < MEANINGFUL_CORRELATION


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        (_group(clean=-0.002, rng_seed=4, seeds=2), "0.5 is not ruled out"),
        (_group(clean=-0.03, seeds=1), "6 usable models"),
        (_group(clean=-0.03, weights=(0.0, 0.001, 0.005)), "3 settings"),
        (_group().assign(clean_accuracy=0.9), "constant"),
    ],
)
def test_clean_accuracy_undecided(models: pd.DataFrame, reason: str) -> None:
    row = _claim(_decide(models), "C4")
    assert row["verdict"] == INCONCLUSIVE
    assert reason in row["evidence"]


def test_clean_accuracy_significant_over_models_alone_is_inconclusive() -> None:
    models = _group(clean=-0.03)
    models.loc[models["loss_weight"] == 0.1, "clean_accuracy"] += 0.1
    assert stats.spearmanr(models["clean_accuracy"], models[f"stat.{PRIMARY_STATISTIC}"]).pvalue < 0.01
    row = _claim(_decide(models), "C4")
    assert row["verdict"] == INCONCLUSIVE
    assert "not significantly positive, but 0.5 is not ruled out" in row["evidence"].lower()


# --- all claims


def test_excluded_models_never_count() -> None:
    models = _group(0.03, 0.03)
    dead = _group(-0.5, -0.5, clean=-0.5, rng_seed=9).assign(excluded="near chance on clean data")
    both, alone = _decide(pd.concat([models, dead], ignore_index=True)), _decide(models)
    columns = [column for column in COLUMNS if column != "evidence"]
    pd.testing.assert_frame_equal(both[columns], alone[columns])
    for claim in ("C1", "C2", "C4"):
        assert "24 of 48 models are excluded." in _claim(both, claim)["evidence"]
        assert "excluded" not in _claim(alone, claim)["evidence"]
    counted = _decide(pd.concat([models, dead.assign(excluded=None)], ignore_index=True))
    assert _claim(counted, "C1")["n"] == 48


def test_only_excluded_models() -> None:
    claims = _decide(_group(0.03, 0.03).assign(excluded="near chance on clean data"))
    assert set(claims.loc[claims["claim"] != "C3", "verdict"]) == {INCONCLUSIVE}


def test_table_has_the_overall_rows_first() -> None:
    claims = _decide(_group(0.03, 0.03))
    assert list(claims) == COLUMNS
    assert claims["claim"].tolist() == [*STATEMENTS, *STATEMENTS]
    assert claims["data"].tolist() == ["all"] * len(STATEMENTS) + ["mnist"] * len(STATEMENTS)
    assert set(claims["verdict"]) <= set(VERDICTS)
    assert claims["evidence"].str.endswith(".").all()
    numbers = ["verdict", "effect", "ci_low", "ci_high", "n"]
    only, overall = claims.iloc[len(STATEMENTS) :][numbers], claims.iloc[: len(STATEMENTS)][numbers]
    pd.testing.assert_frame_equal(only.reset_index(drop=True), overall)


def test_overall_is_the_least_favourable_conclusive_group() -> None:
    models = pd.concat([
        _group(0.03, 0.03), _group(0.03, 0.0, data="cifar10"), _group(0.05, 0.05, data="digits", seeds=1),
    ], ignore_index=True)  # fmt: skip
    timing = pd.concat([_timing(), _timing(1.2, 1.4, "cifar10")], ignore_index=True)
    correlations = correlation_table(models, n_bootstrap=500, n_permutations=499)
    tables = models, correlations, timing, _landing()
    claims = decide_claims(*tables, strong_suite=True, outcomes=even_outcomes(models))
    expected = {"C1": (SUPPORTED, WEAK_ONLY), "C2": (SUPPORTED, WEAK_ONLY), "C3": (SUPPORTED, NOT_SUPPORTED)}
    for claim, verdicts in expected.items():
        assert tuple(_claim(claims, claim, data)["verdict"] for data in ("mnist", "cifar10")) == verdicts
        assert _claim(claims, claim, "digits")["verdict"] == INCONCLUSIVE
        assert _claim(claims, claim, "all")["verdict"] == verdicts[1]
    pooled = correlations[(correlations["data"] == "pooled") & (correlations["method"] == "spearman")]
    pooled = pooled[pooled["statistic"] == PRIMARY_STATISTIC].set_index("attack")
    for claim, attack in (("C1", "worst_linf@mean"), ("C4", "clean")):
        row = _claim(claims, claim, "all")
        assert row["effect"] == pooled["coefficient"][attack]
        assert row["ci_low"] == pooled["ci_low"][attack]
        assert row["n"] == pooled["n_models"][attack] == 54
    row = _claim(claims, "C3", "all")
    assert row["effect"] == pytest.approx((1.02 + 1.3) / 2)
    assert math.isnan(row["ci_low"])
    assert row["n"] == 120
    assert "mnist/lenet supported; cifar10/lenet not supported" in row["evidence"]
    assert "the mean over 2 groups, itself without an interval" in row["evidence"]
    # A share of no gain, or a single pair's difference, is no figure to average.
    unbounded = timing.assign(ci_high=timing["ci_high"].where(timing["data"] != "cifar10"))
    row = _claim(decide_claims(models, correlations, unbounded, _landing(), strong_suite=True), "C3", "all")
    assert (row["effect"], row["n"]) == (1.02, 60)
    assert "the 1 group of 2 where it has a bounded interval" in row["evidence"]


@pytest.mark.parametrize(
    "missing",
    ["acc.cw@mean", "norm.cw", "acc.fgsm@mean", "acc.worst_l2@mean", "acc.worst_linf@mean", "clean_accuracy",
     "stat.nonlabel_cv", f"stat.{PRIMARY_STATISTIC}", "excluded"],
)  # fmt: skip
def test_a_missing_column_is_survived(missing: str) -> None:
    full = dict.fromkeys(STATEMENTS, SUPPORTED) | {"C5": INCONCLUSIVE}  # needs tables of its own
    found = _decide(_group(0.03, 0.03, clean=0.03).drop(columns=missing)).set_index(["data", "claim"])["verdict"][
        "mnist"
    ]
    changed = {
        "acc.fgsm@mean": {"C1": INCONCLUSIVE, "C2": INCONCLUSIVE},
        "acc.worst_l2@mean": {"C1": WEAK_ONLY, "C2": WEAK_ONLY},
        "acc.worst_linf@mean": {"C1": WEAK_ONLY, "C2": WEAK_ONLY},
        "clean_accuracy": {"C4": INCONCLUSIVE},
        f"stat.{PRIMARY_STATISTIC}": {"C1": INCONCLUSIVE, "C4": INCONCLUSIVE},
    }.get(missing, {})
    assert found.to_dict() == full | changed


def test_missing_tables_are_survived() -> None:
    models, nothing = _group(0.03, 0.03), pd.DataFrame()
    claims = decide_claims(models, nothing, nothing, nothing, strong_suite=True)
    verdicts = claims[claims["data"] == "mnist"].set_index("claim")["verdict"].to_dict()
    assert verdicts == dict.fromkeys(STATEMENTS, INCONCLUSIVE)
    for no_models in (models.iloc[:0], nothing):
        empty = decide_claims(no_models, correlation_table(no_models), nothing, nothing, strong_suite=True)
        assert empty["verdict"].tolist() == [INCONCLUSIVE] * len(STATEMENTS)
        assert set(empty["evidence"]) == {"No finished model."}


def test_tables_read_back_from_csv_decide_the_same(tmp_path: object) -> None:
    models = pd.concat([_group(0.03, 0.0), _group(0.02, 0.02, data="cifar10", seeds=3)], ignore_index=True)
    correlations = correlation_table(models, n_bootstrap=200, n_permutations=199)
    tables = [models, correlations, _timing(), _landing(), even_outcomes(models)]
    before = decide_claims(*tables[:4], strong_suite=True, outcomes=tables[4])
    for i, table in enumerate(tables):
        table.to_csv(f"{tmp_path}/{i}.csv", index=False)
    *read, outcomes = (pd.read_csv(f"{tmp_path}/{i}.csv") for i in range(5))
    after = decide_claims(*read, strong_suite=True, outcomes=outcomes)
    pd.testing.assert_frame_equal(after, before)


def test_rules_state_the_constants() -> None:
    text = " ".join(RULES.split())
    for part in (
        *STATEMENTS.values(),
        *VERDICTS,
        f"`{PRIMARY_STATISTIC}`",
        f"below {ALPHA:g}",
        f"weight {PRIMARY_WEIGHT:g}",
        f"fewer than {MIN_MODELS} models or {MIN_SETTINGS} settings",
        f"fewer than {MIN_PAIRS} pairs",
        f"below {100 * MEANINGFUL_GAIN:g} points",
        f"±{MEANINGFUL_CORRELATION:g}",
        f"below {TIME_BUDGET:g}",
        "Intervals of C2 and C5 were over seeds alone when the study was first run; they were widened to count images",
    ):
        assert part in text, part


# --- paired differences


def test_paired_differences_agree_with_scipy() -> None:
    models = _group(0.02, 0.01, noise=0.02)
    table = paired_difference_table(models)
    assert set(table["attack"]) == {"clean", *WEAK, *WORST, "cw@mean", "norm.cw"}
    assert set(table["loss_weight"]) == set(WEIGHTS[1:])
    for row in table.itertuples():
        column = {"clean": "clean_accuracy", "norm.cw": "norm.cw"}.get(row.attack, f"acc.{row.attack}")
        by_seed = models.pivot(index="seed", columns="loss_weight", values=column)
        own, baseline = by_seed[row.loss_weight], by_seed[0.0]
        test = stats.ttest_rel(own, baseline)
        assert (row.ci_low, row.ci_high) == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert row.difference == pytest.approx(row.loss_mean - row.baseline_mean)
        assert row.sd == pytest.approx(np.std(own - baseline, ddof=1))
        assert row.n_pairs == 4


def test_pairs_need_both_seeds_and_finite_values() -> None:
    models = _group(seeds=4, weights=(0.0, 0.005))
    models.loc[models["run_id"] == "mnist-0-3", "seed"] = 7
    models.loc[models["run_id"] == "mnist-0-2", "norm.cw"] = math.inf
    models.loc[models["run_id"] == "mnist-0.005-1", ["norm.cw", "acc.pgd@mean"]] = math.nan
    models.loc[models["run_id"] == "mnist-0.005-0", "excluded"] = "near chance"
    table = paired_difference_table(models).set_index("attack")
    assert table["n_pairs"].to_dict() == {"clean": 2, **dict.fromkeys([*WEAK, *WORST, "cw@mean"], 2), "pgd@mean": 1}
    assert math.isnan(table.loc["pgd@mean", "ci_low"])
    wanted = models.set_index("run_id")["acc.pgd@mean"]
    assert table.loc["pgd@mean", "difference"] == pytest.approx(wanted["mnist-0.005-2"] - wanted["mnist-0-2"])


def test_loss_under_adversarial_training_is_compared_with_that_too() -> None:
    models = _group(seeds=3, weights=(0.0, 0.005))
    hardened = models.replace({"loss": {"ce": "adversarial", "dr_softmax": "adversarial+dr_softmax"}})
    hardened = hardened.assign(
        clean_accuracy=lambda rows: rows["clean_accuracy"] - 0.1 + 0.03 * rows["loss_weight"] / 0.005
    )
    table = paired_difference_table(pd.concat([models, hardened], ignore_index=True)).query("attack == 'clean'")
    own = models.pivot(index="seed", columns="loss", values="clean_accuracy")
    step = (own["dr_softmax"] - own["ce"]).mean()
    found = table.set_index(["loss", "baseline"])["difference"].to_dict()
    assert found == {
        ("dr_softmax", "ce"): pytest.approx(step),
        ("adversarial", "ce"): pytest.approx(-0.1),
        ("adversarial+dr_softmax", "ce"): pytest.approx(step - 0.07),
        ("adversarial+dr_softmax", "adversarial"): pytest.approx(step + 0.03),
    }


def test_equal_differences_have_no_interval() -> None:
    models = _group(seeds=3, weights=(0.0, 0.005)).sort_values(["seed", "loss_weight"])
    models["clean_accuracy"] = [0.9, 0.91, 0.5, 0.51, 0.3, 0.31]
    row = paired_difference_table(models).set_index("attack").loc["clean"]
    assert row["difference"] == pytest.approx(0.01) and row["sd"] == 0
    assert np.isnan([row["ci_low"], row["ci_high"]]).all()


def test_several_runs_of_one_seed_enter_as_their_mean() -> None:
    models = _group(weights=(0.0, 0.005))
    twice = pd.concat([models, models.assign(clean_accuracy=models["clean_accuracy"] + 0.02)], ignore_index=True)
    once = paired_difference_table(models).set_index("attack").loc["clean"]
    both = paired_difference_table(twice).set_index("attack").loc["clean"]
    assert both["n_pairs"] == once["n_pairs"] == 4
    assert both["difference"] == pytest.approx(once["difference"])
    assert both["loss_mean"] == pytest.approx(once["loss_mean"] + 0.01)


def test_no_baseline_gives_no_difference() -> None:
    models = _group()
    assert paired_difference_table(models[models["loss"] != "ce"]).empty
    assert paired_difference_table(models.iloc[:0]).empty
