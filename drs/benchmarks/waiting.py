"""How long OpenMP's threads wait for work before they sleep: a training alone, and two at a time."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from drs.benchmarks.harness import Row, ratio_of_medians
from drs.config import PROJECT_ROOT

REPEATS = 3
CHOSEN = "3000 turns and asleep, as in trainings"
WAITS: dict[str, dict[str, str]] = {
    CHOSEN: {},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "300000 turns, as GNU's OpenMP has it": {"GOMP_SPINCOUNT": "300000"},
}


def waiting_rows(overrides: Sequence[str], environment: Mapping[str, str]) -> Iterator[Row]:
    """Yield the seconds of trainings whose threads wait otherwise beside those of trainings as they are.

    Args:
        overrides: Of each training, which is a process of its own; what is compared is the time of its epochs.
        environment: Of the processes.

    Raises:
        RuntimeError: If a training fails, or the waiting changes its weights.
    """
    kept = {name: value for name, value in environment.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for count in (1, 2):
        seconds, weights = np.empty((REPEATS, len(WAITS))), set()
        for repeat in range(REPEATS):
            for which, variables in list(enumerate(WAITS.values()))[:: 1 if repeat % 2 else -1]:
                seconds[repeat, which], digests = _train(overrides, count, {**kept, **variables})
                weights.add(digests)
        if len(weights) != 1:
            raise RuntimeError("trainings whose threads wait otherwise ended with other weights")
        medians = np.median(seconds, axis=0)
        for which, name in list(enumerate(WAITS))[1:]:
            yield Row(
                "training", f"threads that wait: {' '.join(overrides)}, {count} at a time", name, CHOSEN, "s",
                float(medians[which]), float(medians[0]), *ratio_of_medians(seconds[:, which], seconds[:, 0]), REPEATS,
                "", "cpu", torch.get_num_threads(), tried=True, note="the results are the same, byte for byte",
            )  # fmt: skip


def _train(overrides: Sequence[str], count: int, environment: Mapping[str, str]) -> tuple[float, frozenset[str]]:
    """Train ``count`` seeds at a time; return the mean seconds of their epochs and the digests of their weights.

    Raises:
        RuntimeError: If one fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(PROJECT_ROOT / "scripts" / "train.py"), *overrides, "device=cpu", "study=waits",
            "progress=false", f"results_dir={folder}",
        ]  # fmt: skip
        started = [
            subprocess.Popen([*command, f"seed={seed}"], env=environment, stdout=subprocess.DEVNULL)
            for seed in range(count)
        ]
        if any([process.wait() for process in started]):
            raise RuntimeError(f"{' '.join(command)} failed")
        states = [json.loads(path.read_text()) for path in Path(folder).glob("waits/runs/*/status.json")]
        digests = frozenset(state["files"]["checkpoint.safetensors"]["sha256"] for state in states)
        return float(np.mean([state["train_seconds"] for state in states])), digests
