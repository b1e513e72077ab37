"""Work batch by batch on a device whose memory may run out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from drs.errors import UserError

Result = TypeVar("Result")


def in_batches(
    work: Callable[[int, int], Result], n: int, batch_size: int, source: str = "a batch"
) -> tuple[list[Result], int]:
    """Call ``work(start, stop)`` over 0..n in batches; where a GPU's memory runs out, halve the batch and go on.

    A batch that did not fit is done again in smaller ones, and the rest of the samples keep the smaller size.

    Args:
        work: Computes one batch; called again for a part of it after it ran out of memory.
        n: Samples.
        batch_size: Samples per batch, to begin with.
        source: What it is a batch of, for the message.

    Returns:
        What ``work`` returned, in order, and the size of batch that it ended with: ``batch_size``, or what was left of
        it. What depends on its batch must be recorded with it.

    Raises:
        UserError: If not even one sample fits.
    """
    results: list[Result] = []
    start, size = 0, batch_size
    while start < n:
        stop = min(start + size, n)
        try:
            results.append(work(start, stop))
        except torch.cuda.OutOfMemoryError:
            fits = False
        else:
            fits = True
        # The error holds on to the frames that filled the memory, so what follows waits until it is gone.
        if fits:
            start = stop
            continue
        if stop - start == 1:
            raise UserError(f"{source}: the GPU's memory is too small for a single sample; device=cpu can do it")
        size = (stop - start + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results, size
