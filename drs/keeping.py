"""Keeps a training that may be interrupted: its last finished epoch, in memory and every so often in its folder."""

import time
from pathlib import Path

from drs.claiming import Claim
from drs.interrupts import Deferred
from drs.runs import RunFolder
from drs.training_state import Snapshot, StateError, TrainingState, load_snapshot, save_snapshot

STATE_FILE = "state.safetensors"
SAVE_SHARE = 0.02
"""What share of the time writing may take: a large model on a slow disk is saved less often than asked for."""


class Keeper:
    """Keeps one training.

    Args:
        folder: The run's folder.
        claim: The claim on it; nothing is written once it is lost.
        interrupts: Looked at after every step.
        seconds: How much time lies between two writes at least; 0 writes after every epoch.

    Attributes:
        snapshot: The last finished epoch.
        resumed: How many epochs earlier starts had finished.
    """

    def __init__(self, folder: RunFolder, claim: Claim, interrupts: Deferred, seconds: float) -> None:
        self.folder = folder
        self.claim = claim
        self.interrupts = interrupts
        self.seconds = seconds
        self.pause = seconds
        self.snapshot: Snapshot | None = None
        self.written = time.monotonic()
        self.resumed = 0

    @property
    def path(self) -> Path:
        """The file that holds the training between two starts."""
        return self.folder.path / STATE_FILE

    def begin(self, state: TrainingState) -> list[dict[str, float]]:
        """Put ``state`` where an earlier start stopped and return the metrics up to there; a bad file is told."""
        if not self.path.exists():
            return []
        try:
            snapshot = load_snapshot(self.path)
            state.restore(snapshot)
        except StateError as error:
            print(f"run {self.folder.run_id}: starts anew; {self.path} cannot be used: {error}", flush=True)
            return []
        print(f"run {self.folder.run_id}: goes on after epoch {len(snapshot.rows)}", flush=True)
        self.snapshot = snapshot
        self.resumed = len(snapshot.rows)
        return list(snapshot.rows)

    def step(self) -> None:
        """Raise ``Interrupted`` if the program was asked to end."""
        self.interrupts.check()

    def epoch(self, state: TrainingState, rows: list[dict[str, float]]) -> None:
        """Keep a finished epoch.

        Raises:
            ClaimLost: If another process has taken the run over.
            UserError: If the folder cannot be written.
        """
        self.snapshot = state.capture(rows)
        if time.monotonic() - self.written >= self.pause:
            self.save()

    def save(self) -> None:
        """Write metrics and state of the last finished epoch, where there is one; raises what ``epoch`` does."""
        self.claim.check()
        began = time.monotonic()
        if self.snapshot is not None:
            self.folder.write_metrics(self.snapshot.rows)
            save_snapshot(self.path, self.snapshot)
        self.written = time.monotonic()
        if self.seconds:
            self.pause = max(self.seconds, (self.written - began) / SAVE_SHARE)
