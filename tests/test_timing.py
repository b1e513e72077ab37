"""Every loss and procedure of a study is timed once, against cross-entropy."""

from typing import Any

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
    others = [["loss=ce"], ["loss=gce"], ["loss=cot"], ["loss=ce", *inner], ["loss=dr_softmax", *inner]]
    return [compose_train(*small, *own) for own in [*weights, *others, ["loss=gce", "seed=1"]]]


def test_each_loss_is_timed_once_at_the_published_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "N_PAIRS", 5)
    monkeypatch.setattr(timing, "N_PAIRS_PROCEDURE", 5)
    cpu = torch.device("cpu")
    empty = timing.update_timing([], pd.DataFrame(columns=timing.COLUMNS), cpu, measure=True)
    table = timing.update_timing(_configs(), empty, cpu, measure=True)
    weights = dict(zip(table["loss"], table["loss_weight"], strict=True))
    assert weights.pop("dr_softmax") == weights.pop("adversarial+dr_softmax") == 0.005
    assert set(weights) == {"gce", "cot", "adversarial"}
    assert len(table) == 5 and table["ratio"].gt(0).all()
    again = timing.update_timing(_configs(), table, cpu, measure=True)
    assert again.equals(table), "what is known is not measured again"
    assert timing.update_timing(_configs(), empty, cpu, measure=False).empty


@pytest.mark.parametrize(
    ("overrides", "updates"),
    [(["loss=gce"], 6), (["loss=cot"], 9), (["loss=logit_squeezing", "loss.noise_std=0.5"], 6)],
)
def test_a_step_is_that_of_training(monkeypatch: pytest.MonkeyPatch, overrides: list[str], updates: int) -> None:
    """Of three pairs: complement objective training updates twice a batch."""
    counted, seen = [], []
    build_optimizer, build_model = timing.build_optimizer, timing.build_model_of

    def counting(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)
        optimizer.register_step_post_hook(lambda *_: counted.append(1))
        return optimizer

    def watched(config: TrainConfig) -> torch.nn.Module:
        model = build_model(config)
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        return model

    monkeypatch.setattr(timing, "build_optimizer", counting)
    monkeypatch.setattr(timing, "build_model_of", watched)
    config = compose_train("data=digits", "model=mlp", *overrides)
    timing.time_steps(config, torch.device("cpu"), n_pairs=3, warmup=0)
    assert len(counted) == len(seen) == updates
    noisy = any(not torch.equal(images, seen[0]) for images in seen)
    assert noisy == (config.loss.name == "logit_squeezing")
