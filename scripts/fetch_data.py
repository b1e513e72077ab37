"""Fetch data sets into the cache: python scripts/fetch_data.py [NAME ...], all of them by default.

The directory of torchvision's files is taken from DRS_DATA, the cache folder from DRS_CACHE (default data/).
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drs.config import project_path
from drs.data import DATASETS, dataset, fetch_all
from drs.data_sources import NoSourceError
from drs.entrypoint import fail, run_script
from drs.errors import UserError


def main() -> None:
    """Fetch; exit with status 2 if a set that was asked for by name, or every set, cannot be had."""
    parser = argparse.ArgumentParser(description="Fetch and verify data sets.")
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(DATASETS)}; all by default")
    names = parser.parse_args().names
    wanted = list(dict.fromkeys(names)) or list(DATASETS)
    for name in wanted:
        dataset(name)
    cache = project_path(os.environ.get("DRS_CACHE", "data"))
    failures = fetch_all(wanted, os.environ.get("DRS_DATA"), cache)
    for name in wanted:
        print(f"{name:<14} {describe(failures.get(name))}")
    if failures and (names or len(failures) == len(wanted)):
        fail(f"{len(failures)} of {len(wanted)} data sets cannot be had here: {', '.join(failures)}")


def describe(failure: UserError | None) -> str:
    """Return what a data set's line in the table says: ready, or why it is not, a line per source."""
    if failure is None:
        return "ready"
    if isinstance(failure, NoSourceError):
        return "\n    ".join(["not available here", *failure.tried, failure.remedy])
    return f"refused: {failure}"


if __name__ == "__main__":
    run_script(main)
