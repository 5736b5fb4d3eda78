"""Latents, runs and checkpoints on disk; the only user of zarr. The layout is described in docs/developers.md.

Nothing is ever half there: a store appears under its name by one rename, a checkpoint by the rename of its manifest,
and both only after every byte below them has been flushed to disk.
"""

from distot.store.files import UNREADABLE, check_plain, explained, need_space, new_file, read_npy
from distot.store.forms import restored
from distot.store.latents import Latents, LatentsWriter, copy_latents, new_latents, open_latents
from distot.store.lock import TakenOver
from distot.store.npy import check_npy, npy_header
from distot.store.out import check_holder, check_out, fresh_file, new_npy, save_npy
from distot.store.places import Opened, Place, Url, as_place, reference, referred, typed
from distot.store.rows import RowFile, RowWriter, new_rows
from distot.store.runs import LOST, Run
from distot.store.shelf import Checkpoint, Dropped, Part

__all__ = [
    "LOST",
    "UNREADABLE",
    "Checkpoint",
    "Dropped",
    "Latents",
    "LatentsWriter",
    "Opened",
    "Part",
    "Place",
    "RowFile",
    "RowWriter",
    "Run",
    "TakenOver",
    "Url",
    "as_place",
    "check_holder",
    "check_npy",
    "check_out",
    "check_plain",
    "copy_latents",
    "explained",
    "fresh_file",
    "need_space",
    "new_file",
    "new_latents",
    "new_npy",
    "new_rows",
    "npy_header",
    "open_latents",
    "read_npy",
    "reference",
    "referred",
    "restored",
    "save_npy",
    "typed",
]
