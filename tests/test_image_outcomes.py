"""What became of each image: from the cells of an evaluation, through a table, to differences of pairs."""

import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from brief_study import TRAINING, configuration
from conftest import compose_train
from outcomes import outcomes_of

from drs.evaluation import evaluate_study
from drs.image_outcomes import GroupOutcomes, outcome_rows, outcomes_by_seed, paired_layout
from drs.masking import paired_gains, survival
from drs.paired import paired_difference_table
from drs.tables import build_tables
from drs.training import train


def test_a_row_has_a_letter_for_each_image_that_every_epsilon_has() -> None:
    standing = [np.array([True, True, False, True]), np.array([True, False, False])]
    (row,) = outcome_rows({"pgd@mean": standing})
    assert row == {"attack": "pgd@mean", "n": 3, "n_epsilons": 2, "standing": "CBA"}


def test_rows_survive_a_file_and_many_epsilons() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((2, 300, 40)) < rng.random((2, 1, 40))
    table = outcomes_of({("ce", 0.0): values}, "pgd@mean")
    read = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    found = outcomes_by_seed(read)
    for seed in (0, 1):
        assert found[seed] == pytest.approx(values[seed].mean(axis=0))


def test_runs_of_one_seed_enter_as_their_mean_on_the_images_of_both() -> None:
    first = outcomes_of({("ce", 0.0): np.array([[[1, 1, 0, 0]]], dtype=bool)}, "pgd@mean")
    second = outcomes_of({("ce", 0.0): np.array([[[1, 0, 0]]], dtype=bool)}, "pgd@mean")
    assert outcomes_by_seed(pd.concat([first, second]))[0].tolist() == [1.0, 0.5, 0.0]


def test_pairs_are_of_seeds_and_images_that_both_have() -> None:
    own = {0: np.array([1.0, 1.0, 0.0]), 2: np.array([1.0, 0.5]), 3: np.ones(3)}
    other = {2: np.array([0.0, 0.25, 1.0]), 0: np.array([0.0, 1.0, 0.0])}
    assert paired_layout(own, other).tolist() == [[1.0, 0.0], [1.0, 0.25]]
    assert paired_layout(own, {1: np.ones(3)}).size == 0


def test_excluded_models_and_other_groups_have_no_outcomes() -> None:
    values = np.ones((3, 1, 4), dtype=bool)
    table = outcomes_of({("ce", 0.0): ~values, ("dr_softmax", 0.005): values}, "pgd@mean")
    table.loc[table["seed"] == 1, "excluded"] = "near chance on clean data"

    def pairs(model: str, weight: float, attack: str = "pgd@mean") -> tuple[int, ...]:
        return GroupOutcomes(table, "mnist", model).difference(attack, "dr_softmax", weight, "ce").shape

    assert pairs("lenet", 0.005) == (2, 4)
    assert pairs("lenet", 0.02) == pairs("mlp", 0.005) == pairs("lenet", 0.005, "fgsm@mean") == (0, 0)
    assert GroupOutcomes(None, "mnist", "lenet").difference("pgd@mean", "dr_softmax", 0.005, "ce").shape == (0, 0)


def test_outcomes_of_an_evaluation_have_the_means_of_its_tables(brief_results: Path, tmp_path: Path) -> None:
    """Robust accuracy comes from the same cells another way, and so do gains at the decisive epsilons."""
    shutil.copytree(brief_results, tmp_path / "results")
    others = [name for name in TRAINING if name != "loss=ce"]
    for seed in range(2):
        train(compose_train(*others, "loss=dr_softmax", f"seed={seed}", f"results_dir={tmp_path / 'results'}"))
    config = configuration(tmp_path / "results")
    evaluation = evaluate_study(config)
    tables, _ = build_tables(evaluation.cells, config.suite, evaluation.folder)
    models, outcomes = tables["models"].set_index("run_id"), tables["image_outcomes"]
    assert {"fgsm@mean", "pgd@mean", "worst_linf@mean", "pgd@decisive"} <= set(outcomes["attack"])
    decisive = tables["worst_case"].query("norm == 'linf'").groupby("run_id")[["pgd", "n"]].mean()
    for row in outcomes.to_dict("records"):
        share = (np.array([ord(letter) for letter in row["standing"]]) - ord("A")) / row["n_epsilons"]
        assert len(share) == row["n"]
        if row["attack"] == "pgd@decisive":
            assert (share.mean(), len(share)) == pytest.approx(tuple(decisive.loc[row["run_id"]]))
        else:
            assert share.mean() == pytest.approx(models.loc[row["run_id"], f"acc.{row['attack']}"])
    differences = paired_difference_table(tables["models"], outcomes)
    crossed = differences[differences["n_images"].notna()]
    assert crossed["attack"].tolist() == ["fgsm@mean", "pgd@mean", "worst_linf@mean"]
    assert (crossed["n_pairs"] == 2).all() and crossed["crossed_low"].notna().any()
    for row in crossed.to_dict("records"):
        images = GroupOutcomes(outcomes, row["data"], row["model"])
        layout = images.difference(row["attack"], row["loss"], row["loss_weight"], row["baseline"])
        assert layout.shape == (row["n_pairs"], row["n_images"])
        assert layout.mean() == pytest.approx(row["difference"])
    alone = differences[differences["n_images"].isna()]
    assert alone["attack"].str.fullmatch(r"clean|norm\..*|.*@(?!mean).*").all()
    ours = outcomes[outcomes["loss"] != "ce"].iloc[0]
    gains = survival(paired_gains(tables["worst_case"], ours["loss"], ours["loss_weight"]))
    images = GroupOutcomes(outcomes, ours["data"], ours["model"])
    layout = images.difference("pgd@decisive", ours["loss"], ours["loss_weight"], "ce")
    assert layout.mean() == pytest.approx(gains.pgd.difference)
