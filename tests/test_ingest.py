"""Every format gives the same latents; every mistake gives one sentence and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import zarr

import distot
from distot import readers as module
from distot.errors import DistotError, DistotWarning, InputError, StoreError
from distot.fingerprint import Fingerprint
from distot.ingest import ingest
from distot.store import new_latents, open_latents, read_npy

N, D = 700, 6
Z = np.random.default_rng(1).standard_normal((N, D)).astype(np.float32)
MASS = np.random.default_rng(2).random(N)


def npy(path: Path, z: np.ndarray, **_: np.ndarray) -> Path:
    np.save(path / "a.npy", z)
    return path / "a.npy"


def fortran(path: Path, z: np.ndarray, **_: np.ndarray) -> Path:
    return npy(path, np.asfortranarray(z))


def big_endian(path: Path, z: np.ndarray, **_: np.ndarray) -> Path:
    return npy(path, z.astype(z.dtype.newbyteorder(">")))


def npz(path: Path, z: np.ndarray, **others: Any) -> Path:
    np.savez(path / "a.npz", z=z, **others)
    return path / "a.npz"


def npz_compressed(path: Path, z: np.ndarray, **others: Any) -> Path:
    np.savez_compressed(path / "a.npz", z=z, **others)
    return path / "a.npz"


def tensors(path: Path, z: np.ndarray, **others: np.ndarray) -> Path:
    safetensors.numpy.save_file({"z": np.ascontiguousarray(z), **others}, path / "a.safetensors")
    return path / "a.safetensors"


def fixed(z: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(z.ravel(), z.shape[1])


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path / "a.parquet", row_group_size=300)
    return path / "a.parquet"


def parquet_fixed(path: Path, z: np.ndarray, **others: np.ndarray) -> Path:
    return write_parquet(path, label=np.arange(len(z)), z=fixed(z), **others)


def parquet_lists(path: Path, z: np.ndarray, **others: np.ndarray) -> Path:
    return write_parquet(path, name=["x"] * len(z), z=list(z), **others)


def parquet_columns(path: Path, z: np.ndarray, **others: np.ndarray) -> Path:
    columns = {f"x{i}": z[:, i] for i in range(z.shape[1])}
    return write_parquet(path, name=["x"] * len(z), __index_level_0__=np.arange(len(z)), **columns, **others)


def parquet_folder(path: Path, z: np.ndarray, **_: np.ndarray) -> Path:
    folder = path / "table"
    (folder / "more").mkdir(parents=True)
    pq.write_table(pa.table({"z": fixed(z[:411])}), folder / "a.parquet")
    pq.write_table(pa.table({"z": fixed(z[411:])}), folder / "more" / "b.parquet")
    return folder


def zarr_array(path: Path, z: np.ndarray, **_: np.ndarray) -> Path:
    zarr.create_array(str(path / "a.zarr"), shape=z.shape, dtype=z.dtype, chunks=(64, *z.shape[1:]))[:] = z
    return path / "a.zarr"


def zarr_group(path: Path, z: np.ndarray, **others: np.ndarray) -> Path:
    group = zarr.create_group(str(path / "a"))
    for name, values in {"z": z, **others}.items():
        group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=values.shape)[:] = values
    return path / "a"


def zarr_v2(path: Path, z: np.ndarray, **_: np.ndarray) -> Path:
    array = zarr.create_array(str(path / "a"), shape=z.shape, dtype=z.dtype, chunks=(64, D), zarr_format=2)
    array[:] = z
    return path / "a"


def latents_store(path: Path, z: np.ndarray, **others: np.ndarray) -> Path:
    with new_latents(path / "b.zarr", z.shape, z.dtype.name, "a test") as writer:
        writer.write(z)
        if others:
            writer.write_mass(others["w"])
    return path / "b.zarr"


Save = Callable[..., Path]
FORMATS: list[Save] = [
    *(npy, fortran, big_endian, npz, npz_compressed, tensors),
    *(parquet_fixed, parquet_lists, parquet_columns, parquet_folder),
    *(zarr_array, zarr_group, zarr_v2, latents_store),
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for the destination alone, so that what is left beside it shows."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def refused(kind: type[DistotError], source: Path, out: Path, *words: str, **options: Any) -> str:
    """Asserts one sentence with these words, and nothing at or beside the destination."""
    with pytest.raises(kind) as caught:
        ingest(source, out / "l.zarr", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert not [word for word in words if word not in message], message
    assert not list(out.iterdir())
    return message


def digest(z: np.ndarray) -> str:
    fingerprint = Fingerprint(z.shape, z.dtype)
    fingerprint.update(z)
    return fingerprint.hexdigest()


@pytest.mark.parametrize("save", FORMATS)
def test_every_format_gives_the_same_latents_in_bounded_blocks(
    save: Save, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 100 * D * 8)
    source, done = save(tmp_path, Z), [0]

    def on_rows(rows: int, total: int) -> None:
        assert total == N
        done.append(rows)

    result = ingest(source, out / "l.zarr", on_rows=on_rows)
    stored = open_latents(out / "l.zarr")
    np.testing.assert_array_equal(stored[:], Z)
    assert (result.path, result.shape, result.dtype) == (out / "l.zarr", (N, D), "float32")
    assert result.fingerprint == stored.fingerprint == digest(Z)
    assert stored.attributes["origin"].startswith(source.name)
    assert done[-1] == N
    assert set(np.diff(done)) <= set(range(1, 101))
    assert [path.name for path in out.iterdir()] == ["l.zarr"]


@pytest.mark.parametrize("save", [npy, fortran, npz, tensors, zarr_array])
def test_flatten_makes_each_latent_a_row(
    save: Save, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 100 * D * 8)
    source = save(tmp_path, Z.reshape(N, 1, 2, 3))
    refused(InputError, source, out, f"({N}, 1, 2, 3)", "--flatten", f"({N}, {D})")
    assert ingest(source, out / "l.zarr", flatten=True).shape == (N, D)
    np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], Z)


# -------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("save", [npy, npz, tensors, parquet_fixed, parquet_columns, zarr_array])
@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8", "int64"])
def test_floats_are_kept_and_integers_become_float32_with_a_note(
    save: Save, dtype: str, tmp_path: Path, out: Path
) -> None:
    z = np.abs(Z * 50).astype(dtype)
    result = ingest(save(tmp_path, z), out / "l.zarr")
    integers = dtype in ("uint8", "int64")
    assert result.dtype == ("float32" if integers else dtype)
    assert any(f"{dtype} integers; they are stored as float32" in note for note in result.notes) == integers
    np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], z)


def test_bfloat16_stays_bfloat16(tmp_path: Path, out: Path) -> None:
    z = torch.from_numpy(Z).bfloat16()
    safetensors.torch.save_file({"z": z}, tmp_path / "a.safetensors")
    result = ingest(tmp_path / "a.safetensors", out / "l.zarr")
    stored = open_latents(out / "l.zarr")
    assert (result.dtype, stored.bfloat16, stored.array.dtype.itemsize) == ("bfloat16", True, 2)
    np.testing.assert_array_equal(stored[:], z.float().numpy())
    again = ingest(out / "l.zarr", out / "again.zarr")
    assert (again.dtype, again.fingerprint) == ("bfloat16", result.fingerprint)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_converts_to_the_nearest(dtype: str, tmp_path: Path, out: Path) -> None:
    z = Z.astype(np.float64) / 3
    assert ingest(npy(tmp_path, z), out / "l.zarr", dtype=dtype).dtype == dtype
    expected = torch.from_numpy(z.astype(np.float32) if dtype == "bfloat16" else z).to(getattr(torch, dtype)).double()
    np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], expected.numpy())


@pytest.mark.parametrize(
    ("value", "source", "dtype", "remedy", "fits"),
    [
        (65520.0, "float32", "float16", "keep float32", 65519.0),
        (-1e39, "float64", "float32", "keep float64", -1e38),
        (float.fromhex("0x1.ffp127"), "float32", "bfloat16", "keep float32", float.fromhex("0x1.fep127")),
        (70000, "int64", "float16", "keep float32", 60000),
    ],
)
def test_a_value_that_overflows_is_named(
    value: float, source: str, dtype: str, remedy: str, fits: float, tmp_path: Path, out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "BLOCK_BYTES", 100 * D * 8)
    z = Z.astype(source)
    z[321, 2] = z[654, 0] = value
    refused(InputError, npy(tmp_path, z), out, "row 321", f"too large for {dtype}", remedy, dtype=dtype)
    z[321, 2] = z[654, 0] = fits
    ingest(npy(tmp_path, z), out / "l.zarr", dtype=dtype)
    assert np.isfinite(open_latents(out / "l.zarr")[321:322]).all()


@pytest.mark.parametrize("z", [Z > 0, Z + 1j, Z.astype(str), Z.astype(object), Z.astype("M8[s]"), Z.astype("g")])
def test_what_is_not_a_real_number_is_refused(z: np.ndarray, tmp_path: Path, out: Path) -> None:
    refused(InputError, npy(tmp_path, z), out, "a.npy", z.dtype.name, "float32")
    refused(InputError, npz(tmp_path, z), out, "a.npz: z", z.dtype.name, "float32")


def test_booleans_and_complex_numbers_of_safetensors_are_refused(tmp_path: Path, out: Path) -> None:
    refused(InputError, tensors(tmp_path, Z > 0), out, "BOOL")
    refused(InputError, tensors(tmp_path, Z + 1j), out, "C64")


def test_an_unknown_dtype_is_refused(tmp_path: Path, out: Path) -> None:
    refused(InputError, npy(tmp_path, Z), out, "int8", "float16, bfloat16, float32 or float64", dtype="int8")


# ------------------------------------------------------------------------------------- bad rows and shapes


@pytest.mark.parametrize("save", [npy, npz, tensors, parquet_lists, parquet_columns, zarr_array])
def test_all_rows_with_nan_or_inf_are_counted(
    save: Save, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 100 * D * 8)
    z = Z.copy()
    z[[123, 456, 699], [0, 5, 2]] = [np.nan, np.inf, -np.inf]
    z[456, 1] = np.nan
    refused(InputError, save(tmp_path, z), out, "3 of 700", "first is row 123", "remove")


@pytest.mark.parametrize("save", [npy, npz, tensors, zarr_array])
def test_latents_that_are_not_rows_are_refused(save: Save, tmp_path: Path, out: Path) -> None:
    refused(InputError, save(tmp_path, Z[:, 0]), out, f"({N},)", "(N, d)", "(N, 1)")


def test_a_single_number_is_refused(tmp_path: Path, out: Path) -> None:
    refused(InputError, npy(tmp_path, np.array(1.0)), out, "()", "(N, d)")
    refused(InputError, npz(tmp_path, np.array(1.0)), out, "()", "(N, d)")


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (5, 0)])
def test_too_few_latents_are_refused(shape: tuple[int, int], tmp_path: Path, out: Path) -> None:
    refused(InputError, npy(tmp_path, np.zeros(shape)), out, str(shape), "N >= 2")
    refused(InputError, npz(tmp_path, np.zeros(shape)), out, str(shape), "N >= 2")


@pytest.mark.parametrize("null_in", ["list", "value", "column"])
def test_the_first_null_is_named(null_in: str, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 100 * D * 8)
    rows: list[Any] = Z.tolist()
    if null_in == "list":
        rows[421] = rows[500] = None
    elif null_in == "value":
        rows[421][3] = rows[422][0] = None
    column = pa.array([None if i == 421 else 1.0 for i in range(N)])
    source = write_parquet(tmp_path, x=column) if null_in == "column" else write_parquet(tmp_path, z=rows)
    refused(InputError, source, out, "null in row 421", "remove")


def test_a_first_null_is_named(tmp_path: Path, out: Path) -> None:
    refused(InputError, write_parquet(tmp_path, z=[None, *Z[1:].tolist()]), out, "null in row 0")


def test_a_ragged_list_is_named(tmp_path: Path, out: Path) -> None:
    rows = Z.tolist()
    rows[432].pop()
    message = refused(InputError, source := write_parquet(tmp_path, z=rows), out)
    assert message == f"{source}: z has 5 values in row 432 where the first row has 6; give lists of one length"


# ------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize("save", [npz, tensors, parquet_fixed, zarr_group])
def test_a_key_chooses_among_several_arrays(save: Save, tmp_path: Path, out: Path) -> None:
    other = Z[:, :2] + 1
    source = save(tmp_path, Z, other=fixed(other) if save is parquet_fixed else np.ascontiguousarray(other))
    shapes = () if save is zarr_group else (f"z ({N}, {D})", f"other ({N}, 2)")
    refused(InputError, source, out, "other", "--key", *shapes)
    refused(InputError, source, out, "other", "z", "--key", key="absent")
    ingest(source, out / "l.zarr", key="other")
    np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], other)
    assert open_latents(out / "l.zarr").attributes["origin"] == f"{source.name}: other"


@pytest.mark.parametrize("save", [npz, tensors, parquet_fixed, zarr_group])
def test_the_only_array_of_rows_needs_no_key(save: Save, tmp_path: Path, out: Path) -> None:
    ingest(save(tmp_path, Z, labels=np.arange(N)), out / "l.zarr")
    np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], Z)


def test_a_key_for_a_single_array_is_refused(tmp_path: Path, out: Path) -> None:
    refused(InputError, npy(tmp_path, Z), out, "single array", "--key z", key="z")
    refused(InputError, latents_store(tmp_path, Z), out, "latents store", "--key x", key="x")


def test_columns_used_as_coordinates_are_noted(tmp_path: Path, out: Path) -> None:
    (note,) = ingest(parquet_columns(tmp_path, Z), out / "l.zarr").notes
    assert note.endswith("is made of the columns x0, x1, x2, x3, x4, x5")


def test_a_parquet_file_without_numbers_is_refused(tmp_path: Path, out: Path) -> None:
    refused(InputError, write_parquet(tmp_path, name=["x", "y"]), out, "a.parquet", "no arrays of numbers")


def test_parquet_files_of_different_schemas_are_refused(tmp_path: Path, out: Path) -> None:
    folder = parquet_folder(tmp_path, Z)
    pq.write_table(pa.table({"z": fixed(Z.astype(np.float64))}), folder / "c.parquet")
    refused(InputError, folder, out, "c.parquet has other columns than", "a.parquet")


NESTED = Z.reshape(N, 2, 3)
NESTED_LISTS = pa.array(NESTED.tolist(), pa.list_(pa.list_(pa.float32())))
LABELS = np.arange(N)


@pytest.mark.parametrize(
    "column",
    [
        NESTED_LISTS,
        NESTED_LISTS.cast(pa.list_(pa.list_(pa.float32(), 3), 2)),
        pa.array(NESTED.tolist(), pa.list_(pa.list_(pa.float32(), 3))),
        pa.FixedShapeTensorArray.from_numpy_ndarray(NESTED),
    ],
    ids=["lists", "fixed lists", "lists of fixed lists", "tensors"],
)
def test_nested_lists_are_flattened_and_never_passed_over(
    column: pa.Array, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 100 * D * 8)
    source = write_parquet(tmp_path, label=LABELS, latent=column)
    refused(InputError, source, out, "latent has shape (700, 2, 3)", "--flatten")
    (note,) = ingest(source, out / "l.zarr", flatten=True).notes
    assert note.endswith("left out: label")
    np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], Z)


def test_rows_of_nested_lists_that_are_not_alike_are_named(tmp_path: Path, out: Path) -> None:
    rows: list[Any] = NESTED.tolist()
    rows[433][1].pop()
    source = write_parquet(tmp_path, z=rows)
    refused(InputError, source, out, "z has 2 values in row 433 where the first row has 3", flatten=True)
    rows[433][1] = None
    refused(InputError, write_parquet(tmp_path, z=rows), out, "null in row 433", flatten=True)


STRANGE: dict[str, pa.Array] = {
    "struct": pa.array([{"x": 1.0, "y": 2.0}] * N),
    "binary": pa.array([b"1234"] * N),
    "fixed_size_binary": pa.array([b"1234"] * N, pa.binary(4)),
    "map": pa.array([[("x", 1.0)]] * N, pa.map_(pa.string(), pa.float32())),
    "decimal": pa.array([Decimal("1.5")] * N),
    "list<element: bool>": pa.array([[True, False]] * N),
    "list<element: struct": pa.array([[{"x": 1.0}]] * N),
    "permutation": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), [2, 3], permutation=[1, 0]), fixed(Z)
    ),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("beside", ["label", "list"])
def test_what_might_be_the_latents_and_is_not_understood_is_refused(
    kind: str, beside: str, tmp_path: Path, out: Path
) -> None:
    column = LABELS if beside == "label" else fixed(Z)
    source = write_parquet(tmp_path, **{"latent": STRANGE[kind], beside: column})
    refused(InputError, source, out, "latent", kind, "--key")
    refused(InputError, source, out, "latent holds values of type", kind, "float32", key="latent")
    if beside == "list":
        ingest(source, out / "l.zarr", key="list")
        np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], Z)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x"] * N),
        pa.array(["x"] * N).dictionary_encode(),
        pa.array([True] * N),
        pa.nulls(N),
        pa.array([datetime(2026, 1, 1)] * N),
        pa.array([["a", "b"]] * N),
        pa.array([[1, 2]] * N),
    ],
    ids=["text", "categories", "truth", "nothing", "times", "texts", "shape"],
)
def test_columns_left_out_are_named(column: pa.Array, tmp_path: Path, out: Path) -> None:
    source = write_parquet(tmp_path, z=fixed(Z), height=LABELS, latent_shape=column)
    (note,) = ingest(source, out / "l.zarr").notes
    assert note == f"the latents are z of {source}; left out: height, latent_shape"
    np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], Z)
    source = write_parquet(tmp_path, x=Z[:, 0], y=Z[:, 1], latent_shape=column)
    (note,) = ingest(source, out / "m.zarr").notes
    assert note == f"left out: latent_shape; each row of {source} is made of the columns x, y"


def test_columns_that_are_hardly_coordinates_are_noted(tmp_path: Path, out: Path) -> None:
    source = write_parquet(tmp_path, x=Z[:, 0], class_label=LABELS, image_height=LABELS)
    notes = ingest(source, out / "l.zarr").notes
    assert (
        f"class_label, image_height of {source} count as coordinates; if they are none, save it without them" in notes
    )


def test_numbers_as_categories_and_half_floats_are_numbers(tmp_path: Path, out: Path) -> None:
    z = np.round(Z[:, :2]).astype(np.float16)
    source = write_parquet(tmp_path, x=pa.array(z[:, 0].astype(np.float32)).dictionary_encode(), y=pa.array(z[:, 1]))
    ingest(source, out / "l.zarr")
    np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], z)
    ingest(write_parquet(tmp_path, z=pa.array(list(z), pa.list_(pa.float16()))), out / "m.zarr")
    np.testing.assert_array_equal(open_latents(out / "m.zarr")[:], z)


def test_columns_of_one_name_are_refused(tmp_path: Path, out: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(LABELS)] * 2, names=["x", "x"]), tmp_path / "a.parquet")
    refused(InputError, tmp_path / "a.parquet", out, "several columns of one name")


def test_every_file_of_a_folder_is_accounted_for(tmp_path: Path, out: Path) -> None:
    folder = parquet_folder(tmp_path, Z)
    pq.write_table(pa.table({"z": fixed(Z[:0])}), folder / "0.parquet")
    (folder / "_SUCCESS").touch()
    np.save(folder / "more.npy", Z)
    (folder / "c.PARQUET").write_bytes((folder / "a.parquet").read_bytes())
    notes = ingest(folder, out / "l.zarr").notes
    assert f"files of {folder} that are no .parquet are left out: c.PARQUET, more.npy" in notes
    np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], Z)
    pq.write_table(pa.table({"z": fixed(Z), "latent": NESTED_LISTS}), folder / "d.parquet")
    refused(InputError, folder, out_of(out), "d.parquet has other columns than", "0.parquet")


def out_of(out: Path) -> Path:
    """Another empty folder."""
    (out.parent / "other").mkdir(exist_ok=True)
    return out.parent / "other"


@pytest.mark.parametrize("save", [npz, tensors, zarr_group])
def test_arrays_left_out_are_named(save: Save, tmp_path: Path, out: Path) -> None:
    (note,) = ingest(save(tmp_path, Z, labels=LABELS, other=LABELS), out / "l.zarr").notes
    assert note.endswith(("left out: labels, other", "left out beside it: labels, other"))
    assert ingest(save(out_of(out), Z, labels=LABELS), out / "m.zarr", key="z").notes == ()


def test_objects_in_an_npz_are_not_passed_over(tmp_path: Path, out: Path) -> None:
    source = npz(tmp_path, Z[:, :2], latents=np.array([*Z, None], dtype=object))
    refused(InputError, source, out, "latents (values of type object)", "--key")
    refused(InputError, source, out, "latents holds values of type object", key="latents")
    ingest(source, out / "l.zarr", key="z")


def test_numbers_that_are_packed_are_not_taken_as_they_are(tmp_path: Path, out: Path) -> None:
    array = zarr.open_array(zarr_array(tmp_path, Z))
    array.attrs["add_offset"] = 0.0
    array.attrs["_FillValue"] = "NaN"
    assert ingest(tmp_path / "a.zarr", out / "l.zarr").notes == ()
    array.attrs["_FillValue"] = -999
    (note,) = ingest(tmp_path / "a.zarr", out / "m.zarr").notes
    assert "_FillValue" in note
    assert "-999" in note
    array.attrs["scale_factor"] = 0.1
    refused(InputError, tmp_path / "a.zarr", out_of(out), "packed (scale_factor = 0.1)", "unpacked")
    with pytest.raises(InputError, match="packed"):
        distot.solve(tmp_path / "a.zarr", progress=False)
    safetensors.numpy.save_file({"z": Z}, tmp_path / "a.safetensors", metadata={"scaling_factor": "0.18"})
    (note,) = ingest(tmp_path / "a.safetensors", out / "n.zarr").notes
    assert "scaling_factor 0.18" in note


def test_groups_and_arrays_of_more_dimensions_are_not_passed_over(tmp_path: Path, out: Path) -> None:
    source = zarr_group(tmp_path, Z[:, :2], images=Z.reshape(N, 2, 3))
    refused(InputError, source, out, "images", "z", "--key")
    group = zarr.create_group(tmp_path / "b")
    zarr_group(tmp_path / "b", Z)
    refused(InputError, tmp_path / "b", out, "groups ['a/']", "--key")
    ingest(tmp_path / "b", out / "l.zarr", key="a/z")
    np.testing.assert_array_equal(open_latents(out / "l.zarr")[:], Z)
    group.create_array("pos", shape=(N, 2), dtype="f4")[:] = Z[:, :2]
    assert any("left out beside it: a/" in note for note in ingest(tmp_path / "b", out / "m.zarr").notes)


# --------------------------------------------------------------------------------- more than one array in a file


def several(path: Path, count: int) -> Path:
    """An npy file as it comes of saving batch after batch."""
    with (path / "a.npy").open("wb") as file:
        for _ in range(count):
            np.save(file, Z)
    return path / "a.npy"


def test_an_npy_of_several_arrays_is_refused_wherever_one_is_read(tmp_path: Path, out: Path) -> None:
    source = several(tmp_path, 3)
    refused(InputError, source, out, "a.npy holds 3 arrays one after another", "numpy.concatenate")
    with pytest.raises(InputError, match="holds 3 arrays"):
        read_npy(source)
    with pytest.raises(InputError, match="holds 3 arrays"):
        ingest(npz(tmp_path, Z), out / "l.zarr", mass=source)
    distot.solve(Z, run=out / "run.zarr", max_samples=1000, progress=False)
    with pytest.raises(InputError, match="holds 3 arrays"):
        distot.assign_file(out / "run.zarr", source, out / "index.npy")
    with pytest.raises(InputError, match="holds 3 arrays"):
        distot.solve(Z, init=source, progress=False)


def test_bytes_behind_an_array_are_refused(tmp_path: Path, out: Path) -> None:
    source = npy(tmp_path, Z)
    source.write_bytes(source.read_bytes() + b"more")
    refused(InputError, source, out, "goes on for 4 bytes behind its array", "numpy.save")


def test_files_that_were_joined_are_refused(tmp_path: Path, out: Path) -> None:
    source = npz(tmp_path, Z)
    source.write_bytes(2 * source.read_bytes())
    refused(InputError, source, out, "bytes before its first array")


@pytest.mark.parametrize("shape", ["(-5, 6)", "(0, 9223372036854775807)", "(100000000000000000000, 3)", "(3, -1)"])
def test_impossible_shapes_are_refused(tmp_path: Path, out: Path, shape: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(1000)
    (tmp_path / "a.npy").write_bytes(content)
    refused(InputError, tmp_path / "a.npy", out, "a.npy is damaged", shape)
    with pytest.raises(InputError, match="cannot be read as an npy file"):
        read_npy(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("z.npy", content)
    refused(InputError, tmp_path / "a.npz", out, "a.npz is damaged", shape)


# ---------------------------------------------------------------------------------------------- masses


@pytest.mark.parametrize("save", [npz, tensors, parquet_fixed, parquet_columns, zarr_group])
def test_masses_of_the_source_are_stored_as_given(save: Save, tmp_path: Path, out: Path) -> None:
    result = ingest(save(tmp_path, Z, w=MASS), out / "l.zarr", mass_key="w")
    stored = open_latents(out / "l.zarr")
    np.testing.assert_array_equal(stored.mass, MASS)
    np.testing.assert_array_equal(stored[:], Z)
    assert any(f"the masses sum to {MASS.sum():.6g}" in note for note in result.notes)


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors", "parquet"])
def test_masses_come_from_another_file(suffix: str, tmp_path: Path, out: Path) -> None:
    path, mass = tmp_path / f"w.{suffix}", np.where(np.arange(N) < 3, 0, MASS)
    other = np.ones((N, 2))
    match suffix:
        case "npy":
            np.save(path, mass)
        case "npz":
            np.savez(path, w=mass, other=other)
        case "safetensors":
            safetensors.numpy.save_file({"w": mass, "other": other}, path)
        case "parquet":
            pq.write_table(pa.table({"w": mass, "other": fixed(other)}), path)
    result = ingest(latents_store(tmp_path, Z, w=MASS + 1), out / "l.zarr", mass=path)
    np.testing.assert_array_equal(open_latents(out / "l.zarr").mass, mass)
    assert any("3 of 700 latents have zero mass" in note for note in result.notes)
    if suffix != "npy":
        with pytest.raises(InputError, match=r"nothing named 'absent' but .*w .*--mass-key"):
            ingest(npy(tmp_path, Z), out / "m.zarr", mass=path, mass_key="absent")
        ingest(npy(tmp_path, Z), out / "m.zarr", mass=path, mass_key="w")
        np.testing.assert_array_equal(open_latents(out / "m.zarr").mass, mass)


def test_masses_of_a_latents_store_are_taken_over(tmp_path: Path, out: Path) -> None:
    ingest(latents_store(tmp_path, Z, w=MASS), out / "l.zarr")
    np.testing.assert_array_equal(open_latents(out / "l.zarr").mass, MASS)
    ingest(npy(tmp_path, Z), out / "without.zarr")
    assert open_latents(out / "without.zarr").mass is None


def test_masses_that_cannot_be_used_are_refused(tmp_path: Path, out: Path) -> None:
    source = npy(tmp_path, Z)

    def refuse(mass: np.ndarray, *words: str) -> None:
        np.save(tmp_path / "w.npy", mass)
        refused(InputError, source, out, *words, mass=tmp_path / "w.npy")

    refuse(MASS[1:], "(699,)", "(700,)")
    refuse(MASS[:, None], "(700, 1)")
    refuse(np.where(np.arange(N) == 5, -1, MASS), "1 of 700", "mass[5] = -1.0")
    refuse(MASS * np.nan, "700 of 700", "finite")
    refuse(MASS + 1j, "complex128")
    refuse(MASS.astype(object), "object")
    refused(InputError, source, out, "nowhere.npy does not exist", mass=tmp_path / "nowhere.npy")
    refused(InputError, npz(tmp_path, Z, w=MASS, v=MASS), out, "w (700,)", "--mass-key", mass=tmp_path / "a.npz")


# ---------------------------------------------------------------------------------- missing and damaged


@pytest.mark.parametrize("layout", [{}, {"shards": (128, D)}, {"zarr_format": 2}])
def test_chunks_of_a_foreign_zarr_that_are_not_there_are_counted(tmp_path: Path, out: Path, layout: Any) -> None:
    z = np.ones((200, D), "f4")
    zarr.create_array(tmp_path / "a.zarr", shape=z.shape, dtype="f4", chunks=(64, D), fill_value=0, **layout)[:] = z
    assert ingest(tmp_path / "a.zarr", out / "whole.zarr").notes == ()
    chunks = sorted(its for its in (tmp_path / "a.zarr").rglob("*") if its.name[0].isdigit() and its.is_file())
    chunks[0].unlink()
    (note,) = ingest(tmp_path / "a.zarr", out / "l.zarr").notes
    assert note.startswith("1 chunks of")
    with pytest.warns(DistotWarning) as told:
        solution = distot.solve(tmp_path / "a.zarr", max_samples=64, until_chi2=None, progress=False)
    assert note in solution.notes
    assert note in [str(its.message) for its in told]


def test_a_missing_source_or_unknown_format_is_refused(tmp_path: Path, out: Path) -> None:
    refused(InputError, tmp_path / "a.npy", out, "a.npy does not exist")
    (tmp_path / "a.csv").write_text("1,2")
    formats = (".npy", ".npz", ".safetensors", ".parquet", ".zarr")
    refused(InputError, tmp_path / "a.csv", out, "a.csv", *formats)
    (tmp_path / "empty").mkdir()
    refused(InputError, tmp_path / "empty", out, "empty", *formats)


def test_a_missing_library_is_named(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet_fixed(tmp_path, Z)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(InputError, source, out, "pyarrow.parquet", "pip install pyarrow")


def test_an_existing_destination_is_refused_before_any_row_is_read(tmp_path: Path, out: Path) -> None:
    source = npy(tmp_path, Z * np.nan)
    (out / "l.zarr").mkdir()
    (out / "l.zarr" / "precious").write_text("kept")
    with pytest.raises(StoreError, match=r"l\.zarr exists already"):
        ingest(source, out / "l.zarr", mass=tmp_path / "nowhere.npy", on_rows=lambda *_: pytest.fail("rows were read"))
    assert [(path.name, path.read_text()) for path in out.glob("*/*")] == [("precious", "kept")]
    assert len(list(out.iterdir())) == 1


def test_an_exception_of_the_caller_passes_and_leaves_nothing(tmp_path: Path, out: Path) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(npy(tmp_path, Z), out / "l.zarr", on_rows=stop)
    assert not list(out.iterdir())


@pytest.mark.parametrize("kept", [0, 5, 60, 0.5, -1])
@pytest.mark.parametrize(
    "save", [npy, fortran, npz, npz_compressed, tensors, parquet_fixed, parquet_folder, zarr_array]
)
def test_a_file_cut_short_is_named(save: Save, kept: float, tmp_path: Path, out: Path) -> None:
    source = save(tmp_path, Z)
    file = max((path for path in [source, *source.rglob("*")] if path.is_file()), key=lambda path: path.stat().st_size)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)] if isinstance(kept, float) else whole[:kept])
    refused(DistotError, source, out, str(source), "make it anew")


def test_a_changed_byte_fails_the_checksum_of_a_zip(tmp_path: Path, out: Path) -> None:
    source = npz(tmp_path, Z)
    whole = bytearray(source.read_bytes())
    whole[len(whole) // 2] ^= 1
    source.write_bytes(whole)
    refused(InputError, source, out, "a.npz is damaged", "CRC")


def test_a_changed_byte_fails_the_checksum_of_a_parquet_page(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"z": fixed(Z)}), source, write_page_checksum=True, use_dictionary=False, compression="none"
    )
    whole = bytearray(source.read_bytes())
    whole[len(whole) // 2] ^= 1
    source.write_bytes(whole)
    refused(InputError, source, out, "a.parquet is damaged", "CRC")


def test_an_npy_file_cut_short_is_refused_before_any_row_is_read(tmp_path: Path, out: Path) -> None:
    source = npy(tmp_path, Z)
    source.write_bytes(source.read_bytes()[:-8])
    refused(InputError, source, out, "8 bytes are missing", on_rows=lambda *_: pytest.fail("rows were read"))


@pytest.mark.parametrize("more", [b"", b"12345678"])
def test_a_zip_member_of_another_length_than_its_header_is_refused(more: bytes, tmp_path: Path, out: Path) -> None:
    whole = npy(tmp_path, Z).read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("z.npy", whole + more if more else whole[:-8])
    words = "longer than its header" if more else "ends too soon"
    refused(InputError, tmp_path / "a.npz", out, "a.npz is damaged", words)


def test_damaged_headers_are_refused(tmp_path: Path, out: Path) -> None:
    source = npy(tmp_path, Z)
    source.write_bytes(source.read_bytes().replace(b"(700, 6)", b"((((( 6)"))
    refused(InputError, source, out, "a.npy is damaged")
    source.write_bytes(b"not numpy at all, but text with a wrong name")
    refused(InputError, source, out, "a.npy is damaged")
    header = zarr_array(tmp_path, Z) / "zarr.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"chunk_grid": {"name": "regular"}}))
    refused(DistotError, tmp_path / "a.zarr", out, "a.zarr")


def test_an_unreadable_file_is_explained(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = npy(tmp_path, Z)

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(StoreError, source, out, "a.npy", "permission denied")


def test_a_column_by_column_member_of_a_zip_is_refused_with_the_remedy(tmp_path: Path, out: Path) -> None:
    refused(InputError, npz(tmp_path, np.asfortranarray(Z)), out, "a.npz: z", "ascontiguousarray", ".npy")


# ---------------------------------------------------------------------------------------------- memory

MEMORY = """
import re, sys
import pyarrow.parquet, safetensors
from distot import ingest, readers
from distot.store import latents

def peak():  # in MiB, of this program alone; ru_maxrss would start at what the parent held
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) >> 10

readers.BLOCK_BYTES, latents.CHUNKS_PER_SHARD = 4 << 20, 2  # so that files of moderate size are large
before = peak()
for source in sys.argv[1:]:
    ingest.ingest(source, source + ".zarr", dtype="float32")
    print(source.rpartition("/")[2], peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Files of 160 MiB, holes where the format allows; reading any of them as a whole would take more than that."""
    n, d = 1 << 15, 640
    size = n * d * 8
    header = {"descr": "<f8", "fortran_order": False, "shape": (n, d)}
    for name, order in (("c.npy", False), ("f.npy", True)):
        with (tmp_path / name).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header | {"fortran_order": order})
            file.truncate(file.tell() + size)
    with (
        zipfile.ZipFile(tmp_path / "z.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("z.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(size >> 22):
            member.write(bytes(1 << 22))
    with (tmp_path / "t.safetensors").open("wb") as file:
        text = json.dumps({"z": {"dtype": "F64", "shape": [n, d], "data_offsets": [0, size]}}).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + size)
    table = pa.table({"z": fixed(np.zeros((n, d)))})
    pq.write_table(table, tmp_path / "p.parquet", use_dictionary=False, compression="none")
    sources = [str(tmp_path / name) for name in ("c.npy", "f.npy", "z.npz", "t.safetensors", "p.parquet", "c.npy.zarr")]
    done = subprocess.run([sys.executable, "-c", MEMORY, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = {name: int(peak) for name, peak in (line.split() for line in done.stdout.splitlines())}
    assert len(peaks) == 6
    assert max(peaks.values()) < 120, peaks
