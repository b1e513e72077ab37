"""Every loss and procedure of a study is timed once, against cross-entropy."""

import pandas as pd
import pytest
import torch
from conftest import compose_train

from drs import timing
from drs.config import TrainConfig


def _configs() -> list[TrainConfig]:
    small = ["data=digits", "model=mlp"]
    inner = ["procedure=adversarial", "procedure.epsilon=0.1", "procedure.steps=2"]
    weights = [["loss=dr_softmax", f"loss.weight={weight}"] for weight in (0.1, 0.005, 0.001)]
    others = [["loss=ce"], ["loss=gce"], ["loss=ce", *inner], ["loss=dr_softmax", *inner]]
    return [compose_train(*small, *own) for own in [*weights, *others, ["loss=gce", "seed=1"]]]


def test_each_loss_is_timed_once_at_the_published_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "N_PAIRS", 5)
    monkeypatch.setattr(timing, "N_PAIRS_PROCEDURE", 5)
    cpu = torch.device("cpu")
    empty = timing.update_timing([], pd.DataFrame(columns=timing.COLUMNS), cpu, measure=True)
    table = timing.update_timing(_configs(), empty, cpu, measure=True)
    weights = dict(zip(table["loss"], table["loss_weight"], strict=True))
    assert weights.pop("dr_softmax") == weights.pop("adversarial+dr_softmax") == 0.005
    assert set(weights) == {"gce", "adversarial"}
    assert len(table) == 4 and table["ratio"].gt(0).all()
    slow = table.set_index("loss")["ratio"]
    assert slow["adversarial"] > 1.5 > slow["dr_softmax"] / 2
    again = timing.update_timing(_configs(), table, cpu, measure=True)
    assert again.equals(table), "what is known is not measured again"
    assert timing.update_timing(_configs(), empty, cpu, measure=False).empty
