"""``distot report``: one page that shows what a run has found, how it got there, and what to do next.

figures.py draws axes and marks; charts.py and pictures.py make the figures of the page, out of what story.py reads from
the run folder and detail.py finds with the latents; page.py puts them into page.html.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from distot.case import Room
from distot.errors import DistotError, InputError
from distot.report import charts, page, pictures
from distot.report import detail as details
from distot.report.detail import Decoder
from distot.report.figures import Figure
from distot.report.page import Detail
from distot.report.story import read
from distot.solution import Solution
from distot.store import Place, as_place, check_out, new_file
from distot.work import Load

__all__ = ["report"]


def report(
    run: str | Place,
    out: str | Place = "report.html",
    *,
    samples: int | None = None,
    detail: bool | None = None,
    decoder: str | Decoder | None = None,
    source: object = None,
    latents: ArrayLike | Tensor | str | Place | None = None,
    device: str | None = None,
) -> Place:
    """Writes a page about a run, finished or not, and returns where it is. It needs no other file and no network.

    out: a name that ends in .html; a page of ``report`` that is there is replaced, and nothing else is.
    samples: measures the cells with so many fresh samples; None takes what the run folder has, or 10 a latent.
    detail: whether to read the latents, for pictures and statistics of cells; None: if they have at most 2^28 numbers,
        and cells are measured if that is at most 2e12 flops. What is left out is said on the page.
    decoder: turns latents (n, d) into images (n, h, w) or (n, h, w, 1, 3 or 4), bytes or numbers, of which those in
        [0, 1] are shown as they are and others from their least to their largest; or FILE.py:FUNCTION. Needs Pillow.
    source, latents, device: as in ``load``.

    Takes no lock. Raises InputError for a decoder that is none, or a name that cannot be; StoreError if there is no
    run. Anything else that is missing or damaged is told on the page.
    """
    place = as_place(out)
    if not place.name.endswith(".html"):
        raise InputError(f"{out}: a page wants a name that ends in .html")
    if isinstance(place, Path) and (place.is_dir() or not place.absolute().parent.is_dir()):
        raise InputError(f"{out}: {'that is a folder' if place.is_dir() else f'there is no folder {place.parent}'}")
    reads = Load(as_place(run), latents=as_place(latents) if isinstance(latents, str) else latents).reads()
    ours = page.is_ours(place)
    check_out(place, *reads, goes_on=ours)
    if samples is not None and samples < 2:
        raise InputError(f"samples must be at least 2, not {samples}")
    if detail is False and (samples is not None or decoder is not None):
        raise InputError("samples and decoder need the latents; leave detail=False away")
    function = details.load_decoder(decoder) if isinstance(decoder, str) else decoder
    story = read(as_place(run))
    asked = detail or samples is not None or function is not None
    found = Detail()
    if detail is False:
        found = Detail(("Latents were not read, as it was asked for.",))
    elif not asked and not details.worth_reading(story.shape):
        n, d = story.shape
        found = Detail((f"{n:,} x {d:,} latents are not read without being asked for: distot report --detail",))
    elif story.checkpoint is not None:
        given = as_place(latents) if isinstance(latents, str) else latents
        task = Load(story.run.path, source, given, {} if device is None else {"device": device})
        try:
            solution = task(Room(show=False))
        except DistotError as error:
            if function is not None:
                raise
            found = Detail((f"Latents could not be read: {error}.",))
        else:
            found = _detail(solution, samples, bool(detail), function)
    text = page.render(story, found, time.strftime("%Y-%m-%d %H:%M"))
    with new_file(place, over=ours) as file:
        file.write_text(text, encoding="utf-8", errors="replace")  # a path may be no text
    return place


def _detail(solution: Solution, samples: int | None, always: bool, decoder: Decoder | None) -> Detail:
    why: tuple[str, ...] = ()
    images = () if decoder is None else _images(solution, decoder)
    measured = details.measured(solution, samples, always)
    if measured is None:
        why = ("Cells are not measured without being asked for, as there are many: distot report --detail",)
    cells, sums = measured or (None, None)
    ratio = None if measured is None else charts.shrunk(*measured)
    shown = pictures.transport(details.flow(solution), ratio, solution.facts.shape)
    return Detail(why, cells, sums, (shown, *images))


def _images(solution: Solution, decoder: Decoder) -> tuple[Figure, ...]:
    """Decoded latents, and decoded latents that are new."""
    index, latents = details.some_latents(solution)
    old = details.decoded(decoder, latents)
    ends = pictures.ends_of(old)
    caption = f"Latents {index[0]:,} to {index[-1]:,}, evenly spread, through the decoder."
    first = pictures.gallery("latents", "Latents, decoded", caption, old, ends)
    try:
        made = solution.generate(details.IMAGES)
    except InputError as error:  # too few latents to mix, or all noise refused
        return (Figure("latents", first.title, f"{first.caption} No new ones: {error}.", first.drawing),)
    new = details.decoded(decoder, np.asarray(made.samples, dtype=latents.dtype))
    caption = (
        "Fresh noise, sent to mixtures of the latents in whose cells, or next to which, it lies; never across a jump "
        "of the transport."
    )
    return first, pictures.gallery("generated", "New samples from noise, decoded", caption, new, ends)
