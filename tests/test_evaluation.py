"""The whole pipeline on the smoke study, from the command line, and the reductions behind its tables."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMOKE
from synthetic import study_tables

import drs.study
from drs.array_files import load_arrays_file
from drs.config import PROJECT_ROOT, run_id
from drs.data import load_split
from drs.filling import load_test
from drs.landing import landing_row
from drs.runs import finished_runs, iterate_runs
from drs.study import STAMP, _coefficients
from drs.tables import busy_seconds
from drs.verdicts import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, WEAK_ONLY

TABLES = [
    "accuracy", "claims", "comparators", "correlations", "failures", "granulated", "image_outcomes", "landing",
    "landing_matrices", "minimal_norms", "models", "paired_differences", "partial_correlations", "sample_correlations",
    "sanity", "softmax_profile", "timing", "training", "worst_case",
]  # fmt: skip


def evaluate(results: Path, out: Path, *more: str) -> str:
    """Evaluate the smoke study again; return what is printed."""
    done = forked.run("evaluate.py", *SMOKE, *more, out=out, environment={"DRS_RESULTS": str(results)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def study(smoke_results: Path) -> Path:
    return smoke_results / "smoke"


def test_data_is_read_from_where_the_environment_says_now(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may have been trained on another machine, whose folders are not here."""
    run = next(iter(iterate_runs(study)))
    for name in ("DRS_CACHE", "DRS_DATA"):
        monkeypatch.delenv(name, raising=False)
    trained = run.config()
    monkeypatch.setenv("DRS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DRS_DATA", str(tmp_path / "files"))
    found = run.config()
    assert (found.data.cache, found.data.root) == (str(tmp_path / "cache"), str(tmp_path / "files"))
    assert found == replace(trained, data=found.data) and run_id(found) == run.run_id
    assert load_test(found.data, 5, torch.device("cpu"))[0].images.shape[0] == 5
    assert list((tmp_path / "cache").iterdir())


def read(study: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(study / "tables" / f"{name}.csv", dtype={"run_id": str, "epsilon_label": str})


def test_study_has_every_table_figure_and_a_report(study: Path) -> None:
    assert sorted(path.stem for path in (study / "tables").glob("*.csv")) == TABLES
    pictures = sorted(path.stem for path in (study / "figures").glob("*.png"))
    assert pictures == sorted(path.stem for path in (study / "figures").glob("*.pdf"))
    kinds = "statistic_vs_accuracy epsilon_curves nonlabel_distribution correlation_heatmap training_curves"
    for kind in [*kinds.split(), "where_attacks_land"]:
        assert any(name.startswith(kind) for name in pictures), kind
    report = (study / "REPORT.md").read_text()
    for claim in ("C1", "C2", "C3", "C4", "C5"):
        assert claim in report
    assert not list(study.rglob("*.tmp"))


@pytest.mark.slow
def test_smoke_study_runs_as_it_is(tmp_path: Path) -> None:
    environment = {**os.environ, "DRS_RESULTS": str(tmp_path), "DRS_CACHE": str(tmp_path / "data")}
    for script in ("train.py", "evaluate.py"):
        command = [sys.executable, str(PROJECT_ROOT / "scripts" / script), "experiment=smoke"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    assert len(read(tmp_path / "smoke", "models")) == 8
    assert (tmp_path / "smoke" / "REPORT.md").exists()


def test_models_table_has_the_promised_columns_and_one_row_per_training(study: Path) -> None:
    models = read(study, "models")
    assert list(models.columns[:8]) == [
        "run_id", "data", "model", "loss", "loss_weight", "seed", "clean_accuracy", "train_seconds",
    ]  # fmt: skip
    assert len(models) == models["run_id"].nunique() == 8
    assert sorted(zip(models["loss"], models["loss_weight"], models["seed"], strict=True)) == sorted(
        [("ce", 0.0, seed) for seed in (0, 1)]
        + [("dr_softmax", weight, seed) for weight in (0.001, 0.005, 0.02) for seed in (0, 1)]
    )
    assert models["clean_accuracy"].min() > 0.9
    assert (models["train_seconds"] > 0).all()
    config = next(iterate_runs(study)).config()
    assert set(models["images_seen"]) == {config.epochs * len(load_split(config.data, torch.device("cpu"))[0])}
    assert models["excluded"].isna().all()
    accuracies = models.filter(regex=r"^acc\.")
    assert accuracies.shape[1] > 15
    assert accuracies.stack().between(0, 1).all()


def test_claims_have_a_verdict_of_the_four(study: Path) -> None:
    claims = read(study, "claims")
    assert claims["claim"].drop_duplicates().tolist() == ["C1", "C2", "C3", "C4", "C5"]
    assert set(claims["verdict"]) <= {SUPPORTED, WEAK_ONLY, NOT_SUPPORTED, INCONCLUSIVE}
    assert claims["evidence"].str.len().min() > 10


def test_accuracy_is_what_the_stored_logits_say(study: Path) -> None:
    """Recompute one row of each kind from the arrays, in plain Python."""
    accuracy = read(study, "accuracy")
    for run in list(iterate_runs(study))[:2]:
        rows = accuracy[accuracy["run_id"] == run.run_id].set_index(["attack", "epsilon_label"])["robust_accuracy"]
        files = {path.name.rsplit("-", 1)[0]: load_arrays_file(path) for path in (run.path / "eval").glob("*.npz")}
        right = {
            name: [int(np.argmax(row)) == label for row, label in zip(item["logits"], item["labels"], strict=True)]
            for name, item in files.items()
        }
        assert rows["clean", "0"] == pytest.approx(sum(right["clean"]) / 500)
        assert rows["pgd", "0.1"] == pytest.approx(sum(right["pgd@0.1"]) / 200)
        before = accuracy[accuracy["run_id"] == run.run_id].set_index(["attack", "epsilon_label"])["clean"]
        assert before["pgd", "0.1"] == pytest.approx(sum(right["clean"][:200]) / 200), "of the same images"
        assert before["clean", "0"] == rows["clean", "0"]
        both = [a and b for a, b in zip(right["pgd@0.1"], right["fgsm@0.1"], strict=True)]
        assert rows["worst_linf", "0.1"] == pytest.approx(sum(both) / 200)
        robust = [
            stands or distance > 0.5
            for stands, distance in zip(right["cw"], files["cw"]["distance"].tolist(), strict=True)
        ]
        assert rows["cw", "0.5"] == pytest.approx(sum(robust) / 60)
        assert rows["cw_torchattacks", "inf"] == pytest.approx(sum(right["cw_torchattacks"]) / 200)


def test_worst_case_is_no_higher_than_any_attack_on_the_same_samples(study: Path) -> None:
    accuracy = read(study, "accuracy")
    for (_, norm, _), rows in accuracy[accuracy["attack"] != "clean"].groupby(["run_id", "norm", "epsilon_label"]):
        worst = rows[rows["attack"] == f"worst_{norm}"]
        if len(worst):
            same = rows[rows["n"] == worst["n"].iloc[0]]
            assert worst["robust_accuracy"].iloc[0] <= same["robust_accuracy"].min() + 1e-12


def test_pgd_is_no_weaker_than_fgsm_and_accuracy_falls_with_epsilon(study: Path) -> None:
    models = read(study, "models")
    for epsilon in ("0.05", "0.1", "0.2"):
        assert (models[f"acc.pgd@{epsilon}"] <= models[f"acc.fgsm@{epsilon}"] + 0.01).all()
    curve = models[[f"acc.pgd@{epsilon}" for epsilon in ("0.05", "0.1", "0.2", "0.3")]].to_numpy()
    assert (np.diff(curve, axis=1) <= 0).all()


def test_second_evaluation_computes_nothing_and_changes_nothing(
    smoke_results: Path, study: Path, tmp_path: Path
) -> None:
    def times() -> dict[Path, int]:
        # Another test may let W&B write into a folder of its own meanwhile.
        files = (path for path in study.rglob("*") if path.is_file() and "wandb" not in path.parts)
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    said = evaluate(smoke_results, tmp_path / "out")
    assert "0 to compute" in said and "nothing has changed" in said
    assert times() == before


def test_only_missing_and_damaged_cells_are_filled_and_come_out_the_same(smoke_results: Path, tmp_path: Path) -> None:
    study = tmp_path / "smoke"
    shutil.copytree(smoke_results / "smoke", study)
    drawn = {path: path.stat().st_mtime_ns for path in [study / "REPORT.md", *(study / "figures").iterdir()]}
    run = finished_runs(tmp_path / "smoke")[0]
    missing = next((run.path / "eval").glob("pgd@0.1-*.npz"))
    damaged = next((run.path / "eval").glob("fgsm@0.1-*.npz"))
    before = {path: load_arrays_file(path) for path in (missing, damaged)}
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:1000])
    said = evaluate(tmp_path, tmp_path / "out", "timing=false", "report=false")
    # That a cell is damaged shows where the tables are built from it.
    assert f"{damaged}: not a whole array file" in said
    assert said.count("88 cells, 1 to compute") == 2
    for path, arrays in before.items():
        after = load_arrays_file(path)
        for name in ("indices", "labels", "logits", "distance"):
            np.testing.assert_array_equal(arrays[name], after[name])
    assert f"the tables are in {study / 'tables'}" in said
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn, "tables alone were asked for"
    assert not (study / STAMP).exists(), "the report is older than the tables, and the next evaluation writes it"


def test_coefficients_of_many_models_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    models = study_tables()["models"]
    models = models[models["data"] == "cifar10"]
    alone = _coefficients(models, 1)
    monkeypatch.setattr(drs.study, "SPREAD_MODELS", 1)
    spread = _coefficients(models, 2)
    assert list(alone) == list(spread) == ["granulated", "correlations", "partial_correlations"]
    for name, table in alone.items():
        pd.testing.assert_frame_equal(spread[name], table)


def test_study_without_a_finished_run_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "empty" / "runs" / "0123456789ab"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    # In an interpreter of its own, which shows that nothing that is imported says anything.
    command = [sys.executable, str(PROJECT_ROOT / "scripts" / "evaluate.py"), "study=empty"]
    environment = {**os.environ, "DRS_RESULTS": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == f"error: study=empty: no finished run under {tmp_path}/empty (1 running); train one first"
    )


def test_landing_counts_flips_to_the_runner_up() -> None:
    clean = {
        "indices": np.arange(4),
        "labels": np.array([0, 0, 1, 2]),
        "logits": np.array([[3, 2, 1], [3, 1, 2], [0, 3, 1], [3, 0, 1]], np.float32),
    }
    attacked = {**clean, "logits": np.array([[0, 5, 0], [0, 5, 0], [0, 0, 5], [0, 5, 0]], np.float32)}
    row, pair = landing_row(clean, attacked)
    # Sample 0 flips to its runner-up, sample 1 does not, sample 2 does; sample 3 was wrong before and is no flip.
    assert row["n_flips"] == 3
    assert row["runner_up_rate"] == pytest.approx(2 / 3)
    assert row["chance"] == 0.5
    softmax = torch.tensor(clean["logits"]).double().softmax(1)
    mean = (softmax[0] + softmax[1]) / 2
    assert pair[0, 0, 1] == pytest.approx(float(mean[1] / (mean[1] + mean[2])))
    assert pair[1, 0].tolist()[1:] == [1.0, 0.0]
    assert math.isnan(pair[1, 2, 0])
    assert math.isnan(pair[0, 0, 0])


def test_landing_needs_the_same_samples() -> None:
    clean = {"indices": np.arange(2), "labels": np.array([0, 1]), "logits": np.eye(2, 3, dtype=np.float32)}
    with pytest.raises(ValueError, match="not the first"):
        landing_row(clean, {**clean, "indices": np.array([1, 0])})


def test_busy_time_counts_what_ran_side_by_side_once_and_pauses_never() -> None:
    assert busy_seconds([]) == 0
    assert busy_seconds([(0, 10), (5, 12), (6, 7), (20, 21)]) == 13
    assert busy_seconds([(20, 21), (0, 10)]) == 11


def test_smallest_norms_of_models_and_comparators_are_medians_over_the_attacks_of_a_norm(study: Path) -> None:
    models = read(study, "models").set_index("run_id")
    expected = {}
    for run in finished_runs(study):
        files = [
            load_arrays_file(path) for name in ("cw-", "cw_torchattacks-") for path in run.path.glob(f"eval/{name}*")
        ]
        n = len(files[0]["labels"])
        assert len(files) == 2 and n == 60, "the search, and the other attack without a bound"
        norms = [np.where(file["logits"].argmax(1) != file["labels"], file["distance"], np.inf)[:n] for file in files]
        expected[run.run_id] = float(np.median(np.minimum(*norms)))
    assert models["norm.smallest_l2"].to_dict() == pytest.approx(expected) and len(expected) == 8
    gains = read(study, "paired_differences")
    found = gains[gains["attack"] == "norm.smallest_l2"].set_index(["loss", "loss_weight"])["difference"]
    assert len(found) == 3
    for (loss, weight), difference in found.items():
        chosen = models[(models["loss"] == loss) & (models["loss_weight"] == weight)].set_index("seed")
        baseline = models[models["loss"] == "ce"].set_index("seed")
        assert difference == pytest.approx((chosen["norm.smallest_l2"] - baseline["norm.smallest_l2"]).mean())
    table = read(study, "comparators").set_index(["loss", "loss_weight"])
    means = models.groupby(["loss", "loss_weight"])["norm.smallest_l2"].mean()
    for setting, mean in means.items():
        assert table.loc[setting, "mean.norm.smallest_l2"] == pytest.approx(mean)
