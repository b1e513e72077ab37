"""A GPU whose memory runs out: the batch is halved, the work goes on, and the result says so.

There is no GPU here to fill, so a model stands in that raises torch's own error for a batch above a size.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose_train
from torch import Tensor, nn

from drs.array_files import load_arrays_file
from drs.attack_config import CWTorchattacksConfig, FGSMConfig, PGDConfig, SanityConfig
from drs.attacks import build_attack, run_attack
from drs.batches import in_batches
from drs.cells import Cell
from drs.data import LabelledImages
from drs.errors import UserError
from drs.filling import fill_cell
from drs.runs import RunFolder
from drs.suite_config import UNBOUNDED, Epsilon

Digits = tuple[LabelledImages, LabelledImages, LabelledImages]


class LittleMemory(nn.Module):
    """A model that takes ``most`` samples at a time."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model = model
        self.most = most
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory with {len(images)} images")
        result: Tensor = self.model(images)
        return result


def test_what_does_not_fit_is_done_again_in_halves_and_nothing_twice() -> None:
    seen: list[tuple[int, int]] = []

    def work(start: int, stop: int) -> list[int]:
        if stop - start > 30:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        seen.append((start, stop))
        return list(range(start, stop))

    results, size = in_batches(work, 250, 100)
    assert sum(results, []) == list(range(250))
    assert size == 25
    assert seen == [(start, start + 25) for start in range(0, 250, 25)]
    assert in_batches(lambda start, stop: stop - start, 250, 100) == ([100, 100, 50], 100)
    assert in_batches(lambda start, stop: stop - start, 0, 100) == ([], 100)


def test_memory_too_small_for_one_sample_is_one_line() -> None:
    def work(start: int, stop: int) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="PGD: the GPU's memory is too small for a single sample"):
        in_batches(work, 8, 8, "PGD")


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def work(start: int, stop: int) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        in_batches(work, 8, 8)


def test_attack_in_smaller_batches_finds_the_same_and_leaves_the_model_as_it_was(
    digits: Digits, digits_model: nn.Module
) -> None:
    images, labels = digits[2].pixels()[:100], digits[2].labels[:100]
    little = LittleMemory(digits_model, 30)
    modes = [module.training for module in little.modules()]
    flags = [parameter.requires_grad for parameter in little.parameters()]
    state = torch.get_rng_state()
    attack = build_attack(FGSMConfig(kind="fgsm", norm="linf"))
    whole = run_attack(attack, digits_model, images, labels, epsilon=0.1, batch_size=100)
    parts = run_attack(attack, little, images, labels, epsilon=0.1, batch_size=100)
    assert (whole.batch_size, parts.batch_size) == (100, 25)
    assert torch.equal(whole.logits.argmax(1), parts.logits.argmax(1))
    assert torch.allclose(whole.logits, parts.logits, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in little.modules()] == modes
    assert [parameter.requires_grad for parameter in little.parameters()] == flags
    # Seeds go by the position of a batch's first sample, so the result is that of the smaller size from the start.
    attack = build_attack(PGDConfig(kind="pgd", norm="linf", steps=3))
    halved = run_attack(attack, little, images, labels, epsilon=0.1, batch_size=100)
    small = run_attack(attack, digits_model, images, labels, epsilon=0.1, batch_size=25)
    assert torch.equal(halved.logits, small.logits)


@pytest.mark.parametrize(
    ("config", "epsilon"),
    [
        (None, UNBOUNDED),
        (CWTorchattacksConfig(kind="cw_torchattacks", norm="l2", steps=3), UNBOUNDED),
        (SanityConfig(n_samples=80, steps=2, restarts=1), Epsilon(0.1, "0.1")),
    ],
)
def test_cell_says_that_its_batch_was_halved(
    tmp_path: Path, digits_model: nn.Module, config: CWTorchattacksConfig | SanityConfig | None, epsilon: Epsilon
) -> None:
    train = compose_train("data=digits", "model=mlp", f"data.cache={tmp_path}/data")
    about = {}
    for most in (1000, 20):
        cell = Cell(RunFolder(tmp_path / "run"), train, "x", config, epsilon, 80, 80, tmp_path / f"{most}.npz")
        fill_cell(cell, LittleMemory(digits_model, most).eval(), torch.device("cpu"))
        arrays = load_arrays_file(cell.path)
        assert len(arrays["labels"]) == 80 and np.isfinite(arrays.get("logits", np.zeros(1))).all()
        about[most] = json.loads(str(arrays["about"]))
    assert "batch_halved" not in about[1000]
    assert about[20]["batch_halved"] == {"from": 80, "to": 20}
