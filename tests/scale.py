"""A made-up study of thousands of finished runs: how long it takes to skip through it, show it and rebuild its tables.

    python tests/scale.py FOLDER [--runs 2000] [--steps skip status tables]

The study is made in FOLDER first, unless it is there. Each step is a process of its own; its time is the whole
process's, its memory the largest of it and its children. A step that misses its target ends with status 1; one that
runs for longer than its limit is ended.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SEEDS = 50
TARGETS = {"skip": 60.0, "status": 5.0, "tables": 60.0}
"""Seconds."""
MEMORY_GIB = 2.0
LIMIT_SECONDS = 150.0


def grid(runs: int) -> list[str]:
    """Return the overrides of a sweep over weights and seeds."""
    weights = ",".join(f"{0.0005 * (i + 1):g}" for i in range(runs // SEEDS - 1))
    return [f"loss.weight={weights}", f"seed=range({SEEDS})"]


def common(folder: Path) -> list[str]:
    """Return the overrides of every training of the study."""
    return ["data=mnist", "model=lenet", "epochs=5", "study=scale", f"results_dir={folder}"]


def make(folder: Path, runs: int) -> None:
    """Write the study: ``runs`` finished trainings with the cells of the paper suite."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from synthetic_runs import compose_evaluate, write_runs

    from drs.composition import Composer
    from drs.sweeper import expand_grid, register_plugins

    register_plugins()
    overrides = expand_grid([], [*common(folder), "loss=dr_softmax", *grid(runs)])
    overrides += expand_grid([], [*common(folder), "loss=ce", grid(runs)[1]])
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composer = Composer(
            lambda job: compose("train", job), GlobalHydra.instance().config_loader().repository.group_exists
        )
        jobs = [composer.train_config(job) for job in overrides]
    write_runs(jobs, compose_evaluate("study=scale", "suite=paper", f"results_dir={folder}"))
    (folder / "made").write_text(str(runs))


def commands(folder: Path, runs: int) -> dict[str, list[str]]:
    """Return what each step runs."""
    scripts = ROOT / "scripts"
    return {
        "skip": [str(scripts / "train.py"), "-m", *common(folder), "loss=dr_softmax", *grid(runs)],
        "status": [str(scripts / "status.py"), "scale"],
        "tables": [str(scripts / "evaluate.py"), "study=scale", "suite=paper", f"results_dir={folder}", "timing=false",
                   "report=false", "progress=false"],
    }  # fmt: skip


def main() -> int:
    """Make the study, run the steps, print what they took; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--steps", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if not (folder / "made").exists() or (folder / "made").read_text() != str(arguments.runs):
        began = time.monotonic()
        make(folder, arguments.runs)
        print(f"made {arguments.runs} runs in {time.monotonic() - began:.0f} s", flush=True)
    missed = 0
    for name in arguments.steps:
        if name == "tables":
            (folder / "scale" / "tables" / ".made-from.json").unlink(missing_ok=True)
        missed += not _measure(name, commands(folder, arguments.runs)[name], folder)
    return 1 if missed else 0


def _measure(name: str, command: list[str], folder: Path) -> bool:
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command], env={**os.environ, "DRS_RESULTS": str(folder)}, stdout=subprocess.PIPE, text=True
    )
    try:
        out, _ = process.communicate(timeout=LIMIT_SECONDS)
        status = str(process.returncode)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        status = "ended at the limit"
    seconds = time.monotonic() - began
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of all children so far; the steps are in the order of what they need.
    memory = usage.ru_maxrss / 2**20
    good = status == "0" and seconds < TARGETS[name] and memory < MEMORY_GIB
    print(
        f"{name}: {seconds:.1f} s (target {TARGETS[name]:g}), {memory:.2f} GiB (target {MEMORY_GIB:g}), exit status "
        f"{status}: {'reached' if good else 'MISSED'}",
        flush=True,
    )
    print("".join(f"    {line}\n" for line in out.splitlines()[-6:]), end="", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
