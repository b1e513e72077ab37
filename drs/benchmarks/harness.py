"""Functions timed in turn -> a ratio of medians with its spread."""

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

BOOTSTRAP = 2000


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        section: Which part of the benchmark it belongs to.
        case: What was done.
        ours: What is measured; a name.
        theirs: What it is measured against; a name.
        unit: Of the two medians.
        ours_median: Of ``ours``; None where it was not measured.
        theirs_median: Of ``theirs``.
        ratio: Their median over ours for a speed, ours over theirs for a cost; the target says which.
        low: Lower end of the 95 % bootstrap interval of the ratio over repeats.
        high: Upper end.
        repeats: How often each was run.
        target: What the ratio should reach, such as ``<= 2``; empty where there is none.
        device: ``cpu`` or ``cuda``.
        threads: Of torch on the CPU.
        floor: What no implementation can do without, in words with figures.
        note: What else a reader must know, such as why it was not measured.
        least: The floor in the unit of the medians, where it is a figure.
        tried: Whether this is something that was tried to reach a target, and not how the work is done.
        reason: Why the target is missed, where it is.
        held: Whether what the target asks besides the ratio holds, such as an attack that is no weaker.
    """

    section: str
    case: str
    ours: str
    theirs: str
    unit: str
    ours_median: float | None
    theirs_median: float | None
    ratio: float | None
    low: float | None
    high: float | None
    repeats: int
    target: str
    device: str
    threads: int
    floor: str = ""
    note: str = ""
    least: float | None = None
    tried: bool = False
    reason: str = ""
    held: bool = True

    @property
    def verdict(self) -> str:
        """``met``, ``missed``, ``not measured``, or empty where there is no target."""
        if self.ratio is None:
            return "not measured"
        if not self.target:
            return ""
        sign, bound = self.target.split()
        reached = self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)
        return "met" if reached and self.held else "missed"

    @property
    def is_certain(self) -> bool:
        """Whether the whole interval of the ratio is on the side of the target that the ratio is on."""
        ends = (replace(self, ratio=end).verdict for end in (self.low, self.high))
        return all(verdict == self.verdict for verdict in ends)


def failed_row(section: str, device: str, error: Exception) -> Row:
    """Return the row that stands for what a section did not come to measure."""
    return Row(
        section, "the rest of this section", "ours", "others", "", None, None, None, None, None, 0, "", device, 0,
        note=f"it ended with {type(error).__name__}: {' '.join(str(error).split())[:500]}",
    )  # fmt: skip


def time_in_turn(
    functions: Sequence[Callable[[], object]], repeats: int, *, warmup: int = 2, device: str = "cpu"
) -> np.ndarray:
    """Return the seconds ``[repeats, len(functions)]`` that each call took, the order turned round every time."""
    seconds = np.empty((repeats, len(functions)))
    for repeat in range(-warmup, repeats):
        order = range(len(functions)) if repeat % 2 else reversed(range(len(functions)))
        for which in order:
            began = time.perf_counter()
            functions[which]()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 0:
                seconds[repeat, which] = time.perf_counter() - began
    return seconds


def ratio_of_medians(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float, float]:
    """Return the ratio of the medians of two arrays ``[repeats]`` and its 95 % interval over resampled repeats."""
    count = len(numerator)
    draws = np.random.default_rng(0).integers(count, size=(BOOTSTRAP, count))
    ratios = np.median(numerator[draws], axis=1) / np.median(denominator[draws], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.median(numerator) / np.median(denominator)), float(low), float(high)


class _Storages(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def peak_tensor_bytes(function: Callable[[], object]) -> int:
    """Return the most bytes that tensors made inside a call held at a time; what operations use inside is not seen."""
    with _Storages() as storages:
        function()
    return storages.peak


def count_flops(function: Callable[[], object]) -> int:
    """Return the multiplications and additions of the matrix products and convolutions in a call and on its way back.

    As PyTorch counts them from the shapes; what works value by value is not among them.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Give torch so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Machine:
    """What a processor or a card can do at best.

    Attributes:
        gigaflops: Multiplications and additions of large float32 matrices, 1e9 a second.
        gigabytes: Read and written when a large tensor is copied, 1e9 a second.
    """

    gigaflops: float
    gigabytes: float


def measure_machine(device: str = "cpu", repeats: int = 5) -> Machine:
    """Measure the arithmetic rate and the bandwidth of a device, of a CPU with as many threads as torch has."""
    size, values = (1536, 32 * 2**20) if device == "cpu" else (8192, 256 * 2**20)  # beyond the caches
    one, other = torch.randn(2, size, size, device=device)
    source = torch.randn(values, device=device)
    target = torch.empty_like(source)
    seconds = time_in_turn([lambda: one @ other, lambda: target.copy_(source)], repeats, device=device)
    multiply, copy = np.median(seconds, axis=0)
    return Machine(2 * size**3 / multiply / 1e9, 2 * source.nbytes / copy / 1e9)
