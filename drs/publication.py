"""A finished study -> its reference folder: tables, figures and reports, and a few models with their samples.

The models let a reader, and the notebooks, go below the averages without training anything: per dataset, of the
architecture with the most models, cross-entropy and the DR-softmax setting that stands best under the worst case, each
with its weights and the per-sample arrays of every attack; and the first test images, so that a model can be attacked
at once.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from drs.array_files import load_arrays_file, save_arrays
from drs.attack_config import PGDConfig
from drs.attacks import build_attack
from drs.config import loss_label, project_path, run_id
from drs.data import LabelledImages, load_test_split
from drs.errors import UserError
from drs.figure_samples import draw_samples
from drs.figure_style import setting_label
from drs.files import atomic_write, sha256_of
from drs.integrity import CHECKPOINT, CONFIG, METRICS, check_files
from drs.marks import failed_checks_of
from drs.paired import BASELINE
from drs.report import read_provenance, read_tables, save_figure
from drs.runs import RunFolder
from drs.samples import attack_samples
from drs.selection import best_weight, group_models, standard_models
from drs.verdicts import PRIMARY_LOSS, PRIMARY_WEIGHT

REPORTS = ("REPORT.md", "report.html", "provenance.json")
STUDY_FOLDERS = ("tables", "figures")
MODELS, SUMS, IMAGES = "models", "SHA256SUMS", "-images.npz"
LIMIT_MB = 10.0
"""Of weights and per-sample arrays together, which stay in the history of the repository for ever."""
N_IMAGES, N_DRAWN = 10, 3


def chosen_runs(study: Path) -> dict[str, str]:
    """Return the run ids of the models to publish, under the name of their folder, ``<data>-<model>-<loss>``.

    Per dataset, of the architecture with the most models: the DR-softmax setting that is best in Linf
    (``drs.selection.best_weight``), at the lowest seed that cross-entropy has too; and cross-entropy at that seed. A
    dataset without such a pair has none.

    Raises:
        UserError: If the study has no tables.
    """
    worst = read_tables(study)["worst_case"]
    usable = standard_models(worst[worst["norm"] == "linf"])
    chosen: dict[str, str] = {}
    counts = usable.groupby(["data", "model"])["run_id"].nunique().sort_values(ascending=False, kind="stable")
    most = counts.reset_index().drop_duplicates("data").set_index("data")["model"]
    for data, model, rows in group_models(usable):
        if model != most[data]:
            continue
        # A model has a row for each epsilon.
        models = rows.groupby(["run_id", "loss", "loss_weight", "seed"], as_index=False)[["clean", "worst"]].mean()
        cross_entropy = models[models["loss"] == BASELINE]
        baseline = cross_entropy.set_index("seed")["run_id"]
        ours = models[(models["loss"] == PRIMARY_LOSS) & models["seed"].isin(baseline.index)]
        if ours.empty:
            continue
        weight = best_weight(ours, float(cross_entropy["clean"].mean()), PRIMARY_WEIGHT)
        best = ours[ours["loss_weight"] == weight].sort_values("seed").iloc[0]
        chosen[f"{data}-{model}-{BASELINE}"] = str(baseline[best["seed"]])
        chosen[f"{data}-{model}-{PRIMARY_LOSS}"] = str(best["run_id"])
    return chosen


def publish(study: Path, destination: Path) -> list[Path]:
    """Replace a reference folder by a finished study; what was there goes only when all of the new is there.

    Args:
        study: The folder of the study, with its runs.
        destination: The reference folder.

    Returns:
        The files, relative to ``destination``.

    Raises:
        UserError: If the study is not whole, came from code that is in no commit, or has more than ``LIMIT_MB`` of
            weights and arrays.
        DamagedFileError: If a file of a chosen run is not the one that was written.
    """
    for name in (*REPORTS, *STUDY_FOLDERS):
        if not (study / name).exists():
            raise UserError(
                f"{study / name} is missing; evaluate the study again: scripts/evaluate.py study={study.name}"
            )
    if read_provenance(study).get("dirty"):
        raise UserError(
            f"{study / 'provenance.json'}: the study was made by code with changes that are in no commit, so that "
            "nobody can repeat it; commit, and evaluate it again"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".publishing-") as name:
        new = Path(name) / "new"
        new.mkdir()
        for report in REPORTS:
            shutil.copyfile(study / report, new / report)
        for folder in STUDY_FOLDERS:
            shutil.copytree(study / folder, new / folder)
        for label, run_id in chosen_runs(study).items():
            _copy_run(RunFolder(study / "runs" / run_id), new / MODELS / label)
        for data, model in _pairs(new):
            _draw_pair(new, data, model)
        _seal(new / MODELS)
        if destination.exists():
            destination.rename(Path(name) / "old")
        new.rename(destination)
    return sorted(path.relative_to(destination) for path in destination.rglob("*") if path.is_file())


def _copy_run(run: RunFolder, target: Path) -> None:
    """Copy a run's training and its cells; folders of the machine that it was made on become the default ones."""
    check_files(run.path, run.status().get("files", {}), (CONFIG, METRICS, CHECKPOINT))
    config = run.config()
    (target / "eval").mkdir(parents=True)
    for name in (METRICS, CHECKPOINT):
        shutil.copyfile(run.path / name, target / name)
    new = RunFolder(target)
    new.write_config(replace(config, results_dir="results", data=replace(config.data, cache="data", root=None)))
    new.write_status(**run.status() | {"files": new.describe_files()})
    for cell in sorted((run.path / "eval").glob("*.npz")):
        shutil.copyfile(cell, target / "eval" / cell.name)
    images = target.parent / f"{config.data.name}{IMAGES}"
    if not images.exists():
        cache = project_path(config.data.cache)
        samples, _ = load_test_split(config.data.name, n=N_IMAGES, root=config.data.root, cache=cache)
        save_arrays(images, images=samples.images.numpy(), labels=samples.labels.numpy())


def _pairs(reference: Path) -> list[tuple[str, str]]:
    """Return dataset and architecture of the published models."""
    folders = (reference / MODELS).glob(f"*-{BASELINE}")
    configs = [RunFolder(folder).config() for folder in sorted(folders)]
    return [(config.data.name, config.model.name) for config in configs]


def _draw_pair(reference: Path, data: str, model: str) -> None:
    """Draw some of the published images under PGD, on either model of a pair, at the first decisive epsilon."""
    tables = read_tables(reference)
    worst = tables["worst_case"]
    bounds = worst.loc[(worst["data"] == data) & (worst["norm"] == "linf"), "epsilon"]
    epsilon = float(bounds.min())
    images = published_images(reference, data)
    few = images.first(N_DRAWN)
    attack = build_attack(PGDConfig("pgd", "linf", steps=40, relative_step_size=0.125, random_start=True))
    samples, failed = {}, {}
    for loss in (BASELINE, PRIMARY_LOSS):
        run = RunFolder(reference / MODELS / f"{data}-{model}-{loss}")
        weight = run.config().loss.weight if loss == PRIMARY_LOSS else 0.0
        network = run.load_model(torch.device("cpu"))
        name = setting_label(loss, weight)
        samples[name] = attack_samples(network, few, attack, epsilon)
        failed[name] = failed_checks_of(tables["models"], run_id(run.config())) or []
    figure = draw_samples(samples, epsilon=epsilon, failed_checks=failed)
    save_figure(figure, reference / MODELS, f"{data}-{model}-samples")


def _seal(models: Path) -> None:
    """Write the list of digests, in the form that ``sha256sum -c`` reads."""
    files = sorted(path for path in models.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e6
    if size > LIMIT_MB:
        raise UserError(
            f"the chosen models and their samples take {size:.1f} MB; at most {LIMIT_MB:g} MB are published"
        )
    if files:
        with atomic_write(models / SUMS) as temporary:
            temporary.write_text(
                "".join(f"{sha256_of(path)}  {path.relative_to(models).as_posix()}\n" for path in files)
            )


def published_models(reference: Path) -> pd.DataFrame:
    """Return what models a reference folder holds: ``name``, ``data``, ``model``, ``loss``, ``loss_weight``, ``seed``.

    Raises:
        UserError: If it holds none.
    """
    folders = sorted(path for path in (reference / MODELS).glob("*") if path.is_dir())
    if not folders:
        raise UserError(
            f"{reference / MODELS}: holds no model; publish a study that has its runs: make publish STUDY=NAME"
        )
    rows = []
    for folder in folders:
        config = RunFolder(folder).config()
        weight = config.loss.weight if config.loss.name == PRIMARY_LOSS else 0.0
        rows.append([folder.name, config.data.name, config.model.name, loss_label(config), weight, config.seed])
    return pd.DataFrame(rows, columns=["name", "data", "model", "loss", "loss_weight", "seed"])


def published_images(reference: Path, data: str) -> LabelledImages:
    """Return the test images that a reference folder holds of a dataset, one of each class first.

    Raises:
        DamagedFileError: If they are not there, or not what was written.
    """
    arrays = load_arrays_file(reference / MODELS / f"{data}{IMAGES}")
    return LabelledImages(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]))
