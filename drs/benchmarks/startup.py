"""What starting costs: help, runs that are done already, and the memory of a training and an evaluation."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from drs.benchmarks.harness import Row, ratio_of_medians, time_in_turn
from drs.config import PROJECT_ROOT

TRAIN, EVALUATE = (str(PROJECT_ROOT / "scripts" / name) for name in ("train.py", "evaluate.py"))
REPEATS = 5
WARMUP = 1
RUNS = (1, 10, 50)
"""Trainings of a sweep that is done already."""
TRAINING = ("data=digits", "model=mlp", "loss=ce", "epochs=1", "progress=false", "device=cpu")
IMAGES = (10000, 20000, 55000)
"""MNIST images trained on, up to all but those for validation."""


def startup_rows(results: Path, environment: dict[str, str]) -> Iterator[Row]:
    """Yield whole-process times of ``--help`` and of runs that are done, one alone and sweeps of ``RUNS``.

    Args:
        results: An empty folder for the runs.
        environment: Of the processes.

    Raises:
        RuntimeError: If a process fails, or if one that should find its runs done does not.
    """
    job = [TRAIN, *TRAINING, f"results_dir={results}", "study=startup"]
    sweeps = {count: [TRAIN, "-m", *job[1:], f"seed=range({count})"] for count in RUNS}
    _run(sweeps[max(RUNS)], environment)
    commands = {"train.py --help": [TRAIN, "--help"], "a run that is done": job}
    against = {"import torch": ["-c", "import torch"], "import hydra, omegaconf": ["-c", "import hydra, omegaconf"]}
    said = {"a run that is done": "skipped: "}
    calls = [_call(each, environment, said.get(name, "")) for name, each in (commands | against).items()]
    calls += [_call(sweep, environment, f"0 done, {count} skipped") for count, sweep in sweeps.items()]
    seconds = time_in_turn(calls, REPEATS, warmup=WARMUP)
    of = dict(zip(commands | against, seconds.T, strict=False))
    for name, command in commands.items():
        torch_too = imports("torch", command, environment)
        for other in against:
            beside_torch = other == "import torch"
            least = float(np.median(of[other]))
            yield Row(
                "startup", name, name, other, "s", float(np.median(of[name])), least,
                *ratio_of_medians(of[name], of[other]), REPEATS, "", "cpu", 1,
                floor="" if beside_torch else "it imports Hydra and OmegaConf too",
                least=None if beside_torch else least,
                note=f"torch is {'' if torch_too else 'not '}imported" if beside_torch else "",
            )  # fmt: skip
    swept = seconds[:, len(of) :]
    more = float(np.median(swept[:, -1]) - np.median(swept[:, 0])) / (RUNS[-1] - RUNS[0])
    note = f"beyond the first, {1e3 * more:.1f} ms for each run"
    yield from curve_rows("startup", "runs that are done", "a sweep of {}", RUNS, "s", swept, threads=1, note=note)


def peak_memory_rows(
    results: Path, environment: dict[str, str], images: Sequence[int] = IMAGES, repeats: int = 3
) -> Iterator[Row]:
    """Yield the peak memory of trainings on so many images of MNIST and of the evaluation of the last of them.

    Args:
        results: An empty folder for the runs.
        environment: Of the processes.
        images: In rising order.
        repeats: Of each training.

    Raises:
        RuntimeError: If a process fails.
    """
    common = [f"results_dir={results}", "progress=false", "device=cpu"]

    def trained_on(count: int) -> float:
        shutil.rmtree(results / f"of-{count}", ignore_errors=True)  # a run that is done would not train again
        job = ["data=mnist", "model=lenet", "loss=dr_softmax", "epochs=1", f"data.train_samples={count}"]
        return measured_process([TRAIN, *job, f"study=of-{count}", *common], environment)[0]

    def bare() -> float:
        return measured_process(["-c", "import torch"], environment)[0]

    peaks = in_turn([bare, *(partial(trained_on, count) for count in images)], repeats)
    case = "training, MNIST lenet"
    for count, peak in zip(images, peaks.T[1:], strict=True):
        yield _beside_torch(f"{case}, {count} images", peak, peaks[:, 0])
    yield from curve_rows(
        "memory", f"{case}: peak memory", "{} images", images, "GiB", peaks[:, 1:], threads=torch.get_num_threads(),
        note="the whole of MNIST is read, whatever part of it is trained on",
    )  # fmt: skip
    command = [EVALUATE, "suite=paper", "workers=1", f"study=of-{images[-1]}", *common]
    peak, seconds = measured_process(command, environment)
    note = f"measured once: it takes {seconds:.0f} s"
    yield _beside_torch("evaluation, MNIST lenet, paper suite", np.array([peak]), peaks[:1, 0], note)


def _beside_torch(case: str, peaks: np.ndarray, bare: np.ndarray, note: str = "") -> Row:
    """Return the row of peaks ``[repeats]`` in GiB beside those of a process that imports torch and ends."""
    least = float(np.median(bare))
    return Row(
        "memory", case, "peak memory", "import torch", "GiB", float(np.median(peaks)), least,
        *ratio_of_medians(peaks, bare), len(peaks), "", "cpu", torch.get_num_threads(), least=least,
        floor="who uses torch has imported it", note=note,
    )  # fmt: skip


def curve_rows(
    section: str, case: str, named: str, sizes: Sequence[int], unit: str, values: np.ndarray, *, threads: int,
    note: str = "",
) -> Iterator[Row]:  # fmt: skip
    """Yield a row for each size beside the size before it.

    Args:
        section: Of the rows.
        case: What is done.
        named: What a size is called, such as ``{} images``.
        sizes: In rising order.
        unit: Of the values.
        values: ``[repeats, len(sizes)]``, measured in turn.
        threads: See ``Row``.
        note: See ``Row``.
    """
    medians = np.median(values, axis=0)
    for before, this in pairwise(range(len(sizes))):
        yield Row(
            section, case, named.format(sizes[this]), named.format(sizes[before]), unit, float(medians[this]),
            float(medians[before]), *ratio_of_medians(values[:, this], values[:, before]), len(values), "", "cpu",
            threads, note=note,
        )  # fmt: skip


def in_turn(functions: Sequence[Callable[[], float | Sequence[float]]], repeats: int) -> np.ndarray:
    """Return what each call returned, ``[repeats, len(functions), ...]``, the order turned round every time."""
    found: list[list[float | Sequence[float]]] = []
    for repeat in range(repeats):
        order = list(enumerate(functions))[:: 1 if repeat % 2 else -1]
        values = {which: function() for which, function in order}
        found.append([values[which] for which in range(len(functions))])
    return np.array(found)


def imports(module: str, arguments: Sequence[str], environment: dict[str, str]) -> bool:
    """Return whether a Python process imports a module.

    Raises:
        RuntimeError: If it ends with another status than 0.
    """
    lines = _run(["-X", "importtime", *arguments], environment).stderr.splitlines()
    return any(line.rpartition("|")[2].strip() == module for line in lines)


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
    peak, seconds = _run(["-c", watcher, *arguments], environment, arguments).stdout.split()
    return int(peak) / 2**20, float(seconds)


def _call(arguments: Sequence[str], environment: dict[str, str], says: str = "") -> Callable[[], None]:
    """Return a function that runs a Python process and raises ``RuntimeError`` unless its output has ``says``."""

    def call() -> None:
        output = _run(arguments, environment).stdout
        if says not in output:
            raise RuntimeError(f"{' '.join(arguments)} did not say '{says}': {output.strip()[-500:]}")

    return call


def _run(
    arguments: Sequence[str], environment: dict[str, str], named: Sequence[str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a Python process, which a failure calls by ``named`` or else by its arguments."""
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(named or arguments)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done
