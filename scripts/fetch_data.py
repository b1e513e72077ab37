"""Fetch data sets into the cache: python scripts/fetch_data.py [NAME ...], all of them by default.

The directory of torchvision's files is taken from DRS_DATA, the cache folder from DRS_CACHE (default data/).
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drs.config import project_path  # noqa: E402
from drs.data import dataset, fetch_all  # noqa: E402
from drs.data_sources import DATASETS  # noqa: E402
from drs.entrypoint import fail  # noqa: E402
from drs.errors import UserError  # noqa: E402


def main() -> None:
    """Fetch; exit with status 2 if a set that was asked for by name, or every set, cannot be had."""
    parser = argparse.ArgumentParser(description="Fetch and verify data sets.")
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(DATASETS)}; all by default")
    names = parser.parse_args().names
    try:
        for name in names:
            dataset(name)
    except UserError as error:
        fail(str(error))
    wanted = names or list(DATASETS)
    cache = project_path(os.environ.get("DRS_CACHE", "data"))
    failures = fetch_all(wanted, os.environ.get("DRS_DATA"), cache)
    for name in wanted:
        print(f"{name}: {'not available here: ' + failures[name] if name in failures else 'ready'}")
    if failures and (names or len(failures) == len(wanted)):
        fail(f"{len(failures)} of {len(wanted)} data sets cannot be had here: {', '.join(failures)}")


if __name__ == "__main__":
    main()
