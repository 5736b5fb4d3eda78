"""What can go wrong, as exceptions whose message is one sentence with the remedy.

The command line prints the message alone; no traceback belongs to a mistake that a user can mend.
"""

from __future__ import annotations

import re


def without_passwords(text: str) -> str:
    """A text whose addresses have lost the user and password that stand before their @."""
    return re.sub(r"([a-z][a-z0-9+.-]*://)[^/\s'\"]*@", r"\1***@", text, flags=re.IGNORECASE)


class DistotError(Exception):
    """Base of every error that distot raises on purpose. No password of an address is in its message."""

    def __init__(self, *about: object) -> None:
        super().__init__(*(without_passwords(its) if isinstance(its, str) else its for its in about))


class InputError(DistotError, ValueError):
    """A value, file or shape the caller gave cannot be used."""


class StoreError(DistotError, OSError):
    """A store could not be read or written: corrupt, full, locked or not ours."""

    __str__ = Exception.__str__


class Diverged(DistotError):
    """The heights are no longer finite; the last ones that were are saved."""


class DistotWarning(UserWarning):
    """Something about the input was mended (merged, normalised, left out) and is worth knowing."""
