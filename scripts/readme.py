"""Write the tables of the reference study into README.md: python scripts/readme.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drs.config import PROJECT_ROOT
from drs.entrypoint import run_script
from drs.readme import README_STUDY, update_readme


def main() -> None:
    """Update README.md from its study in results/reference."""
    changed = update_readme(PROJECT_ROOT / "README.md", PROJECT_ROOT / "results" / "reference" / README_STUDY)
    print("README.md is new" if changed else "README.md was up to date")


if __name__ == "__main__":
    run_script(main)
