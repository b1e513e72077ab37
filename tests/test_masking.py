"""What is left of a gain: Fieller's interval against known answers, and every verdict of claim C5."""

import math

import numpy as np
import pandas as pd
import pytest
from outcomes import outcomes_of, outcomes_of_worst_case

from drs.claims import decide_claims
from drs.comparators import comparator_table
from drs.correlation import correlation_table
from drs.marks import correlated_note
from drs.masking import Gain, Survival, fieller_interval, masked_checks, paired_gains, survival
from drs.verdicts import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, decide_masking

NAN = math.nan
NAMES = ["run_id", "data", "model", "loss", "loss_weight", "seed"]


def worst_case(pgd: list[float], worst: list[float], loss: str = "dr_softmax", weight: float = 0.005) -> pd.DataFrame:
    """Cross-entropy at 40 % under PGD and 35 % in the worst case, and a loss with these gains, a seed each."""
    rows = []
    for seed, gains in enumerate(zip(pgd, worst, strict=True)):
        for name, own, gain in (("ce", 0.0, (0.0, 0.0)), (loss, weight, gains)):
            rows.append({
                "run_id": f"{name}-{seed}", "data": "mnist", "model": "lenet", "loss": name, "loss_weight": own,
                "seed": seed, "procedure": "standard", "norm": "linf", "epsilon": 0.1, "epsilon_label": "0.1", "n": 100,
                "clean": 0.99, "pgd": 0.4 + gain[0], "worst": 0.35 + gain[1], "excluded": "", "failed_checks": "",
            })  # fmt: skip
    return pd.DataFrame(rows)


def sanity(check: str, own: list[str], baseline: list[str]) -> pd.DataFrame:
    rows = [("dr_softmax", 0.005, passed) for passed in own] + [("ce", 0.0, passed) for passed in baseline]
    return pd.DataFrame([
        {"data": "mnist", "model": "lenet", "loss": loss, "loss_weight": weight, "check": check, "passed": passed,
         "excluded": ""}
        for loss, weight, passed in rows
    ])  # fmt: skip


def test_fieller_is_the_textbook_interval_of_independent_means() -> None:
    """Solving |top - r bottom| = t se(top - r bottom) for r numerically gives the same bounds."""
    rng = np.random.default_rng(1)
    top, bottom = rng.normal(2, 0.5, 12), rng.normal(4, 0.5, 12)
    low, high = fieller_interval(top, bottom)
    from scipy import stats

    quantile = stats.t.ppf(0.975, 11)
    for ratio in (low, high):
        rest = top - ratio * bottom
        assert abs(rest.mean()) == pytest.approx(quantile * rest.std(ddof=1) / math.sqrt(12), rel=1e-9)
    assert low < top.mean() / bottom.mean() < high


def test_fieller_covers_at_its_nominal_rate() -> None:
    rng = np.random.default_rng(2)
    inside, studies = 0, 2000
    for _ in range(studies):
        common = rng.normal(0, 0.3, 6)
        low, high = fieller_interval(1 + common + rng.normal(0, 0.2, 6), 2 + common + rng.normal(0, 0.2, 6))
        inside += low <= 0.5 <= high
    # Three standard errors of a share of 0.95 over 2000 studies are 1.5 points.
    assert inside / studies == pytest.approx(0.95, abs=0.015)


def test_a_denominator_that_cannot_be_told_from_zero_leaves_the_ratio_unbounded() -> None:
    low, high = fieller_interval(np.array([1.0, 1.1, 0.9]), np.array([-1.0, 1.0, 0.5]))
    assert math.isnan(low) and math.isnan(high)
    assert all(math.isnan(bound) for bound in fieller_interval(np.array([1.0]), np.array([1.0])))


def test_gains_are_paired_by_seed_on_the_same_images() -> None:
    table = worst_case([0.2, 0.22, 0.18], [0.1, 0.11, 0.09])
    gains = paired_gains(table, "dr_softmax", 0.005)
    assert gains["pgd"].tolist() == pytest.approx([0.2, 0.22, 0.18])
    left = survival(gains)
    assert left.pgd.n == 3
    assert left.share == pytest.approx(0.5)
    assert (left.ci_low, left.ci_high) == pytest.approx((0.5, 0.5))
    one_seed_less = table.drop(index=table.index[(table["loss"] == "ce") & (table["seed"] == 1)])
    assert paired_gains(one_seed_less, "dr_softmax", 0.005).index.tolist() == [0, 2]
    excluded = table.assign(excluded=np.where(table["seed"] == 0, "near chance on clean data", ""))
    assert len(paired_gains(excluded, "dr_softmax", 0.005)) == 2
    assert paired_gains(table, "dr_softmax", 0.02).empty
    assert math.isnan(survival(paired_gains(table, "dr_softmax", 0.02)).share)


def test_a_loss_under_pgd_leaves_no_share_of_a_gain() -> None:
    worse = pd.DataFrame({"pgd": [-0.04, -0.05, -0.03], "worst": [-0.08, -0.06, -0.07]})
    left = survival(worse)
    assert left.pgd.difference == pytest.approx(-0.04)
    assert all(math.isnan(value) for value in left[2:])
    better = survival(-worse)
    assert better.share == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("own", "baseline", "counts"),
    [
        (["fail", "fail", "pass"], ["pass", "pass", "pass"], True),
        (["fail", "pass", "pass"], ["pass", "pass", "pass"], False),
        (["fail", "fail", "fail"], ["fail", "fail", "pass"], False),
        (["not run", "not run", "fail"], ["not run", "not run", "not run"], True),
        (["not run", "not run", "not run"], ["pass", "pass", "pass"], False),
    ],
)
def test_a_masking_check_counts_where_most_fail_and_cross_entropy_does_not(
    own: list[str], baseline: list[str], counts: bool
) -> None:
    table = sanity("objective_gap", own, baseline)
    is_own = table["loss"] == "dr_softmax"
    assert masked_checks(table[is_own], table[~is_own]) == (["objective_gap"] if counts else [])
    other = table.assign(check="more_steps")
    assert masked_checks(other[is_own], other[~is_own]) == [], "a short attack is not a mask"


def left(pgd: tuple[float, float], worst: tuple[float, float], share: tuple[float, float], n: int = 4) -> Survival:
    middle = [sum(pair) / 2 for pair in (pgd, worst, share)]
    return Survival(Gain(n, middle[0], *pgd), Gain(n, middle[1], *worst), middle[2], *share)


@pytest.mark.parametrize(
    ("figures", "counting", "strong", "verdict"),
    [
        (left((0.1, 0.3), (0.1, 0.3), (0.8, 1.2)), [], True, SUPPORTED),
        (left((0.1, 0.3), (0.1, 0.3), (0.8, 1.2)), ["objective_gap"], True, NOT_SUPPORTED),
        (left((0.1, 0.3), (0.01, 0.09), (0.1, 0.45)), [], True, NOT_SUPPORTED),
        (left((0.1, 0.3), (-0.02, 0.09), (NAN, NAN)), [], True, NOT_SUPPORTED),
        (left((0.1, 0.3), (0.05, 0.25), (0.3, 1.1)), [], True, INCONCLUSIVE),
        (left((-0.1, 0.3), (0.1, 0.3), (NAN, NAN)), [], True, INCONCLUSIVE),
        (left((-0.1, 0.3), (0.1, 0.3), (NAN, NAN)), ["objective_gap"], True, INCONCLUSIVE),
        (left((0.1, 0.3), (0.1, 0.3), (0.8, 1.2), n=2), [], True, INCONCLUSIVE),
        (left((0.1, 0.3), (0.1, 0.3), (0.8, 1.2)), [], False, INCONCLUSIVE),
        (None, [], True, INCONCLUSIVE),
    ],
)
def test_verdict_on_masking(figures: Survival | None, counting: list[str], strong: bool, verdict: str) -> None:
    assert decide_masking(figures, counting, strong_suite=strong).verdict == verdict


@pytest.mark.parametrize(
    ("pgd", "worst", "check", "verdict"),
    [
        ([0.2, 0.22, 0.21, 0.19], [0.19, 0.21, 0.21, 0.18], "pass", SUPPORTED),
        ([0.2, 0.22, 0.21, 0.19], [0.19, 0.21, 0.21, 0.18], "fail", NOT_SUPPORTED),
        ([0.2, 0.22, 0.21, 0.19], [0.02, 0.03, 0.01, 0.02], "pass", NOT_SUPPORTED),
        ([0.2, -0.3, 0.3, -0.1], [0.1, 0.1, 0.1, 0.1], "pass", INCONCLUSIVE),
    ],
)
def test_claims_table_decides_masking_from_the_tables(
    pgd: list[float], worst: list[float], check: str, verdict: str
) -> None:
    table = worst_case(pgd, worst)
    models = table[[*NAMES, "procedure", "excluded"]].assign(clean_accuracy=0.99)
    checks = sanity("logit_shift_and_scale", [check] * 4, ["pass"] * 4)
    nothing = pd.DataFrame()
    claims = decide_claims(
        models, correlation_table(models), nothing, nothing, strong_suite=True, worst_case=table, sanity=checks,
        outcomes=outcomes_of_worst_case(table),
    )  # fmt: skip
    (row,) = claims[(claims["claim"] == "C5") & (claims["data"] == "mnist")].to_dict("records")
    assert row["verdict"] == verdict
    assert row["n"] == 4
    assert row["effect"] == pytest.approx(np.mean(worst) / np.mean(pgd))
    assert "same 3 images" in row["evidence"] and row["n_images"] == 3


@pytest.mark.parametrize(("images", "verdict"), [(0.0, SUPPORTED), (0.39, INCONCLUSIVE)], ids=["alike", "that differ"])
def test_images_that_differ_leave_a_share_unsettled(images: float, verdict: str) -> None:
    """PGD gains 20 points on 100 images, the worst case 16; where it keeps much on some images, it loses on others."""
    rng = np.random.default_rng(0)
    levels = (np.arange(400)[:, None] + 0.5) / 400
    of_image = np.where(np.arange(100) % 2, images, -images)
    noise = rng.normal(0, 0.005, (6, 1))
    shares = {"pgd@decisive": 0.2 + noise + np.zeros(100), "worst_linf@mean": 0.16 + noise + of_image}
    even, tables, means = np.full((6, 100), 0.4), [], {}
    for attack, gain in shares.items():
        standing = {("ce", 0.0): levels < even[:, None], ("dr_softmax", 0.005): levels < (even + gain)[:, None]}
        tables.append(outcomes_of(standing, attack))
        means[attack] = (
            standing["dr_softmax", 0.005].mean(axis=(1, 2)) - standing["ce", 0.0].mean(axis=(1, 2))
        ).tolist()
    table = worst_case(*means.values())
    models = table[[*NAMES, "procedure", "excluded"]].assign(clean_accuracy=0.99)
    outcomes, nothing = pd.concat(tables), pd.DataFrame()
    claims = decide_claims(
        models, nothing, nothing, nothing, strong_suite=True, worst_case=table, outcomes=outcomes
    ).set_index(["claim", "data"])  # fmt: skip
    row = claims.loc[("C5", "mnist")]
    assert row["verdict"] == verdict
    assert (row["n"], row["n_images"]) == (6, 100)
    alone = survival(paired_gains(table, "dr_softmax", 0.005))
    assert row["effect"] == pytest.approx(alone.share)
    assert alone.ci_low > 0.5 and alone.worst.ci_low > 0, "over seeds alone C5 is supported"
    assert ("over seeds alone it is 0.80 [0.80, 0.80]" in row["evidence"]) == bool(images)
    accuracy = table[[*NAMES, "norm", "epsilon", "excluded"]].assign(attack="pgd", robust_accuracy=table["pgd"])
    timed = models.assign(train_seconds=1.0, images_seen=100)
    compared = comparator_table(timed, accuracy, table, outcomes).set_index("loss").loc["dr_softmax"]
    assert compared[["share_low", "share_high"]].tolist() == [alone.ci_low, alone.ci_high]
    assert compared[["share_crossed_low", "share_crossed_high"]].tolist() == row[["ci_low", "ci_high"]].tolist()
    assert (compared["gain_worst_crossed_low"] < compared["gain_worst_low"] - 0.01) == bool(images)


def test_masking_without_outcomes_of_images_is_open() -> None:
    table = worst_case([0.2, 0.22, 0.21], [0.19, 0.21, 0.21])
    models = table[[*NAMES, "procedure", "excluded"]].assign(clean_accuracy=0.99)
    claims = decide_claims(models, *[pd.DataFrame()] * 3, strong_suite=True, worst_case=table)
    (row,) = claims[(claims["claim"] == "C5") & (claims["data"] == "mnist")].to_dict("records")
    assert row["verdict"] == INCONCLUSIVE and row["n"] == 3
    assert "no outcomes of single images" in row["evidence"]


def test_comparator_table_has_a_row_per_setting_with_its_survival() -> None:
    table = pd.concat(
        [
            worst_case([0.2, 0.22], [0.1, 0.11]),
            worst_case([0.5, 0.5], [0.5, 0.5], "adversarial", 0.0).query("loss != 'ce'"),
        ]
    )
    models = table[[*NAMES, "procedure", "excluded"]].assign(
        clean_accuracy=0.9, train_seconds=[1.0, 2.0, 3.0, 4.0, 9.0, 9.0], images_seen=40000,
        failed_checks=["", "objective_gap", "", "objective_gap;more_steps", "", ""],
    )  # fmt: skip
    models["norm.fmn_linf"] = [0.1, 0.2, 0.1, np.inf, 0.3, 0.3]
    accuracy = table[[*NAMES, "norm", "epsilon", "excluded"]].assign(attack="pgd", robust_accuracy=table["pgd"])
    elsewhere = accuracy.assign(epsilon=0.3, robust_accuracy=0.0)
    rows = comparator_table(models, pd.concat([accuracy, elsewhere]), table).set_index("loss")
    assert set(rows.index) == {"ce", "dr_softmax", "adversarial"}
    own = rows.loc["dr_softmax"]
    assert own["n_seeds"] == 2
    assert own["mean.pgd"] == pytest.approx(0.61), "other epsilons than the decisive ones must not enter"
    assert own["gain_pgd"] == pytest.approx(0.21)
    assert own["share"] == pytest.approx(0.5)
    assert own["mean.train_seconds"] == pytest.approx(3.0)
    assert own["mean.seconds_10k"] == pytest.approx(0.75)
    assert own["mean.norm.fmn_linf"] == pytest.approx(0.2), "an infinite median does not enter the mean"
    assert own["failed_checks"] == "objective_gap 2/2; more_steps 1/2"
    assert rows.loc["adversarial", "gain_worst"] == pytest.approx(0.5)
    assert pd.isna(rows.loc["ce"].get("gain_pgd"))


def test_note_counts_the_failing_models_among_those_that_are_correlated() -> None:
    models = pd.DataFrame({
        "run_id": list("abcdef"), "data": ["mnist"] * 5 + ["cifar10"], "model": ["lenet"] * 5 + ["cnn"],
        "procedure": ["standard"] * 4 + ["adversarial", "standard"], "excluded": ["", "", "", "near chance", "", ""],
        "failed_checks": ["more_steps", "", "objective_gap;more_steps", "more_steps", "more_steps", ""],
    })  # fmt: skip
    note = correlated_note(models)
    assert "(†) is failed by 2 of 3 models of mnist, lenet." in note
    assert "cifar10" not in note
    assert (
        correlated_note(models.assign(failed_checks="")) == correlated_note(models.drop(columns="failed_checks")) == ""
    )
