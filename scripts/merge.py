"""Merge results of another machine into results/: python scripts/merge.py results-<study>-<host>.tar.gz [...]

What is finished here stays as it is. Then `python scripts/evaluate.py` fills in what is missing and writes the tables.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drs.config import project_path
from drs.entrypoint import run_script
from drs.merging import merge_results


def main() -> int:
    """Merge each archive in turn; exit with status 2 if one is damaged, 1 if a run of one was refused."""
    parser = argparse.ArgumentParser(description="Merge results of another machine into results/.")
    parser.add_argument("archives", nargs="+", metavar="ARCHIVE", type=Path)
    refused = False
    for archive in parser.parse_args().archives:
        merged = merge_results(archive, project_path(os.environ.get("DRS_RESULTS", "results")))
        print(
            f"{merged.study} from {merged.host}: {len(merged.added)} runs added, {len(merged.replaced)} unfinished "
            f"ones replaced, {len(merged.kept)} kept as they are, {merged.cells} evaluations added to them"
        )
        for name, reason in merged.refused.items():
            print(f"  refused: run {name}: {reason}")
        refused = refused or bool(merged.refused)
    return int(refused)


if __name__ == "__main__":
    run_script(main, interrupted="interrupted; the same command goes on where it stopped")
