"""What starting costs: help, a run that is done already, and the memory of a training and an evaluation."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from drs.benchmarks.harness import Row, ratio_of_medians, time_in_turn
from drs.config import PROJECT_ROOT

REPEATS = 5
TRAINING = ("data=digits", "model=mlp", "loss=ce", "epochs=1", "progress=false")


def _call(arguments: Sequence[str], environment: dict[str, str]) -> Callable[[], None]:
    def run() -> None:
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")

    return run


def startup_rows(results: Path, environment: dict[str, str]) -> Iterator[Row]:
    """Yield whole-process times of ``--help`` and of a skipped run beside ``import torch`` and Hydra's own start."""
    train = str(PROJECT_ROOT / "scripts" / "train.py")
    job = [train, *TRAINING, f"results_dir={results}", "study=startup"]
    _call(job, environment)()
    runs = {
        "train.py --help": _call([train, "--help"], environment),
        "a run that is done": _call(job, environment),
        "import torch": _call(["-c", "import torch"], environment),
        "import hydra, omegaconf": _call(["-c", "import hydra, omegaconf"], environment),
    }
    seconds = dict(zip(runs, time_in_turn(list(runs.values()), REPEATS, warmup=1).T, strict=True))
    for name in ("train.py --help", "a run that is done"):
        for floor in ("import torch", "import hydra, omegaconf"):
            yield Row(
                "startup", name, name, floor, "s", float(np.median(seconds[name])), float(np.median(seconds[floor])),
                *ratio_of_medians(seconds[name], seconds[floor]), REPEATS, "", "cpu", 1,
                least=float(np.median(seconds[floor])), floor="what the other imports, it imports too",
            )  # fmt: skip


def peak_memory_rows(results: Path, environment: dict[str, str]) -> Iterator[Row]:
    """Yield the peak memory of a training of MNIST and of its evaluation beside that of ``import torch``."""
    train, evaluate = (str(PROJECT_ROOT / "scripts" / name) for name in ("train.py", "evaluate.py"))
    common = [f"results_dir={results}", "study=memory", "progress=false"]
    jobs = {
        "training, MNIST lenet": [train, "data=mnist", "model=lenet", "loss=dr_softmax", "epochs=1", *common],
        "evaluation, MNIST lenet, paper suite": [evaluate, "suite=paper", "workers=1", *common],
    }
    base, _ = measured_process(["-c", "import torch"], environment)
    for name, arguments in jobs.items():
        peak, _ = measured_process(arguments, environment)
        yield Row(
            "memory", name, "peak memory", "import torch", "GiB", peak, base, peak / base, peak / base, peak / base, 1,
            "", "cpu", 1, least=base, floor="who uses torch has imported it",
        )  # fmt: skip


def measured_process(arguments: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return the peak resident memory in GiB of a Python process and its wall time in seconds.

    Raises:
        RuntimeError: If it ends with another status than 0.
    """
    # The parent that looks has no other child, and is not counted.
    watcher = (
        "import resource, subprocess, sys, time\n"
        "began = time.perf_counter()\n"
        "status = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, time.perf_counter() - began)\n"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", watcher, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    peak, seconds = done.stdout.split()
    return int(peak) / 2**20, float(seconds)
