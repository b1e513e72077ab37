"""The script that shows how far the sanity checks of a model depend on images and steps."""

import json
import runpy
from pathlib import Path
from typing import Any

import forked
import pandas as pd
import pytest
from conftest import compose_train
from torch import Tensor, nn

from drs.attacks.probes import Probes
from drs.config import PROJECT_ROOT
from drs.jobs import TrainingResult
from drs.runs import run_folder
from drs.sanity_checks import CHECKS
from drs.training import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    config = compose_train("data=digits", "model=mlp", "epochs=2", f"results_dir={folder}", "progress=false")
    result: TrainingResult = train(config)
    assert json.loads((run_folder(config).path / "status.json").read_text())["state"] == "done", result
    return run_folder(config).path


def test_figures_are_shown_and_written_for_each_number_of_images_and_steps(run: Path, tmp_path: Path) -> None:
    done = forked.run(
        "probes.py",
        str(run),
        "--images",
        "10,30",
        "--steps",
        "1,5",
        "--output",
        f"{tmp_path}/a.csv",
        out=tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "a.csv")
    assert list(zip(table["images"], table["steps"], strict=True)) == [(10, 1), (10, 5), (30, 1), (30, 5)]
    assert {"objective_gap", "logit_shift_and_scale"} <= set(table.columns) & set(CHECKS)
    assert (table["eps0_equals_clean"] == 0).all() and (table["epsilon"] == 0.1).all()
    assert (table["more_steps"] * table["images"] % 1).lt(1e-9).all(), "a share of the images that were probed"
    assert done.stdout.count(run.name) == 4 and "objective_gap" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: nowhere: no run is here; a run's folder holds config.yaml and checkpoint.safetensors"),
        (["RUN", "--steps", "3,x"], "error: --steps 3,x: must be whole numbers above 0, with commas between"),
        (["RUN", "--images", "0"], "error: --images 0: must be whole numbers above 0, with commas between"),
        (["RUN", "--images", "9", "--steps", "2", "--output", "/proc/x.csv"], "--output FILE chooses another place"),
        (["RUN", "--images", "501"], "error: --images 501: digits has 500 test images"),
    ],
)
def test_what_cannot_be_probed_is_said_in_a_line(run: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    given = (str(run) if item == "RUN" else item for item in arguments)
    done = forked.run("probes.py", *given, out=tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_probes_have_the_images_and_steps_that_the_row_names(run: Path) -> None:
    script = runpy.run_path(str(PROJECT_ROOT / "scripts" / "probes.py"))
    asked = []

    def run_probes(model: nn.Module, images: Tensor, *others: Any) -> Probes:
        asked.append((len(images), others[-1].steps, others[-2]))
        return real(model, images, *others)

    script["probed"].__globals__["run_probes"], real = run_probes, script["run_probes"]
    row = script["probed"](run, script["strong_suite"](), 7, 3)
    assert asked == [(7, 3, 0.1)] and (row["images"], row["steps"]) == (7, 3)
