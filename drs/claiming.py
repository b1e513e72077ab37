"""One worker at a time on a piece of work, also where several machines share the file system.

A claim is a small file, made with an exclusive create, which fails where the name exists. Besides it only reading and
deleting files is relied upon: no lock, no rename, and no clock of another machine.

A dead owner's claim is not replaced, because of two who find it dead the slower one would replace the faster one's.
Instead who takes over creates the claim's successor, whose name is the claim's with the dead owner's random token
added. Claims so form a chain, and who is at its end is the owner. Only one can be the next, because the create is
exclusive.

An owner gives up by creating his own successor, after which nobody else can, and then deletes the chain from its start.
Whoever has judged an older link in the meantime, and creates a successor to it, finds that the chain no longer begins
at the start, deletes what he made and looks again.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from drs.errors import UserError
from drs.files import unwritable
from drs.processes import has_ended, process_place, read_process

PATIENCE_SECONDS = 60.0
"""How long another machine must have seen no sign of life of an owner before it takes over; ``DRS_CLAIM_PATIENCE``."""
BEATS = 12
"""Signs of life in that time."""


class ClaimedElsewhere(UserError):
    """The work has a living owner, or one of whom it is not known yet that he is dead."""


class ClaimLost(Exception):
    """An owner who was taken for dead has lost the work to another, and must write nothing more of it."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim.

    Attributes:
        host: The machine's name.
        pid: The process, a number of its own process namespace.
        started: When the process started, in clock ticks since the machine did; process numbers are used again.
        place: The running kernel and the process namespace, within which process numbers can be compared; None
            where the system does not tell.
        token: Random, the claim's own.
        patience: Seconds without a sign of life after which the owner counts as dead on another machine.
    """

    host: str
    pid: int
    started: str | None
    place: str | None
    token: str
    patience: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "an owner who left no name"


@dataclass(frozen=True)
class _Link:
    root: Path
    path: Path
    owner: Owner
    content: bytes

    @property
    def successor(self) -> Path:
        return self.root.with_name(f"{self.root.name}.{self.owner.token}")


class Claim:
    """A claim that this process holds."""

    def __init__(self, what: str, chain: list[_Link], handle: int, beat_offset: int) -> None:
        self.what = what
        self._chain = chain
        self._link = chain[-1]
        self._handle = handle
        self._beat_offset = beat_offset
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Raise ``ClaimLost`` if another has taken over or the claim is gone; call it before a result is written."""
        link = self._link
        mine = _read(link.root, link.path)
        if mine is None or mine.owner.token != link.owner.token:
            raise ClaimLost(f"{self.what}: its claim {link.path} is gone")
        successor = _read(link.root, link.successor)
        if successor is not None:
            raise ClaimLost(f"{self.what}: taken over by {successor.owner}, who saw no sign of life of this process")

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(self._link.owner.patience / BEATS):
            count += 1
            # A full disk or a server that is away costs signs of life, and the claim only if it lasts.
            with contextlib.suppress(OSError):
                os.pwrite(self._handle, b"%012d" % count, self._beat_offset)
                os.fsync(self._handle)

    def _release(self) -> None:
        self._ended.set()
        self._heart.join()
        os.close(self._handle)
        try:
            end = os.open(self._link.successor, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except OSError:
            # Taken over, or the folder cannot be written: then the claim ends with this process.
            return
        # Who it is matters only if this process dies in the next moment, and a full disk is no reason to keep a claim.
        with contextlib.suppress(OSError):
            os.write(end, _line(_myself(self._link.owner.patience)))
        os.close(end)
        for path in [*(link.path for link in self._chain), self._link.successor]:
            with contextlib.suppress(OSError):
                path.unlink()


@contextmanager
def claim(path: Path, what: str, *, watch: bool = False) -> Iterator[Claim]:
    """Hold the claim ``path`` on a piece of work for as long as the block runs.

    The claim of a process that has ended is taken over: at once on the same machine, and on another one when its signs
    of life have stayed away for its patience, counted from the first look that this process takes at it.

    Args:
        path: The claim's file, beside what it protects. The folder is made if it is missing.
        what: What the work is, for messages.
        watch: Where the owner is on another machine, look for a sign of life until there is one or he counts as
            dead; otherwise one look decides.

    Raises:
        ClaimedElsewhere: If another process holds the claim.
        UserError: If the claim cannot be written.
    """
    held = _acquire(path, what, watch)
    try:
        yield held
    finally:
        held._release()


def owner_of(path: Path) -> Owner | None:
    """Return who holds the claim ``path``, or None where nobody does or its owner is known to be dead."""
    chain = _chain(path)
    return None if not chain or _is_dead(chain[-1]) else chain[-1].owner


def _acquire(path: Path, what: str, watch: bool) -> Claim:
    myself = _myself(_patience())
    watched = None
    while True:
        chain = _chain(path)
        if chain and not _is_dead(chain[-1]):
            end = chain[-1]
            beats = (end.path, end.content)
            if not watch or end.owner.place == process_place() or (watched is not None and watched != beats):
                raise ClaimedElsewhere(
                    f"{what}: {end.owner} is at work on it; wait for that, or end that process ({end.path})"
                )
            if watched is None:
                wait = end.owner.patience
                print(f"{what}: looking whether {end.owner} is still at work on it, for {wait:g} s at most", flush=True)
            watched = beats
            time.sleep(min(1.0, end.owner.patience / (4 * BEATS)))
            continue
        place = chain[-1].successor if chain else path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, offset = _create(place, myself)
        except (FileExistsError, FileNotFoundError) as error:
            if isinstance(error, FileExistsError) and not path.parent.is_dir():
                raise unwritable(place, error) from None
            continue  # another was faster, or gave up and deleted an empty folder
        except OSError as error:
            raise unwritable(place, error) from None
        chain = _chain(path)
        if chain and chain[-1].owner.token == myself.token:
            return Claim(what, chain, handle, offset)
        os.close(handle)
        place.unlink(missing_ok=True)


def _create(path: Path, owner: Owner) -> tuple[int, int]:
    """Create a claim; return its open file and the place of the sign of life in it."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    line = _line(owner)
    try:
        os.write(handle, line + b"%012d\n" % 0)
        os.fsync(handle)
    except OSError:
        os.close(handle)
        path.unlink(missing_ok=True)
        raise
    return handle, len(line)


def _line(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode() + b"\n"


def _chain(root: Path) -> list[_Link]:
    chain: list[_Link] = []
    link = _read(root, root)
    while link is not None:
        chain.append(link)
        link = _read(root, link.successor, len(chain))
    return chain


def _read(root: Path, path: Path, position: int = 0) -> _Link | None:
    """Return the link ``path`` of the chain that starts at ``root``, or None where there is no such file."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); who holds the claim is not known") from None
    try:
        owner = Owner(**json.loads(content.partition(b"\n")[0]))
        sound = isinstance(owner.token, str) and owner.token.isalnum() and float(owner.patience) > 0
    except (ValueError, TypeError):
        sound = False
    if not sound:
        # Created, but not written yet; if that is how it stays, its owner has died in between.
        owner = Owner("", 0, None, None, f"unnamed{position}", PATIENCE_SECONDS)
    return _Link(root, path, owner, content)


_seen: dict[Path, tuple[bytes, float]] = {}
"""The content of each claim of another machine that was looked at, and when it was first seen so, on this clock."""


def _is_dead(link: _Link) -> bool:
    owner = link.owner
    if owner.place is not None and owner.place == process_place():
        gone = has_ended(owner.pid, owner.started)
        if gone is not None:
            return gone
    now = time.monotonic()
    content, since = _seen.get(link.path, (None, now))
    if content != link.content:
        _seen[link.path] = (link.content, now)
        return False
    return now - since > owner.patience


def _myself(patience: float) -> Owner:
    pid = os.getpid()
    found = read_process(pid)
    return Owner(
        socket.gethostname(), pid, found[1] if found else None, process_place(), secrets.token_hex(8), patience
    )


def _patience() -> float:
    text = os.environ.get("DRS_CLAIM_PATIENCE", str(PATIENCE_SECONDS))
    try:
        patience = float(text)
    except ValueError:
        patience = 0.0
    if not 0 < patience < float("inf"):
        raise UserError(f"DRS_CLAIM_PATIENCE={text}: must be a number of seconds above 0")
    return patience
