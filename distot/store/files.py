"""Files and folders that are whole or not there, and what the operating system says when that fails."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distot.errors import StoreError


@contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Turns what the operating system says into one sentence with the remedy."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        remedy = {
            errno.ENOSPC: "the disk is full; free some space or choose another disk",
            errno.EDQUOT: "your disk quota is used up; free some space or choose another disk",
            errno.EFBIG: "the file would grow past the size limit of this process (ulimit -f); raise it",
            errno.EACCES: "permission denied; choose a folder you may write to",
            errno.EPERM: "permission denied; choose a folder you may write to",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.ENOTDIR: "a part of that path is a file, not a folder; choose another path",
            errno.EEXIST: "a part of that path is a file, not a folder; choose another path",
            errno.ENOTEMPTY: "another process has made it in the meantime; choose another name",
            errno.ENOENT: "no such file or folder; check the path",
        }.get(error.errno or 0, str(error))
        raise StoreError(f"cannot {doing} {path}: {remedy}") from error


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


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a crash, sees the old text or the new one, never a part."""
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
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name only when filled and flushed. Raises StoreError if the name is taken."""
    if path.exists():
        raise StoreError(f"{path} exists already; choose another name or delete it first")
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
        try:
            yield partial
            flush_tree(partial)
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        flush(path.parent)


def need_space(path: Path, wanted: int) -> None:
    """Raises StoreError if the disk of ``path`` has fewer than ``wanted`` bytes free."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise StoreError(
            f"{path} needs about {wanted / 2**20:,.1f} MiB and its disk has {free / 2**20:,.1f} MiB free; "
            "free some space or choose another disk"
        )
