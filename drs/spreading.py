"""The cells of one run, spread over worker processes batch by batch.

A batch is seeded with its place among the samples of its cell, so who computes it changes nothing in the arrays but the
order of sums, which the number of threads decides.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from drs.attacks.replay import SIZES
from drs.cell_costs import plain_cost
from drs.cells import Cell
from drs.errors import DamagedFileError
from drs.evaluation_workers import StartingPool, starting_pool
from drs.filling import CLEAN, Before, Part, compute_part, load_test, read_before, write_cell
from drs.runs import RunFolder

SPREAD_SECONDS = {"cuda": 0.0}
SPREAD_SECONDS_DEFAULT = 2.0
"""How long a run is evaluated, to the end of a cell, before other processes are started to help. On a card they take
long to start, and are only started where a config asks for them."""
LARGE_BATCH = {"cuda": SIZES[-1]}
"""Images beyond which a batch keeps a device busy by itself. Processes take turns on a card, so two such batches gain
nothing from each other, and long searches on few images, which ask for little of it, wait for both at every step."""


@dataclass
class _Open:
    """A cell at work: what came before it, the batches that are not yet begun, and the parts that are there;
    how many samples there are, and how many are done."""

    cell: Cell
    before: Before
    began: float
    todo: list[tuple[int, int]]
    count: int
    parts: dict[int, Part] = field(default_factory=dict)
    done: int = 0


@lru_cache(maxsize=1)
def _model_of(run: RunFolder, device: torch.device) -> nn.Module:
    return run.load_model(device)


def prepare_worker(cell: Cell, device: torch.device) -> None:
    """Do what a worker process has to do before its first part of a cell: import, load, and wake the device."""
    _model_of(cell.run, device)
    load_test(cell.train.data, cell.n, device)


def _compute(cell: Cell, device: torch.device, standing: np.ndarray, start: int, stop: int) -> Part:
    """Compute a part in a worker process."""
    return compute_part(cell, _model_of(cell.run, device), device, standing, start, stop)


def batches_of(cell: Cell, count: int) -> list[tuple[int, int]]:
    """Return where each batch of ``count`` samples starts and stops."""
    if not cell.is_divisible:
        return [(0, count)]
    return [(start, min(start + cell.batch_size, count)) for start in range(0, count, cell.batch_size)]


def in_order_of_need(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with those first that the most other cells wait for, one after another; else as they come."""
    heights: dict[Path, int] = {}
    for cell in reversed(cells):
        later = [heights[other.path] for other in cells if other.path in heights and cell in other.after]
        heights[cell.path] = 1 + max(later, default=0)
    return sorted(cells, key=lambda cell: -heights[cell.path])


def _is_large(count: int, device: torch.device) -> bool:
    return count > LARGE_BATCH.get(device.type, math.inf)


def fill_side_by_side(
    pool: ProcessPoolExecutor,
    workers: int,
    cells: Sequence[Cell],
    device: torch.device,
    *,
    fill_here: Callable[[Cell], int],
    before_writing: Callable[[], None],
    when_begun: Callable[[Cell], None],
    when_done: Callable[[Cell, int], None],
    on_images: Callable[[Cell, int, int], None],
) -> None:
    """Compute cells of one run in worker processes, at most as many batches at a time as there are workers.

    Large batches (``LARGE_BATCH``) are in half of the workers at most, so that the others get on with small ones.

    Args:
        pool: Of ``drs.evaluation_workers.worker_pool``.
        workers: Its processes.
        cells: Missing cells, in the order of the plan.
        device: Where to compute.
        fill_here: Computes a cell in this process, and those before it that are damaged; returns how many.
        before_writing: See ``drs.filling.fill_cell``.
        when_begun: Called with a cell before its first batch, and before what may fail.
        when_done: Called with every cell that is written, and with how many cells were computed for it.
        on_images: See ``drs.filling.fill_cell``.

    Raises:
        UserError: As ``drs.filling.fill_cell``; what is running then is for the pool to end.
    """
    waiting = in_order_of_need(cells)
    unwritten = {cell.path for cell in cells}
    looked_up: dict[Path, tuple[Before, list[tuple[int, int]]]] = {}
    at_work: list[_Open] = []
    running: dict[Future[Part], tuple[_Open, int, int]] = {}

    def finish(opened: _Open) -> None:
        at_work.remove(opened)
        parts = [opened.parts[start] for start in sorted(opened.parts)]
        write_cell(opened.cell, device, opened.before, parts, opened.began, before_writing)
        unwritten.discard(opened.cell.path)
        when_done(opened.cell, 1)

    def room_for_large() -> bool:
        large = sum(_is_large(stop - start, device) for _, start, stop in running.values())
        return large < max(1, workers // 2)

    def next_at_work() -> _Open | None:
        """Return the first cell at work with a batch that may be computed now."""
        room = room_for_large()
        for opened in at_work:
            if opened.todo and (room or not _is_large(opened.todo[0][1] - opened.todo[0][0], device)):
                return opened
        return None

    def begin_next() -> bool:
        """Begin the first cell that waits for no other and may be computed now; return whether there is one."""
        room = room_for_large()
        for cell in waiting:
            if any(earlier.path in unwritten for earlier in cell.after):
                continue
            if cell.path not in looked_up:
                try:
                    before = read_before(cell, device)
                except DamagedFileError:
                    waiting.remove(cell)
                    when_begun(cell)
                    count = fill_here(cell)
                    unwritten.discard(cell.path)
                    when_done(cell, count)
                    return True
                except Exception:
                    when_begun(cell)
                    raise
                looked_up[cell.path] = before, batches_of(cell, int(before.standing.sum()))
            before, batches = looked_up[cell.path]
            if not room and batches and _is_large(batches[0][1] - batches[0][0], device):
                continue
            del looked_up[cell.path]
            waiting.remove(cell)
            when_begun(cell)
            count = int(before.standing.sum())
            opened = _Open(cell, before, time.perf_counter(), batches, count)
            at_work.append(opened)
            on_images(cell, 0, count)
            if not opened.todo:
                finish(opened)
            return True
        return False

    while waiting or at_work:
        while len(running) < workers:
            opened = next_at_work()
            if opened is None:
                if not begin_next():
                    break
                continue
            start, stop = opened.todo.pop(0)
            future = pool.submit(_compute, opened.cell, device, opened.before.standing, start, stop)
            running[future] = opened, start, stop
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            opened, start, stop = running.pop(future)
            when_begun(opened.cell)
            opened.parts[start] = future.result()
            opened.done += stop - start
            on_images(opened.cell, opened.done, opened.count)
            if not opened.todo and not any(other is opened for other, *_ in running.values()):
                finish(opened)


def fill_queue(queue: list[Cell], device: torch.device, processes: int, **steps: Any) -> None:
    """Compute missing cells of one run: here, or if there may be several processes, in them as soon as they are ready.

    They are started after ``SPREAD_SECONDS``. Meanwhile the work goes on: on a CPU with the cheapest cells, since the
    processes wait for the end of the one that is at work here, and on a card with those that the most others wait for.

    Args:
        queue: The cells, in the order of the plan; those that are begun here are taken from it.
        device: Where to compute.
        processes: How many there may be; with 1 everything is computed here.
        steps: ``fill_here``, ``before_writing``, ``when_begun``, ``when_done`` and ``on_images`` of
            ``fill_side_by_side``.

    Raises:
        UserError: As ``fill_side_by_side``, and if a process is ended from outside.
    """
    began, wait_for = time.perf_counter(), SPREAD_SECONDS.get(device.type, SPREAD_SECONDS_DEFAULT)
    costs = {cell.path: plain_cost(cell, device.type) for cell in queue}

    def take() -> Cell:
        """Take the next cell, or where other processes are to help, one that waits for no other."""
        if processes == 1:
            return queue.pop(0)
        unwritten = {cell.path for cell in queue}
        free = [cell for cell in queue if not any(earlier.path in unwritten for earlier in cell.after)]
        if device.type in LARGE_BATCH:
            cell = next(cell for cell in in_order_of_need(queue) if cell in free)
        else:
            cell = min(free, key=lambda cell: costs[cell.path])
        queue.remove(cell)
        return cell

    with ExitStack() as stack:
        helpers: StartingPool | None = None
        while queue and not (helpers is not None and helpers.is_ready()):
            if helpers is None and processes > 1 and len(queue) > 1 and time.perf_counter() - began >= wait_for:
                helpers = stack.enter_context(starting_pool(processes, partial(prepare_worker, queue[0], device)))
                continue
            cell = take()
            steps["when_begun"](cell)
            steps["when_done"](cell, steps["fill_here"](cell))
        if queue:
            assert helpers is not None
            if device.type == "cuda":
                CLEAN.forget()
                torch.cuda.empty_cache()  # most of the memory is theirs now
            fill_side_by_side(helpers.pool, processes, queue, device, **steps)
