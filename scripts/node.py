"""Run a study from a bundle on a machine without a network; in the bundle this file is called run.py.

    python3 run.py --experiment mnist

unpacks the bundle into ./drs-node, checks every digest, trains and evaluates the study, and packs what it found into
results-<study>-<host>.tar.gz, which `make merge ARCHIVE=...` merges at home. Called again it goes on where it stopped.
Nothing but Python is needed to unpack; torch must be there, in the Python that this is called with.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
STAMP = ".bundle.json"
PACKAGES = ".packages"
RESULT_FILES = (
    r"runs/[0-9a-f]{12}/(config\.yaml|status\.json|metrics\.csv|checkpoint\.safetensors|eval/\w[\w@.+-]*\.npz)"
)


def main() -> int:
    """Do what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", metavar="NAME", help="the study to run: a file of configs/experiment")
    parser.add_argument("--into", metavar="DIR", default="drs-node", help="where to unpack (default: ./drs-node)")
    parser.add_argument("--unpack", action="store_true", help="unpack and check only")
    parser.add_argument("--pack", action="store_true", help="pack the results that are there, and run nothing")
    parser.add_argument("--train", metavar="KEY=VALUE", action="append", default=[], help="an argument for train.py")
    parser.add_argument("--evaluate", metavar="KEY=VALUE", action="append", default=[], help="one for evaluate.py")
    given = parser.parse_args()
    if not (given.experiment or given.unpack or given.pack):
        parser.error("name a study with --experiment, or use --unpack or --pack")
    root = Path(given.into).absolute()
    manifest = read_manifest(HERE)
    check_machine(manifest)
    unpack(HERE, manifest, root)
    if given.unpack:
        return 0
    status = 0
    if not given.pack:
        check_packages(manifest, root)
        experiment = f"experiment={given.experiment}"
        status = run_script(root, "train.py", [experiment, *given.train])
        if status < 128:  # a training that failed does not keep the others from being evaluated
            status = run_script(root, "evaluate.py", [experiment, *given.evaluate]) or status
        if status >= 128:
            fail("interrupted; the same command goes on where it stopped", status)
    for runs in sorted((root / "results").glob("*/runs")):
        if runs.parent.name not in ("reference", "bench"):
            pack_results(runs.parent, manifest, Path.cwd())
    return status


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the bundle's manifest."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        fail(f"{path}: {error.strerror}; run.py belongs beside it and the other pieces")
    except ValueError as error:
        fail(f"{path}: not JSON ({error}); copy the bundle again")
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        fail(f"{path}: not a manifest that this run.py knows; copy the whole bundle again")
    return manifest


def check_machine(manifest: dict[str, Any]) -> None:
    """Stop unless this Python and this machine are those that the bundle was made for."""
    here = "{}.{}".format(*sys.version_info)
    if here != manifest["python"]:
        fail(
            f"{sys.executable} is Python {here}, but the bundle was made for {manifest['python']}: "
            f"call run.py with that, or make a bundle with PYTHON={here}"
        )
    _, minor, machine = re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", manifest["platform"]).groups()  # type: ignore[union-attr]
    library, version = platform.libc_ver()
    if not sys.platform.startswith("linux") or platform.machine() != machine:
        fail(f"this is {platform.machine()} {sys.platform}, but the bundle was made for {machine} linux")
    if library != "glibc" or int(version.split(".")[1]) < int(minor):
        fail(
            f"this machine has {library or 'no glibc'} {version}, but the bundle needs glibc 2.{minor}: "
            f"make one with a lower PLATFORM=manylinux_2_N_{machine}"
        )


def unpack(bundle: Path, manifest: dict[str, Any], root: Path) -> None:
    """Check and unpack every piece into ``root``, unless this bundle is there already; results that are there stay."""
    mark = json.dumps(manifest, sort_keys=True)
    stamp = root / STAMP
    if stamp.is_file() and stamp.read_text() == mark:
        print(f"{root}: unpacked before", flush=True)
        return
    if root.is_dir() and any(root.iterdir()) and not stamp.exists() and not (root / PACKAGES).exists():
        fail(f"{root}: is not empty and holds no bundle; name another folder with --into")
    pieces = [piece for parts in manifest["files"].values() for piece in parts]
    for piece in pieces:
        check_piece(bundle / piece["name"], piece)
    print(f"{len(pieces)} pieces have the digests of the manifest; unpacking into {root}", flush=True)
    packages, data = root / PACKAGES, root / "data"
    # Made first: it says that this folder is ours, should the unpacking be interrupted.
    shutil.rmtree(packages, ignore_errors=True)
    packages.mkdir(parents=True)
    stamp.unlink(missing_ok=True)
    data.mkdir(exist_ok=True)
    for name, parts in manifest["files"].items():
        content = Pieces([bundle / piece["name"] for piece in parts])
        if name.startswith("wheels/"):
            install_wheel(content, packages)
        elif name.startswith("data/"):
            unpack_data(content, data / Path(name).name.removesuffix(".gz"))
        else:
            unpack_code(content, root)
    temporary = root / (STAMP + ".tmp")
    temporary.write_text(mark)
    temporary.replace(stamp)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def check_piece(path: Path, expected: dict[str, Any]) -> None:
    """Stop unless a piece is there, whole and unchanged."""
    try:
        found = digest_of(path)
    except OSError as error:
        fail(f"{path}: {error.strerror}; copy this piece of the bundle again")
    if found != expected["sha256"]:
        fail(f"{path}: its SHA-256 is {found}, but the manifest has {expected['sha256']}; copy it again")


class Pieces(io.RawIOBase):
    """The bytes of a file that lies in several pieces, read in order."""

    def __init__(self, paths: list[Path]) -> None:
        self.left = list(paths)
        self.file: Any = None

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the piece at hand, or from the next one; return how many bytes it got, 0 at the end."""
        while True:
            if self.file is None:
                if not self.left:
                    return 0
                self.file = self.left.pop(0).open("rb")
            count: int = self.file.readinto(buffer)
            if count:
                return count
            self.file.close()
            self.file = None


def install_wheel(content: Pieces, folder: Path) -> None:
    """Unpack a wheel so that ``folder`` can be put on Python's path; commands that it would install are left out."""
    with zipfile.ZipFile(io.BytesIO(content.readall())) as wheel:
        for member in wheel.infolist():
            parts = Path(member.filename).parts
            if member.is_dir():
                continue
            if parts[0].endswith(".data"):
                if parts[1] not in ("purelib", "platlib"):
                    continue
                parts = parts[2:]
            target = folder.joinpath(*parts)
            if folder not in target.resolve().parents:
                fail(f"a wheel holds {member.filename}, which lies outside its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            if member.external_attr >> 16 & 0o111:
                target.chmod(0o755)


def unpack_data(content: Pieces, path: Path) -> None:
    """Unpack one file of the data cache; the project checks its digest once more when it reads it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with gzip.GzipFile(fileobj=io.BufferedReader(content)) as packed, temporary.open("wb") as file:
        shutil.copyfileobj(packed, file, 2**20)
    temporary.replace(path)


def unpack_code(content: Pieces, root: Path) -> None:
    """Put the project's files in the place of those of an earlier bundle; results and data stay."""
    seen: set[str] = set()
    with tarfile.open(fileobj=io.BufferedReader(content), mode="r|") as archive:
        for member in archive:
            target, top = root / member.name, member.name.split("/")[0]
            if top not in seen and top not in ("results", "data") and (root / top).is_dir():
                shutil.rmtree(root / top)
            seen.add(top)
            source = archive.extractfile(member) if member.isfile() else None
            if source is not None:
                if root not in target.resolve().parents:
                    fail(f"the code holds {member.name}, which lies outside its folder")
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(source, file)
                target.chmod(member.mode & 0o755)


def environment(root: Path) -> dict[str, str]:
    """Return the environment for the project's scripts: the packages come first, no setting leads out of ``root``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DRS_")}
    paths = [str(root / PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PIP_NO_INDEX": "1"}


def check_packages(manifest: dict[str, Any], root: Path) -> None:
    """Say which of the packages that the bundle leaves out are there, and in which version; stop without torch."""
    program = (
        "import importlib.metadata as m, json, sys\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))\n"
    )
    command = [sys.executable, "-c", program, *manifest["brought"]]
    done = subprocess.run(command, env=environment(root), cwd=root, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for name, pinned in manifest["brought"].items():
        if found[name] is None and name == "torchvision":
            print("torchvision is not here: models vgg16_bn and resnet18 need it, nothing else does")
        elif found[name] is None:
            fail(f"{name} is not installed for {sys.executable}: call run.py with a Python that has it")
        elif found[name].partition("+")[0] != pinned:
            print(f"{name} {found[name]} is here, the project is pinned to {pinned}: results may differ slightly")
    sys.stdout.flush()


def run_script(root: Path, name: str, arguments: list[str]) -> int:
    """Run one of the project's scripts and return its exit status, 128 + n where signal n ended it."""
    print(f"-- {name} {' '.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, f"scripts/{name}", *arguments], cwd=root, env=environment(root))
    # Slurm ends a job with SIGTERM, a terminal sends SIGINT to all of its processes; the script saves what it has.
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = process.wait()
    for number, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def pack_results(study: Path, manifest: dict[str, Any], folder: Path) -> None:
    """Pack the finished runs of a study into one archive in ``folder``, with the digest of each file."""
    files: dict[str, str] = {}
    runs = 0
    for run in sorted((study / "runs").iterdir()):
        try:
            status = json.loads((run / "status.json").read_text())
        except (OSError, ValueError):
            continue
        if status.get("state") == "done" or status.get("reason") == "diverged":
            runs += 1
            for path in sorted(run.rglob("*")):
                name = path.relative_to(study).as_posix()
                if path.is_file() and re.fullmatch(RESULT_FILES, name):
                    files[name] = digest_of(path)
    if not runs:
        print(f"{study.name}: no finished run to pack")
        return
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname()).strip("-") or "host"
    about = {"format": 1, "study": study.name, "host": host, "files": files}
    about |= {key: manifest[key] for key in ("commit", "dirty")}
    content = json.dumps(about, indent=1).encode()
    path = folder / f"results-{study.name}-{host}.tar.gz"
    temporary = folder / f".{path.name}.tmp"
    with tarfile.open(temporary, "w:gz") as archive:
        head = tarfile.TarInfo("results.json")
        head.size = len(content)
        archive.addfile(head, io.BytesIO(content))
        for name in files:
            archive.add(study / name, name)
    temporary.replace(path)
    print(f"{runs} finished runs of {study.name} in {path}; at home: make merge ARCHIVE={path.name}", flush=True)


def fail(message: str, status: int = 2) -> NoReturn:
    """Print one line and exit."""
    print(f"error: {message}" if status == 2 else message, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as problem:
        fail(f"{problem.filename}: {problem.strerror}; free some space or name another folder with --into")
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on where it stopped", 130)
