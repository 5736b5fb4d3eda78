"""npy files: what the header says, and whether the file holds that and nothing else."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from distot.errors import InputError

Header = tuple[tuple[int, ...], bool, np.dtype[Any]]


def npy_header(stream: IO[bytes]) -> Header:
    """Shape, whether in Fortran order, and dtype of the npy file that starts here; leaves the stream at its values.

    Raises ValueError for a shape that cannot be.
    """
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the npy format, which only structured arrays use")
    shape, fortran, dtype = read(stream)
    if any(n < 0 for n in shape) or prod(max(n, 1) for n in shape) * max(dtype.itemsize, 1) >= 2**63:
        raise ValueError(f"its header claims the shape {shape}")
    return shape, fortran, dtype


def check_npy(path: Path) -> tuple[Header, int]:
    """The header of a file, and where its values begin. Raises ValueError if some are missing, InputError if there is
    more than that one array."""
    with path.open("rb") as stream:
        header = shape, _, dtype = npy_header(stream)
        begin, size = stream.tell(), path.stat().st_size
        end = begin + prod(shape) * dtype.itemsize
        if dtype.hasobject:
            return header, begin
        if end > size:
            raise ValueError(f"{end - size:,} bytes are missing")
        if end < size:
            raise InputError(_surplus(path, stream, end, size))
    return header, begin


def _surplus(path: Path, stream: IO[bytes], end: int, size: int) -> str:
    """What is wrong with a file that goes on behind its array."""
    count, at = 1, end
    try:
        while at < size:
            stream.seek(at)
            shape, _, dtype = npy_header(stream)
            count, at = count + 1, stream.tell() + prod(shape) * dtype.itemsize
    except ValueError:
        count = 1
    if count == 1:
        return f"{path} goes on for {size - end:,} bytes behind its array; save it anew with numpy.save"
    return f"{path} holds {count:,} arrays one after another; save them as one, joined by numpy.concatenate"
