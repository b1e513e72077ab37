"""Redraw every figure of a study from its tables by executing notebooks/figures.ipynb.

    python scripts/figures.py [STUDY]

STUDY is a folder that holds tables/, or the name of a study under results/. Without it: results/reference/laptop if
that is there, else the study under results/ whose tables are newest.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

from drs.errors import UserError
from drs.report import read_tables

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "figures.ipynb"
REFERENCE = Path("reference", "laptop")


def find_study(name: str | None, results: Path) -> Path:
    """Return the folder of a study that has tables.

    Args:
        name: A folder or a study's name; None for the reference study, else the newest one.
        results: The folder that holds the studies.

    Raises:
        UserError: If there is no such study, or it has no tables.
    """
    if name is not None:
        candidates = [Path(name), results / name]
    else:
        tables = sorted(results.glob("*/tables/models.csv"), key=lambda path: path.stat().st_mtime, reverse=True)
        candidates = [results / REFERENCE, *(path.parent.parent for path in tables)]
    for candidate in candidates:
        if (candidate / "tables" / "models.csv").is_file():
            return candidate.resolve()
    if name is None:
        raise UserError(f"no study under {results} has tables; make one first: make smoke")
    tried = " or ".join(str(candidate / "tables" / "models.csv") for candidate in candidates)
    raise UserError(f"study {name!r} has no tables ({tried}); evaluate it first: scripts/evaluate.py study=NAME")


def execute(notebook: Path, study_dir: Path) -> None:
    """Run a notebook from top to bottom on a study; what it prints and shows is not kept."""
    content = nbformat.read(notebook, as_version=4)
    # Sockets in the file system keep other users of the machine from reading along; Windows has none.
    config = Config({"KernelManager": {"transport": "ipc"}} if os.name == "posix" else {})
    resources = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(content, timeout=600, kernel_name="python3", resources=resources, config=config)
    client.execute(env={**os.environ, "DRS_STUDY_DIR": str(study_dir)})


def main() -> int:
    """Redraw the figures of the study named on the command line."""
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return 0 if len(sys.argv) == 2 else 2
    try:
        study_dir = find_study(sys.argv[1] if len(sys.argv) == 2 else None, ROOT / "results")
        read_tables(study_dir)  # a study that cannot be drawn is told here in one line, not by the notebook in fifty
        print(f"redrawing the figures of {study_dir}")
        execute(NOTEBOOK, study_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in sorted((study_dir / "figures").glob("*.png")):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
