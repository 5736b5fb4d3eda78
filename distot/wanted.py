"""Which of the arrays of a file is meant, and that nothing of it is passed over without a word."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

from numpy.typing import NDArray

from distot.errors import DistotError, InputError
from distot.store import UNREADABLE, Place, check_plain, explained

PIECE_BYTES = 1 << 20  # read at a time from a compressed file
DAMAGE: tuple[type[Exception], ...] = (*UNREADABLE, RuntimeError, BadZipFile, zlib.error)

Shape = tuple[int, ...]
Blocks = Iterator[NDArray[Any]]


@dataclass(frozen=True)
class Wanted:
    """Which array of a source is meant: the latents, or with ``vector`` the masses."""

    key: str | None
    vector: bool = False
    besides: str | None = None  # an array that holds the masses

    @property
    def option(self) -> str:
        return "--mass-key" if self.vector else "--key"

    @property
    def what(self) -> str:
        return "masses" if self.vector else "latents"

    def choose(self, path: Place, shapes: Mapping[str, Shape], odd: Mapping[str, str] | None = None) -> str:
        """The named array, or the only one with enough dimensions. Raises InputError that lists what there is.

        odd: what else there is that might be meant, and cannot be read, with what it is.
        """
        odd = odd or {}
        if self.key is not None and self.key in odd:
            raise InputError(
                f"{path}: {self.key} holds {odd[self.key]}; save it as an array, or lists, of float32 numbers"
            )
        there = listed(f"{name} {shape}" for name, shape in shapes.items()) or "no arrays of numbers"
        if self.key is not None and self.key not in shapes:
            raise InputError(f"{path} has nothing named {self.key!r} but {there}; name one of these ({self.option})")
        if self.key is not None:
            return self.key
        if odd:
            strange = listed(f"{name} ({kind})" for name, kind in odd.items())
            raise InputError(
                f"{path} holds {there}, and {strange}, which cannot be read; name the one with the {self.what} "
                f"({self.option}), or save it as lists of numbers"
            )
        fitting = [name for name in shapes if (len(shapes[name]) < 2) == self.vector] or list(shapes)
        if len(fitting) != 1:
            raise InputError(f"{path} holds {there}; name the one with the {self.what} ({self.option})")
        return fitting[0]

    def left(self, path: Place, chosen: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
        """A note on what was left out, if nobody named what is meant."""
        rest = [name for name in names if name not in chosen and name != self.besides]
        if self.key is not None or not rest:
            return ()
        return (f"the {self.what} are {listed(chosen)} of {path}; left out: {listed(rest)}",)

    def refuse_key(self, path: Place, why: str) -> None:
        if self.key is not None:
            raise InputError(f"{path} {why}; leave out {self.option} {self.key}")


def listed(words: Iterable[str]) -> str:
    """Twenty at most, and how many more there are."""
    every = list(words)
    return ", ".join(every[:20]) + (f" and {len(every) - 20:,} more" if len(every) > 20 else "")


@contextmanager
def reading(path: Place, *also: type[Exception]) -> Iterator[None]:
    """Turns what the libraries raise on a damaged file, and the operating system on any, into one sentence."""
    with explained("read", path):
        try:
            check_plain(path, links=True, pipes=True)  # who names a pipe may be about to write to it
            yield
        except DistotError:
            raise
        except (*DAMAGE, *also) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            why = " ".join(str(error).split()).rstrip(".")
            raise InputError(f"{path} is damaged, cut short or not what its name says ({why}); make it anew") from error


def library(name: str) -> Any:
    """A library that only some formats need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} cannot be loaded ({error}); install it: pip install {name.split('.')[0]}") from error


def ranges(n: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, n)) for start in range(0, n, step))
