"""Pictures of the transport, and of decoded latents.

Legend: N latents, S of them shown, B samples of noise.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from distot.errors import InputError
from distot.power import Array
from distot.report.detail import Flow
from distot.report.figures import Element, Figure, drawing, element, markup, points
from distot.report.words import count, number, percent

SIDE, FLAT = 640, 300  # of a picture, and its height if it shows a line
EDGES = (0.5, 0.75, 0.9, 1.1, 1.33, 2.0)  # of mass over wanted mass, between colours
NAMES = ("under ½", "½ to ¾", "¾ to 0.9", "0.9 to 1.1", "1.1 to 1⅓", "1⅓ to 2", "over 2")
PIXELS = 96  # the least side of a decoded image on the page
MOST_PIXELS = 160
COLUMNS = 8


def transport(flow: Flow, masses: Array | None, shape: tuple[int, int]) -> Figure:
    """Latents, coloured by what they got (``masses`` (N,) over wanted ones), and noise that flows to them; behind them
    the power diagram if it is known."""
    height = FLAT if flow.kind == "line" else SIDE
    everything = np.concatenate([flow.latents, flow.noise])
    low, high = np.quantile(everything, 0.005, axis=0), np.quantile(everything, 0.995, axis=0)
    middle, reach = 0.5 * (low + high), 0.54 * np.maximum(high - low, 1e-12)
    reach = reach if flow.kind == "line" else np.full(2, reach.max())
    half = np.array([SIDE, height]) / 2

    def place(x: Array) -> Array:
        return half + (x - middle) / reach * half * np.array([1, -1])

    ratio = flow.ratio
    if ratio is None and masses is not None:
        ratio = masses[flow.index]
    colours = np.full(len(flow.index), 3) if ratio is None else np.searchsorted(EDGES, ratio)
    name, title = "transport", _title(flow)
    told = (
        f"{count(len(flow.index))} of {count(shape[0])} latents as dots, and {count(len(flow.noise))} samples of "
        "noise, each with an arrow to its latent."
    )
    svg = drawing(name, title, told, SIDE, height)
    svg.set("class", "flow")
    if flow.polygons is not None:
        svg.append(_diagram(flow, colours, place, ratio))
    radius = float(np.clip(72 / math.sqrt(max(len(flow.index), 1)), 1.8, 5.0))
    dots = element("g", class_="latents")
    tips = _tips(flow, ratio)
    for (x, y), colour, tip in zip(place(flow.latents), colours, tips, strict=True):
        dots.append(element("circle", class_=f"mass{colour}", cx=float(x), cy=float(y), r=radius, data_tip=tip))
    svg.append(_arrows(place(flow.noise), place(flow.to)))
    svg.append(dots)
    svg.append(_noise(place(flow.noise), place(flow.to)))
    legend = [("noise", "noise")] + ([] if ratio is not None else [("mass3", "latents")])
    legend += [(f"mass{k}", text) for k, text in enumerate(NAMES)] if ratio is not None else []
    return Figure(name, title, _caption(flow, shape, ratio), markup(svg), legend=tuple(legend))


def _title(flow: Flow) -> str:
    if flow.kind == "projection":
        return "The transport, seen along the principal axes of the latents"
    return "The power diagram and its transport" if flow.polygons is not None else "The transport"


def _caption(flow: Flow, shape: tuple[int, int], ratio: Array | None) -> str:
    parts = ["Every sample of noise goes to the latent whose cell it lies in: move the slider, or press Play."]
    if flow.kind == "projection":
        parts.append(
            f"Two of {shape[1]} dimensions, which hold {percent(flow.explained)} of the latents' variance: arrows may "
            "seem to cross that do not."
        )
    if flow.kind == "line":
        parts.append("Noise lies on the lower edge, latents on the upper one.")
    if len(flow.index) < shape[0] and flow.polygons is None:
        parts.append(f"{count(len(flow.index))} of {count(shape[0])} latents are shown, drawn at random.")
    if flow.polygons is not None:
        parts.append("Cells and their masses are exact.")
    if ratio is not None:
        parts.append(
            "Colours are mass over wanted mass"
            + ("." if flow.ratio is not None else ", drawn towards 1 by as much as is noise of the measurement.")
        )
    return " ".join(parts)


def _tips(flow: Flow, ratio: Array | None) -> Sequence[str]:
    if ratio is None:
        return [f"latent {i}" for i in flow.index]
    return [f"latent {i}: {number(float(r), 3)} of its mass" for i, r in zip(flow.index, ratio, strict=True)]


def _diagram(flow: Flow, colours: NDArray[Any], place: Any, ratio: Array | None) -> Element:
    assert flow.polygons is not None
    group = element("g", class_="cells")
    for polygon, colour, tip in zip(flow.polygons, colours, _tips(flow, ratio), strict=True):
        if len(polygon):
            group.append(element("path", class_=f"cell mass{colour}", d=f"{points(*place(polygon).T)}Z", data_tip=tip))
    return group


def _arrows(start: Array, end: Array) -> Element:
    """One path for all lines from noise to latents."""
    lines = "".join(f"M{a:.0f},{b:.0f}L{c:.0f},{d:.0f}" for (a, b), (c, d) in zip(start, end, strict=True))
    return element("path", class_="arrows", d=lines)


def _noise(start: Array, end: Array) -> Element:
    """Circles that the style of the page moves by the share --t of their way."""
    group = element("g", class_="noise")
    for (a, b), (c, d) in zip(start, end, strict=True):
        group.append(element("circle", cx=float(a), cy=float(b), r=2.6, style=f"--dx:{c - a:.0f}px;--dy:{d - b:.0f}px"))
    return group


def gallery(name: str, title: str, caption: str, images: NDArray[Any], ends: tuple[float, float]) -> Figure:
    """Images (n, h, w[, c]) side by side in one PNG. ``ends``: what black and white are."""
    sheet = _sheet(_bytes(images, ends))
    text = f"{len(images)} images of {images.shape[2]} by {images.shape[1]} pixels: {title}"
    shown = Markup('<img class="gallery" alt="{}" width="{}" height="{}" src="data:image/png;base64,{}">').format(
        escape(text), sheet.shape[1], sheet.shape[0], base64.b64encode(_png(sheet)).decode()
    )
    return Figure(name, title, caption, shown)


def ends_of(*images: NDArray[Any]) -> tuple[float, float]:
    """What black and white are for all of these images: 0 and 255 for bytes, 0 and 1 for numbers in between, else the
    least and the largest number."""
    if all(its.dtype == np.uint8 for its in images):
        return 0.0, 255.0
    low, high = min(float(its.min()) for its in images), max(float(its.max()) for its in images)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, max(high, low + 1e-12))


def _bytes(images: NDArray[Any], ends: tuple[float, float]) -> NDArray[np.uint8]:
    """(n, h, w, 3) with 4 channels reduced to 3."""
    low, high = ends
    grey = (np.clip((images.astype(np.float64) - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
    grey = grey[..., None] if grey.ndim == 3 else grey
    return np.repeat(grey, 3, axis=3) if grey.shape[3] == 1 else grey[..., :3]


def _sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 4): images enlarged, or thinned out, to a like size, in rows, with clear gaps between them."""
    h, w = images.shape[1:3]
    thin = -(-max(h, w) // MOST_PIXELS)
    images = images[:, ::thin, ::thin]
    zoom = max(1, PIXELS // max(images.shape[1:3]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    n, h, w = images.shape[:3]
    gap, columns = 6, min(COLUMNS, n)
    rows = -(-n // columns)
    sheet = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, 4), dtype=np.uint8)
    for k, image in enumerate(images):
        top, left = (h + gap) * (k // columns), (w + gap) * (k % columns)
        sheet[top : top + h, left : left + w] = np.concatenate([image, np.full((h, w, 1), 255, np.uint8)], axis=2)
    return sheet


def _png(sheet: NDArray[np.uint8]) -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("images on the page need Pillow: pip install 'distot[report]'") from error
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
