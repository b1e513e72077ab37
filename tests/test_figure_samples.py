"""The picture of single samples under attack, and what it is drawn from."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from drs import publication
from drs.attack_config import PGDConfig
from drs.attacks import build_attack
from drs.data import LabelledImages
from drs.errors import UserError
from drs.figure_samples import AttackedSamples, draw_samples
from drs.runs import RunFolder
from drs.samples import attack_samples

Digits = tuple[LabelledImages, LabelledImages, LabelledImages]
PGD = build_attack(PGDConfig("pgd", "linf", steps=10, relative_step_size=0.25, random_start=True))


@pytest.fixture
def attacked(digits_model: nn.Module, digits: Digits) -> AttackedSamples:
    few = digits[2].first(4)
    return attack_samples(digits_model, few, PGD, 0.3)


def test_samples_hold_both_images_and_the_softmax_of_each(
    attacked: AttackedSamples, digits_model: nn.Module, digits: Digits
) -> None:
    assert len(attacked) == 4
    change = np.abs(attacked.adversarial - attacked.images).max((1, 2, 3))
    assert np.all((change > 0) & (change <= 0.3 + 1e-6))
    for pixels, softmax in ((attacked.images, attacked.before), (attacked.adversarial, attacked.after)):
        wanted = digits_model(torch.from_numpy(pixels)).softmax(1).detach().numpy()
        np.testing.assert_allclose(softmax, wanted, atol=1e-6)
    with pytest.raises(UserError, match="epsilon|eval"):
        attack_samples(digits_model.train(), digits[2].first(2), PGD, 0.3)
    digits_model.eval()


def test_picture_says_what_became_of_each_sample(attacked: AttackedSamples) -> None:
    names = [f"c{number}" for number in range(10)]
    figure = draw_samples({"CE": attacked}, epsilon=0.3, class_names=names)
    axes = np.array(figure.axes).reshape(4, 4)
    for place, own in enumerate(axes):
        found, label = attacked.after[place].argmax(), attacked.labels[place]
        assert own[2].get_xlabel() == (f"still {names[found]}" if found == label else f"now {names[found]}")
        assert own[0].get_ylabel() == f"CE\n{names[label]}"
        shown = np.asarray(own[1].images[0].get_array())
        wanted = 0.5 + (attacked.adversarial - attacked.images)[place, 0] / 0.6
        np.testing.assert_allclose(shown, wanted, atol=1e-6)
        heights = [bar.get_height() for bar in own[3].patches]
        np.testing.assert_allclose(heights, np.concatenate([attacked.before[place], attacked.after[place]]), atol=1e-6)
    with pytest.raises(ValueError, match="no samples"):
        draw_samples({}, epsilon=0.1)
    with pytest.raises(ValueError, match="one attack"):
        draw_samples({"CE": attacked, "DR": replace(attacked, attack="fgsm")}, epsilon=0.1)


def test_picture_marks_the_models_that_fail_a_check(attacked: AttackedSamples) -> None:
    failed = {"CE": [], "DR": ["objective_gap", "more_steps"], "GCE": ["zero_gradient"]}
    figure = draw_samples({"CE": attacked, "DR": attacked}, epsilon=0.3, failed_checks=failed)
    names = [own[0].get_ylabel().split("\n")[0] for own in np.array(figure.axes).reshape(8, 4)]
    assert names == ["CE"] * 4 + ["DR †"] * 4
    assert figure.get_suptitle() == (
        "attack: PGD (torchattacks), L∞ bound 0.3\n† sanity checks: DR fails objective_gap, more_steps"
    )
    passing = draw_samples({"CE": attacked}, epsilon=0.3, failed_checks={"CE": []})
    assert passing.get_suptitle() == "attack: PGD (torchattacks), L∞ bound 0.3" and passing.axes[
        0
    ].get_ylabel().startswith("CE\n")


def test_published_picture_marks_what_the_study_says_fails(
    smoke_results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, reference = smoke_results / "smoke", tmp_path / "reference"
    shutil.copytree(study / "tables", reference / "tables")
    chosen = publication.chosen_runs(study)
    for name, run_id in chosen.items():
        publication._copy_run(RunFolder(study / "runs" / run_id), reference / publication.MODELS / name)
    models = pd.read_csv(reference / "tables" / "models.csv", dtype={"run_id": str})
    failed = models["run_id"] == chosen["digits-mlp-dr_softmax"]
    models.assign(failed_checks=np.where(failed, "objective_gap", "")).to_csv(reference / "tables" / "models.csv")
    drawn: list[Figure] = []
    monkeypatch.setattr(publication, "save_figure", lambda figure, *_: drawn.append(figure))
    publication._draw_pair(reference, "digits", "mlp")
    names = {axis.get_ylabel().split("\n")[0] for axis in drawn[0].axes} - {""}
    assert len(names) == 2 and "CE" in names
    (ours,) = names - {"CE"}
    assert ours.startswith("DR ") and ours.endswith(" †")
    assert drawn[0].get_suptitle().split("\n")[1] == f"† sanity checks: {ours.removesuffix(' †')} fails objective_gap"
