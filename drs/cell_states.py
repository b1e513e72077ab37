"""How far each cell of an evaluation is, in memory that its processes share.

Each process writes the cells that it computes and no other, without a lock and without a message, so that one that is
killed leaves nothing that another waits for.
"""

from collections.abc import Mapping, Sequence
from ctypes import c_int32
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np

from drs.cells import Cell
from drs.runs import RunFolder

WAITING, OPEN, DONE, ELSEWHERE = range(4)
"""A cell is not begun, at work, computed here, or none of this evaluation's work any more: another one has computed it,
or its run has failed."""
_FIELDS = 3


class RunWatch:
    """Where a process notes how far the cells of one run are.

    Args:
        shared: The memory of ``CellStates``; None to note nothing.
        first: Number of the run's first cell.
        cells: The run's missing cells, in the order of ``CellStates``.
    """

    def __init__(self, shared: Any, first: int, cells: Sequence[Cell]) -> None:
        self._table = None if shared is None else _table(shared)
        self._row = {cell.path: first + place for place, cell in enumerate(cells)}

    def begun(self, cell: Cell) -> None:
        """Note that a cell is at work, unless it is known."""
        self._note(cell, OPEN, before=(WAITING,))

    def images(self, cell: Cell, done: int, total: int) -> None:
        """Note how many images of a cell are done, of those that are attacked."""
        row = self._row.get(cell.path)
        if self._table is not None and row is not None:
            self._table[row, 1:] = done, total

    def done(self, cell: Cell) -> None:
        """Note that a cell is written."""
        self._note(cell, DONE, before=(WAITING, OPEN))

    def keep(self, cells: Sequence[Cell]) -> None:
        """Note that of the cells that are not done only these are still to be computed here."""
        left = {self._row.get(cell.path) for cell in cells}
        for row in self._row.values():
            if row not in left:
                self._set(row, ELSEWHERE, before=(WAITING, OPEN))

    def _note(self, cell: Cell, state: int, before: tuple[int, ...]) -> None:
        # A damaged cell that is computed again along the way is none of those that were missing.
        row = self._row.get(cell.path)
        if row is not None:
            self._set(row, state, before)

    def _set(self, row: int, state: int, before: tuple[int, ...]) -> None:
        if self._table is not None and self._table[row, 0] in before:
            self._table[row, 0] = state


class CellStates:
    """The states of all missing cells of an evaluation, as the process that shows them sees them.

    Args:
        todo: The missing cells of every run.

    Attributes:
        cells: All missing cells, run by run.
        shared: The memory, for ``lend`` in a worker process.
        first: Number of each run's first cell.
    """

    def __init__(self, todo: Mapping[RunFolder, list[Cell]]) -> None:
        self.todo = todo
        self.cells = [cell for cells in todo.values() for cell in cells]
        self.first: dict[RunFolder, int] = {}
        count = 0
        for run, cells in todo.items():
            self.first[run] = count
            count += len(cells)
        self.shared = RawArray(c_int32, _FIELDS * max(1, count))
        self._view = _table(self.shared)

    def watch(self, run: RunFolder) -> RunWatch:
        """Return where this process notes how far a run is."""
        return RunWatch(self.shared, self.first[run], self.todo[run])

    def end_run(self, run: RunFolder) -> None:
        """Note that a run is over, whatever became of it."""
        self.watch(run).keep(())

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return state, images done and images to attack (0 until that is known) of every cell, each ``[C]`` int32."""
        state, images, total = self._view[: len(self.cells)].copy().T
        return state, images, total


def _table(shared: Any) -> np.ndarray:
    return np.frombuffer(shared, dtype=np.int32).reshape(-1, _FIELDS)


_lent: Any = None


def lend(shared: Any) -> None:
    """Give a worker process the memory of ``CellStates``."""
    global _lent
    _lent = shared


def watch_in_worker(first: int, cells: Sequence[Cell]) -> RunWatch:
    """Return where this worker process notes how far a run is whose first cell has the number ``first``."""
    return RunWatch(_lent, first, cells)
