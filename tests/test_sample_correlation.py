"""Correlation over the samples of one model, against a linear model's exact minimal norms and scipy."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from drs.report_statistics import sample_correlation_section
from drs.sample_correlation import MIN_SAMPLES, sample_correlation_rows, spearman_interval
from drs.statistics import STATISTICS

KEYS = ["statistic", "n", "n_not_found", "coefficient", "ci_low", "ci_high", "p_value"]


def _arrays(seed: int, n: int = 200, extra: int = 50) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Logits [n, 4] of which two thirds are right, attacked with luck; norms unrelated to anything."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n + extra).astype(np.int16)
    logits = rng.normal(size=(n + extra, 4)).astype(np.float32)
    logits[np.arange(n + extra), labels] += 1.5
    indices = rng.permutation(1000)[: n + extra].astype(np.int32)
    after = logits[:n].copy()
    fooled = rng.random(n) < 0.8
    after[fooled, labels[:n][fooled]] = -9
    clean = {"indices": indices, "labels": labels, "logits": logits, "distance": np.zeros(n + extra)}
    attacked = {"indices": indices[:n], "labels": labels[:n], "logits": after, "distance": rng.random(n)}
    return clean, attacked


def _row(rows: list[dict[str, Any]], statistic: str) -> dict[str, Any]:
    return next(row for row in rows if row["statistic"] == statistic)


def test_a_linear_models_norm_is_the_margin() -> None:
    """Of a two-class linear classifier the minimal L2 norm is the margin over the norm of the weights' difference."""
    rng = np.random.default_rng(0)
    weights, images = rng.normal(size=(2, 30)), rng.normal(size=(300, 30))
    logits = images @ weights.T
    labels = np.where(rng.random(300) < 0.9, logits.argmax(1), 1 - logits.argmax(1))
    direction = weights[0] - weights[1]
    margin = logits[:, 0] - logits[:, 1]
    moved = images - 1.001 * (margin / (direction @ direction))[:, None] * direction
    clean = {"indices": np.arange(300), "labels": labels, "logits": logits}
    distance = np.linalg.norm(moved - images, axis=1)
    attacked = {"indices": np.arange(300), "labels": labels, "logits": moved @ weights.T, "distance": distance}
    rows = sample_correlation_rows(clean, attacked)
    assert [row["statistic"] for row in rows] == list(STATISTICS)
    assert all(list(row) == KEYS for row in rows)
    right = int((logits.argmax(1) == labels).sum())
    assert 200 < right < 300
    row = _row(rows, "margin")
    assert (row["n"], row["n_not_found"]) == (right, 0)
    assert row["coefficient"] == row["ci_low"] == row["ci_high"] == pytest.approx(1)
    assert _row(rows, "nonlabel_max")["coefficient"] == pytest.approx(-1)
    assert np.isnan(_row(rows, "nonlabel_var_log")["coefficient"]), "constant with two classes"


def test_only_samples_that_were_right_and_are_fooled_count() -> None:
    clean, attacked = _arrays(1)
    logits, labels = clean["logits"][:200].astype(float), attacked["labels"]
    right = logits.argmax(1) == labels
    fooled = attacked["logits"].argmax(1) != labels
    kept = right & fooled
    assert (right & ~fooled).sum() > 0 and (~right & fooled).sum() > 0, "every kind of sample occurs"
    masked = np.where(np.arange(4) == labels[:, None], -np.inf, logits)
    margin = (logits[np.arange(200), labels] - masked.max(1))[kept]
    row = _row(sample_correlation_rows(clean, attacked), "margin")
    coefficient, p_value = stats.spearmanr(margin, attacked["distance"][kept])
    assert (row["n"], row["n_not_found"]) == (kept.sum(), (right & ~fooled).sum())
    assert row["coefficient"] == pytest.approx(coefficient)
    assert row["p_value"] == pytest.approx(p_value)
    assert row["ci_low"] < row["coefficient"] < row["ci_high"]
    ruined = {**attacked, "distance": np.where(kept, attacked["distance"], np.inf)}
    assert sample_correlation_rows(clean, ruined) == sample_correlation_rows(clean, attacked)


@pytest.mark.parametrize("relation", [0.0, 0.6, 0.9])
def test_intervals_cover_the_true_coefficient(relation: float) -> None:
    """95 % intervals of 2000 models with 100 samples; three standard errors of that share are 1.5 points."""
    true = 6 / np.pi * np.arcsin(relation / 2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 100))
    y = relation * x + np.sqrt(1 - relation**2) * rng.normal(size=(2000, 100))
    covered = []
    for left, right in zip(x, y, strict=True):
        low, high = spearman_interval(float(stats.spearmanr(left, right)[0]), 100)
        covered.append(low <= true <= high)
    assert 0.935 <= np.mean(covered) <= 0.965


def test_interval_is_close_to_a_bootstrap() -> None:
    rng = np.random.default_rng(3)
    x = rng.exponential(size=400)
    y = x + rng.exponential(size=400)
    found = spearman_interval(float(stats.spearmanr(x, y)[0]), 400)
    rows = rng.integers(0, 400, (1000, 400))
    draws = [stats.spearmanr(x[own], y[own])[0] for own in rows]
    np.testing.assert_allclose(found, np.quantile(draws, [0.025, 0.975]), atol=0.02)


def test_too_few_samples_have_no_coefficient() -> None:
    clean, attacked = _arrays(4)
    right_and_fooled = (clean["logits"][:200].argmax(1) == attacked["labels"]) & (
        attacked["logits"].argmax(1) != attacked["labels"]
    )
    enough = int(np.flatnonzero(right_and_fooled)[MIN_SAMPLES - 1]) + 1
    for n, exists in ((enough, True), (enough - 1, False), (0, False)):
        rows = sample_correlation_rows(clean, {name: values[:n] for name, values in attacked.items()})
        assert len(rows) == len(STATISTICS)
        assert all(np.isfinite(row[key]) == exists for row in rows for key in KEYS[3:])


def test_what_does_not_fit_is_refused() -> None:
    clean, attacked = _arrays(5)
    with pytest.raises(ValueError, match="not the first"):
        sample_correlation_rows(clean, {**attacked, "indices": attacked["indices"][::-1]})
    with pytest.raises(ValueError, match="not finite"):
        sample_correlation_rows(clean, {**attacked, "distance": np.full(200, np.inf)})


def test_section_averages_over_the_models_of_a_setting() -> None:
    named = {"data": "mnist", "model": "net", "loss": "dr_softmax", "loss_weight": 0.005, "attack": "cw"}
    rows = [
        {**named, "run_id": f"r{seed}", "seed": seed, "statistic": statistic, "n": 90 + seed, "n_not_found": seed,
         "coefficient": coefficient + 0.1 * seed, "ci_low": 0, "ci_high": 1, "p_value": 0.5,
         "excluded": "near chance on clean data" if seed == 3 else ""}
        for seed in range(4) for statistic, coefficient in (("nonlabel_var_log", -0.3), ("margin", 0.6), ("other", 9))
    ]  # fmt: skip
    text = sample_correlation_section(pd.DataFrame(rows))
    lines = [line for line in text.splitlines() if line.startswith("| mnist")]
    assert lines == ["| mnist/net | CW | DR 0.005 | 3 | 90–92 | 3 | −0.20 ± 0.10 | 0.70 ± 0.10 |"]
    assert "No attack" in sample_correlation_section(pd.DataFrame(rows).iloc[:0])
