"""What a file of JSON may hold: whatever lies in a folder from elsewhere is checked before it is believed.

The form of a record is a dict of names and type hints; ``Annotated`` adds the bounds of a number, what a text must
match, or the length of a list. A form speaks of types and sizes alone; whether the values make sense together is for
those who use them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from distot.errors import InputError, StoreError
from distot.store.files import content
from distot.store.places import Place

MOST = 2**63  # what integers, and counts, stay below
Count = Annotated[int, (0, MOST - 1)]
Real = Annotated[float, (-1e100, 1e100)]  # neither NaN nor infinite
Seconds = Annotated[float, (0.0, 1e12)]
Name = Annotated[str, r"\w[\w.-]*"]  # of a file or folder, and no path
REASON = Annotated[str, "until_chi2|max_samples|max_seconds|interrupted|exact|sampled"]  # why a run has stopped
Text = Annotated[str, r"[^\x00]+"]

Form = Mapping[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Maybe:
    """The type of what a record may lack."""

    hint: Any


@dataclasses.dataclass(frozen=True)
class Each:
    """The type of a list of records of one form."""

    form: Form


class Malformed(ValueError):
    """A value has not the form that it should have; the message says which and how."""


class Newer(Malformed):
    """A record has something that this version does not know."""


def fits(value: object, hint: Any) -> bool:
    """Whether a value that was read from JSON is of this type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner, limit = arguments
        if not fits(value, inner):
            return False
        if isinstance(value, list):
            return len(value) == limit
        return bool(re.fullmatch(limit, str(value))) if isinstance(limit, str) else bool(limit[0] <= value <= limit[1])
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(one, arguments[0]) for one in value)
    if origin is dict:
        names, values = arguments
        return isinstance(value, dict) and all(fits(name, names) and fits(one, values) for name, one in value.items())
    if isinstance(hint, Maybe):
        return fits(value, hint.hint)
    if isinstance(hint, Each):
        return isinstance(value, list) and all(_is_record(one, hint.form) for one in value)
    if hint is Any:
        return True
    if isinstance(value, int) and not isinstance(value, bool) and hint in (int, float):
        return abs(value) < MOST
    return isinstance(value, NoneType if hint is None else hint)


def _is_record(value: object, form: Form) -> bool:
    try:
        check(value, form)
    except Malformed:
        return False
    return True


def check(value: object, form: Form, others: bool = False) -> None:
    """Raises Malformed unless a value is a record of this form.

    others: whether it may have other names, too.
    """
    if not isinstance(value, dict):
        raise Malformed(f"it is {shown(value)}, and no record")
    for name, hint in form.items():
        if name not in value and not isinstance(hint, Maybe):
            raise Malformed(f"its {name} is missing")
        if name in value and not fits(value[name], hint):
            raise Malformed(f"its {name} is {shown(value[name])}")
    if (unknown := sorted(set(value) - set(form))) and not others:
        raise Newer(
            f"has {shown(unknown[0])}, which this version of distot does not know; read it with the one that wrote it"
        )


def shown(value: object) -> str:
    """A value in an error, cut short."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}..."


def restored(cls: type[T], values: object, what: str, remedy: str) -> T:
    """The dataclass that was stored with ``asdict``; fields that it did not have then are as they are by default.

    Raises StoreError, which begins with ``what`` and ends with the ``remedy``, for values it cannot have.
    """
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    form: Form = {
        name: hints[name] if field.default is dataclasses.MISSING else Maybe(hints[name])
        for name, field in fields.items()
    }
    try:
        check(values, form)
        assert isinstance(values, dict)
        return cls(**values)
    except Newer as error:
        raise StoreError(f"{what} {error}") from error
    except (Malformed, InputError) as error:
        raise StoreError(f"{what} is damaged ({error}); {remedy}") from error


def parsed(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises Malformed for all else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"it is no JSON, {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"it is {shown(value)}, and no record")
    return value


def digest_of(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the hash of its content, so that damage to it shows."""
    return record | {"sha256": digest_of(json.loads(json.dumps(record)))}


def unsealed(file: Place) -> dict[str, Any]:
    """The record in a file, without its hash, which older versions did not write.

    Raises FileNotFoundError; StoreError for what is no file; Malformed if it is damaged.
    """
    record = parsed(content(file))
    if record.pop("sha256", None) not in (None, digest_of(record)):
        raise Malformed("it fails its checksum")
    return record
