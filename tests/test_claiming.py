"""Claims between real processes: one winner, dead owners, owners on other machines, and clocks that jump."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from drs import claiming
from drs.claiming import ClaimedElsewhere, ClaimLost, claim, owner_of
from drs.config import PROJECT_ROOT
from drs.errors import UserError

# A process that claims argv[1], says so, and holds it until its standard input ends.
HOLDER = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(PROJECT_ROOT)!r})
from drs import claiming
if "elsewhere" in sys.argv:
    claiming.process_place = lambda: "another machine"
try:
    with claiming.claim(Path(sys.argv[1]), "work") as held:
        print("held", flush=True)
        sys.stdin.read()
        held.check()
    print("released", flush=True)
except claiming.ClaimedElsewhere as error:
    print(error, flush=True)
except claiming.ClaimLost as error:
    print("lost:", error, flush=True)
"""


@contextmanager
def holder(path: Path, *options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), *options], env={**os.environ, **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait(10)


def ends_with(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    text = process.stdout.read()
    process.wait(10)
    return text


def taken_over(path: Path, seconds: float, enter: Callable[[], Any] = lambda: None) -> float:
    """Try to claim until it succeeds; return after how many seconds it did."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            with claim(path, "work"):
                enter()
                return time.monotonic() - began
        except ClaimedElsewhere:
            time.sleep(0.02)
    raise AssertionError(f"still claimed after {seconds} s")


def test_claim_names_its_owner_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "run" / "claim"
    assert owner_of(path) is None
    with claim(path, "run x") as held:
        held.check()
        owner = owner_of(path)
        assert owner is not None and owner.pid == os.getpid()
        with (
            pytest.raises(
                ClaimedElsewhere, match=rf"^run x: process {os.getpid()} on \S+ is at work on it; .*claim\)$"
            ),
            claim(path, "run x"),
        ):
            pass
        held.check()
    assert owner_of(path) is None
    assert list(path.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), claim(path, "run x"):
        1 / 0  # noqa: B018
    assert list(path.parent.iterdir()) == []


def test_of_many_processes_one_at_a_time_holds_a_claim(tmp_path: Path) -> None:
    """Five at a time claim, work and release, and each dies holding a claim; nobody ever meets another at work."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, random, sys, time
from pathlib import Path
sys.path.insert(0, {str(PROJECT_ROOT)!r})
from drs import claiming
folder, won = Path(sys.argv[1]), 0
while True:
    try:
        with claiming.claim(folder / "claim", "work") as held:
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            time.sleep(random.random() * 0.002)
            held.check()
            os.unlink(folder / "inside")
            won += 1
            if won == 10:
                os._exit(0)
    except claiming.ClaimedElsewhere:
        time.sleep(random.random() * 0.002)
""")
    folder = tmp_path / "folder"
    folder.mkdir()
    loop = 'for i in 1 2 3; do "$0" "$1" "$2" || exit; done'
    shells = [subprocess.Popen(["sh", "-c", loop, sys.executable, str(program), str(folder)]) for _ in range(5)]
    assert [shell.wait(60) for shell in shells] == [0] * 5
    assert owner_of(folder / "claim") is None
    with claim(folder / "claim", "work"):
        pass
    assert list(folder.iterdir()) == []


def test_killed_owner_on_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    with holder(path) as process:
        with pytest.raises(ClaimedElsewhere, match=f"process {process.pid} on"), claim(path, "work"):
            pass
        process.kill()  # nobody has waited for it yet: a process that can do nothing more counts as gone
        assert taken_over(path, 5) < 1
    assert list(tmp_path.iterdir()) == []


def test_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    with claim(path, "work"):
        content = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({**content, "started": "1"}) + "\n")
    assert owner_of(path) is None
    path.write_text(json.dumps(content) + "\n")
    assert owner_of(path) is not None


def test_stopped_owner_on_another_machine_is_succeeded_after_its_patience_and_knows(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    with holder(path, "elsewhere", DRS_CLAIM_PATIENCE="1") as process:
        with pytest.raises(AssertionError, match="still claimed"):
            taken_over(path, 2.5)  # it gives signs of life
        process.send_signal(signal.SIGSTOP)
        assert 0.8 < taken_over(path, 10) < 4
        process.send_signal(signal.SIGCONT)
        assert ends_with(process).startswith("lost: work: ")
    assert list(tmp_path.iterdir()) == []


def test_owner_that_wakes_up_while_another_works_is_told_who_and_takes_nothing_away(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    with holder(path, "elsewhere", DRS_CLAIM_PATIENCE="0.5") as process:
        process.send_signal(signal.SIGSTOP)

        def wake() -> None:
            process.send_signal(signal.SIGCONT)
            assert f"taken over by process {os.getpid()} on " in ends_with(process)
            owner = owner_of(path)
            assert owner is not None and owner.pid == os.getpid()

        taken_over(path, 10, wake)
    assert list(tmp_path.iterdir()) == []


def test_watching_tells_a_dead_owner_on_another_machine_from_a_living_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "claim"
    with holder(path, "elsewhere", DRS_CLAIM_PATIENCE="1") as process:
        with pytest.raises(ClaimedElsewhere, match=f"process {process.pid} on"), claim(path, "work", watch=True):
            pass
        process.kill()
        began = time.monotonic()
        with claim(path, "work", watch=True):
            assert 0.8 < time.monotonic() - began < 4
    assert "work: looking whether process" in capsys.readouterr().out


def test_wall_clock_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_clock(*_: object) -> float:
        raise AssertionError("the wall clock was read")

    monkeypatch.setattr(time, "time", no_clock)
    monkeypatch.setattr(time, "time_ns", no_clock)
    path = tmp_path / "claim"
    with holder(path, "elsewhere", DRS_CLAIM_PATIENCE="0.3") as process:
        # Nor the times that the file system gives to files.
        os.utime(path, (0, 0))
        with pytest.raises(ClaimedElsewhere), claim(path, "work"):
            pass
        os.utime(path, (2**33, 2**33))
        with pytest.raises(ClaimedElsewhere), claim(path, "work"):
            pass
        process.kill()
        taken_over(path, 5)


def test_latecomer_who_judged_a_claim_that_is_gone_by_now_does_not_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one process looks at a dead claim, another takes over, works, releases, and a third starts."""
    path = tmp_path / "claim"
    with holder(path) as process:
        process.kill()
    looked = claiming._is_dead
    third = None

    def slowly(link: Any) -> bool:
        nonlocal third
        dead = looked(link)
        if dead and third is None:
            monkeypatch.setattr(claiming, "_is_dead", looked)
            with claim(path, "second"):
                pass
            third = claim(path, "third")
            third.__enter__()
        return dead

    monkeypatch.setattr(claiming, "_is_dead", slowly)
    with pytest.raises(ClaimedElsewhere), claim(path, "latecomer"):
        pass
    assert third is not None
    third.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_claim_that_was_never_written_is_taken_over_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "PATIENCE_SECONDS", 0.3)
    path = tmp_path / "claim"
    path.touch()
    with pytest.raises(ClaimedElsewhere, match="an owner who left no name"), claim(path, "work"):
        pass
    (tmp_path / "claim.unnamed0").touch()  # and so was its successor
    assert taken_over(path, 5) > 0.2
    assert list(tmp_path.iterdir()) == []


def test_claim_that_someone_deleted_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    with claim(path, "work") as held:
        path.unlink()
        with pytest.raises(ClaimLost, match="its claim .* is gone"):
            held.check()


def test_claim_where_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "claim", tmp_path / "file" / "run" / "claim"):
        said = r"claim: cannot be written \((Not a directory|File exists)\); results_dir=FOLDER or DRS_RESULTS="
        with pytest.raises(UserError, match=said), claim(path, "work"):
            pass


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan"])
def test_patience_that_is_no_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DRS_CLAIM_PATIENCE", value)
    said = f"DRS_CLAIM_PATIENCE={value}: must be a number of seconds above 0"
    with pytest.raises(UserError, match=said), claim(tmp_path / "claim", "work"):
        pass
