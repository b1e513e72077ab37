"""Show whether the library attacks of the strong suite agree with a second implementation on trained models.

    python scripts/agreement.py [--study FOLDER] [--runs NAME ...] [--images N] [--attacks NAME ...] [--out FILE]

FOLDER is a study, by default results/reference/laptop; a NAME is a folder of its models/ or its runs/, by default every
published model of mnist. A row of the table is a library attack at a radius, beside an attack of this project on the
same problem (drs/agreement.py says which); they agree where their robust accuracies are within one point. Rows for
strength show what an attack misses of a stronger one, which it need not agree with. With 300 images a LeNet takes about
six minutes on a core. Exit status 1 says that some do not agree that must.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from hydra import compose, initialize_config_dir

from drs.agreement import PAIRS, Agreement, agreement_table, compare
from drs.config import PROJECT_ROOT, SuiteConfig, evaluate_config, project_path
from drs.entrypoint import run_script
from drs.errors import UserError
from drs.files import atomic_write
from drs.filling import load_test
from drs.provenance import describe_machine
from drs.runs import RunFolder
from drs.sweeper import register_plugins

STUDY = PROJECT_ROOT / "results" / "reference" / "laptop"
DEFAULT_DATA = "mnist"
"""Of the published models those of this data set are compared where none is named; colour images take much longer."""


def main() -> int:
    """Compare the attacks on the models that the command line names, print the table, and write it where it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=STUDY, metavar="FOLDER")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--images", type=int, default=300, metavar="N", help="test images (default: 300)")
    parser.add_argument("--attacks", nargs="+", default=list(PAIRS), metavar="NAME", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a Markdown file for the table")
    arguments = parser.parse_args()
    if arguments.images < 1:
        raise UserError(f"--images {arguments.images}: must be at least 1")
    runs = find_runs(project_path(str(arguments.study)), arguments.runs)
    suite = strong_suite()
    rows = [row for run in runs for row in agreements(run, suite, arguments.images, arguments.attacks)]
    text = agreement_table(rows)
    print(text)
    if arguments.out:
        with atomic_write(arguments.out) as temporary:
            temporary.write_text(f"{heading(arguments.images)}\n\n{text}\n", encoding="utf-8")
    return 0 if all(row.agrees for row in rows if row.required) else 1


def heading(images: int) -> str:
    """Return the title of the table and where its figures come from."""
    place = describe_machine(torch.device("cpu"))
    versions = ", ".join(f"{name} {place['versions'][name]}" for name in ("torch", "torchattacks", "foolbox"))
    return (
        "# Agreement of library attacks with a second implementation\n\n"
        f"Robust accuracy over {images} test images under an attack of a library, as the strong suite has it, and "
        "under one of this project on the same problem. Rows for agreement are held to one point: they tell whether "
        "the library's attack is run right. Rows for strength are not: they show what both implementations of it miss "
        "of an attack of another kind. Made by `python scripts/agreement.py` on "
        f"{place['created'][:10]} at commit `{place['commit'][:12]}`{' with changes' if place['dirty'] else ''}: "
        f"{versions}."
    )


def find_runs(study: Path, names: list[str]) -> list[RunFolder]:
    """Return the named models of a study, published or trained; the published ones of ``DEFAULT_DATA`` for no name.

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
        places = [study / folder / name for folder in ("models", "runs")]
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
    for row in compare(run.run_id, config.data.name, model, test.pixels(), test.labels, suite, attacks):
        print(f"{row.model}: {row.attack}, {row.norm} {row.epsilon} done", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_script(main)
