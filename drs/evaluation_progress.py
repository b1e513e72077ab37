"""What a user sees of an evaluation while it runs: a bar in a terminal, elsewhere a line every half minute.

A thread looks at ``drs.cell_states`` every second, so that nothing that computes has to wait for what is shown.
"""

import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from tqdm import tqdm

from drs.cell_costs import CellCosts
from drs.cell_states import DONE, ELSEWHERE, OPEN, WAITING, CellStates
from drs.cells import Cell
from drs.durations import duration
from drs.jobs import short_title
from drs.runs import RunFolder

TICK_SECONDS = 1.0
"""How often the states of the cells are looked at."""
FIRST_SECONDS = 6.0
"""When the first line comes; what ends before prints none."""
LINE_SECONDS = 30.0
LEAST_SECONDS = 15.0
"""No line follows another, such as that of a finished run, sooner than this."""
PRIOR_SECONDS = 5.0
"""How much the seconds of earlier evaluations count against those of this one, which may have another machine."""
MOST_RUNS = 4
"""How many of the runs that are at work are named."""


class TimeLeft:
    """How long an evaluation still takes: what its cells are expected to cost, at the pace of those that are done.

    The pace is taken whenever something is finished; in between the time left runs down.

    Args:
        states: Of the cells.
        costs: Of the same cells, in the same order; those of earlier evaluations are learnt already.
        lanes: Runs that are evaluated at a time.
        now: A time in seconds, here as in all methods.
    """

    def __init__(self, states: CellStates, costs: CellCosts, lanes: int, now: float) -> None:
        self.states = states
        self.costs = costs
        self.lanes = lanes
        self.has_prior = costs.in_seconds
        self.run = np.repeat(np.arange(len(states.todo)), [len(cells) for cells in states.todo.values()])
        self.began: float | None = None
        self.changed = self.made = now
        self.state, self.images, self.total = states.read()

    def look(self, now: float) -> None:
        """Read the states of the cells."""
        state, images, total = self.states.read()
        if self.began is None and bool(((state == OPEN) | (state == DONE)).any()):
            # The start of the worker processes says nothing about the pace. It was at most a tick ago.
            self.began = max(self.made, now - TICK_SECONDS)
        if bool((state != self.state).any() or (images != self.images).any()):
            finished = np.flatnonzero((state == DONE) & (self.state != DONE))
            self.costs.learn(self.states.cells[place] for place in finished)
            if len(finished) or bool((images != self.images).any()):
                self.changed = now
            self.state, self.images, self.total = state, images, total

    def seconds(self, now: float) -> float | None:
        """Return the seconds left, as last looked at; None as long as nothing is known."""
        cost = np.where(self.state == ELSEWHERE, 0.0, self.costs.expected(self.total))
        share = np.where(self.state == DONE, 1.0, self.images / np.maximum(self.total, 1))
        done = float((cost * share).sum())
        passed = 0.0 if self.began is None else self.changed - self.began
        if self.has_prior:
            done, passed = done + PRIOR_SECONDS * self.lanes, passed + PRIOR_SECONDS
        if done <= 0 or passed <= 0:
            return None
        pace = passed / done
        left = cost * (1 - share)
        # A run is evaluated by one process where there are several: the longest one may outlast the others.
        longest = np.bincount(self.run, weights=left).max(initial=0.0) * self.lanes if self.lanes > 1 else 0.0
        since = 0.0 if self.began is None else now - self.changed
        not_begun = float(cost[self.state == WAITING].sum())
        return max(pace * max(float(left.sum()), float(longest)) - since, pace * not_begun)


class Progress:
    """A bar over the expected costs of all cells in a terminal; elsewhere lines with the time left.

    Args:
        todo: The missing cells of every run.
        finished: Cells of the same study that are there.
        device: Type of the device that computes.
        workers: Runs that are evaluated at a time.
        enabled: Show anything at all.
    """

    def __init__(
        self, todo: Mapping[RunFolder, list[Cell]], finished: Iterable[Cell], device: str, workers: int, enabled: bool
    ) -> None:
        self.states = CellStates(todo)
        self.titles = [short_title(cells[0].train) for cells in todo.values()]
        self.enabled = enabled and bool(todo)
        self.terminal = self.enabled and sys.stderr.isatty()
        layout = "attacks {percentage:3.0f}%|{bar:20}| {elapsed}{postfix}"
        self.bar: tqdm[Any] = tqdm(
            total=100, disable=not self.terminal, dynamic_ncols=True, leave=False, bar_format=layout
        )
        self.finished_runs = 0
        self.began = time.perf_counter()
        self.next_line = self.began + FIRST_SECONDS
        self._finished = finished
        self._device = device
        self._workers = workers
        self._left: TimeLeft | None = None
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Progress":
        if self.enabled:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * TICK_SECONDS)  # it may hang where nobody reads what it prints
        self.bar.close()

    def finished(self, run: RunFolder, verb: str, seconds: float) -> None:
        """Count a run, which was evaluated or failed."""
        self.finished_runs += 1
        self.states.end_run(run)
        if not self.enabled or self.terminal:
            return
        with self._lock:
            now = time.perf_counter()
            left = self._seconds_left(now)
            is_last = self.finished_runs == len(self.titles)
            then = "" if is_last or left is None else f", about {duration(left, rough=True)} left"
            self.next_line = max(self.next_line, now + LEAST_SECONDS)
        print(f"{verb} run {self.finished_runs}/{len(self.titles)} ({seconds:.0f} s){then}", flush=True)

    def _watch(self) -> None:
        while not self._end.wait(TICK_SECONDS):
            with self._lock:
                now = time.perf_counter()
                left = self._seconds_left(now)
                if self.terminal:
                    self._move_bar(now - self.began, left)
                elif now >= self.next_line and (work := self._at_work()):
                    self.next_line = now + LINE_SECONDS
                    told = "" if left is None else f", about {duration(left, rough=True)} left"
                    with suppress(OSError, ValueError):  # where nobody reads it, the main thread finds out
                        print(f"{'; '.join(work)}: {duration(now - self.began)} passed{told}", flush=True)

    def _seconds_left(self, now: float) -> float | None:
        if self._left is None:
            costs = CellCosts(self.states.cells, self._device)
            costs.learn(self._finished)
            self._left = TimeLeft(self.states, costs, self._workers, self.began)
        self._left.look(now)
        return self._left.seconds(now)

    def _move_bar(self, passed: float, left: float | None) -> None:
        self.bar.n = 0 if left is None else 100 * passed / (passed + left)
        told = [] if left is None else [f"about {duration(left, rough=True)} left"]
        self.bar.set_postfix_str(", ".join([*told, *self._at_work(short=True)]), refresh=False)
        self.bar.refresh()

    def _at_work(self, *, short: bool = False) -> list[str]:
        """Return a phrase for each run at work: its number, its attack, what is done; what it is unless ``short``."""
        assert self._left is not None
        state, images, total = self._left.state, self._left.images, self._left.total
        phrases = []
        for place, (run, cells) in enumerate(self.states.todo.items()):
            first = self.states.first[run]
            mine = state[first : first + len(cells)]
            if not bool((mine == OPEN).any()):
                continue
            offset = int((mine == OPEN).argmax())
            count = int((mine >= DONE).sum()) + 1
            counted = f", {images[first + offset]}/{total[first + offset]} images" if total[first + offset] else ""
            title = "" if short else f"{self.titles[place]} "
            phrases.append(
                f"run {place + 1}/{len(self.titles)} {title}{cells[offset].title} (cell {count}/{len(cells)}{counted})"
            )
        more = len(phrases) - MOST_RUNS
        return [*phrases[:MOST_RUNS], f"{more} more"] if more > 0 else phrases
