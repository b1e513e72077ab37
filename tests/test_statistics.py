"""Softmax statistics against closed forms and a second implementation in numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy

from drs.losses import distribution_penalty
from drs.statistics import STATISTICS, softmax_statistics

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 3.0], [0.0, 1.0, 2.0, -1.0]])
LABELS = torch.tensor([3, 1])
SCALE_FREE = ("nonlabel_var_log", "nonlabel_cv", "nonlabel_entropy")


def _reference(logits: np.ndarray, label: int) -> dict[str, float]:
    log_p = log_softmax(logits)
    others = np.delete(np.exp(log_p), label)
    ordered = np.sort(others)[::-1]
    q = others / others.sum()
    return {
        "nonlabel_var_log": np.var(np.delete(log_p, label)),
        "nonlabel_std": np.std(others),
        "nonlabel_cv": np.std(others) / np.mean(others),
        "nonlabel_entropy": entropy(q, base=len(q)),
        "nonlabel_max": ordered[0],
        "nonlabel_gap": ordered[0] - ordered[1],
        "label_prob": np.exp(log_p[label]),
        "margin": logits[label] - np.delete(logits, label).max(),
        "logit_norm": np.linalg.norm(logits - logits.mean()),
    }


def _as_dict(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in softmax_statistics(logits, labels).items()}


def test_variance_of_logarithms_on_the_test_vector() -> None:
    values = softmax_statistics(LOGITS, LABELS)["nonlabel_var_log"]
    # Non-label logits 2, -1, 0.5 (mean 0.5) and 0, 2, -1 (mean 1/3): squared deviations sum to 4.5 and 14/3.
    torch.testing.assert_close(values * 3, torch.tensor([4.5, 14 / 3], dtype=torch.float64))


def test_hand_computed_sample() -> None:
    # p = (1, 2, 4, 8, 1) / 16, label the fourth: q = (1, 2, 4, 1) / 8.
    logits = torch.log(torch.tensor([[1.0, 2.0, 4.0, 8.0, 1.0]], dtype=torch.float64))
    found = {name: values[0] for name, values in _as_dict(logits, torch.tensor([3])).items()}
    assert found["nonlabel_std"] == pytest.approx(math.sqrt(1.5) / 16)  # values 1, 2, 4, 1 have mean 2, variance 1.5
    assert found["nonlabel_cv"] == pytest.approx(math.sqrt(1.5) / 2)
    assert found["nonlabel_entropy"] == pytest.approx(1.75 / 2)  # 1.75 bits of at most 2
    assert found["nonlabel_max"] == pytest.approx(4 / 16)
    assert found["nonlabel_gap"] == pytest.approx(2 / 16)
    assert found["label_prob"] == pytest.approx(8 / 16)
    assert found["margin"] == pytest.approx(math.log(2))
    assert found["nonlabel_var_log"] == pytest.approx(math.log(2) ** 2 * 11 / 16)  # 0, 1, 2, 0 have variance 11/16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [3, 10, 100])
def test_agrees_with_a_loop_in_numpy_and_scipy(classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = (4 * torch.randn(40, classes, generator=generator)).to(dtype)
    labels = torch.randint(classes, (40,), generator=generator)
    found = softmax_statistics(logits, labels)
    for i in range(40):
        for name, expected in _reference(logits[i].double().numpy(), int(labels[i])).items():
            assert float(found[name][i]) == pytest.approx(expected, rel=1e-10, abs=1e-14), name


def test_names_order_and_type() -> None:
    found = softmax_statistics(LOGITS, LABELS.to(torch.int32))
    assert tuple(found) == STATISTICS
    assert all(values.dtype == torch.float64 and values.shape == (2,) for values in found.values())
    assert all(values.shape == (0,) for values in softmax_statistics(LOGITS[:0], LABELS[:0]).values())


def test_is_the_penalty_of_the_loss_divided_by_its_classes() -> None:
    logits = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 7
    penalty = distribution_penalty(logits, labels)
    torch.testing.assert_close(softmax_statistics(logits, labels)["nonlabel_var_log"] * 6, penalty)


def test_uniform_non_label_classes() -> None:
    found = {
        name: values[0] for name, values in _as_dict(torch.tensor([[0.3, 0.3, 5.0, 0.3]]), torch.tensor([2])).items()
    }
    assert found["nonlabel_entropy"] == pytest.approx(1)
    for name in ("nonlabel_var_log", "nonlabel_std", "nonlabel_cv", "nonlabel_gap"):
        assert found[name] == pytest.approx(0, abs=1e-15), name


def test_nothing_changes_when_every_logit_is_shifted() -> None:
    logits = torch.randn(30, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(30) % 10
    shifted = softmax_statistics(logits + 1000, labels)
    for name, values in softmax_statistics(logits, labels).items():
        torch.testing.assert_close(shifted[name], values, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("label_logit", [1e4, -1e4])
def test_extreme_label_logit(label_logit: float) -> None:
    """Where softmax underflows, what depends on the non-label logits alone is that of moderate logits."""
    moderate = softmax_statistics(torch.tensor([[0.0, -2.0, 1.0, 3.0]]), torch.tensor([0]))
    found = softmax_statistics(torch.tensor([[label_logit, -2.0, 1.0, 3.0]]), torch.tensor([0]))
    for name in SCALE_FREE:
        torch.testing.assert_close(found[name], moderate[name], msg=name)
    assert float(found["margin"]) == label_logit - 3
    certain = label_logit > 0
    assert float(found["label_prob"]) == (1.0 if certain else 0.0)
    expected_max = 0.0 if certain else math.exp(3) / (math.exp(-2) + math.exp(1) + math.exp(3))
    assert float(found["nonlabel_max"]) == pytest.approx(expected_max)
    assert (float(found["nonlabel_std"]) == 0) == certain


def test_extreme_spread_stays_finite_and_right() -> None:
    found = {
        name: values[0] for name, values in _as_dict(torch.tensor([[0.0, 1e4, -1e4, 0.0]]), torch.tensor([0])).items()
    }
    assert found["nonlabel_var_log"] == pytest.approx(2e8 / 3)
    assert found["nonlabel_cv"] == pytest.approx(math.sqrt(2))  # q = (1, 0, 0): standard deviation sqrt(2) / 3
    assert found["nonlabel_entropy"] == 0
    assert math.copysign(1, found["nonlabel_entropy"]) == 1
    assert (found["nonlabel_max"], found["nonlabel_gap"], found["label_prob"]) == (1, 1, 0)


def test_tiny_values_keep_their_digits() -> None:
    found = _as_dict(torch.tensor([[60.0, 0.0, -1e-9]], dtype=torch.float64), torch.tensor([0]))
    assert found["nonlabel_gap"][0] == pytest.approx(math.exp(-60) * 1e-9, rel=1e-6)
    assert found["nonlabel_std"][0] == pytest.approx(math.exp(-60) * 0.5e-9, rel=1e-6)


def test_two_classes() -> None:
    found = {name: values[0] for name, values in _as_dict(torch.tensor([[1.0, 2.0]]), torch.tensor([0])).items()}
    other = 1 / (1 + math.exp(-1))
    assert (found["nonlabel_var_log"], found["nonlabel_std"], found["nonlabel_cv"]) == (0, 0, 0)
    assert found["nonlabel_entropy"] == 1
    assert found["nonlabel_max"] == found["nonlabel_gap"] == pytest.approx(other)
    assert found["label_prob"] == pytest.approx(1 - other)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (LOGITS, torch.tensor([3, 4]), "label 4 is outside 0..3"),
        (LOGITS, torch.tensor([-1, 0]), "label -1 is outside 0..3"),
        (LOGITS, torch.tensor([0]), r"\[2, 4\] and \[1\]"),
        (LOGITS[0], torch.tensor([0]), "must be"),
        (LOGITS, torch.tensor([0.0, 1.0]), "integers"),
        (LOGITS.long(), LABELS, "float type"),
        (LOGITS[:, :1], torch.tensor([0, 0]), "at least 2 classes"),
        (torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), torch.tensor([0, 1]), "sample 1, class 0 is nan"),
        (torch.tensor([[0.0, -math.inf]]), torch.tensor([0]), "sample 0, class 1 is -inf"),
    ],
)
def test_bad_input(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        softmax_statistics(logits, labels)
