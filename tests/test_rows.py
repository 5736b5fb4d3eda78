"""Rows under construction: what was written stays, whatever stops the writer, and the next one goes on behind it."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from numpy.typing import NDArray
from processes import files_up_to

from distot.errors import InputError, StoreError
from distot.store import RowFile, RowWriter, new_rows, open_latents, places
from distot.store import rows as room

ROWS, DIM, BLOCK = 3000, 6, 50
COLUMNS = {"index": ("int64", None), "z": ("float32", DIM)}
ABOUT = {"seed": 3, "fingerprint": "abc"}
VECTORS = {"cov": np.eye(3)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LEAST_BYTES", 4 * DIM * 200)


def block(first: int) -> dict[str, NDArray[Any]]:
    index = np.arange(first, first + BLOCK)
    return {"index": index, "z": (index[:, None] + np.arange(DIM) / 8).astype(np.float32)}


def fill(out: RowWriter, until: int = ROWS) -> None:
    for first in range(out.written, until, BLOCK):
        out.write(block(first), {"next": first + BLOCK})


def begin(path: Any) -> Any:
    return new_rows(path, ROWS, COLUMNS, ABOUT, VECTORS, BLOCK)


def assert_right(path: Any, rows: int) -> None:
    found = RowFile(path)
    assert found.written == rows
    assert found.about == ABOUT
    assert found.state == ({"next": rows} if rows else {})
    assert np.array_equal(found.read("index"), np.arange(rows))
    assert np.array_equal(found.read("z")[:, 0], np.arange(rows))
    assert np.array_equal(found.vector("cov"), np.eye(3))


def test_rows_of_any_number_make_whole_shards(tmp_path: Path) -> None:
    with begin(tmp_path / "rows.zarr") as out:
        assert not out.complete
        for first, end in ((0, 1), (1, 777), (777, 777), (777, 2999), (2999, ROWS)):
            index = np.arange(first, end)
            out.write({"index": index, "z": np.repeat(index[:, None], DIM, axis=1)})
        assert out.complete
    found = RowFile(tmp_path / "rows.zarr")
    assert found.complete
    assert np.array_equal(found.read("index"), np.arange(ROWS))
    assert np.array_equal(found.read("z", slice(700, 900)), np.repeat(np.arange(700, 900)[:, None], DIM, axis=1))
    assert open_latents(tmp_path / "rows.zarr", "z").shape == (ROWS, DIM)


def test_a_stopped_writer_is_followed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rows.zarr"

    def stopped(at: int) -> None:
        with begin(path) as out:
            fill(out, at)
            raise KeyboardInterrupt

    for at, safe in ((0, 0), (399, 400), (1630, 1600)):
        with pytest.raises(KeyboardInterrupt):
            stopped(at)
        assert_right(path, safe)
        with pytest.raises(StoreError, match="the command that was writing it goes on"):
            open_latents(path, "z")
    with pytest.raises(StoreError, match="has 1,600 rows so far"):
        RowFile(path).read("index", slice(1500, 1700))
    with begin(path) as out:
        fill(out)
    assert_right(path, ROWS)
    with begin(path) as out:
        assert out.complete


def test_a_killed_writer_is_followed_by_the_next(tmp_path: Path) -> None:
    """SIGKILL in the middle of a shard, in a process of its own."""
    path = tmp_path / "rows.zarr"
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_rows
test_rows.room.LEAST_BYTES = {4 * DIM * 200}
with test_rows.begin({str(path)!r}) as out:
    test_rows.fill(out, 1150)
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert_right(path, 1000)
    with begin(path) as out:
        fill(out)
    assert_right(path, ROWS)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.zarr"
    with begin(path) as out:
        fill(out, 1000)
        with files_up_to(3000), pytest.raises(StoreError, match=r"size limit.*1,000 of 3,000 rows are safe"):
            fill(out)
    assert_right(path, 1000)
    with begin(path) as out:
        fill(out)
    assert_right(path, ROWS)


def test_a_full_disk(tmp_path: Path) -> None:
    """A file system of its own that another file fills."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with begin(disk / "rows.zarr") as out:
            fill(out, 1000)
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
            with pytest.raises(StoreError, match=r"the disk is full.*1,000 of 3,000 rows are safe"):
                fill(out)
        with pytest.raises(StoreError, match="free some space"), begin(disk / "rows.zarr"):
            pass
        assert_right(disk / "rows.zarr", 1000)
        (disk / "other").unlink()
        with begin(disk / "rows.zarr") as out:
            fill(out)
        assert_right(disk / "rows.zarr", ROWS)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_only_one_writes(tmp_path: Path) -> None:
    with begin(tmp_path / "rows.zarr"):
        with pytest.raises(StoreError, match="is being written by process"), begin(tmp_path / "rows.zarr"):
            pass
        assert_right(tmp_path / "rows.zarr", 0)


def test_other_rows_do_not_follow(tmp_path: Path) -> None:
    path = tmp_path / "rows.zarr"
    with begin(path) as out:
        fill(out, 800)
    others: list[tuple[dict[str, Any], str]] = [
        ({"about": ABOUT | {"seed": 4}}, "was begun with seed = 3, and not 4"),
        ({"about": {"seed": 3}}, "was begun with fingerprint = 'abc', and not None"),
        ({"rows": 10}, "was begun with rows = 3000, and not 10"),
        ({"columns": {"index": ("int64", None)}}, r"was begun with columns = \{'index'.*, and not \{'index'"),
        ({"columns": COLUMNS | {"z": ("float32", 7)}}, r"was begun with columns = "),
        ({"vectors": {}}, r"was begun with vectors = \['cov'\], and not \[\]"),
        ({"vectors": {"cov": 2 * np.eye(3)}}, "was begun with another cov"),
    ]
    for change, message in others:
        given: dict[str, Any] = {"rows": ROWS, "columns": COLUMNS, "about": ABOUT, "vectors": VECTORS} | change
        with pytest.raises(InputError, match=message), new_rows(path, **given):
            pass
    np.save(tmp_path / "else.npy", np.zeros(3))
    with pytest.raises(StoreError), begin(tmp_path / "else.npy"):
        pass


def test_a_state_must_end_with_a_shard(tmp_path: Path) -> None:
    with begin(tmp_path / "rows.zarr") as out:
        rows = {name: np.concatenate([block(0)[name]] * 5) for name in COLUMNS}
        with pytest.raises(ValueError, match="beyond the end of a shard"):
            out.write(rows, {"next": 250})
        with pytest.raises(ValueError, match="equally many"):
            out.write({"index": np.arange(3)})


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a-key",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    places._bucket.cache_clear()
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="rows")
    yield "s3://rows"
    places._bucket.cache_clear()
    server.stop()


def test_in_an_object_store(bucket: str) -> None:
    path = f"{bucket}/a/rows.zarr"
    with begin(path) as out:
        fill(out, 1150)
    assert_right(path, 1000)
    with begin(path) as out:
        fill(out)
    assert_right(path, ROWS)


def test_forked_processes_are_told(bucket: str) -> None:
    """A client of an object store would wait for ever there; one that starts afresh opens the rows again."""
    with begin(f"{bucket}/rows.zarr") as out:
        fill(out)
    found = RowFile(f"{bucket}/rows.zarr")
    again = pickle.loads(pickle.dumps(found))
    assert np.array_equal(again.read("index"), np.arange(ROWS))
    found.opened.process += 1  # as if this process had been forked
    with pytest.raises(InputError, match=r'with multiprocessing_context="spawn", or use num_workers=0'):
        found.read("index")
