"""Arrays that users give, of whatever library, as numpy arrays of all that they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distot.errors import InputError

EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")  # of ml_dtypes, as JAX has them


def array(values: object, what: str) -> NDArray[Any]:
    """The array in ``values``, in its own dtype. Raises InputError for masked values and what is no array.

    bfloat16 and the types of eight bits become float32, which numpy has.
    """
    if isinstance(values, Tensor):
        return _of_tensor(values, what)
    if type(values).__module__.startswith("scipy.sparse"):
        raise InputError(f"{what} is a sparse matrix; make it dense with .toarray()")
    parts = values if isinstance(values, list | tuple) else [values]
    masked = sum(int(np.ma.getmaskarray(part).sum()) for part in parts if isinstance(part, np.ma.MaskedArray))
    if masked:
        raise InputError(f"{what} has {masked:,} masked values; fill them with .filled(), or leave those rows out")
    try:
        found = np.asarray(values)
    except Exception as error:
        why = " ".join(str(error).split())
        raise InputError(f"{what} cannot be made an array of ({why}); give rows of one length, all numbers") from error
    return found.astype(np.float32) if found.dtype.kind == "V" and found.dtype.name in EXTENDED else found


def numbers(values: object, what: str) -> NDArray[np.float64]:
    """The same as float64, in order. Raises InputError for what are no real numbers: text, dates, complex numbers."""
    found = array(values, what)
    if found.dtype.kind not in "fiu" and found.size:
        hint = ", none of them missing" if found.dtype.kind == "O" else ""
        raise InputError(f"{what} holds values of type {found.dtype}; give real numbers{hint}")
    return np.require(found, np.float64, ["C", "W"])  # as torch wants it


def _of_tensor(values: Tensor, what: str) -> NDArray[Any]:
    if values.is_meta:
        raise InputError(f"{what} is a tensor without values, on the device meta; give it after it was computed")
    if values.is_nested or values.layout != torch.strided:
        raise InputError(f"{what} is a {'nested' if values.is_nested else 'sparse'} tensor; make it dense")
    if values.is_quantized:
        raise InputError(f"{what} is a quantized tensor; give it as numbers, with .dequantize()")
    plain = values.detach().cpu().resolve_conj().resolve_neg()
    if plain.is_floating_point() and plain.dtype not in (torch.float16, torch.float32, torch.float64):
        plain = plain.float()
    return plain.numpy()
