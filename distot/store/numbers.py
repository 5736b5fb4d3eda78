"""What zarr may read: files of plain numbers, by codecs that compute. zarr itself takes whatever its metadata says.

zarr 2 knows arrays of Python objects, whose codecs can run code as they decode; either version may name codecs that
somebody's package brings along. So metadata are read here first, and zarr never sees those of any other array.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from distot.errors import StoreError
from distot.store.files import SMALL_BYTES, check_plain
from distot.store.places import Place

TYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")  # of zarr 3; the last are refused later
TYPES_2 = re.compile(r"[<>|](b1|[iu][1248]|f[248]|c8|c16)")
COMPRESSORS = {"blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"}
CHECKSUMS = {"adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3"}
FILTERS = {"astype", "bitround", "delta", "fixedscaleoffset", "quantize", "shuffle"}
CODECS_2 = COMPRESSORS | CHECKSUMS | FILTERS
CODECS = {"bytes", "crc32c", "transpose", "blosc", "gzip", "zstd"} | {f"numcodecs.{name}" for name in CODECS_2}


class NumbersOnly(WrapperStore[Store]):
    """The files at ``path``: metadata of arrays of numbers, and no links, unless ``links`` to files may be.

    Other arrays are not there for zarr; ``refused`` says why, by their names.
    """

    def __init__(self, store: Store, path: Place, links: bool = False) -> None:
        super().__init__(store)
        self.path, self.links, self.folder = path, links, path.absolute() if isinstance(path, Path) else None
        self.refused: dict[str, str] = {}

    def _with_store(self, store: Store) -> NumbersOnly:
        return NumbersOnly(store, self.path, self.links)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        name = PurePosixPath(key).name
        if name == ".zmetadata":  # all of it again, which nobody would have looked at
            return None
        self._admit(key, name in (".zarray", ".zattrs", ".zgroup", "zarr.json"))
        found = await self._store.get(key, prototype, byte_range)
        if found is None or name not in (".zarray", ".zattrs", "zarr.json"):
            return found
        about = self._metadata(key, found.to_bytes())
        return None if about is None else prototype.buffer.from_bytes(json.dumps(about).encode())

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, its) for key, its in key_ranges]

    async def set(self, key: str, value: Buffer) -> None:
        self._admit(key, False)
        await self._store.set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self._admit(key, False)
        await self._store.set_if_not_exists(key, value)

    def _admit(self, key: str, small: bool) -> None:
        """Raises StoreError for what is no file, or not in this folder."""
        if self.folder is None:
            return
        file = self.folder / key
        if not self.links:
            for part in PurePosixPath(key).parents:
                if part.name:
                    check_plain(self.folder / part)
        check_plain(file, self.links)
        if small and file.is_file() and file.stat().st_size > SMALL_BYTES:
            raise StoreError(f"{file} is larger than any such file can be; make the store anew")

    def _metadata(self, key: str, text: bytes) -> dict[str, Any] | None:
        """What zarr is to see of a node; None for an array that it must not read."""
        place = f"{self.path}/{key}"
        try:
            about = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{place} is damaged ({error}); restore it, or make the store anew") from error
        if not (isinstance(about, dict) and isinstance(about.get("attributes", {}), dict)):
            raise StoreError(f"{place} is damaged (it holds no record); restore it, or make the store anew")
        about.pop("consolidated_metadata", None)  # the metadata of what is below, once more
        if key.endswith(".zattrs") or about.get("node_type") == "group":
            return about
        wrong = _wrong_2(about) if key.endswith(".zarray") else _wrong(about)
        if wrong is None:
            return about
        self.refused[str(PurePosixPath(key).parent)] = (
            f"{place} has {wrong}, which distot does not read; save the array as numbers, float32 say, with a usual "
            "compressor"
        )
        return None


def _wrong(about: dict[str, Any]) -> str | None:
    """What is unusual about an array of zarr 3."""
    kind = about.get("data_type")
    if not (isinstance(kind, str) and TYPES.fullmatch(kind)):
        return f"values of type {_short(kind)}"
    if about.get("storage_transformers"):
        return "storage transformers"
    grid = about.get("chunk_grid")
    more = grid.get("configuration") if isinstance(grid, dict) else None
    chunks = more.get("chunk_shape") if isinstance(more, dict) else None
    return _wrong_shape(about.get("shape"), chunks) or _wrong_codecs(about.get("codecs"))


def _wrong_codecs(codecs: Any) -> str | None:
    if not isinstance(codecs, list):
        return f"the codecs {_short(codecs)}"
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else codec
        more = codec.get("configuration", {}) if isinstance(codec, dict) else {}
        if not isinstance(more, dict):
            return f"the codec {_short(codec)}"
        if name == "sharding_indexed":
            wrong = _wrong_codecs(more.get("codecs")) or _wrong_codecs(more.get("index_codecs", []))
            if wrong is not None:
                return wrong
        elif not isinstance(name, str) or name not in CODECS or not _harmless(more):
            return f"the codec {_short(name)}"
    return None


def _wrong_2(about: dict[str, Any]) -> str | None:
    """What is unusual about an array of zarr 2."""
    kind, filters = about.get("dtype"), about.get("filters")
    if not (isinstance(kind, str) and TYPES_2.fullmatch(kind)):
        return f"values of type {_short(kind)}"
    if not isinstance(filters, list | None):
        return f"the filters {_short(filters)}"
    for codec in [*(filters or []), *([about["compressor"]] if about.get("compressor") else [])]:
        name = codec.get("id") if isinstance(codec, dict) else codec
        if not isinstance(name, str) or name not in CODECS_2 or not _harmless(codec):
            return f"the codec {_short(name)}"
    return _wrong_shape(about.get("shape"), about.get("chunks"))


def _wrong_shape(shape: Any, chunks: Any) -> str | None:
    for what, its in (("shape", shape), ("chunks", chunks)):
        if not (isinstance(its, list) and all(type(n) is int and 0 <= n < 2**63 for n in its)):
            return f"the {what} {_short(its)}"
    if len(shape) != len(chunks) or any(n and not step for n, step in zip(shape, chunks, strict=True)):
        return f"the shape {_short(shape)} in chunks {_short(chunks)}"
    return None


def _harmless(configuration: Any) -> bool:
    """Whether the types of numbers that a codec names are such."""
    return isinstance(configuration, dict) and all(
        isinstance(its, str) and (TYPES_2.fullmatch(its) or TYPES.fullmatch(its)) is not None
        for name, its in configuration.items()
        if name == "astype" or name.endswith("dtype")
    )


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:50]}..."
