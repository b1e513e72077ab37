"""Show how far the sanity checks of trained models depend on the images and the steps that their probes have.

    python scripts/probes.py RUN [RUN ...] [--images N[,N ...]] [--steps S[,S ...]] [--output FILE]

RUN is the folder of a finished run or of a published model, such as results/reference/laptop/models/mnist-lenet-ce.
A row for each number of images and of steps has the figures of the checks that rest on probes, at the smallest decisive
epsilon; sanity.csv says what they mean and what they must not exceed. With --output they go to a CSV file too.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
from hydra import compose, initialize_config_dir

from drs.attacks.probes import run_probes
from drs.config import PROJECT_ROOT, EvaluateConfig, evaluate_config
from drs.data_cache import check_test_images
from drs.entrypoint import run_script
from drs.errors import UserError
from drs.files import atomic_write
from drs.filling import load_test
from drs.runs import RunFolder
from drs.sanity import probe_figures
from drs.suite_config import decisive_epsilons
from drs.sweeper import register_plugins

IMAGES, STEPS = "40,100,200", "10,30,100"


def main() -> int:
    """Run the probes that the command line asks for, print their figures, and write them where it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--images", default=IMAGES, help=f"test images that are probed (default: {IMAGES})")
    parser.add_argument("--steps", default=STEPS, help=f"gradient steps of a probe (default: {STEPS})")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a CSV file")
    arguments = parser.parse_args()
    images, steps = counts("--images", arguments.images), counts("--steps", arguments.steps)
    suite = strong_suite()
    rows = []
    for path in arguments.runs:
        if not (path / "config.yaml").exists():
            raise UserError(f"{path}: no run is here; a run's folder holds config.yaml and checkpoint.safetensors")
        check_test_images("--images", max(images), RunFolder(path).config().data.name)
    for path in arguments.runs:
        for n in images:
            for number in steps:
                rows.append(probed(path, suite, n, number))
                print(f"{path.name}: {n} images, {number} steps done", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    if arguments.output:
        with atomic_write(arguments.output, "--output FILE chooses another place") as temporary:
            table.to_csv(temporary, index=False)
    return 0


def counts(option: str, text: str) -> list[int]:
    """Return the whole numbers above 0 that an option lists."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text}: must be whole numbers above 0, with commas between")
    return [int(part) for part in parts]


def strong_suite() -> EvaluateConfig:
    """Compose the evaluation under the strong suite."""
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return evaluate_config(compose("evaluate", ["suite=strong"]))


def probed(path: Path, evaluation: EvaluateConfig, n: int, steps: int) -> dict[str, object]:
    """Return the figures of a model's checks over its first ``n`` test images, with so many steps of a probe."""
    run, suite, device = RunFolder(path), evaluation.suite, torch.device("cpu")
    config = run.config()
    epsilon = decisive_epsilons(suite, config.data.name, "linf")[0]
    test, _ = load_test(config.data, n, device)
    probes = run_probes(
        run.load_model(device), test.pixels(), test.labels, epsilon.value, replace(suite.sanity, steps=steps)
    )
    figures = {name: figure for name, (figure, *_) in probe_figures(probes.standing, probes.gradient_norm).items()}
    return {"run": path.name, "epsilon": epsilon.label, "images": n, "steps": steps, **figures}


if __name__ == "__main__":
    run_script(main)
