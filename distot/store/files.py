"""Files and folders that are whole or not there, and what the operating system says when that fails."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.core.sync import sync

from distot.errors import InputError, StoreError
from distot.store.npy import check_npy
from distot.store.places import Place, Url

NOT_OFFERED = "the file system does not offer that; choose a folder on another one, a local disk say"
SETTLED = 10.0  # seconds to wait for what zarr is writing when that was broken off
UNREADABLE = (
    *(ArithmeticError, EOFError, MemoryError, OSError, RecursionError, SyntaxError, TypeError, ValueError),
    tokenize.TokenError,
)
SMALL_BYTES = 1 << 28  # files of JSON are smaller


@contextmanager
def explained(doing: str, path: Place) -> Iterator[None]:
    """Turns what the operating system says into one sentence with the remedy."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        may = "read" if doing == "read" else "write to"
        remedy = {
            errno.ENOSPC: "the disk is full; free some space or choose another disk",
            errno.EDQUOT: "your disk quota is used up; free some space or choose another disk",
            errno.EFBIG: "the file would grow past the size limit of this process (ulimit -f); raise it",
            errno.EACCES: f"permission denied; choose a folder you may {may}",
            errno.EPERM: f"permission denied; choose a folder you may {may}",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.ENOTDIR: "a part of that path is a file, not a folder; choose another path",
            errno.EEXIST: "a part of that path is a file, not a folder; choose another path",
            errno.ENOTEMPTY: "another process has made it in the meantime; choose another name",
            errno.ENOLCK: NOT_OFFERED,
            errno.ENOSYS: NOT_OFFERED,
            errno.ENOTSUP: NOT_OFFERED,
            errno.EOPNOTSUPP: NOT_OFFERED,
            errno.ENOENT: "no such file or folder; check the path",
        }.get(error.errno or 0, str(error))
        raise StoreError(f"cannot {doing} {path}: {remedy}") from error


def check_plain(path: Place, links: bool = False, pipes: bool = False) -> None:
    """Raises StoreError for what is neither a file nor a folder: a device, a pipe or a link, unless those may be.

    Nothing that lies in a run may lead out of it, or keep its reader waiting for ever. What is not there is plain.
    """
    if isinstance(path, Url):
        return
    try:
        mode = path.stat().st_mode if links else path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    if stat.S_ISLNK(mode):
        raise StoreError(
            f"{path} is a symbolic link, which distot does not follow there; put in its place what it names"
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (pipes and stat.S_ISFIFO(mode))):
        raise StoreError(f"{path} is no file but a pipe or device; delete it")


def content(file: Place) -> bytes:
    """What a small file of a run holds. Raises FileNotFoundError; StoreError if it is no plain file, or a large one."""
    check_plain(file)
    if isinstance(file, Url):
        return file.read_bytes()
    if file.stat().st_size > SMALL_BYTES:
        raise StoreError(f"{file} is larger than any such file can be; it was not written by distot")
    with explained("read", file):
        return file.read_bytes()


def flush(path: Path) -> None:
    """Forces a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path, files: bool = True) -> None:
    """Forces a folder and all below it to disk; without ``files`` the lists of names alone."""
    for root, _, names in os.walk(folder):
        for name in names if files else []:
            flush(Path(root, name))
        flush(Path(root))


def write_atomically(path: Place, text: str) -> None:
    """Replaces a file so that a reader, or a crash, sees the old text or the new one, never a part."""
    if isinstance(path, Url):
        path.write_bytes(text.encode())
        return
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def new_folder(path: Place) -> Iterator[Place]:
    """A folder to fill, which gets its name only when filled and flushed. Raises StoreError if the name is taken.

    In an object store the names are there at once: what is filled there must say that it is complete, at the end. A
    claim keeps a second process out until then.
    """
    if path.exists():
        raise StoreError(f"{path} exists already; choose another name or delete it first")
    if isinstance(path, Url):
        claim = path / ".claim"
        if claim.swap(secrets.token_bytes(8), None) is None:
            raise StoreError(f"another process is making {path}; choose another name")
        try:
            yield path
            claim.unlink()
        except BaseException:
            _settle()
            remove(path)
            raise
        return
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _partial(path) as partial:
            yield partial
            flush_tree(partial)
            partial.rename(path)
        flush(path.parent)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` for what gets that name when it is whole; it is gone afterwards.

    Killed writers leave theirs, which are cleared here. A writer holds a lock on its folder from before the first file
    is in it, and locks are sure on one machine alone, so folders of others stay.
    """
    _sweep(path)
    partial = path.with_name(f"{path.name}.partial-{_machine()}{secrets.token_hex(4)}")
    held = None
    try:
        partial.mkdir()
        held = os.open(partial, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks, on which nobody will clear it
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
    except BaseException:
        _settle()
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)


def _sweep(path: Path) -> None:
    """Deletes folders of ``_partial`` for this path whose writers are dead."""
    name = re.compile(re.escape(f"{path.name}.partial-{_machine()}") + "[0-9a-f]{8}")
    with suppress(OSError):  # debris does no harm
        for folder in path.parent.iterdir():
            if name.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink() and any(folder.iterdir()):
                held = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                except OSError:
                    continue  # its writer is at work, or there are no locks here
                finally:
                    os.close(held)


def _machine() -> str:
    """Four digits for this machine."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]


def _settle() -> None:
    """Waits until zarr has written what it is at in its own thread; a signal breaks off the waiting for it alone."""

    async def others() -> None:
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    with suppress(TimeoutError):
        sync(others(), timeout=SETTLED)


@contextmanager
def new_file(path: Place, over: bool = True) -> Iterator[Path]:
    """A file of this machine to write, which gets its place when written; ``over`` one that is there, or not.

    Two that write the same one do not meet: each has a file of its own, and one of these is put in place whole.
    """
    with explained("write", path):
        if isinstance(path, Url):
            with tempfile.TemporaryDirectory(prefix="distot-") as folder:
                file = Path(folder, path.name)
                yield file
                if not over and path.exists():
                    raise _taken(path)
                path.upload(file)
            return
        with _partial(path) as folder:
            file = folder / path.name
            yield file
            flush(file)
            if over:
                file.rename(path)
            else:
                _name(file, path)
        flush(path.parent)


def _name(partial: Path, path: Path) -> None:
    """Gives a file its name, if that is free: a link does so in one step, where the file system has any."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise _taken(path) from None
    except OSError:
        if path.exists():
            raise _taken(path) from None
        partial.rename(path)


def _taken(path: Place) -> StoreError:
    return StoreError(f"{path} was made by another process in the meantime; delete it first, or choose another name")


def remove(folder: Place) -> None:
    """Deletes a folder with all below it, as far as that is possible."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(StoreError):  # debris does no harm
        folder.remove()


def read_npy(path: Path) -> NDArray[Any]:
    """The array in an npy file, read where it is used. Raises InputError if there is none, or more than that one."""
    try:
        check_plain(path, links=True)
        check_npy(path)
        values: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as an npy file: {' '.join(str(error).split())}") from error
    return values


def need_space(path: Place, wanted: int) -> None:
    """Raises StoreError if the disk of ``path`` has fewer than ``wanted`` bytes free; an object store has no end."""
    if isinstance(path, Url):
        return
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise StoreError(
            f"{path} needs about {wanted / 2**20:,.1f} MiB and its disk has {free / 2**20:,.1f} MiB free; "
            "free some space or choose another disk"
        )
