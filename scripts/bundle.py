"""Pack everything that a machine without a network needs into dist/: python scripts/bundle.py --python 3.12 ...

There, `python3 dist/run.py --experiment mnist` unpacks it, checks it and runs the study; see scripts/node.py.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drs.bundle import EXCLUDE, Target, make_bundle, this_platform
from drs.config import PROJECT_ROOT, project_path
from drs.entrypoint import fail, run_script
from drs.files import sha256_of


def main() -> None:
    """Make the bundle and tell what it holds."""
    parser = argparse.ArgumentParser(description="Make a bundle for a machine without a network.")
    here = "{}.{}".format(*sys.version_info)
    parser.add_argument("--python", default=here, help=f"the Python of that machine (default: this one's, {here})")
    parser.add_argument("--platform", help="its platform, such as manylinux_2_28_x86_64 (default: this machine's)")
    parser.add_argument("--data", default="mnist,cifar10", help="data sets to pack, separated by commas")
    parser.add_argument("--exclude", default=",".join(EXCLUDE), help="packages that it brings itself")
    parser.add_argument("--output", default=str(PROJECT_ROOT / "dist"), help="folder of the bundle")
    given = parser.parse_args()
    cache = project_path(os.environ.get("DRS_CACHE", "data"))
    try:
        target = Target(given.python.rpartition("python")[2], given.platform or this_platform(), names(given.exclude))
        manifest = make_bundle(target, names(given.data), cache, Path(given.output).resolve())
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; the bundle was not made")
    pieces = [piece for file in manifest["files"].values() for piece in file]
    size = sum(piece["size"] for piece in pieces)
    print(f"{given.output}: {len(pieces)} pieces, {size / 1e6:.0f} MB, commit {manifest['commit'][:10]}")
    print(
        f"left out, to be there already: {', '.join(f'{k} {v}' for k, v in manifest['brought'].items()) or 'nothing'}"
    )
    print(f"manifest.json has SHA-256 {sha256_of(Path(given.output) / 'manifest.json')}")
    if manifest["dirty"]:
        print("warning: there are changes that are not committed; the bundle holds the last commit", file=sys.stderr)
    print(f"on the other machine: python3 {Path(given.output).name}/run.py --experiment NAME")


def names(text: str) -> tuple[str, ...]:
    """Return the parts of a list separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    run_script(main)
