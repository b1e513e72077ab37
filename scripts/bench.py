"""Measure how fast this is beside other ways to do the same work.

    python scripts/bench.py [--only SECTION[,SECTION ...]] [--folder FOLDER] [--within SECONDS]

Results go to results/bench (bench.csv, REPORT.md) after every row; what was measured stays when a section fails or the
command is stopped. Where there is no GPU, what was measured on one before is kept. Nothing else should run on the
machine meanwhile.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from drs.allocator import keep_freed_memory
from drs.benchmarks.harness import Machine, Row, failed_row, measure_machine
from drs.benchmarks.report import TITLES, read_provenance, read_rows, write_rows
from drs.benchmarks.sections import Section, sections
from drs.config import PROJECT_ROOT
from drs.entrypoint import let_threads_doze, run_script
from drs.errors import UserError
from drs.provenance import describe_machine, package_version

PEERS = ("adversarial-robustness-toolbox", "airbench", "joblib")
"""Packages that are measured beside, and not among those of every provenance."""


def main() -> int:
    """Run the sections asked for and write what they found beside the rows of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="SECTION", help=f"some of {', '.join(TITLES)}")
    parser.add_argument("--folder", type=Path, default=PROJECT_ROOT / "results" / "bench", help="instead of that")
    parser.add_argument(
        "--within", type=float, metavar="SECONDS", help="stop the studies for a GPU then (default: 600, their target)"
    )
    arguments = parser.parse_args()
    known = sections(arguments.within)
    chosen = list(dict.fromkeys(arguments.only.split(","))) if arguments.only else list(known)
    for name in chosen:
        if name not in known:
            raise UserError(f"ONLY={name}: must be one of {', '.join(known)}, or some of them with commas between")
    if not torch.cuda.is_available():
        chosen = without_those_of_a_card(chosen, arguments.folder)
    keep_freed_memory()
    failed = measure({name: known[name] for name in known if name in chosen}, arguments.folder)
    print(f"{arguments.folder / 'REPORT.md'}")
    return 1 if failed else 0


def without_those_of_a_card(chosen: Sequence[str], folder: Path, show: Callable[[str], None] = print) -> list[str]:
    """Return the sections to be run where there is no GPU: what was measured on one before is kept."""
    on_a_card = {row.section for row in read_rows(folder) if row.device == "cuda" and row.ratio is not None}
    for name in chosen:
        if name in on_a_card:
            show(f"{name}: no GPU here; what was measured on one is kept")
    return [name for name in chosen if name not in on_a_card]


def measure(chosen: dict[str, Section], folder: Path, show: Callable[[str], None] = print) -> list[str]:
    """Run sections, writing after each row, and return those that failed.

    A section that fails keeps the rows that it had, and gets one that says what went wrong.
    """
    began = time.perf_counter()
    rows = {name: [row for row in read_rows(folder) if row.section == name] for name in TITLES}
    provenance = {name: content for name, content in read_provenance(folder).items() if name in TITLES}
    places: dict[str, dict[str, Any]] = {}
    failed = []

    def write(name: str, found: Sequence[Row], place: dict[str, Any], finished: bool) -> None:
        rows[name], provenance[name] = list(found), {**place, "finished": finished}
        write_rows(folder, [row for title in TITLES for row in rows[title]], provenance)

    for name, section in chosen.items():
        device = "cuda" if name.startswith("gpu") and torch.cuda.is_available() else "cpu"
        if device not in places:
            show(f"measuring the {'card' if device == 'cuda' else 'machine'}")
            places[device] = describe(device)
        place, found = places[device], []
        try:
            for row in _rows(section, place):
                found.append(row)
                write(name, found, place, False)
                ratio = "not measured" if row.ratio is None else f"{row.ratio:.3g}"
                passed = time.perf_counter() - began
                show(f"[{passed:5.0f} s] {row.case}: {row.ours} against {row.theirs}: {ratio} {row.verdict}")
        except Exception as error:
            traceback.print_exc()
            found.append(failed_row(name, device, error))
            failed.append(name)
        write(name, found, place, True)
    return failed


def _rows(section: Section, place: dict[str, Any]) -> Iterator[Row]:
    return section(Machine(**place["machine"]))


def describe(device: str) -> dict[str, Any]:
    """Return what is recorded of a section: commit, versions, hardware, and what the device can do at best."""
    content = describe_machine(torch.device(device))
    content["versions"] |= {name: package_version(name) for name in PEERS}
    return {**content, "machine": asdict(measure_machine(device))}


if __name__ == "__main__":
    if let_threads_doze():  # as trainings have it; torch has been imported by now and reads it at the start
        os.execv(sys.executable, [sys.executable, *sys.argv])
    run_script(main)
