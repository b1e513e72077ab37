"""Show whether the library attacks of the strong suite agree with a second implementation on trained models.

    python scripts/agreement.py [--study FOLDER] [--runs NAME ...] [--images N] [--attacks NAME ...] [--out FILE]
    python scripts/agreement.py --published [--attacks NAME ...]
    python scripts/agreement.py --lay-out

FOLDER is a study, by default results/reference/laptop; a NAME is a folder of its models/ or its runs/, or the path of a
model's folder, by default every published model of mnist. A row of the table is a library attack at a radius, beside an
attack of this project or of another library on the same problem (drs/agreement.py says which). They agree where their
robust accuracies are within one point. Rows for strength show what an attack misses of a stronger one, which it need
not agree with. With 300 images a LeNet takes about twenty minutes on a core, half of them for hop_skip_jump; that and
square need the optional package adversarial-robustness-toolbox and are left out where it is not installed. Exit status
1 says that some do not agree that must.

With --published the comparisons of results/reference/agreement.md are made anew, all or those of some attacks, and kept
in agreement.csv beside it. With --lay-out the page is only written anew, with the daggers that the tables of the
studies give now.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from hydra import compose, initialize_config_dir

from drs.agreement import PAIRS, Agreement, agreement_table, check_known, compare, without_missing
from drs.agreement_report import (
    PUBLISHED,
    TITLE,
    keys,
    made_by,
    made_now,
    marked_title,
    notes,
    put_records,
    record,
    write_page,
)
from drs.config import PROJECT_ROOT, SuiteConfig, evaluate_config, project_path
from drs.data_cache import check_test_images
from drs.entrypoint import run_script
from drs.errors import UserError
from drs.files import atomic_write
from drs.filling import load_test
from drs.runs import RunFolder
from drs.sweeper import register_plugins

REFERENCE = PROJECT_ROOT / "results" / "reference"
STUDY = REFERENCE / "laptop"
IMAGES = 300
DEFAULT_DATA = "mnist"
"""Of the published models those of this data set are compared where none is named; colour images take much longer."""


def main() -> int:
    """Compare the attacks on the models that the command line names, print the table, and write it where it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, metavar="FOLDER")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--images", type=int, metavar="N", help=f"test images (default: {IMAGES})")
    parser.add_argument("--attacks", nargs="+", metavar="NAME", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a Markdown file for the table")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--published", action="store_true", help="make the published comparisons anew")
    only.add_argument("--lay-out", action="store_true", help="write the published page anew from its table")
    arguments = parser.parse_args()
    refuse_unread(arguments)
    images = IMAGES if arguments.images is None else arguments.images
    if images < 1:
        raise UserError(f"--images {images}: must be at least 1")
    if arguments.lay_out:
        print(f"the page is {write_page(REFERENCE)}")
        return 0
    wanted = arguments.attacks or list(PAIRS)
    check_known(wanted)
    attacks, left_out = without_missing(wanted)
    if left_out:
        print(left_out, file=sys.stderr, flush=True)
    if not attacks:
        raise UserError(left_out)
    if arguments.published:
        rows = publish(attacks)
    else:
        runs = find_runs(project_path(str(arguments.study or STUDY)), arguments.runs)
        for run in runs:
            check_test_images("--images", images, run.config().data.name)
        suite = strong_suite()
        rows = [row for run in runs for row in agreements(run, suite, images, attacks)]
        told = [*keys(runs), *notes(attacks), *([f"{left_out}."] if left_out else [])]
        text = "\n\n".join([agreement_table(rows), *told])
        print(text)
        if arguments.out:
            with atomic_write(arguments.out, "--out FILE chooses another place") as temporary:
                temporary.write_text(f"{TITLE}\n\n{heading(images)}\n\n{text}\n", encoding="utf-8")
    return 0 if all(row.agrees for row in rows if row.required) else 1


def refuse_unread(arguments: argparse.Namespace) -> None:
    """Raise ``UserError`` for an option that --published or --lay-out would not read."""
    mode = "--published" if arguments.published else "--lay-out" if arguments.lay_out else ""
    unread = ["study", "runs", "images", "out", *(["attacks"] if arguments.lay_out else [])] if mode else []
    for name in unread:
        if getattr(arguments, name):
            raise UserError(f"--{name} says nothing to {mode}, whose comparisons are fixed (drs/agreement_report.py)")


def heading(images: int) -> str:
    """Return a table's own heading: what was run, when and by which versions."""
    command = " ".join(["python scripts/agreement.py", *(shlex.quote(word) for word in sys.argv[1:])])
    return f"## {images} test images\n\nMade by `{command}` {made_by(made_now())}."


def publish(attacks: list[str]) -> list[Agreement]:
    """Make the published comparisons of these attacks, keep each as soon as it is there, and lay out the page."""
    suite, made, rows = strong_suite(), made_now(), []
    for comparison in PUBLISHED:
        chosen = [attack for attack in comparison.attacks if attack in attacks]
        for run in find_runs(REFERENCE / comparison.study, list(comparison.models)) if chosen else []:
            for attack in chosen:
                found = agreements(run, suite, comparison.images, [attack])
                put_records(REFERENCE, [record(comparison.study, row, made) for row in found])
                rows += found
    print(f"the page is {write_page(REFERENCE)}")
    return rows


def find_runs(study: Path, names: list[str]) -> list[RunFolder]:
    """Return the named models of a study, published or trained, or those at the paths that names are.

    For no name they are the study's published models of ``DEFAULT_DATA``.

    Raises:
        UserError: If the study has no such model.
    """
    if not names:
        found = [RunFolder(path.parent) for path in sorted(study.glob("models/*/config.yaml"))]
        runs = [run for run in found if run.config().data.name == DEFAULT_DATA]
        if not runs:
            raise UserError(f"{study / 'models'}: no published model of {DEFAULT_DATA}; name runs with --runs")
        return runs
    runs = []
    for name in names:
        places = [study / "models" / name, study / "runs" / name, project_path(name)]
        there = [place for place in places if (place / "config.yaml").is_file()]
        if not there:
            raise UserError(f"{name}: no model is at {' or '.join(str(place) for place in places)}")
        runs.append(RunFolder(there[0]))
    return runs


def strong_suite() -> SuiteConfig:
    """Compose the strong suite."""
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return evaluate_config(compose("evaluate", ["suite=strong"])).suite


def agreements(run: RunFolder, suite: SuiteConfig, n: int, attacks: list[str]) -> list[Agreement]:
    """Compare attacks on a model and its first ``n`` test images; what is done is told on stderr."""
    config, device, rows = run.config(), torch.device("cpu"), []
    test, _ = load_test(config.data, n, device)
    model = run.load_model(device)
    for row in compare(marked_title(run), config.data.name, model, test.pixels(), test.labels, suite, attacks):
        print(f"{row.model}: {row.attack}, {row.norm} {row.epsilon} done", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_script(main)
