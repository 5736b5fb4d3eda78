"""Where stores lie: a folder of this machine (a Path), or one of an object store (a Url), which looks like a Path.

Credentials come from where the tools of each provider look for them: environment, profile, or the machine's own role.
They are never part of a Url, so they reach no log, configuration or run.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import posixpath
import shlex
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, S3Store
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, ObjectStore

from distot.errors import InputError, StoreError

SCHEMES: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
TIMEOUT = timedelta(minutes=2)  # of one request
PATIENCE = timedelta(minutes=3)  # from the first try of a request to the last one, with growing pauses
CONNECTING = timedelta(seconds=10)

PIECE_BYTES = 16 << 20  # read at a time

Tag = dict[str, Any]
T = TypeVar("T")


class Url:
    """A folder or file in an object store, s3://BUCKET/KEY, gs://BUCKET/KEY or az://CONTAINER/KEY.

    It has those methods of a Path that the stores need. A file appears whole or not at all, and no folders exist but as
    parts of names. All methods raise StoreError if the store refuses or cannot be reached, after retries.
    """

    def __init__(self, text: str) -> None:
        scheme, _, rest = text.partition("://")
        root, _, key = rest.partition("/")
        if scheme not in SCHEMES or not root:
            raise InputError(f"{text} is no place that distot knows; give a path, file://, s3://, gs:// or az://")
        if "@" in root:
            raise InputError("put no credentials into the address of a store; set them in the environment")
        self.scheme, self.root, self.key = scheme, root, posixpath.normpath(key).strip("/") if key.strip("/") else ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.root}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self}/{name}")

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.key)[1]

    def resolve(self) -> Url:
        return self

    @property
    def bucket(self) -> Any:
        """The obstore store of the whole bucket."""
        return _bucket(self.scheme, self.root)

    def exists(self) -> bool:
        """Whether there is a file of this name, or any below it."""
        return self.is_file() or bool(self.files())

    def is_dir(self) -> bool:
        return bool(self.files())

    def is_file(self) -> bool:
        try:
            self._ask("look at", lambda: obstore.head(self.bucket, self.key))
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError if there is no such file."""
        return bytes(self._ask("read", lambda: obstore.get(self.bucket, self.key).bytes()))

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        self._ask("write", lambda: obstore.put(self.bucket, self.key, data))

    def upload(self, file: Path) -> None:
        """Writes a file of this machine, in parts if it is large."""
        self._ask("write", lambda: obstore.put(self.bucket, self.key, file))

    def swap(self, data: bytes, before: Tag | None) -> Tag | None:
        """Writes if the file is as it was ``before`` (None: not there yet): its new tag, or None if it is not."""
        mode: Any = "create" if before is None else before
        try:
            return _tag(self._ask("write", lambda: obstore.put(self.bucket, self.key, data, mode=mode)))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            there = self.tagged()  # the answer to a first try may have been lost
            return there[1] if there is not None and there[0] == data else None

    def tagged(self) -> tuple[bytes, Tag] | None:
        """The content, and what tells this version of it from others; None if there is none."""

        def both() -> tuple[bytes, Tag]:
            found = obstore.get(self.bucket, self.key)
            return bytes(found.bytes()), _tag(found.meta)

        try:
            return self._ask("read", both)
        except FileNotFoundError:
            return None

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("delete", lambda: obstore.delete(self.bucket, self.key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove(self) -> None:
        """Deletes all files below."""
        if names := [f"{self.key}/{name}" for name in self.files()]:
            self._ask("delete", lambda: obstore.delete(self.bucket, names))

    def files(self) -> dict[str, tuple[int, datetime]]:
        """Size and time of all files below, by their names from here."""
        prefix = f"{self.key}/" if self.key else ""
        found = self._ask("list", lambda: obstore.list(self.bucket, prefix).collect())
        return {entry["path"][len(prefix) :]: (entry["size"], entry["last_modified"]) for entry in found}

    def pieces(self) -> Iterator[bytes]:
        """The content, piece by piece. Raises FileNotFoundError if there is no such file."""
        size = self._ask("read", lambda: obstore.head(self.bucket, self.key)["size"])
        for start in range(0, size, PIECE_BYTES):
            end = min(size, start + PIECE_BYTES)
            yield bytes(self._ask("read", partial(obstore.get_range, self.bucket, self.key, start=start, end=end)))

    def _ask(self, doing: str, request: Callable[[], T]) -> T:
        """Sends a request until it is answered, for PATIENCE at most."""
        for pause in _pauses():
            try:
                return request()
            except BaseError as error:
                _judge(error, doing, str(self), final=pause is None)
                time.sleep(pause or 0)
            except FileNotFoundError as error:
                _judge(error, doing, str(self), final=False)
                raise FileNotFoundError(errno.ENOENT, "no such file", str(self)) from error
        raise AssertionError("unreachable")


Place = Path | Url


class _Patient(ObjectStore[Any]):
    """The files of zarr. Repeats what was cut off; the client does so only before the first byte of an answer."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        return await self._ask("read", key, super().get, key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        await self._ask("write", key, super().set, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await self._ask("write", key, super().set_if_not_exists, key, value)

    async def exists(self, key: str) -> bool:
        return await self._ask("look at", key, super().exists, key)

    async def _ask(self, doing: str, key: str, request: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        for pause in _pauses():
            try:
                return await request(*arguments)
            except BaseError as error:
                _judge(error, doing, f"{self.store.prefix}/{key}", final=pause is None)
                await asyncio.sleep(pause or 0)
        raise AssertionError("unreachable")


def _judge(error: Exception, doing: str, place: str, final: bool) -> None:
    """Returns if the request is worth another try. Raises StoreError if not, or what the caller expects."""
    if isinstance(error, AlreadyExistsError | PreconditionError):
        raise error
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        raise StoreError(
            f"cannot {doing} {place}: permission denied; check the credentials in the environment, and what they allow"
        ) from error
    if "NoSuchBucket" in str(error):
        raise StoreError(f"cannot {doing} {place}: there is no such bucket; create it first") from error
    if final:
        raise StoreError(f"cannot {doing} {place}: {_said(error)}; check network and address") from error


def _pauses() -> Iterator[float | None]:
    """Seconds to wait after each failure, None after the last one."""
    pause, deadline = 0.05, time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() + pause < deadline:
        yield pause
        pause = min(2 * pause, 5.0)
    yield None


def as_place(text: str | Path | Url) -> Place:
    """A path, or file://, s3://, gs:// or az:// and what follows. Raises InputError for another scheme."""
    if not isinstance(text, str) or "://" not in text:
        return Path(text) if isinstance(text, str) else text
    return Path(text.removeprefix("file://")) if text.startswith("file://") else Url(text)


def typed(place: object) -> str:
    """A path as it can be typed in a shell, in commands that a user may copy."""
    words = str(place)
    return shlex.quote(f"./{words}" if words.startswith("-") else words)


def zarr_store(place: Place, read_only: bool = False) -> Store:
    """For zarr, at this place."""
    if isinstance(place, Path):
        return LocalStore(place.absolute(), read_only=read_only)  # which is read from later, from any folder
    return _Patient(_bucket(place.scheme, place.root, place.key), read_only=read_only)


def sizes(place: Place) -> dict[str, int]:
    """Sizes of all files below, by their names from here."""
    if isinstance(place, Url):
        return {name: size for name, (size, _) in place.files().items()}
    return {file.relative_to(place).as_posix(): file.stat().st_size for file in place.rglob("*") if file.is_file()}


def digest(place: Place) -> dict[str, Any]:
    """Size and hash of a file."""
    if isinstance(place, Path):
        with place.open("rb") as stream:
            return {"bytes": place.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    found, size = hashlib.sha256(), 0
    for piece in place.pieces():
        found.update(piece)
        size += len(piece)
    return {"bytes": size, "sha256": found.hexdigest()}


class Opened:
    """Where something was opened, and by which process: clients of object stores do not outlive a fork."""

    def __init__(self, place: Place) -> None:
        self.place, self.process = place.resolve(), os.getpid()

    def check(self) -> None:
        """Raises InputError in a process that was forked since, where a request would never be answered."""
        if isinstance(self.place, Url) and os.getpid() != self.process:
            raise InputError(
                f"{self.place} is in an object store, whose client does not outlive a fork: start the workers of the "
                'DataLoader afresh, with multiprocessing_context="spawn", or use num_workers=0'
            )


def reference(target: Place, start: Place) -> str:
    """How a file at ``start`` names another place: relative to it if it can be, so that both can move together."""
    target, start = target.resolve(), start.resolve()
    if isinstance(target, Path) and isinstance(start, Path):
        return os.path.relpath(target, start)
    if (
        isinstance(target, Url)
        and isinstance(start, Url)
        and (target.scheme, target.root) == (start.scheme, start.root)
    ):
        return posixpath.relpath(target.key, start.key)
    return str(target)


def referred(name: str, start: Place) -> Place:
    """The inverse of ``reference``."""
    if "://" in name:
        return Url(name)
    if not isinstance(start, Path):
        return Path(os.path.normpath(name)) if name.startswith("/") else start / name
    found = Path(os.path.normpath(start.resolve() / name))
    beside = Path(os.path.normpath(start.absolute() / name))  # of the link, where the run alone was moved
    return beside if beside.exists() and not found.exists() else found


@lru_cache(maxsize=32)  # a client each, and every checkpoint has a prefix of its own
def _bucket(scheme: str, root: str, prefix: str = "") -> Any:
    prefix_of = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}[scheme]
    plain = os.environ.get(f"{prefix_of}_ALLOW_HTTP", "").lower() in ("1", "true")  # a server of one's own
    options: dict[str, Any] = {
        "client_options": {"timeout": TIMEOUT, "connect_timeout": CONNECTING, "allow_http": plain},
        "retry_config": {"max_retries": 1000, "retry_timeout": PATIENCE},
    }
    if scheme == "s3" and _has_profile():
        if find_spec("boto3") is None:
            raise InputError("credentials from an AWS profile need boto3; install it, or set AWS_ACCESS_KEY_ID")
        from obstore.auth.boto3 import Boto3CredentialProvider

        options["credential_provider"] = Boto3CredentialProvider()
    url = Url(f"{scheme}://{root}/{prefix}")
    try:
        return SCHEMES[scheme].from_url(str(url), **options)
    except BaseError as error:
        raise InputError(f"cannot open {url}: {_said(error)}; check the settings in the environment") from error


def _has_profile() -> bool:
    """Whether credentials lie in the files of the AWS command line, and not in the environment."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return False
    files = [os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")]
    return "AWS_PROFILE" in os.environ or any(Path(file).expanduser().is_file() for file in files)


def _tag(found: Any) -> Tag:
    return {name: found[name] for name in ("e_tag", "version") if found.get(name)}


def _said(error: BaseException) -> str:
    """What an object store said, in one line without markup."""
    lines = str(error).partition("Debug source")[0].splitlines()
    line = lines[0].partition("<?xml")[0].partition(", max_retries")[0] if lines else type(error).__name__
    return " ".join(line.split())
