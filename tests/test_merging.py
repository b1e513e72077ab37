"""Results of another machine: what is merged, what is kept, and what is refused."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import compose_train
from test_bundle import node  # noqa: F401 - a fixture

from drs.array_files import save_arrays
from drs.config import PROJECT_ROOT, TrainConfig
from drs.errors import UserError
from drs.files import sha256_of
from drs.merging import merge_results
from drs.runs import RunFolder, run_folder

MANIFEST = {"commit": "0" * 40, "dirty": False}


def make_run(
    results: Path, seed: int, state: str = "done", weights: bytes = b"w", cells: tuple[str, ...] = ()
) -> RunFolder:
    """Write a run as training leaves it, with stand-ins for weights and metrics."""
    config: TrainConfig = compose_train("data=digits", "model=mlp", f"results_dir={results}", "study=s", f"seed={seed}")
    folder = run_folder(config)
    folder.write_config(config)
    if state == "done":
        (folder.path / "metrics.csv").write_text("epoch\n1\n")
        (folder.path / "checkpoint.safetensors").write_bytes(weights)
    for cell in cells:
        save_arrays(folder.path / "eval" / f"{cell}.npz", logits=np.zeros((2, 10), np.float32))
    status: dict[str, Any] = {"state": "failed", "reason": "diverged"} if state == "diverged" else {"state": state}
    folder.write_status(**status, **({"files": folder.describe_files()} if state == "done" else {}))
    return folder


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (sha256_of(path), path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


@pytest.fixture
def pack(tmp_path: Path, there: Path, node: Any) -> Callable[[], Path]:  # noqa: F811
    def packed() -> Path:
        node.pack_results(there / "s", MANIFEST, tmp_path)
        (archive,) = tmp_path.glob("results-s-*.tar.gz")
        return archive

    return packed


def test_finished_runs_are_kept_and_others_added_or_replaced(there: Path, here: Path, pack: Callable[[], Path]) -> None:
    for seed, state in ((0, "done"), (1, "done"), (2, "done"), (3, "diverged"), (4, "running"), (5, "done")):
        make_run(there, seed, state, cells=("clean-1", "fgsm-2") if state == "done" else ())
    kept = make_run(here, 0, cells=("clean-1",))
    other = make_run(here, 5, weights=b"other", cells=("clean-1",))
    running = make_run(here, 1, "running")
    (running.path / "state.safetensors").write_text("of an interrupted training")
    make_run(here, 6)
    before, before_other = contents(kept.path), contents(other.path)
    merged = merge_results(pack(), here)
    ids = {seed: make_run(there, seed).run_id for seed in range(7)}
    assert sorted(merged.added) == sorted([ids[2], ids[3]])
    assert merged.replaced == [ids[1]]
    assert sorted(merged.kept) == sorted([ids[0], ids[5]])
    assert merged.cells == 1
    assert merged.refused == {ids[5]: "trained on both machines to other weights; 1 evaluations left out"}
    after = contents(kept.path)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"eval/fgsm-2.npz"}
    assert contents(other.path) == before_other
    runs = here / "s" / "runs"
    assert {path.name for path in runs.iterdir()} == {ids[seed] for seed in (0, 1, 2, 3, 5, 6)}
    assert sorted(path.name for path in (runs / ids[1]).iterdir()) == [
        "checkpoint.safetensors", "config.yaml", "eval", "metrics.csv", "status.json",
    ]  # fmt: skip
    assert RunFolder(runs / ids[1]).status()["state"] == "done"
    assert RunFolder(runs / ids[3]).status()["reason"] == "diverged"
    assert [path.name for path in (here / "s").iterdir()] == ["runs"], "nothing is left beside the runs"


def test_merging_again_changes_nothing(there: Path, here: Path, pack: Callable[[], Path]) -> None:
    make_run(there, 0, cells=("clean-1",))
    archive = pack()
    merge_results(archive, here)
    before = contents(here)
    merged = merge_results(archive, here)
    assert (len(merged.kept), merged.added, merged.replaced, merged.cells) == (1, [], [], 0)
    assert contents(here) == before


def rewrite(archive: Path, change: Callable[[dict[str, bytes], dict[str, Any]], list[tarfile.TarInfo]]) -> None:
    """Write an archive anew with other contents (by name), head, or further members."""
    with tarfile.open(archive) as file:
        files = {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]
    head = json.loads(files.pop("results.json"))
    further = change(files, head)
    with tarfile.open(archive, "w:gz") as file:
        for name, content in {"results.json": json.dumps(head).encode(), **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        for member in further:
            file.addfile(member)


def put(name: str, content: bytes = b"x", listed: bool = True) -> Any:
    def change(files: dict[str, bytes], head: dict[str, Any]) -> list[tarfile.TarInfo]:
        files[name] = content
        if listed:
            head["files"][name] = hashlib.sha256(content).hexdigest()
        return []

    return change


def special(name: str, kind: bytes, target: str = "") -> Any:
    def change(files: dict[str, bytes], head: dict[str, Any]) -> list[tarfile.TarInfo]:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        head["files"][name] = hashlib.sha256(b"").hexdigest()
        return [member]

    return change


def lose(files: dict[str, bytes], head: dict[str, Any]) -> list[tarfile.TarInfo]:
    del files[next(name for name in files if name.endswith("metrics.csv"))]
    return []


def other_study(files: dict[str, bytes], head: dict[str, Any]) -> list[tarfile.TarInfo]:
    head["study"] = "../../outside"
    return []


RUN = "runs/0123456789ab"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("../outside"), "'../outside', which is no file of a run"),
        (put("/tmp/drs-outside"), "'/tmp/drs-outside', which is no file of a run"),
        (put(f"{RUN}/../../outside.json"), "which is no file of a run"),
        (put(f"{RUN}/payload.py"), "payload.py', which is no file of a run"),
        (put(f"{RUN}/.claim"), "which is no file of a run"),
        (put(f"{RUN}/status.json", b"{}", listed=False), "which is no file of a run"),
        (special(f"{RUN}/status.json", tarfile.SYMTYPE, "/etc/passwd"), "which is no file of a run"),
        (special(f"{RUN}/status.json", tarfile.LNKTYPE, "results.json"), "which is no file of a run"),
        (special(f"{RUN}/status.json", tarfile.CHRTYPE), "which is no file of a run"),
        (special(f"{RUN}/status.json", tarfile.FIFOTYPE), "which is no file of a run"),
        (lose, "metrics.csv; copy it again"),
        (other_study, r"study=../../outside: must be one path component"),
    ],
)  # fmt: skip
def test_archive_with_anything_else_is_refused_whole(
    there: Path, here: Path, tmp_path: Path, pack: Callable[[], Path], change: Any, message: str
) -> None:
    make_run(there, 0)
    archive = pack()
    rewrite(archive, change)
    with pytest.raises(UserError) as caught:
        merge_results(archive, here)
    assert message in str(caught.value)
    assert not [path for path in here.rglob("*") if path.name != "s"], "nothing was merged"
    assert not (tmp_path / "outside").exists() and not Path("/tmp/drs-outside").exists()


@pytest.mark.parametrize("what", ["truncated", "flipped", "digest", "none"])
def test_damaged_archive_is_one_line_and_changes_nothing(
    there: Path, here: Path, pack: Callable[[], Path], what: str
) -> None:
    run = make_run(there, 0, weights=os.urandom(50_000))
    archive = pack()
    content = bytearray(archive.read_bytes())
    if what == "truncated":
        archive.write_bytes(content[: len(content) // 2])
    elif what == "flipped":
        content[len(content) // 2] ^= 8
        archive.write_bytes(content)
    elif what == "digest":
        rewrite(archive, put(f"runs/{run.run_id}/metrics.csv", b"epoch\n2\n", listed=False))
    else:
        archive.unlink()
    environment = {**os.environ, "DRS_RESULTS": str(here)}
    command = [sys.executable, str(PROJECT_ROOT / "scripts" / "merge.py"), str(archive)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and archive.name in done.stderr
    assert not list(here.rglob("*"))


def test_run_whose_config_is_another_is_refused(there: Path, here: Path, pack: Callable[[], Path]) -> None:
    first, second = make_run(there, 0), make_run(there, 1)
    shutil.copy(first.path / "config.yaml", second.path / "config.yaml")
    second.write_status(state="done", files=second.describe_files())
    merged = merge_results(pack(), here)
    assert merged.added == [first.run_id]
    assert merged.refused == {second.run_id: f"its config belongs to run {first.run_id}"}
    assert [path.name for path in (here / "s" / "runs").iterdir()] == [first.run_id]


def test_yaml_of_an_archive_runs_nothing(there: Path, here: Path, tmp_path: Path, pack: Callable[[], Path]) -> None:
    run = make_run(there, 0)
    (run.path / "config.yaml").write_text(f"study: !!python/object/apply:os.mkdir [{tmp_path / 'executed'}]\n")
    merged = merge_results(pack(), here)
    assert list(merged.refused) == [run.run_id] and not merged.added
    assert not (tmp_path / "executed").exists()


def test_run_that_is_damaged_here_is_replaced_and_one_in_work_is_refused(
    there: Path, here: Path, pack: Callable[[], Path]
) -> None:
    make_run(there, 0)
    make_run(there, 1)
    broken = make_run(here, 0)
    (broken.path / "checkpoint.safetensors").write_bytes(b"?")
    busy = make_run(here, 1, "running")
    program = (
        f"import os, sys; sys.path.insert(0, {str(PROJECT_ROOT)!r})\nfrom pathlib import Path\n"
        "from drs.claiming import claim\n"
        f"with claim(Path({str(busy.path / 'claim')!r}), 'run'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        before = contents(busy.path)
        merged = merge_results(pack(), here)
        assert contents(busy.path) == before
        process.communicate()
    assert merged.replaced == [broken.run_id]
    assert (broken.path / "checkpoint.safetensors").read_bytes() == b"w"
    assert list(merged.refused) == [busy.run_id] and "is at work on it" in merged.refused[busy.run_id]


def test_leftovers_of_a_killed_merge_are_removed(there: Path, here: Path, pack: Callable[[], Path]) -> None:
    make_run(there, 0)
    archive = pack()
    program = (
        f"import os, sys; sys.path.insert(0, {str(PROJECT_ROOT)!r})\n"
        "from pathlib import Path\nfrom drs import merging\n"
        "merging._merge_run = lambda *rest: os.kill(os.getpid(), 9)\n"
        f"merging.merge_results(Path({str(archive)!r}), Path({str(here)!r}))\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert len(list((here / "s").glob(".merge-*.tmp"))) == 1 and not (here / "s" / "runs").exists()
    assert len(merge_results(archive, here).added) == 1
    assert [path.name for path in (here / "s").iterdir()] == ["runs"]
