"""What can go wrong, as exceptions whose message is one sentence with the remedy.

The command line prints the message alone; no traceback belongs to a mistake that a user can mend.
"""

from __future__ import annotations


class DistotError(Exception):
    """Base of every error that distot raises on purpose."""


class InputError(DistotError, ValueError):
    """A value, file or shape the caller gave cannot be used."""


class StoreError(DistotError, OSError):
    """A store could not be read or written: corrupt, full, locked or not ours."""

    __str__ = Exception.__str__


class DistotWarning(UserWarning):
    """Something about the input was mended (merged, normalised, left out) and is worth knowing."""
