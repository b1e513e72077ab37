"""Kills a small sweep, its evaluation and its report at random moments, again and again, and looks at what is left.

    python tests/killing.py FOLDER --kills 50 --seed 0

A child is forked for every start. It runs the real script with its real arguments and is killed by SIGKILL: after a
random time, or right before a random one of its operations on files in the results.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from forked import Forked, run_here, start

import drs.report
from drs.array_files import load_arrays_file
from drs.config import PROJECT_ROOT
from drs.data import load_arrays
from drs.runs import RunFolder

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.chmod", "os.truncate", "os.rmdir")
TRAIN = [
    "-m", "data=digits", "model=mlp", "model.options.width=32", "loss=ce,dr_softmax", "epochs=4", "batch_size=64",
    "study=s", "progress=false", "save_seconds=0",
]  # fmt: skip
EVALUATE = [
    "study=s", "suite=paper", "suite.n_samples.digits=20", "suite.n_clean=60", "suite.epsilons.digits.linf=[0.1,0.2]",
    "suite.epsilons.digits.l2=[0.5]", "timing=false", "progress=false", "workers=1",
]  # fmt: skip
SIZES = {
    "whole": {
        "train": [*TRAIN, "seed=0,1"],
        "evaluate": [*EVALUATE, "suite.attacks.cw.steps=20", "suite.attacks.cw_torchattacks.steps=10"],
    },
    "small": {
        "train": [*TRAIN, "seed=0"],
        "evaluate": [*EVALUATE, "~suite.attacks.cw", "~suite.attacks.cw_torchattacks"],
    },
}
"""Arguments of the scripts: of a sweep of four runs, and of one of two with fewer attacks."""
MOST_KILLS = {"train": 4, "evaluate": 7}
"""Of one sweep; more are spread over several."""
TIMES = ("seconds", "train_seconds", "mean.train_seconds", "sd.train_seconds", "mean.seconds_10k", "sd.seconds_10k")
"""Columns and keys that no two runs share."""


@dataclass
class Whole:
    """The sweep that nobody disturbed.

    Attributes:
        seconds: What each script takes, about.
        operations: How many operations on files each does.
        runs: Trainings.
        cells: Cells of the evaluation.
        content: See ``content_of``.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    operations: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    cells: int = 0
    content: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tally:
    """What was killed, where, and how much was kept through it."""

    kills: Counter[str] = field(default_factory=Counter)
    by: Counter[str] = field(default_factory=Counter)
    sweeps: int = 0
    kept: int = 0


def on_operations(below: str, action: Callable[[int], None]) -> None:
    """Call ``action`` with its number before each operation that changes a file below a folder, from now on."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in FILE_OPERATIONS or not str(arguments[0]).startswith(below):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        count += 1
        action(count)

    sys.addaudithook(watch)


def wait(process: Forked, seconds: float | None) -> int:
    """Wait for a child, kill it after so many seconds, and return its exit status, negative for a signal."""
    until = None if seconds is None else time.monotonic() + seconds
    while (status := process.poll()) is None:
        if until is not None and time.monotonic() >= until:
            os.kill(process.pid, signal.SIGKILL)
            until = None
        time.sleep(0.002)
    return status


def dies_before(operation: int, below: str) -> None:
    """Let this process kill itself before so many operations on files below a folder."""
    on_operations(below, lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == operation else None)


def check_readable(results: Path) -> None:
    """Read every file that is not the rest of an unfinished write or a claim; raise what goes wrong."""
    for path in results.rglob("*"):
        if not path.is_file() or path.suffix == ".tmp" or "claim" in path.name:
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text())
        elif path.suffix == ".csv":
            pd.read_csv(path)
        elif path.suffix == ".npz":
            load_arrays_file(path)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".pdf":
            content = path.read_bytes()
            assert content.startswith(b"%PDF") and content.rstrip().endswith(b"%%EOF"), path
        elif path.name == "REPORT.md":
            assert "## Provenance" in path.read_text(), path
        elif path.name == "report.html":
            assert path.read_text().endswith("</html>\n"), path
        else:
            raise AssertionError(f"a file that nobody knows: {path}")


def finished_files(results: Path) -> dict[Path, bytes]:
    """Return the content of all that is finished: the files of trainings that are done, and cells."""
    files = {}
    for folder in (results / "s" / "runs").glob("*"):
        if RunFolder(folder).status().get("state") == "done":
            for name in ("status.json", "config.yaml", "metrics.csv", "checkpoint.safetensors"):
                files[folder / name] = (folder / name).read_bytes()
        for path in (folder / "eval").glob("*.npz"):
            files[path] = path.read_bytes()
    return files


def without_times(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in TIMES}


def content_of(results: Path) -> dict[str, Any]:
    """Return what a finished study holds, by relative path, in a form that can be compared with another's."""
    study = results / "s"
    content: dict[str, Any] = {}
    for path in sorted(study.rglob("*")):
        name = str(path.relative_to(study))
        if path.name == "checkpoint.safetensors":
            content[name] = path.read_bytes()
        elif path.name == "config.yaml":
            content[name] = {**yaml.safe_load(path.read_text()), "results_dir": None}
        elif path.suffix == ".npz":
            arrays = load_arrays_file(path)
            about = without_times(json.loads(str(arrays.pop("about"))))
            content[name] = about, {key: (str(value.dtype), value.tolist()) for key, value in arrays.items()}
        elif path.suffix == ".csv":
            table = pd.read_csv(path)
            content[name] = table.drop(columns=[column for column in table if column in TIMES]).to_csv()
        elif path.suffix in (".png", ".pdf", ".html"):
            content[name] = None
        elif path.name == "status.json":
            status = json.loads(path.read_text())
            content[name] = status["state"], status["val_accuracy"], status["files"]["checkpoint.safetensors"]
        elif path.name == "REPORT.md":
            content[name] = len(path.read_text().splitlines())
    return content


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise with the first file that is not as the undisturbed sweep left it."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    for name, value in expected.items():
        assert found[name] == value, f"{name} differs from that of the undisturbed sweep"


def undisturbed(size: str, folder: Path) -> Whole:
    """Run everything once without a kill, in this process."""
    whole, stage = Whole(), ""
    on_operations(f"{folder}/", lambda count: whole.operations.update([stage]))
    for stage, arguments in SIZES[size].items():
        began = time.monotonic()
        code = run_here(PROJECT_ROOT / "scripts" / f"{stage}.py", (*arguments, f"results_dir={folder}"))
        assert code == 0, f"{stage} ended with {code}"
        whole.seconds[stage] = time.monotonic() - began
    whole.runs = len(list((folder / "s" / "runs").iterdir()))
    whole.cells = len(list(folder.rglob("*.npz")))
    whole.content = content_of(folder)
    return whole


def disturbed(size: str, results: Path, draw: random.Random, kills: int, tally: Tally, whole: Whole) -> None:
    """Start both scripts until they have come to their end, with no more kills than ``kills`` in all."""
    seen: dict[Path, bytes] = {}
    log = results.with_suffix(".log")
    for stage, arguments in SIZES[size].items():
        left = min(MOST_KILLS[stage], kills - tally.kills.total())
        if stage == "train":
            left = min(left, max(1, left // 3))
        code = -signal.SIGKILL
        while code:
            operations = seconds = None
            if left and draw.random() < 0.6:
                operations = draw.randint(1, whole.operations[stage])
            elif left:
                seconds = draw.uniform(0.02, 1.0) * whole.seconds[stage]
            before = None if operations is None else partial(dies_before, operations, f"{results}/")
            process = start(f"{stage}.py", *arguments, f"results_dir={results}", out=log, before=before)
            code = wait(process, seconds)
            check_readable(results)
            kept = finished_files(results)
            for path, content in seen.items():
                assert kept.get(path) == content, f"{path} was finished before the kill, and is not as it was"
            seen = kept
            tally.kept += len(kept)
            if code == -signal.SIGKILL:
                left -= 1
                cells = len(list(results.rglob("*.npz")))
                where = {"train": "training", "evaluate": "the evaluation"}[stage]
                tally.kills["tables, figures and report" if cells == whole.cells else where] += 1
                tally.by["before an operation on a file" if seconds is None else "by the clock"] += 1
            elif code:
                raise AssertionError(
                    f"{stage} ended with {code}:\n{log.read_text()[-4000:]}{process.err.read_text()[-4000:]}"
                )
    tally.sweeps += 1
    assert not list(results.rglob("*.tmp")), "what killed processes left half written is deleted by the next ones"
    assert_same(content_of(results), whole.content)


def main() -> None:
    """Run the sweeps and print one line of what was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=SIZES, default="whole")
    options = parser.parse_args()
    folder = options.folder.resolve()
    began, draw, tally = time.monotonic(), random.Random(options.seed), Tally()
    os.environ["DRS_CACHE"] = str(folder / "data")
    os.environ.pop("DRS_RESULTS", None)
    for split in ("train", "test"):
        load_arrays("digits", split, cache=folder / "data", report=lambda line: None)
    torch.set_num_threads(1)
    if options.size == "small":
        # Drawing all figures takes most of the time, and the first two are written in the way of all others.
        plan = drs.report.plan_figures
        drs.report.plan_figures = lambda tables: plan(tables)[:2]
    whole = undisturbed(options.size, folder / "whole")
    while tally.kills.total() < options.kills:
        disturbed(options.size, folder / f"killed{tally.sweeps}", draw, options.kills, tally, whole)
    where = ", ".join(f"{count} in {name}" for name, count in tally.kills.items())
    how = ", ".join(f"{count} {name}" for name, count in tally.by.items())
    print(
        f"{tally.kills.total()} kills ({where}; {how}) over {tally.sweeps} sweeps of {whole.runs} runs: every file "
        f"readable after each, finished files found unchanged {tally.kept} times, results identical to the undisturbed "
        f"sweep's; seed {options.seed}, {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
