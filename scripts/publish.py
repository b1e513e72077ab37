"""Put a finished study into results/reference, where it is committed: python scripts/publish.py STUDY [RESULTS].

Tables, figures and reports are taken, and per dataset two models with their per-sample arrays. RESULTS is the folder
that holds the study, results/ by default. README.md is filled anew if the study is the one behind it, and the
page on the agreement of attacks (make agreement) has its models' marks put right.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drs.agreement_report import TABLE, write_page
from drs.config import PROJECT_ROOT
from drs.entrypoint import run_script
from drs.publication import MODELS, publish
from drs.readme import README_STUDY, update_readme
from drs.runs import study_folder


def main() -> int:
    """Publish the study named on the command line."""
    if not 2 <= len(sys.argv) <= 3 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    name, results = sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "results"
    reference = PROJECT_ROOT / "results" / "reference" / name
    files = publish(study_folder(results, name), reference)
    if name == README_STUDY:
        update_readme(PROJECT_ROOT / "README.md", reference)
    if (reference.parent / TABLE).is_file():
        write_page(reference.parent)
    size = sum((reference / file).stat().st_size for file in files) / 1e6
    models = {file.parts[1] for file in files if file.parts[0] == MODELS and len(file.parts) > 2}
    print(f"{reference}: {len(files)} files, {size:.1f} MB; models: {', '.join(sorted(models)) or 'none'}")
    return 0


if __name__ == "__main__":
    run_script(main)
