"""Files of latents, read as a stream: npy, npz, safetensors, parquet, zarr.

A reader knows from the header alone what an array is, and gives its rows in order.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from distot.errors import DistotError, InputError
from distot.store import Place, Url, check_plain, explained, open_latents

BLOCK_BYTES = 32 << 20  # of a block as float64
PIECE_BYTES = 1 << 20  # read at a time from a compressed file

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
DAMAGE: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, RuntimeError, TokenError, BadZipFile, zlib.error)
SAFETENSORS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}

Shape = tuple[int, ...]
Blocks = Iterator[NDArray[Any]]


@dataclass(frozen=True)
class Reader:
    """One array of a source: what its header says, and ``blocks(step)``, its rows in order, at most ``step`` a time."""

    name: str
    shape: Shape
    dtype: str
    blocks: Callable[[int], Blocks]
    notes: tuple[str, ...] = ()
    mass: NDArray[Any] | None = None

    def check_numbers(self) -> None:
        """Raises InputError if the values are not real numbers that numpy and the store know."""
        if self.dtype not in FLOATS + INTEGERS:
            raise InputError(f"{self.name} holds values of type {self.dtype}; save them as float32 numbers")

    def rows(self) -> Blocks:
        """All rows, in blocks of at most BLOCK_BYTES (or one row)."""
        return self.blocks(max(1, BLOCK_BYTES // (8 * max(1, prod(self.shape[1:])))))


@dataclass(frozen=True)
class Wanted:
    """Which array of a source is meant: the latents, or with ``vector`` the masses."""

    key: str | None
    vector: bool = False
    besides: str | None = None  # a column that holds the masses, no coordinate

    @property
    def option(self) -> str:
        return "--mass-key" if self.vector else "--key"

    def choose(self, path: Place, shapes: dict[str, Shape]) -> str:
        """The named array, or the only one with enough dimensions. Raises InputError that lists what there is."""
        listed = ", ".join([f"{name} {shape}" for name, shape in shapes.items()][:20]) or "no arrays of numbers"
        listed += f" and {len(shapes) - 20} more" if len(shapes) > 20 else ""
        if self.key is not None and self.key not in shapes:
            raise InputError(f"{path} has nothing named {self.key!r} but {listed}; name one of these ({self.option})")
        fitting = [name for name in shapes if (len(shapes[name]) < 2) == self.vector] or list(shapes)
        if self.key is None and len(fitting) != 1:
            what = "masses" if self.vector else "latents"
            raise InputError(f"{path} holds {listed}; name the one with the {what} ({self.option})")
        return self.key or fitting[0]

    def refuse_key(self, path: Place, why: str) -> None:
        if self.key is not None:
            raise InputError(f"{path} {why}; leave out {self.option} {self.key}")


def open_reader(path: Place, wanted: Wanted) -> Reader:
    """The reader for a file or folder, by its suffix. Raises InputError if it is missing or of no known format."""
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path")
    suffix = path.suffix.lower()
    if isinstance(path, Url):
        if suffix != ".zarr":
            raise InputError(f"{path} is in an object store, from where only zarr is read; copy the file here first")
        return _zarr(path, wanted)
    if path.is_dir():
        zarr = suffix == ".zarr" or any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup"))
        suffix = ".zarr" if zarr else ".parquet" if any(path.rglob("*.parquet")) else "folder"
    formats = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".parquet": _parquet, ".zarr": _zarr}
    if suffix not in formats:
        raise InputError(
            f"{path} is of no known format; give .npy, .npz, .safetensors, .parquet, a folder of .parquet or .zarr"
        )
    with _reading(path):
        return formats[suffix](path, wanted)


@contextmanager
def _reading(path: Place, *also: type[Exception]) -> Iterator[None]:
    """Turns what the libraries raise on a damaged file, and the operating system on any, into one sentence."""
    with explained("read", path):
        try:
            check_plain(path, links=True)
            yield
        except DistotError:
            raise
        except (*DAMAGE, *also) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            why = " ".join(str(error).split()).rstrip(".")
            raise InputError(f"{path} is damaged, cut short or not what its name says ({why}); make it anew") from error


def _library(name: str) -> Any:
    """A library that only some formats need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} cannot be loaded ({error}); install it: pip install {name.split('.')[0]}") from error


def _ranges(n: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _header(stream: IO[bytes]) -> tuple[Shape, bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of the npy file that starts here; leaves the stream at its values."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the npy format, which only structured arrays use")
    return read(stream)


def _npy(path: Path, wanted: Wanted) -> Reader:
    wanted.refuse_key(path, "holds a single array without a name")
    with path.open("rb") as stream:
        shape, fortran, dtype = _header(stream)
        offset = stream.tell()
    missing = offset + prod(shape) * dtype.itemsize - path.stat().st_size
    if missing > 0 and not dtype.hasobject:
        raise ValueError(f"{missing:,} bytes are missing")

    def blocks(step: int) -> Blocks:
        n, width = shape[0], prod(shape[1:])
        for rows in _ranges(n, step):
            count = rows.stop - rows.start
            with _reading(path):
                if fortran:
                    starts = [offset + (column * n + rows.start) * dtype.itemsize for column in range(width)]
                    block = np.stack([np.fromfile(path, dtype, count, offset=start) for start in starts], axis=1)
                else:
                    block = np.fromfile(path, dtype, count * width, offset=offset + rows.start * width * dtype.itemsize)
                block = block.reshape((count, *shape[1:]), order="F" if fortran else "C")
            yield block

    return Reader(str(path), shape, dtype.name, blocks)


def _npz(path: Path, wanted: Wanted) -> Reader:
    headers = {}
    with ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as stream:
                    headers[name.removesuffix(".npy")] = _header(stream)
    key = wanted.choose(path, {name: header[0] for name, header in headers.items()})
    shape, fortran, dtype = headers[key]
    if fortran:
        raise InputError(f"{path}: {key} is stored column by column; save it with numpy.ascontiguousarray, or as .npy")

    def blocks(step: int) -> Blocks:
        with _reading(path), ZipFile(path) as archive, archive.open(f"{key}.npy") as stream:
            _header(stream)
            for rows in _ranges(shape[0], step):
                block = np.empty((rows.stop - rows.start, *shape[1:]), dtype)
                flat = block.reshape(-1).view(np.uint8)
                for part in _ranges(len(flat), PIECE_BYTES):
                    piece = stream.read(part.stop - part.start)
                    if len(piece) < part.stop - part.start:
                        raise EOFError(f"{key} ends too soon")
                    flat[part] = np.frombuffer(piece, np.uint8)
                yield block
            if stream.read(1):  # reading to the end also verifies the checksum
                raise ValueError(f"{key} is longer than its header says")

    return Reader(f"{path}: {key}", shape, dtype.name, blocks)


def _safetensors(path: Path, wanted: Wanted) -> Reader:
    library = _library("safetensors")
    with _reading(path, library.SafetensorError), library.safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
        key = wanted.choose(path, shapes)
        code = file.get_slice(key).get_dtype()
    shape, letters = shapes[key], code.rstrip("0123456789")
    dtype = SAFETENSORS.get(letters, letters) + code.removeprefix(letters)

    def blocks(step: int) -> Blocks:
        for rows in _ranges(shape[0], step):  # opened anew for each block, lest the pages read pile up
            with _reading(path, library.SafetensorError), library.safe_open(path, framework="pt") as file:
                tensor = file.get_slice(key)[rows]
                block = np.array((tensor.float() if dtype == "bfloat16" else tensor).numpy())
            yield block

    return Reader(f"{path}: {key}", shape, dtype, blocks)


def _zarr(path: Place, wanted: Wanted) -> Reader:
    with _reading(path, KeyError, TypeError):
        latents = open_latents(path, wanted.key)
    if latents.attributes:
        wanted.refuse_key(path, "is a latents store, whose masses are taken over")
    chunk = latents.array.chunks[0] if latents.shape else 1

    def blocks(step: int) -> Blocks:
        with _reading(path):
            for rows in _ranges(latents.shape[0], max(1, step // chunk) * chunk):  # whole chunks, each decoded once
                block = latents[rows]
                yield from (block[part] for part in _ranges(len(block), step))

    dtype = "bfloat16" if latents.bfloat16 else latents.dtype.name
    name = str(path) if wanted.key is None else f"{path}: {wanted.key}"
    return Reader(name, latents.shape, dtype, blocks, latents.notes, mass=latents.mass)


# -------------------------------------------------------------------------------------------- parquet


def _parquet(path: Path, wanted: Wanted) -> Reader:
    """A column of lists; if there is none, all columns of numbers side by side."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    total, schemas = 0, []
    for file in files:
        with _reading(file, KeyError), _streamed(file) as opened:
            total += opened.metadata.num_rows
            schemas.append(opened.schema_arrow)
    kinds = {field.name: field.type for field in schemas[0]}
    lists: dict[str, Shape] = {
        name: (total, _width(files, name, kind)) for name, kind in kinds.items() if _is_list(kind)
    }
    numbers = [name for name, kind in kinds.items() if _is_number(kind) and not name.startswith("__index_level_")]
    names, notes = [name for name in numbers if name != wanted.besides], []
    shape: Shape = (total, len(names))
    if names and not (lists or wanted.key or wanted.vector):
        label = str(path)
        notes += [f"each row of {path} is made of the columns {', '.join(names[:20])}{', ...' if names[20:] else ''}"]
    else:
        names = [wanted.choose(path, dict.fromkeys(numbers, (total,)) | lists)]
        shape = lists.get(names[0], (total,))
        label = f"{path}: {names[0]}"
    if len(files) > 1:
        notes += [f"the {len(files):,} files of {path} were read in the order of their names"]
    dtype = np.result_type(*(getattr(kinds[name], "value_type", kinds[name]).to_pandas_dtype() for name in names))

    def blocks(step: int) -> Blocks:
        done = 0
        for file, schema in zip(files, schemas, strict=True):
            if any(name not in schema.names or schema.field(name).type != kinds[name] for name in names):
                raise InputError(f"{file} has other columns than {files[0]}; give files of one schema")
            with _reading(file, KeyError), _streamed(file) as opened:
                for batch in opened.iter_batches(-(-step // 4), columns=names):  # decoding takes several times a batch
                    columns = [_dense(batch.column(name), f"{path}: {name}", done, shape) for name in names]
                    yield columns[0] if names[0] in lists or len(shape) == 1 else np.column_stack(columns).astype(dtype)
                    done += len(batch)

    return Reader(label, shape, dtype.name, blocks, tuple(notes))


def _streamed(file: Path) -> Any:
    """A parquet file whose column chunks are read piece by piece, not each as a whole."""
    return _library("pyarrow.parquet").ParquetFile(
        file, buffer_size=PIECE_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def _is_number(kind: Any) -> bool:
    types = _library("pyarrow.types")
    return bool(types.is_integer(kind) or types.is_floating(kind))


def _is_list(kind: Any) -> bool:
    types = _library("pyarrow.types")
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and _is_number(kind.value_type))


def _width(files: Sequence[Path], name: str, kind: Any) -> int:
    """Values in a list of this column: by its type, or else by its first list."""
    if _library("pyarrow.types").is_fixed_size_list(kind):
        return int(kind.list_size)
    for file in files:
        with _reading(file, KeyError), _streamed(file) as opened:
            for batch in opened.iter_batches(16, columns=[name]):
                for length in _library("pyarrow.compute").list_value_length(batch.column(0)).drop_null():
                    return int(length.as_py())
    return 0


def _dense(column: Any, name: str, start: int, shape: Shape) -> NDArray[Any]:
    """Values of a batch of numbers (rows,) or of lists (rows, d). Raises InputError at the first null or ragged row."""
    values, width = column, 1
    nulls = column.is_null().to_numpy(zero_copy_only=False)
    if _is_list(column.type) and not nulls.any():
        width = shape[1]
        lengths = _library("pyarrow.compute").list_value_length(column).to_numpy(zero_copy_only=False)
        if (wrong := lengths != width).any():
            row = int(wrong.argmax())
            raise InputError(
                f"{name} has {lengths[row]} values in row {start + row:,} where the first row has {width}; "
                "give lists of one length"
            )
        values = column.flatten()
        nulls = values.is_null().to_numpy(zero_copy_only=False)
    if nulls.any():
        row = start + int(nulls.argmax()) // width
        raise InputError(f"{name} has a null in row {row:,}; fill it or remove the row")
    dense: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return dense.reshape(-1, width) if values is not column else dense
