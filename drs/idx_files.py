"""IDX, the file format of MNIST and of the sets made in its likeness."""

import numpy as np

from drs.errors import UserError


def read_idx(data: bytes, source: str) -> np.ndarray:
    """Return the uint8 array of an IDX file, the format of MNIST (LeCun et al. 1998); ``UserError`` if it is none."""
    start = 4 + 4 * data[3] if len(data) >= 4 else 4
    if data[:3] != b"\x00\x00\x08" or len(data) < start:
        raise UserError(f"{source}: not an IDX file of bytes")
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    expected = int(np.prod(shape))
    if len(data) - start != expected:
        raise UserError(f"{source}: {len(data) - start} bytes of content, but its header announces {expected}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
