"""Redraw every figure and report of a study from its tables by executing notebooks/figures.ipynb.

    python scripts/figures.py [STUDY]

STUDY is a folder that holds tables/, or the name of a study under results/ (DRS_RESULTS names another folder) or
results/reference/. Without it: every study of results/reference, or the study under results/ whose tables are newest if
that holds none.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

from drs.entrypoint import run_script
from drs.errors import UserError
from drs.report import read_tables

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "figures.ipynb"
REFERENCE = ROOT / "results" / "reference"
TABLE = Path("tables", "models.csv")
REPORTS = ("REPORT.md", "report.html")


def find_studies(name: str | None, results: Path, reference: Path) -> list[Path]:
    """Return the folders of the studies to redraw.

    Args:
        name: A folder or a study's name; None for every reference study, or the newest study where there is none.
        results: The folder that holds the studies.
        reference: The folder of the reference studies.

    Raises:
        UserError: If there is no such study, or it has no tables.
    """
    if name is not None:
        candidates = [Path(name), results / name, reference / name]
        for candidate in candidates:
            if (candidate / TABLE).is_file():
                return [candidate.resolve()]
        tried = " or ".join(str(candidate / TABLE) for candidate in candidates)
        raise UserError(f"study {name!r} has no tables ({tried}); evaluate it first: scripts/evaluate.py study=NAME")
    references = sorted(reference.glob(f"*/{TABLE}"))
    newest = sorted(results.glob(f"*/{TABLE}"), key=lambda path: path.stat().st_mtime)[-1:]
    if not references + newest:
        raise UserError(f"no study under {results} has tables; make one first: make smoke")
    return [path.parent.parent.resolve() for path in references or newest]


def execute(notebook: Path, study_dir: Path) -> None:
    """Run a notebook from top to bottom on a study; what it prints and shows is not kept."""
    content = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    # When it is shut down a kernel may complain of its own unfinished tasks: what it says counts where a cell fails.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as said:
        # Sockets in the file system keep other users of the machine from reading along; Windows has none. Their place
        # is told in full, as the notebook does not run where this script was called.
        sockets = {"transport": "ipc", "ip": str(Path(folder, "kernel"))} if os.name == "posix" else {}
        config = Config({"KernelManager": sockets})
        client = NotebookClient(content, timeout=600, kernel_name="python3", resources=resources, config=config)
        try:
            client.execute(env={**os.environ, "DRS_STUDY_DIR": str(study_dir)}, stderr=said)
        except Exception:
            said.seek(0)
            sys.stderr.write(said.read())
            raise


def main() -> int:
    """Redraw the study named on the command line, or those of the reference."""
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return 0 if len(sys.argv) == 2 else 2
    results = ROOT / (os.environ.get("DRS_RESULTS") or "results")
    for study_dir in find_studies(sys.argv[1] if len(sys.argv) == 2 else None, results, REFERENCE):
        read_tables(study_dir)  # a study that cannot be drawn is told here in one line, not by the notebook in fifty
        print(f"redrawing the figures and reports of {study_dir}", flush=True)
        execute(NOTEBOOK, study_dir)
        for path in [*sorted((study_dir / "figures").glob("*.png")), *(study_dir / name for name in REPORTS)]:
            print(path)
    return 0


if __name__ == "__main__":
    run_script(main)
