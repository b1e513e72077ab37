"""Kills a small sweep, its evaluation and its report at random moments, again and again, and looks at what is left.

    python tests/killing.py FOLDER --kills 50 --seed 0

torch takes seconds to import, so this process imports everything once and forks a child for every start. A child runs
the real script with its real arguments, and is killed by SIGKILL: half of the times after a random time, half of them
right before a random one of its operations on files in the results.
"""

import argparse
import json
import os
import random
import runpy
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import drs.attacks.autoattack
import drs.attacks.decision_based
import drs.attacks.minimal_norm
import drs.evaluation
import drs.figures
import drs.report
import drs.study
import drs.training  # noqa: F401
from drs.array_files import load_arrays_file
from drs.config import PROJECT_ROOT
from drs.data import load_arrays
from drs.runs import RunFolder

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.chmod", "os.truncate", "os.rmdir")
TRAIN = [
    "-m", "data=digits", "model=mlp", "model.options.width=32", "loss=ce,dr_softmax", "seed=0,1", "epochs=4",
    "batch_size=64", "study=s", "progress=false", "save_seconds=0",
]  # fmt: skip
EVALUATE = [
    "study=s", "suite=paper", "suite.n_samples.digits=20", "suite.n_clean=60", "suite.attacks.cw.steps=20",
    "suite.attacks.cw_torchattacks.steps=10", "suite.epsilons.digits.linf=[0.1,0.2]",
    "suite.epsilons.digits.l2=[0.5]", "timing=false", "progress=false", "workers=1",
]  # fmt: skip
STAGES = {"train": TRAIN, "evaluate": EVALUATE}
TIMES = ("seconds", "train_seconds", "mean.train_seconds", "sd.train_seconds")
"""Columns and keys that no two runs share."""


@dataclass
class Tally:
    """What was killed, where, and what was kept through it."""

    kills: Counter[str] = field(default_factory=Counter)
    by: Counter[str] = field(default_factory=Counter)
    sweeps: int = 0
    kept: int = 0


def start(name: str, arguments: list[str], log: Path, operations: int | None = None, below: str = "") -> int:
    """Start a script in a child; return its process number.

    Args:
        name: One of scripts/.
        arguments: Its arguments.
        log: Gets what it prints.
        operations: Kill it before so many operations on files ``below`` a folder.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if operations is not None:
            kill_before(operations, below)
        # What runs in the background of a shell is started with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # A pool of threads that the parent has does not survive the fork.
        torch.set_num_threads(1)
        script = PROJECT_ROOT / "scripts" / f"{name}.py"
        sys.argv = [str(script), *arguments]
        try:
            runpy.run_path(str(script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill_before(operations: int, folder: str) -> None:
    """Let this process kill itself right before so many operations on files below a folder."""
    left = operations

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in FILE_OPERATIONS or not str(arguments[0]).startswith(folder):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def wait(pid: int, seconds: float | None) -> int:
    """Wait for a child, kill it after so many seconds, and return its exit status, negative for a signal."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() >= until:
            os.kill(pid, signal.SIGKILL)
            until = None
        time.sleep(0.002)


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
        elif path.suffix in (".png", ".pdf"):
            content[name] = None
        elif path.name == "status.json":
            status = json.loads(path.read_text())
            content[name] = status["state"], status["val_accuracy"], status["files"]["checkpoint.safetensors"]
        elif path.name == "REPORT.md":
            content[name] = len(path.read_text().splitlines())
    return content


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    for name, value in expected.items():
        assert found[name] == value, f"{name} differs from that of the undisturbed sweep"


def sweep(
    results: Path, log: Path, draw: random.Random | None, wanted: int, tally: Tally, spans: dict[str, Any]
) -> None:
    """Train and evaluate, with kills as long as some are wanted, until both have come to their end."""
    seen: dict[Path, bytes] = {}
    for stage in STAGES:
        while True:
            operations = seconds = None
            if tally.kills.total() < wanted:
                if draw.random() < 0.5:
                    operations = draw.randint(1, max(2, int(0.5 * spans[stage]["operations"])))
                else:
                    seconds = draw.uniform(0.02, 0.7) * spans[stage]["seconds"]
            arguments = [*STAGES[stage], f"results_dir={results}"]
            code = wait(start(stage, arguments, log, operations, str(results)), seconds)
            check_readable(results)
            kept = finished_files(results) if results.exists() else {}
            for path, content in seen.items():
                assert kept.get(path) == content, f"{path} was finished before the kill, and is not as it was"
            seen = kept
            tally.kept = max(tally.kept, len(kept))
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise AssertionError(f"{stage} ended with {code}:\n{log.read_text()[-4000:]}")
            all_cells = stage == "evaluate" and len(list(results.rglob("*.npz"))) == spans["cells"]
            tally.kills["report" if all_cells else stage] += 1
            tally.by["an operation on a file" if seconds is None else "the clock"] += 1
    tally.sweeps += 1
    assert not list(results.rglob("*.tmp")), "what killed processes left half written is deleted by the next ones"


def undisturbed(folder: Path) -> dict[str, Any]:
    """Run everything once without a kill; return what came out, how long it took and how many operations it was."""
    spans: dict[str, Any] = {}
    for stage in STAGES:
        began = time.monotonic()
        code = wait(start(stage, [*STAGES[stage], f"results_dir={folder / 'whole'}"], folder / "whole.log"), None)
        if code:
            raise AssertionError(f"{stage} ended with {code}:\n{(folder / 'whole.log').read_text()[-4000:]}")
        files = [path for path in (folder / "whole").rglob("*") if path.is_file()]
        # Creating, setting the mode of, and renaming each file.
        spans[stage] = {"seconds": time.monotonic() - began, "operations": 4 * len(files)}
    spans["cells"] = len(list((folder / "whole").rglob("*.npz")))
    return spans


def main() -> None:
    """Run the sweeps and print one line of what was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, draw, tally = time.monotonic(), random.Random(options.seed), Tally()
    os.environ["DRS_CACHE"] = str(options.folder / "data")
    os.environ.pop("DRS_RESULTS", None)
    for split in ("train", "test"):
        load_arrays("digits", split, cache=options.folder / "data", report=lambda line: None)
    spans = undisturbed(options.folder)
    expected = content_of(options.folder / "whole")
    while tally.kills.total() < options.kills:
        results, log = options.folder / f"killed{tally.sweeps}", options.folder / f"killed{tally.sweeps}.log"
        sweep(results, log, draw, options.kills, tally, spans)
        assert_equal(content_of(results), expected)
    where = ", ".join(f"{count} in {name}" for name, count in sorted(tally.kills.items()))
    how = ", ".join(f"{count} by {name}" for name, count in sorted(tally.by.items()))
    print(
        f"{tally.kills.total()} kills ({where}; {how}) over {tally.sweeps} sweeps of 4 runs: every file readable after "
        f"each, all of {tally.kept} finished files kept, results identical to the undisturbed sweep's; "
        f"seed {options.seed}, {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
