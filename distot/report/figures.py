"""Charts as SVG: scales, axes and marks. Colours are classes, so that the style of the page has light and dark ones.

Marks carry ``data-tip``, a text that the page shows under the pointer. Positions are in the units of the view box.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from distot.report.words import compact

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 46
Element = ElementTree.Element


@dataclass(frozen=True)
class Figure:
    """What stands in a card of the page: a drawing, what it says, and its numbers as a table."""

    name: str  # the element's id
    title: str
    caption: str
    drawing: Markup
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    legend: tuple[tuple[str, str], ...] = ()  # (class of the mark, what it is)


def element(tag: str, text: str = "", **attributes: object) -> Element:
    """An element; ``_`` at the end of an attribute is dropped, any other becomes ``-``; floats get two places."""
    shown = {
        name.rstrip("_").replace("_", "-"): f"{value:.2f}" if isinstance(value, float) else str(value)
        for name, value in attributes.items()
        if value is not None
    }
    made = Element(tag, shown)
    made.text = text or None
    return made


def markup(drawing: Element) -> Markup:
    """The text of an element; its parts are escaped."""
    return Markup(ElementTree.tostring(drawing, encoding="unicode"))


def drawing(name: str, title: str, description: str, width: float, height: float) -> Element:
    """An SVG that a screen reader announces by its title and description."""
    svg = element("svg", viewBox=f"0 0 {width:g} {height:g}", role="img", aria_labelledby=f"{name}-t {name}-d")
    svg.append(element("title", title, id=f"{name}-t"))
    svg.append(element("desc", description, id=f"{name}-d"))
    return svg


def points(x: ArrayLike, y: ArrayLike) -> str:
    """The path through points (m,), (m,), with one decimal."""
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(np.asarray(x), np.asarray(y), strict=True))


@dataclass(frozen=True)
class Scale:
    """From values low..high to positions start..end, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: ArrayLike) -> NDArray[np.float64]:
        """Positions; values beyond the ends are drawn at the ends."""
        values = np.clip(np.asarray(value, dtype=np.float64), self.low, self.high)
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    @cached_property
    def ticks(self) -> list[float]:
        """Some four to eight round numbers."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), min(math.ceil(math.log10(self.high)), 307) + 1)
            every = max(1, -(-len(decades) // 7))
            factors = (1, 2, 5) if len(decades) <= 3 else (1,)
            found = [f * 10.0**e for e in decades if e % every == 0 for f in factors]
        else:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
            step *= next((f for f in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * f) <= 6), 10)
            found = [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        near = 1e-9 * (self.high - self.low)
        return [value for value in found if self.low - near <= value <= self.high + near]


def span(values: Iterable[float], log: bool = False, room: float = 0.05) -> tuple[float, float]:
    """The ends of a scale that shows all values, with some room."""
    found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(found), max(found)) if found else (1.0, 1.0)
    if log:
        factor = max((high / low) ** room, 1.15)
        return low / factor, high * factor
    more = room * (high - low) or abs(high) or 1.0
    return low - more, high + more


class Chart:
    """Axes, and marks in the order in which they are drawn. ``bare``: without numbers along y."""

    def __init__(
        self,
        name: str,
        title: str,
        description: str,
        x: tuple[float, float],
        y: tuple[float, float],
        labels: Sequence[str],
        log_x: bool = False,
        log_y: bool = False,
        bare: bool = False,
    ) -> None:
        self.x = Scale(*x, LEFT, WIDTH - RIGHT, log_x)
        self.y = Scale(*y, HEIGHT - BOTTOM, TOP, log_y)
        self.svg = drawing(name, title, description, WIDTH, HEIGHT)
        self.svg.set("class", "chart")
        self._axes(labels, [] if bare else self.y.ticks)

    def _axes(self, labels: Sequence[str], y_ticks: Sequence[float]) -> None:
        x_label, y_label = labels
        axes = element("g", class_="axes", aria_hidden="true")
        bottom = HEIGHT - BOTTOM
        for value in y_ticks:
            at = float(self.y(value))
            axes.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
            axes.append(element("text", compact(value), class_="tick", x=LEFT - 7, y=at + 4, text_anchor="end"))
        for value in self.x.ticks:
            at = float(self.x(value))
            axes.append(element("line", class_="axis", x1=at, x2=at, y1=bottom, y2=bottom + 4))
            axes.append(element("text", compact(value), class_="tick", x=at, y=bottom + 18, text_anchor="middle"))
        axes.append(element("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
        axes.append(element("text", x_label, class_="label", x=WIDTH - RIGHT, y=HEIGHT - 8, text_anchor="end"))
        axes.append(element("text", y_label, class_="label", x=4, y=14))
        self.svg.append(axes)

    def line(self, x: ArrayLike, y: ArrayLike, kind: str) -> None:
        self.svg.append(element("path", class_=f"line {kind}", d=points(self.x(x), self.y(y))))

    def band(self, x: ArrayLike, low: ArrayLike, high: ArrayLike, kind: str) -> None:
        at = self.x(x)
        outline = points(np.concatenate([at, at[::-1]]), np.concatenate([self.y(high), self.y(low)[::-1]]))
        self.svg.append(element("path", class_=f"band {kind}", d=f"{outline}Z"))

    def dots(self, x: ArrayLike, y: ArrayLike, kind: str, tips: Sequence[str], radius: float = 4.0) -> None:
        for a, b, tip in zip(np.atleast_1d(self.x(x)), np.atleast_1d(self.y(y)), tips, strict=True):
            self.svg.append(element("circle", class_=f"dot {kind}", cx=float(a), cy=float(b), r=radius, data_tip=tip))

    def whisker(self, y: float, low: float, high: float, kind: str) -> None:
        """A level bar from low to high."""
        at, (left, right) = float(self.y(y)), (float(self.x(end)) for end in (low, high))
        self.svg.append(element("line", class_=f"line {kind}", x1=left, x2=right, y1=at, y2=at))

    def say(self, x: float, y: float, text: str, kind: str) -> None:
        """A text above a point."""
        at = min(max(float(self.x(x)), LEFT + 60), WIDTH - RIGHT - 60)
        self.svg.append(
            element("text", text, class_=f"name {kind}", x=at, y=float(self.y(y)) - 12, text_anchor="middle")
        )

    def bars(self, edges: ArrayLike, heights: Sequence[float], kind: str, tips: Sequence[str]) -> None:
        """Bars from zero between neighbouring edges (m + 1,), of heights (m,)."""
        at, floor = self.x(edges), HEIGHT - BOTTOM
        for left, right, height, tip in zip(at[:-1], at[1:], heights, tips, strict=True):
            top = float(self.y(height))
            width = max(float(right - left) - 1, 0.5)
            self.svg.append(
                element(
                    "rect", class_=f"bar {kind}", x=float(left), y=top, width=width, height=floor - top, data_tip=tip
                )
            )

    def rule(self, kind: str, text: str, y: float | None = None, x: float | None = None) -> None:
        """A straight line across the chart, with its name."""
        if y is not None:
            at = float(self.y(y))
            self.svg.append(element("line", class_=f"rule {kind}", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
            self.svg.append(element("text", text, class_=f"name {kind}", x=LEFT + 6, y=at - 5))
        if x is not None:
            at = float(self.x(x))
            self.svg.append(element("line", class_=f"rule {kind}", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM))
            self.svg.append(element("text", text, class_=f"name {kind}", x=at + 5, y=TOP + 10))

    @property
    def markup(self) -> Markup:
        return markup(self.svg)
