"""Data to learn from: toy laws in the plane, scanned digits, and folders of images in well-known formats.

Nothing is downloaded. Legend: N data, M data that training does not see, c channels, h x w pixels.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from distot.errors import InputError

COPIES = 34  # of each digit, itself included
HELD_OUT = 6  # every sixth digit is kept for judging
PATCH = 8  # pixels
CROP, SIDE = 148, 64  # of a CelebA picture: the square in its middle, and what it is reduced to
NOISE = 0.05  # standard deviation of the toys around their cores
REACH = 5 * NOISE  # farther from the core a sample belongs to no mode


@dataclass(frozen=True)
class Core:
    """Where a law of the plane is concentrated, within some ``REACH``: points (k, 2) and the mode of each (k,)."""

    points: NDArray[np.float64]
    mode: NDArray[np.int64]


@dataclass(frozen=True)
class Data:
    """A data set with labels.

    values, fresh: (N, d) and (M, d) float32, or images (N, c, h, w) and (M, c, h, w) as bytes; ``fresh`` is of the same
    law and not in ``values``. labels, fresh_labels: (N,), (M,) int64 from 0 on. core: of a toy, where its law lives.
    """

    name: str
    values: Tensor
    labels: Tensor
    fresh: Tensor
    fresh_labels: Tensor
    core: Core | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a datum."""
        return tuple(self.values.shape[1:])

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def shares(self) -> Tensor:
        """Of each class in ``values`` (classes,)."""
        return torch.bincount(self.labels, minlength=self.classes) / len(self.labels)


def load(name: str | Path, size: int | None = None) -> Data:
    """A data set by its name, one of TOYS or PICTURES, or by the folder that holds it.

    A folder has the four files of MNIST or Fashion-MNIST (``train-images-idx3-ubyte``, as they are or with .gz), or
    those of CelebA (``img_align_celeba/``, ``list_eval_partition.txt``, and ``list_attr_celeba.txt`` for labels).
    size: data for training, for a toy any number, else at most all.

    Raises InputError for other names, for files that are missing or broken, and for a size that cannot be.
    """
    if size is not None and size < 2:
        raise InputError(f"a data set needs at least 2 data, size={size} is too few")
    if str(name) in TOYS:
        return TOYS[str(name)](10_000 if size is None else size)
    if str(name) in PICTURES:
        return _first(PICTURES[str(name)](), size)
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(f"{name}: no data set of that name ({', '.join([*TOYS, *PICTURES])}), and no such folder")
    if (folder / "img_align_celeba").is_dir():
        return _first(celeba(folder), size)
    return _first(mnist(folder), size)


def _data(name: str, parts: list[Tensor], core: Core | None = None) -> Data:
    """Of values, labels, fresh values and their labels."""
    values, labels, fresh, fresh_labels = parts
    return Data(name, values, labels, fresh, fresh_labels, core)


def _first(data: Data, size: int | None) -> Data:
    if size is None:
        return data
    if size > len(data.values):
        raise InputError(f"{data.name} has {len(data.values):,} data to train on, size={size:,} are too many")
    order = torch.randperm(len(data.values), generator=torch.Generator().manual_seed(0))[:size]
    return Data(data.name, data.values[order], data.labels[order], data.fresh, data.fresh_labels, data.core)


def floats(values: Tensor) -> Tensor:
    """Data as networks take them: bytes become numbers in [0, 1]."""
    return values.float() / 255 if values.dtype == torch.uint8 else values.float()


def _toy(
    name: str, n: int, core: Core, draw: Callable[[np.random.Generator, int], tuple[NDArray[Any], NDArray[Any]]]
) -> Data:
    parts: list[Tensor] = []
    for seed, count in ((0, n), (1, 10_000)):
        random = np.random.default_rng(seed)
        clean, mode = draw(random, count)
        noisy = clean + NOISE * random.standard_normal(clean.shape)
        parts += [torch.from_numpy(noisy).float(), torch.from_numpy(mode)]
    return _data(name, parts, core)


def _mixture(name: str, means: NDArray[np.float64], n: int) -> Data:
    """Gaussians of equal share about ``means``; data take turns."""
    core = Core(means, np.arange(len(means)))
    return _toy(name, n, core, lambda _, count: (means[np.arange(count) % len(means)], np.arange(count) % len(means)))


def gaussians8(n: int) -> Data:
    """Eight narrow Gaussians on a circle of radius 2, (n, 2)."""
    angle = np.arange(8) * np.pi / 4
    return _mixture("gaussians8", 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1), n)


def gaussians25(n: int) -> Data:
    """25 narrow Gaussians on a square lattice, (n, 2)."""
    side = np.arange(-2.0, 3.0)
    return _mixture("gaussians25", np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2), n)


def swissroll(n: int) -> Data:
    """A spiral of two turns, (n, 2); its modes are eight pieces of equal share."""

    def curve(u: NDArray[np.float64]) -> NDArray[np.float64]:
        angle = 1.5 * np.pi * (1 + 2 * u)
        return np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 7

    def piece(u: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.minimum(u * 8, 7).astype(np.int64)

    def draw(random: np.random.Generator, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        u = (random.permutation(count) + random.random(count)) / count  # evenly, in any order
        return curve(u), piece(u)

    fine = np.linspace(0, 1, 4000)
    return _toy("swissroll", n, Core(curve(fine), piece(fine)), draw)


TOYS: dict[str, Callable[[int], Data]] = {
    "gaussians8": gaussians8,
    "gaussians25": gaussians25,
    "swissroll": swissroll,
}


def digits() -> Data:
    """The 1,797 scanned digits of scikit-learn, 8 x 8, turned into 50,932 images by small affine maps.

    Every sixth digit is held out, with maps of its own (10,166 images). Of each digit there are 34 images: itself, and
    33 turned by up to 12 degrees, sheared and stretched by up to 8 %, and shifted by up to 0.6 pixels, with bilinear
    interpolation. Raises InputError without scikit-learn.
    """
    _need_sklearn()
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    labels = torch.from_numpy(found.target).long()
    held = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    random = torch.Generator().manual_seed(0)
    parts = []
    for mine in (~held, held):
        parts += [_varied(images[mine], random), labels[mine].repeat(COPIES)]
    return _data("digits", parts)


def patches() -> Data:
    """50,000 patches of 8 x 8 pixels from the two photographs of scikit-learn, and 10,000 from strips held out.

    The class is the photograph, a temple or a flower. Strips are the right eighth of each, which no patch for training
    touches. Raises InputError without scikit-learn.
    """
    _need_sklearn()
    from sklearn.datasets import load_sample_images

    random, parts = np.random.default_rng(0), []
    for count, held in ((25_000, False), (5_000, True)):
        found = []
        for picture in load_sample_images().images:
            edge = picture.shape[1] * 7 // 8
            part = picture[:, edge:] if held else picture[:, :edge]
            windows = np.lib.stride_tricks.sliding_window_view(part, (PATCH, PATCH), axis=(0, 1))
            rows, columns = np.divmod(
                random.choice(windows.shape[0] * windows.shape[1], count, replace=False), windows.shape[1]
            )
            found.append(torch.from_numpy(windows[rows, columns].copy()))
        parts += [torch.cat(found), torch.arange(2).repeat_interleave(count)]
    return _data("patches", parts)


PICTURES: dict[str, Callable[[], Data]] = {"digits": digits, "patches": patches}


def _need_sklearn() -> None:
    if find_spec("sklearn") is None:
        raise InputError("digits and patches come with scikit-learn: pip install 'distot[demo]'")


def _varied(images: Tensor, random: torch.Generator) -> Tensor:
    """The images (n, 1, h, w) and COPIES - 1 distorted ones of each, as bytes, copy after copy."""
    n, side = COPIES * len(images), images.shape[-1]
    turn, stretch, shear, right, down = (2 * torch.rand(5, n, generator=random) - 1).unbind()
    angle = turn * (12 * torch.pi / 180)
    cos, sin, shift = torch.cos(angle), torch.sin(angle), 0.6 * 2 / side
    long, slant = 1 + 0.08 * stretch, 0.08 * shear
    rows = (cos * long, slant - sin, right * shift, sin + slant, cos / long, down * shift)
    maps = torch.stack(rows, dim=1).view(n, 2, 3)
    maps[: len(images)] = torch.eye(3)[:2]
    grid = functional.affine_grid(maps, [n, 1, side, side], align_corners=False)
    made = functional.grid_sample(images.repeat(COPIES, 1, 1, 1), grid, mode="bilinear", align_corners=False)
    return (made * 255).round().clamp(0, 255).byte()


def mnist(folder: Path) -> Data:
    """MNIST, Fashion-MNIST or another set in their four files, 28 x 28 or of any size. Raises InputError."""
    parts = []
    for part in ("train", "t10k"):
        images, labels = _idx(folder, f"{part}-images", 3), _idx(folder, f"{part}-labels", 1)
        if len(images) != len(labels):
            raise InputError(
                f"{folder}: {len(images):,} {part} images, and {len(labels):,} labels; one file is cut off"
            )
        parts += [torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()]
    return _data(folder.name, parts)


def _idx(folder: Path, stem: str, ndim: int) -> NDArray[np.uint8]:
    """An array of bytes in IDX format: a magic number, the shape in big endian, the values."""
    names = [f"{stem}{sign}idx{ndim}-ubyte{gz}" for sign in "-." for gz in ("", ".gz")]
    there = [folder / name for name in names if (folder / name).is_file()]
    if not there:
        raise InputError(f"{folder} has no {names[0]}, plain or with .gz, and no img_align_celeba; see models.load")
    try:
        raw = gzip.decompress(there[0].read_bytes()) if there[0].suffix == ".gz" else there[0].read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"{there[0]} cannot be read: {error}; get it again") from error
    head = 4 + 4 * ndim
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, ndim]):
        raise InputError(f"{there[0]} is not an IDX file of bytes in {ndim} dimensions; get it again")
    shape = np.frombuffer(raw, ">u4", ndim, 4).astype(np.int64)
    if len(raw) != head + shape.prod():
        raise InputError(f"{there[0]}: {len(raw) - head:,} values, where its head says {shape.prod():,}; get it again")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()


def celeba(folder: Path, attribute: str = "Smiling") -> Data:
    """CelebA: aligned faces, cropped to the middle and reduced to 64 x 64; labelled by an attribute, or all 0.

    The parts 0 and 2 of ``list_eval_partition.txt`` are trained on and held out. Raises InputError.
    """
    if find_spec("PIL") is None:
        raise InputError("pictures are read with Pillow: pip install 'distot[report]'")
    listed = folder / "list_eval_partition.txt"
    if not listed.is_file():
        raise InputError(f"{folder} has no {listed.name}, which says what to train on")
    part = dict(line.split() for line in listed.read_text().splitlines() if line.strip())
    label = _attributes(folder / "list_attr_celeba.txt", attribute)
    parts = []
    for number in "02":
        names = sorted(name for name, its in part.items() if its == number)
        if not names:
            raise InputError(f"{listed} names no picture of part {number}")
        parts += [
            torch.stack([_face(folder / "img_align_celeba" / name) for name in names]),
            torch.tensor([label.get(name, 0) for name in names]),
        ]
    return _data(folder.name, parts)


def _attributes(file: Path, attribute: str) -> dict[str, int]:
    """0 or 1 for each picture; empty without the file."""
    if not file.is_file():
        return {}
    lines = file.read_text().splitlines()
    names = lines[1].split()
    if attribute not in names:
        raise InputError(f"{file} has no attribute {attribute!r}; it has {', '.join(names)}")
    place = 1 + names.index(attribute)
    rows = (line.split() for line in lines[2:] if line.strip())
    return {row[0]: int(row[place] == "1") for row in rows}


def _face(file: Path) -> Tensor:
    """(3, 64, 64) bytes."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            across, down = picture.size
            if min(across, down) < CROP:
                raise InputError(f"{file} has {across} x {down} pixels; aligned faces have 178 x 218")
            left, top = (across - CROP) // 2, (down - CROP) // 2
            square = picture.convert("RGB").crop((left, top, left + CROP, top + CROP))
            small = np.array(square.resize((SIDE, SIDE), Image.Resampling.BOX))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}; get it again") from error
    return torch.from_numpy(small).movedim(-1, 0)
