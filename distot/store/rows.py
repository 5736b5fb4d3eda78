"""Rows under construction: arrays of equally many rows that are written shard by shard and can be read meanwhile.

A shard counts when the attributes of the group say so, which happens after it was flushed to disk. So whatever stops a
writer, what it had written stays, and the next one goes on behind it. Legend: N rows in all, d numbers in a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from distot.errors import InputError, StoreError
from distot.store.arrays import Arrays, meaningful, open_node, open_to_write, pieces, read, write_vector
from distot.store.files import explained, flush, need_space, new_folder, write_atomically
from distot.store.forms import MOST, Count, Form, Malformed, Name, check
from distot.store.lock import Fence, TakenOver, writer
from distot.store.places import Opened, Place, as_place, sizes, zarr_store

FORMAT, VERSION = "distot-rows", 1
LEAST_BYTES, MOST_BYTES, PIECES = 1 << 20, 64 << 20, 4096  # a shard is 1/4096 of its array, within these bounds
PARTIAL = re.compile(r".+\.[0-9a-f]{8,32}\.partial")  # of a file that zarr, or we, had not finished
KINDS = ("rows of", "kind")  # attributes that are compared first: whether the rows are of one kind at all
# attributes that ``about`` may not have
OWN = ("format", "version", "rows", "columns", "vectors", "written", "state", "unfinished")

ATTRIBUTES: Form = {
    "rows": Annotated[int, (1, MOST - 1)],
    "written": Count,
    "state": dict[str, Any],
    "vectors": list[Name],
    "columns": dict[Name, Annotated[list[str | Annotated[int, (1, MOST - 1)] | None], 2]],
}

Columns = Mapping[str, tuple[str, int | None]]
"""Names of arrays with their dtype and d; None instead of d makes the array (N,)."""


class RowFile:
    """A store of rows, complete or under construction, for reading.

    about: what its writer said of it. written: how many of its ``rows`` rows are there. state: as of row ``written``.
    Raises StoreError if there is none, or it is damaged.
    """

    def __init__(self, path: str | Place) -> None:
        self.path = as_place(path)
        self.opened = Opened(self.path)
        node = open_node(self.path)
        attributes: dict[str, Any] = dict(node.attrs)
        if not isinstance(node, zarr.Group) or attributes.get("format") != FORMAT:
            raise StoreError(f"{self.path} holds no rows written by distot")
        if attributes.get("version") != VERSION:
            raise StoreError(f"{self.path} was written by another version of distot; read it with that version")
        try:
            check(attributes, ATTRIBUTES, others=True)
            with meaningful(self.path):
                self.arrays: dict[str, Any] = {
                    name: node[name] for name in [*attributes["columns"], *attributes["vectors"]]
                }
            _check_form(self.arrays, attributes)
        except Malformed as error:
            raise StoreError(f"a zarr.json in {self.path} is damaged ({error}); delete it, and make it anew") from error
        self.rows, self.written = int(attributes["rows"]), int(attributes["written"])
        self.kept, self.state = attributes, attributes["state"]
        self._check_written()
        self.about = {name: value for name, value in attributes.items() if name not in OWN}

    def __reduce__(self) -> tuple[type[RowFile], tuple[Place]]:
        return RowFile, (self.opened.place,)  # opened again in another process

    @property
    def complete(self) -> bool:
        return self.written == self.rows

    def _check_written(self) -> None:
        """Raises StoreError if a file of rows that were written is gone: zarr would read its fill value there."""
        there = sizes(self.path)
        for name in self.kept["columns"]:
            its = self.arrays[name]
            if not its.fill_value:  # of zeros zarr leaves out files that hold nothing else
                continue
            for rows, file in pieces(its, self.path / name):
                if isinstance(rows, slice) and rows.start < self.written and not there.get(f"{name}/{file}"):
                    raise StoreError(
                        f"{self.path / name / file} is missing or empty; restore it from a copy, or delete {self.path} "
                        "and make it anew"
                    )

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """Rows of one array that are written (all of them if no slice is given). Raises StoreError for others."""
        self.opened.check()
        if name not in self.arrays:
            raise StoreError(f"{self.path} has no {name} for its rows; delete it, and make it anew")
        rows = rows or slice(0, self.written)
        if rows.stop > self.written:
            raise StoreError(f"{self.path} has {self.written:,} rows so far, row {rows.stop - 1:,} is not among them")
        return read(self.arrays[name], rows, self.path / name)

    def vector(self, name: str) -> NDArray[Any]:
        """An array that was stored with the description."""
        return read(self.arrays[name], ..., self.path / name)


class RowWriter:
    """Takes rows in any number and writes whole shards; made by ``new_rows``.

    written: rows that are safe on disk, at which to go on. state: what was said of them.
    """

    def __init__(self, found: RowFile, columns: Columns, fence: Fence) -> None:
        self.path, self.rows, self.written, self.state = found.path, found.rows, found.written, found.state
        self.kept, self.fence = found.kept, fence
        group = open_to_write(self.path)
        self.arrays: dict[str, Any] = {name: group[name] for name in columns}
        self.shard = min((its.shards or its.chunks)[0] for its in self.arrays.values())
        self.buffer = {name: np.empty((self.shard, *its.shape[1:]), its.dtype) for name, its in self.arrays.items()}
        self.filled = 0

    @property
    def complete(self) -> bool:
        return self.written == self.rows

    @property
    def left(self) -> int:
        """Rows that the shard at hand has room for."""
        return self.shard - self.filled

    def write(self, values: Mapping[str, NDArray[Any]], state: dict[str, Any] | None = None) -> None:
        """Appends rows to every array; state: JSON that holds after them, kept with the shard that they fill.

        Rows that come with a state must end where a shard does, or before: give them ``block`` by ``block``, as
        announced in ``new_rows``. Raises StoreError, which says how to go on, if the disk is full or the like.
        """
        lengths = {len(its) for its in values.values()}
        if set(values) != set(self.arrays) or len(lengths) != 1:
            raise ValueError(f"rows of {sorted(self.arrays)} are wanted, equally many of each")
        count, done = lengths.pop(), 0
        if self.written + self.filled + count > self.rows:
            raise ValueError(f"more than the {self.rows:,} rows that were announced")
        if state is not None and self.filled + count > self.shard:
            raise ValueError(f"{count} rows go beyond the end of a shard, where their state is kept")
        while done < count:
            part = slice(done, min(count, done + self.shard - self.filled))
            for name, its in values.items():
                self.buffer[name][self.filled : self.filled + part.stop - done] = its[part]
            self.filled, done = self.filled + part.stop - done, part.stop
            if self.filled == self.shard or self.written + self.filled == self.rows:
                self._flush(state if done == count else None)

    def _flush(self, state: dict[str, Any] | None) -> None:
        rows = slice(self.written, self.written + self.filled)
        try:
            with explained("write", self.path):
                for name, array in self.arrays.items():
                    array[rows] = self.buffer[name][: self.filled]
                    self._settle(self.path / name, rows.start // self.shard)
                self._commit(rows.stop, self.state if state is None else state)
        except TakenOver:
            raise
        except StoreError as error:
            how = f"{self.written:,} of {self.rows:,} rows are safe, and the same command goes on behind them"
            raise StoreError(f"{error} ({how})") from error
        self.filled = 0

    def _settle(self, folder: Place, shard: int) -> None:
        """Forces one file of an array to disk, with its name."""
        if isinstance(folder, Path):
            tail = [] if self.arrays[folder.name].ndim == 1 else ["0"]
            file = folder.joinpath("c", str(shard), *tail)
            for place in [file, *file.parents][: 2 + len(tail)]:
                flush(place)

    def _commit(self, written: int, state: dict[str, Any]) -> None:
        self.fence()
        attributes = self.kept | {"written": written, "state": state}
        if written == self.rows:
            attributes.pop("unfinished")
        text = json.loads((self.path / "zarr.json").read_bytes()) | {"attributes": attributes}
        write_atomically(self.path / "zarr.json", json.dumps(text, indent=2))
        self.written, self.state = written, state


def _check_form(arrays: dict[str, Any], about: dict[str, Any]) -> None:
    """Raises Malformed unless the arrays are those that were announced."""
    if about["written"] > about["rows"]:
        raise Malformed(f"{about['written']:,} rows are written of {about['rows']:,}")
    for name, its in arrays.items():
        if not isinstance(its, zarr.Array):
            raise Malformed(f"{name} is no array")
        if name in about["columns"]:
            dtype, d = about["columns"][name]
            if (its.shape, str(its.dtype)) != ((about["rows"], *([] if d is None else [d])), dtype):
                raise Malformed(f"{name} has shape {its.shape} and type {its.dtype}, which were not announced")


@contextmanager
def new_rows(
    path: str | Place,
    rows: int,
    columns: Columns,
    about: dict[str, Any],
    vectors: Arrays | None = None,
    block: int = 1,
) -> Iterator[RowWriter]:
    """A store of ``rows`` rows under construction, begun now or taken up where its last writer was stopped.

    columns: the arrays. about: JSON that says what the rows are, vectors: arrays that belong to it; the same ones must
    be given to go on. block: shards hold a multiple of so many rows. Where all rows are there the writer is
    ``complete`` and there is nothing to do.

    Raises InputError for rows that were begun with another description; StoreError if something else is at ``path``,
    the disk is too small, or another process is writing there.
    """
    path, vectors = as_place(path), vectors or {}
    if rows < 1 or block < 1 or set(about) & set(OWN) or set(columns) & set(vectors):
        raise ValueError("new_rows needs rows >= 1, block >= 1, and names that are not taken")
    about = json.loads(json.dumps(about | {"rows": rows, "columns": columns, "vectors": sorted(vectors)}))
    bytes_each = {name: np.dtype(dtype).itemsize * (d or 1) for name, (dtype, d) in columns.items()}
    if not path.exists():
        need_space(path, rows * sum(bytes_each.values()))
        with explained("write", path), new_folder(path) as folder:
            _begin(folder, rows, columns, about, vectors, _shape(rows, max(bytes_each.values()), block))
            if isinstance(folder, Path):  # where no lock can be had, nothing is left behind
                with writer(folder):
                    pass
    elif not (path / "zarr.json").is_file():
        raise StoreError(f"{path} exists already and is no store of rows; delete it first, or choose another name")
    found = RowFile(path)
    _check(found, about, vectors)
    if found.complete:
        yield RowWriter(found, columns, lambda: None)
        return
    need_space(path, (rows - found.written) * sum(bytes_each.values()))
    with writer(path) as fence:
        for debris in path.rglob("*.partial") if isinstance(path, Path) else ():  # of writers that were killed
            if PARTIAL.fullmatch(debris.name) and debris.is_file():
                debris.unlink()
        out = RowWriter(RowFile(path), columns, fence)
        yield out
    if out.complete:
        (path / ".lock").unlink(missing_ok=True)


def _shape(rows: int, row_bytes: int, block: int) -> tuple[int, int]:
    """Rows of a chunk, and of a shard: multiples of a block, unless one holds all rows."""
    chunk = min(rows, block * max(1, LEAST_BYTES // (row_bytes * block)))
    wanted = min(MOST_BYTES, max(LEAST_BYTES, rows * row_bytes // PIECES))
    return chunk, chunk * max(1, min(wanted // (row_bytes * chunk), -(-rows // chunk)))


def _begin(
    folder: Place, rows: int, columns: Columns, about: dict[str, Any], vectors: Arrays, shape: tuple[int, int]
) -> None:
    """The group with its arrays, empty."""
    chunk, shard = shape
    begun = {"format": FORMAT, "version": VERSION, "written": 0, "state": {}, "unfinished": True}
    group = zarr.create_group(zarr_store(folder), attributes=begun | about)
    for name, values in vectors.items():
        write_vector(group, name, values)
    for name, (dtype, d) in columns.items():
        tail = () if d is None else (d,)
        group.create_array(
            name,
            shape=(rows, *tail),
            dtype=dtype,
            chunks=(chunk, *tail),
            shards=None if chunk == shard else (shard, *tail),
            compressors=[Crc32cCodec()],
            fill_value={"f": float("nan"), "i": -1}.get(np.dtype(dtype).kind, 0),
        )


def _check(found: RowFile, about: dict[str, Any], vectors: Arrays) -> None:
    """Raises InputError if the rows that are there were begun as others."""
    there = found.about | {name: found.kept[name] for name in ("rows", "columns", "vectors")}
    for name in sorted(set(about) | set(there), key=lambda its: (its not in KINDS, its)):
        if name not in there:
            raise InputError(
                f"{found.path} does not say of which {name} its rows are, so nobody can tell whether they are these; "
                "choose another name, or delete it"
            )
        if about.get(name) != there[name]:
            raise InputError(
                f"{found.path} was begun with {name} = {there[name]!r}, and not {about.get(name)!r}; go on as it "
                "was begun, choose another name, or delete it"
            )
    for name, values in vectors.items():
        if not np.array_equal(found.vector(name), values):
            raise InputError(f"{found.path} was begun with another {name}; choose another name, or delete it")
