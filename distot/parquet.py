"""Parquet files of latents: a column of lists, or, if there is none, all columns of numbers side by side.

Every column is accounted for: what might be the latents and is not understood is refused, the rest is named in a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distot.errors import InputError
from distot.wanted import PIECE_BYTES, Blocks, Shape, Wanted, library, listed, reading

SHAPES = re.compile(r"(.*_)?(shape|size|sizes|dims?)", re.IGNORECASE)  # lists of this name are no latents
OTHER = re.compile(  # columns of this name are hardly coordinates
    r"(.*_)?(id|ids|idx|index|key|label|labels|class|classes|target|targets|category|split|fold|height|width|channels|"
    r"shape|size|length|seed|epoch|step|time|timestamp|date|year|weight|mass)",
    re.IGNORECASE,
)
FOREIGN = re.compile(r"[._]|__index_level_")  # what other tools put beside data


@dataclass(frozen=True)
class Table:
    """The latents of files of one schema: name, shape, dtype, ``blocks(step)`` and notes as of a ``readers.Reader``."""

    name: str
    shape: Shape
    dtype: str
    blocks: Callable[[int], Blocks]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """value: type of the numbers in it; None: not understood. lists: how many deep they lie in lists. width: numbers of
    each row, (a, b, ...), where the type says so. plain: it can be no latents, such as text and dates."""

    type: Any
    value: Any
    lists: int = 0
    width: Shape | None = None
    plain: bool = False


def read_table(path: Path, wanted: Wanted) -> Table:
    """Raises InputError for columns that are not understood, and files of different schemas."""
    files, notes = _files(path)
    total, schemas = 0, []
    for file in files:
        with reading(file, KeyError), _streamed(file) as opened:
            total += opened.metadata.num_rows
            schemas.append(opened.schema_arrow)
    if len(set(schemas[0].names)) < len(schemas[0].names):
        raise InputError(f"{files[0]} has several columns of one name; give each a name of its own")
    columns = {field.name: _column(field.type) for field in schemas[0]}
    names, told, side = _chosen(path, wanted, columns, files, total)
    _check_schemas(files, schemas, names, wanted.key is None)
    if len(files) > 1:
        notes += (f"the {len(files):,} files of {path} were read in the order of their names",)
    found = [columns[name] for name in names]
    widths = () if side or not found[0].lists else _widths(files, names[0], found[0])
    shape = (total, len(names)) if side else (total, *widths)
    dtype = np.result_type(*(its.value.to_pandas_dtype() for its in found))

    def blocks(step: int) -> Blocks:
        done = 0
        for file in files:
            with reading(file, KeyError), _streamed(file) as opened:
                for batch in opened.iter_batches(-(-step // 4), columns=names):  # decoding takes several times a batch
                    dense = [_dense(batch.column(name), f"{path}: {name}", done, widths) for name in names]
                    yield np.column_stack(dense).astype(dtype) if side else dense[0]
                    done += len(batch)

    return Table(str(path) if side else f"{path}: {names[0]}", shape, dtype.name, blocks, told + notes)


def _files(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The parquet files of a folder, in the order of their names, and a note on files that are none."""
    if not path.is_dir():
        return [path], ()
    every = sorted(file for file in path.rglob("*") if file.is_file())
    hidden = [file for file in every if any(FOREIGN.match(part) for part in file.relative_to(path).parts)]
    files = [file for file in every if file.suffix == ".parquet" and file not in hidden]
    rest = [
        str(file.relative_to(path))
        for file in every
        if file not in files and not (file in hidden and file.suffix != ".parquet")
    ]
    if not files:
        raise InputError(f"{path} holds no .parquet files but {listed(rest)}; give them names that end so")
    return files, (f"files of {path} that are no .parquet are left out: {listed(rest)}",) if rest else ()


def _chosen(
    path: Path, wanted: Wanted, columns: dict[str, Column], files: Sequence[Path], total: int
) -> tuple[list[str], tuple[str, ...], bool]:
    """Names of the columns to read, notes, and whether they lie side by side."""
    known = {name: its for name, its in columns.items() if its.value is not None}
    odd = {name: f"values of type {its.type}" for name, its in columns.items() if its.value is None}
    strange = {name: kind for name, kind in odd.items() if not columns[name].plain and name != wanted.besides}
    lists = [name for name, its in known.items() if its.lists and not SHAPES.fullmatch(name)]
    numbers = [
        name for name, its in known.items() if not its.lists and name != wanted.besides and not FOREIGN.match(name)
    ]
    left = [name for name in columns if name not in numbers and name != wanted.besides]
    if numbers and not (lists or wanted.key or wanted.vector or strange):
        made = f"each row of {path} is made of the columns {', '.join(numbers[:20])}{', ...' if numbers[20:] else ''}"
        notes = [f"left out: {listed(left)}; {made}" if left else made]
        if doubtful := [name for name in numbers if OTHER.fullmatch(name)]:
            notes += [f"{listed(doubtful)} of {path} count as coordinates; if they are none, save it without them"]
        return numbers, tuple(notes), True
    shapes: dict[str, Shape] = {}
    for name in columns if wanted.key not in known else [str(wanted.key)]:
        if name in known and (name in lists or not (known[name].lists or FOREIGN.match(name)) or name == wanted.key):
            shapes[name] = (total, *(_widths(files, name, known[name]) if known[name].lists else ()))
    name = wanted.choose(path, shapes, odd if wanted.key is not None else strange)
    return [name], wanted.left(path, [name], columns), False


def _check_schemas(files: Sequence[Path], schemas: Sequence[Any], names: Sequence[str], every: bool) -> None:
    """Raises InputError unless the columns are alike in all files: those of ``names``, or ``every`` one by name."""
    for file, schema in zip(files, schemas, strict=True):
        other = any(
            name not in schema.names or schema.field(name).type != schemas[0].field(name).type for name in names
        )
        if other or (every and set(schema.names) != set(schemas[0].names)):
            raise InputError(f"{file} has other columns than {files[0]}; give files of one schema")


def _streamed(file: Path) -> Any:
    """A parquet file whose column chunks are read piece by piece, not each as a whole."""
    return library("pyarrow.parquet").ParquetFile(
        file, buffer_size=PIECE_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def _column(kind: Any) -> Column:
    """What a column of this type holds."""
    arrow, types = library("pyarrow"), library("pyarrow.types")
    if isinstance(kind, arrow.FixedShapeTensorType) and kind.permutation in (None, sorted(kind.permutation or ())):
        inner = _column(kind.value_type)
        return Column(kind, inner.value if not inner.lists else None, 1, tuple(kind.shape))
    value = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_integer(value) or types.is_floating(value):
        return Column(kind, value)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _column(kind.value_type)
        own = (int(kind.list_size),) if types.is_fixed_size_list(kind) else None
        width = None if own is None or (inner.lists and inner.width is None) else own + (inner.width or ())
        text = types.is_string(kind.value_type) or types.is_large_string(kind.value_type)
        decoded = inner.value if not types.is_dictionary(kind.value_type) else None
        return Column(kind, decoded, inner.lists + 1, width, plain=text or (inner.plain and inner.lists > 0))
    plain = (types.is_string, types.is_large_string, types.is_temporal, types.is_boolean, types.is_null)
    return Column(kind, None, plain=any(test(value) for test in plain))


def _widths(files: Sequence[Path], name: str, column: Column) -> Shape:
    """Numbers of a row, (a, b, ...): by the type, or else by the first row that is there."""
    if column.width is not None:
        return column.width
    for file in files:
        with reading(file, KeyError), _streamed(file) as opened:
            for batch in opened.iter_batches(16, columns=[name]):
                for row in batch.column(0).drop_null():
                    return _nested(row.as_py(), column.lists)
    return (0,) * column.lists


def _nested(values: Any, depth: int) -> Shape:
    if depth == 0:
        return ()
    values = values or []
    return (len(values), *(_nested(values[0], depth - 1) if values else (0,) * (depth - 1)))


def _dense(column: Any, name: str, start: int, widths: Shape) -> NDArray[Any]:
    """Numbers of a batch, (rows,) or (rows, *widths). Raises InputError at the first null or ragged row."""
    values, each = column, 1
    tensor = hasattr(column, "storage")
    for width in (prod(widths),) if tensor else widths:
        _refuse_nulls(values, name, start, each)
        values = values.storage if tensor else values
        lengths = library("pyarrow.compute").list_value_length(values).to_numpy(zero_copy_only=False)
        if (wrong := lengths != width).any():
            row = int(wrong.argmax())
            raise InputError(
                f"{name} has {lengths[row]} values in row {start + row // each:,} where the first row has {width}; "
                "give lists of one length"
            )
        values, each = values.flatten(), each * width
    _refuse_nulls(values, name, start, each)
    values = values.dictionary_decode() if hasattr(values, "dictionary_decode") else values
    dense: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return dense.reshape(-1, *widths) if widths else dense


def _refuse_nulls(values: Any, name: str, start: int, each: int) -> None:
    """Raises InputError at the first null; ``each`` of the values belong to one row."""
    nulls = values.is_null().to_numpy(zero_copy_only=False)
    if nulls.any():
        raise InputError(f"{name} has a null in row {start + int(nulls.argmax()) // each:,}; fill it or remove the row")
