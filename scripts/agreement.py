"""Show whether the library attacks of the strong suite agree with a second implementation on trained models.

    python scripts/agreement.py [--study FOLDER] [--runs NAME ...] [--images N] [--attacks NAME ...] [--out FILE]
                                [--append]

FOLDER is a study, by default results/reference/laptop; a NAME is a folder of its models/ or its runs/, or the path of a
model's folder, by default every published model of mnist. A row of the table is a library attack at a radius, beside an
attack of this project or of another library on the same problem (drs/agreement.py says which). They agree where their
robust accuracies are within one point. Rows for strength show what an attack misses of a stronger one, which it need
not agree with. With 300 images a LeNet takes about twenty minutes on a core, half of them for hop_skip_jump; that and
square need the optional package adversarial-robustness-toolbox and are left out where it is not installed. With
--append the table is added to what FILE has. Exit status 1 says that some do not agree that must.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
from hydra import compose, initialize_config_dir

from drs.agreement import INSIDE, PAIRS, SHIFT, Agreement, agreement_table, compare, without_missing
from drs.benchmarks.peers import MODULES, is_installed
from drs.config import PROJECT_ROOT, SuiteConfig, evaluate_config, project_path, run_id
from drs.entrypoint import run_script
from drs.errors import UserError
from drs.files import atomic_write
from drs.filling import load_test
from drs.markdown import escape
from drs.marks import COLUMN, MARK
from drs.provenance import describe_machine, package_version
from drs.runs import RunFolder
from drs.sweeper import register_plugins

STUDY = PROJECT_ROOT / "results" / "reference" / "laptop"
DEFAULT_DATA = "mnist"
"""Of the published models those of this data set are compared where none is named; colour images take much longer."""
TITLE = (
    "# Agreement of library attacks with a second implementation\n\n"
    "Robust accuracy under an attack of a library, as the strong suite has it, and under one of this project or of "
    "another library on the same problem. Rows for agreement are held to one point: they tell whether the library's "
    "attack is run right. Rows for strength are not: they show what an attack misses of another kind of attack, or of "
    "one without its defects."
)
NOTES = {
    "square": (
        "square: both make 500 queries rather than the suite's 5000, and the same draws, as all images of a batch get "
        "the same squares in either library and the share that stands depends on them by several points; the shares "
        "are means over three seeds."
    ),
    "hop_skip_jump": (
        "hop_skip_jump: each library makes its own draws, so that shares and median norms are means over six seeds. "
        "Both get the same starts, 16 steps rather than the suite's 32, the same queries and the same threshold of the "
        "binary search, and ART's last step is followed by a search for the boundary, as foolbox's is. As ART runs it, "
        "it solves another problem: its starts are of noise alone, its threshold is 0.01/d rather than 1/d² for d "
        "pixel values, it measures the radius of its noise off the boundary, and it ends there. As foolbox runs it, it "
        "does too: the more images in a batch, the shorter the noise on each."
    ),
    "cw_torchattacks": (
        f"cw_torchattacks, sound: on images drawn to [{INSIDE:g}, {1 - INSIDE:g}], with logits raised by {SHIFT:g} and "
        "without the early stop, so that neither the pixels at 0 and 1, nor the label's mask, nor the total over the "
        "batch does harm. There foolbox's attack has the same objective and the same steps. The rows for strength are "
        "the attack as the suite runs it, beside foolbox's with the same constant, steps and step size, in the wider "
        "pixel range in which the suite's own CW runs it, so that it moves pixels at 0 and 1."
    ),
}


def main() -> int:
    """Compare the attacks on the models that the command line names, print the table, and write it where it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=STUDY, metavar="FOLDER")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--images", type=int, default=300, metavar="N", help="test images (default: 300)")
    parser.add_argument("--attacks", nargs="+", default=list(PAIRS), metavar="NAME", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a Markdown file for the table")
    parser.add_argument("--append", action="store_true", help="add to the file rather than replace it")
    arguments = parser.parse_args()
    if arguments.images < 1:
        raise UserError(f"--images {arguments.images}: must be at least 1")
    attacks, left_out = without_missing(arguments.attacks)
    if left_out:
        print(left_out, file=sys.stderr, flush=True)
    if not attacks:
        raise UserError(left_out)
    runs = find_runs(project_path(str(arguments.study)), arguments.runs)
    suite = strong_suite()
    rows = [row for run in runs for row in agreements(run, suite, arguments.images, attacks)]
    text = "\n\n".join([agreement_table(rows), *keys(runs), *notes(attacks), *([f"{left_out}."] if left_out else [])])
    print(text)
    if arguments.out:
        before = f"{arguments.out.read_text(encoding='utf-8')}\n" if arguments.append else f"{TITLE}\n\n"
        with atomic_write(arguments.out) as temporary:
            temporary.write_text(f"{before}{heading(arguments.images)}\n\n{text}\n", encoding="utf-8")
    return 0 if all(row.agrees for row in rows if row.required) else 1


def heading(images: int) -> str:
    """Return a table's own heading: what was run, when and by which versions."""
    place = describe_machine(torch.device("cpu"))
    versions = [f"{name} {place['versions'][name]}" for name in ("torch", "torchattacks", "foolbox")]
    if is_installed(MODULES["ART"]):
        versions.append(f"ART {package_version('adversarial-robustness-toolbox')}")
    command = " ".join(["python scripts/agreement.py", *(shlex.quote(word) for word in sys.argv[1:])])
    return (
        f"## {images} test images\n\nMade by `{command}` on {place['created'][:10]} at commit "
        f"`{place['commit'][:12]}`{' with changes' if place['dirty'] else ''}: {', '.join(versions)}."
    )


def title(run: RunFolder) -> str:
    """Return the name of a published model, or what a trained one is and its id."""
    config = run.config()
    what = f"{config.data.name}-{config.model.name}-{config.loss.name}"
    return run.run_id if run.run_id.startswith(what) else f"{what} {run.run_id}"


def keys(runs: list[RunFolder]) -> list[str]:
    """Return the key of the mark, with the sanity checks that each model fails, and a line on models not checked."""
    failed = {title(run): failed_checks(run) for run in runs}
    said = [f"{escape(name)}: {', '.join(map(escape, checks))}" for name, checks in failed.items() if checks]
    unknown = [escape(name) for name, checks in failed.items() if checks is None]
    lines = [f"{MARK} fails sanity checks of its study. {'; '.join(said)}."] if said else []
    return lines + ([f"Its study's tables say nothing of sanity checks of: {', '.join(unknown)}."] if unknown else [])


def failed_checks(run: RunFolder) -> list[str] | None:
    """Return the sanity checks that a model fails by the tables of its study, or None where these do not have it."""
    path = run.path.parent.parent / "tables" / "models.csv"
    if not path.is_file():
        return None
    models = pd.read_csv(path, dtype={"run_id": str})
    own = models[models["run_id"] == run_id(run.config())]
    if own.empty or COLUMN not in own:
        return None
    return [name for name in own[COLUMN].fillna("").astype(str).iloc[0].split(";") if name]


def notes(attacks: list[str]) -> list[str]:
    """Return what is to be known of how some of the attacks were compared."""
    return [NOTES[attack] for attack in attacks if attack in NOTES]


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
    name = title(run) + (f" {MARK}" if failed_checks(run) else "")
    for row in compare(name, config.data.name, model, test.pixels(), test.labels, suite, attacks):
        print(f"{row.model}: {row.attack}, {row.norm} {row.epsilon} done", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_script(main)
