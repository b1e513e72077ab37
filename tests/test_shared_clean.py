"""Cells of one model share its clean images and logits, and no number changes for that."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import compose_train
from torch import Tensor, nn

from drs import filling
from drs.array_files import load_arrays_file
from drs.attack_config import AttackConfig, ProjectedConfig
from drs.cells import Cell
from drs.data import LabelledImages
from drs.filling import fill_cell
from drs.runs import RunFolder
from drs.suite_config import Epsilon

MARGIN = ProjectedConfig("projected", "linf", steps=2, objectives=["margin"], random_start=True)


class Counted(nn.Module):
    """Counts the images that it predicts without a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.predicted = model, 0

    def forward(self, images: Tensor) -> Tensor:
        self.predicted += len(images) * (not torch.is_grad_enabled())
        return self.model(images)


def cells_in(folder: Path) -> Callable[..., Cell]:
    train = compose_train("data=digits", "model=mlp", f"data.cache={folder}/data")

    def make(name: str, config: AttackConfig, n: int, **options: object) -> Cell:
        run = RunFolder(folder / "run")
        return Cell(run, train, name, config, Epsilon(0.1, "0.1"), n, 30, folder / f"{name}.npz", **options)  # type: ignore[arg-type]

    return make


def test_cells_on_the_same_samples_predict_the_clean_images_once(tmp_path: Path, digits_model: nn.Module) -> None:
    cell, device = cells_in(tmp_path), torch.device("cpu")
    model = Counted(digits_model).eval()
    found, predicted = {}, {}
    for name, n, seed in (("first", 40, 0), ("second", 40, 1), ("fewer", 20, 0)):
        model.predicted = 0
        planned = cell(name, replace(MARGIN, seed=seed), n)
        fill_cell(planned, model, device)
        found[name], predicted[name] = load_arrays_file(planned.path), model.predicted
    assert predicted["first"] - predicted["second"] >= 40
    assert predicted["fewer"] >= 20 + 20, "other samples are predicted"
    for name, n, seed in (("first", 40, 0), ("second", 40, 1), ("fewer", 20, 0)):
        filling.CLEAN.forget()
        planned = cell(f"{name} alone", replace(MARGIN, seed=seed), n)
        fill_cell(planned, model, device)
        for key in ("logits", "distance"):
            assert np.array_equal(load_arrays_file(planned.path)[key], found[name][key])


def test_another_model_is_asked_itself(tmp_path: Path, digits_model: nn.Module) -> None:
    cell, device = cells_in(tmp_path), torch.device("cpu")
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    logits = []
    for name, model in (("one", digits_model), ("other", other), ("one again", digits_model)):
        planned = cell(name, MARGIN, 20)
        fill_cell(planned, model, device)
        logits.append(load_arrays_file(planned.path)["logits"])
    assert not np.allclose(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


def test_what_a_cell_before_left_standing_is_asked_for_again(tmp_path: Path, digits_model: nn.Module) -> None:
    """Such samples are seldom those of another cell, and would be kept for nothing."""
    cell, device = cells_in(tmp_path), torch.device("cpu")
    first = cell("first", MARGIN, 40)
    fill_cell(first, digits_model, device)
    kept = len(filling.CLEAN._known)
    fill_cell(cell("later", MARGIN, 40, after=(first,)), digits_model, device)
    assert len(filling.CLEAN._known) == kept


def test_another_data_set_has_images_of_its_own(digits_model: nn.Module) -> None:
    first, second = (
        LabelledImages(torch.full((5, 1, 8, 8), value, dtype=torch.uint8), torch.zeros(5)) for value in (0, 9)
    )
    chosen = np.arange(5)
    clean = filling.CLEAN.of(digits_model, "one", first, chosen)
    assert filling.CLEAN.of(digits_model, "one", first, chosen) is clean
    assert not torch.equal(filling.CLEAN.of(digits_model, "other", second, chosen).images, clean.images)
    assert filling.CLEAN.of(digits_model, "one", first, chosen[:3]) is not clean
    assert filling.CLEAN.of(digits_model, "one", first, chosen[[0, 1, 2, 3, 3]]) is not clean
    filling.CLEAN.forget()
    assert filling.CLEAN.of(digits_model, "one", first, chosen) is not clean
