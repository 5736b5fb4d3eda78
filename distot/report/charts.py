"""The charts of the page, each from what is known of a run.

Legend: N latents, n atoms, M samples. Numbers in brackets are those of docs/math.md.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.special import gammainc

from distot.cells import Cells, Sums
from distot.power import Array
from distot.report.figures import Chart, Figure, span
from distot.report.story import Session, Story
from distot.report.words import compact, count, duration, number, percent, plus_minus

SURE = 1.96  # standard errors on either side that hold 95 %
ROWS = 40  # of a chart's table
BINS = 36
MOST_POINTS = 160  # of a line


def progress(story: Story) -> Figure | None:
    """chi2 against the work, with its error, the goal, and the statistical limit (11)."""
    looks, goal, n = story.history, story.options["until_chi2"], story.atoms
    if not looks:
        return None
    samples, chi2, error = (np.array([getattr(look, name) for look in looks]) for name in ("samples", "chi2", "error"))
    certificate = story.certificate
    limits = (n - 1) / samples
    shown = [*chi2, *limits, *(chi2 + SURE * error)] + ([] if goal is None else [goal])
    if certificate is not None:
        shown.append(certificate.chi2)
    low, high = span([value for value in shown if value > 0.05 * (goal or min(limits))], log=True)
    high = min(high, 1.5 * max([*chi2, *limits, goal or 0.0]))
    x = span([*samples, story.samples], log=True)
    name, title = "progress", "How the masses became right"
    told = f"chi2 at {len(looks)} looks, from {number(chi2[0])} to {number(chi2[-1])} at {count(samples[-1])} samples."
    chart = Chart(name, title, told, x, (low, high), ("samples searched", "chi2, error of the cell masses"), True, True)
    least = np.full(len(looks), low)
    chart.band(samples, np.maximum(chi2 - SURE * error, least), np.maximum(chi2 + SURE * error, least), "one")
    ends = np.geomspace(*x, 40)
    chart.line(ends, np.maximum((n - 1) / ends, low), "limit")
    if goal is not None:
        chart.rule("goal", f"goal {compact(goal)}", y=goal)
    chart.line(samples, np.maximum(chi2, low), "one")
    texts = [f"{count(m)} samples: chi2 {plus_minus(v, e)}" for m, v, e in zip(samples, chi2, error, strict=True)]
    chart.dots(samples, np.maximum(chi2, low), "one", texts, 3.5)
    legend = [("one", "chi2 and its 95 % interval"), ("limit", "limit of plain samples, (n − 1)/M")]
    if certificate is not None:
        found = plus_minus(certificate.chi2, certificate.chi2_error)
        chart.dots([story.samples], [max(certificate.chi2, low)], "two", [f"certificate: chi2 {found}"], 5.5)
        legend.append(("two", "certificate, on samples of its own"))
    rows = [
        (
            count(look.samples),
            plus_minus(look.chi2, look.error),
            number((n - 1) / look.samples),
            "yes" if look.close else "",
        )
        for look in looks
    ]
    caption = (
        "chi2 is the mean squared relative error of the cells' masses; 0 is exact. Below the grey line no method can "
        "come that uses plain independent samples once each. A look can come out below zero by chance; it is drawn at "
        "the bottom then."
    )
    columns = ("samples", "chi2 ± standard error", "limit", "close look")
    return Figure(name, title, caption, chart.markup, columns, tuple(rows[-ROWS:]), tuple(legend))


def cost(story: Story) -> Figure | None:
    """The bound (9) on W2² (or other cost) with its limit, and the map's cost, of every certificate in the log."""
    found, at = [], 0
    for event in story.events:
        if event["event"] == "stop":
            at = event["samples"]
        if event["event"] == "certificate":
            found.append((at, event))
    if not found and story.stored is not None:
        found = [(story.samples, story.stored[0].to_dict())]
    if not found:
        return None
    found = found[-4:]
    last = found[-1][1]
    log = last.get("cost") == "log"
    value, unit = ("the least cost", "-log<x, y>") if log else ("W2²", "squared distance")
    keys = (("w2_squared_bound", "one", f"lower bound on {value}"), ("map_cost", "two", "cost of the map"))
    ends = [c[key] + sign * SURE * c[f"{key}_error"] for _, c in found for key, *_ in keys for sign in (-1, 1)]
    limits = [c["w2_squared_limit"] for _, c in found]
    bound, spent = (plus_minus(last[key], last[f"{key}_error"]) for key, *_ in keys)
    name, title = "cost", "What the transport costs"
    told = f"The lower bound on {value} is {bound}, the cost of the map {spent}."
    lines = 2 * len(found)
    chart = Chart(name, title, told, span([*ends, *limits], room=0.08), (0.0, float(lines)), (unit, ""), bare=True)
    rows = []
    for place, ((at, c), limit) in enumerate(zip(found, limits, strict=True)):
        for line, (key, kind, what) in enumerate(keys):
            value, error, y = c[key], c[f"{key}_error"], lines - 2 * place - (0.62, 1.38)[line]
            text = f"{what}: {plus_minus(value, error)}, after {count(at)} samples"
            chart.whisker(y, value - SURE * error, value + SURE * error, kind)
            chart.dots([value], [y], kind, [text], 6)
            chart.say(value, y, plus_minus(value, error), kind)
        sure = f"with {c['level']:.0%} confidence {value} ≥ {number(limit, 6)}"
        chart.dots([limit], [lines - 2 * place - 0.62], "edge", [sure], 3.5)
        of = (plus_minus(c[key], c[f"{key}_error"]) for key, *_ in keys)
        rows.append((count(at), *of, f"≥ {number(limit, 6)}"))
    legend = (
        ("one", f"lower bound on {value}, 95 % interval"),
        ("edge", f"limit: {value} is above"),
        ("two", "cost of the map found"),
    )
    caption = (
        f"The bound holds whatever the heights. The map's own cost may be lower or higher than {value}, because its "
        "masses are not exact; the two meet as chi2 goes to 0."
    )
    if len(found) > 1:
        caption += " One pair for each certificate, the newest at the bottom."
    columns = ("samples", "lower bound", "cost of the map", "limit")
    return Figure(name, title, caption, chart.markup, columns, tuple(rows), legend)


def masses(cells: Cells, sums: Sums) -> Figure:
    """How far each cell's mass is from what it should be, and what the noise of the samples alone would give."""
    there = cells.wanted > 0
    wanted, ratio, m = cells.wanted[there], cells.mass[there] / cells.wanted[there], float(cells.samples)
    variance = _noise(sums) / (m * wanted)  # of a ratio, if the mass were exact
    edges = _ratio_edges(ratio, wanted, m)
    seen, _ = np.histogram(np.clip(ratio, edges[0], edges[-1]), edges)
    expected = _by_chance(edges, variance)
    low, high = edges[0], edges[-1]
    spread, noise = float(np.average((ratio - 1) ** 2, weights=wanted)), float(np.average(variance, weights=wanted))
    rest = max(spread - noise, 0.0) ** 0.5
    name, title = "masses", "How much each cell got"
    told = f"Histogram of mass over wanted mass of {count(len(ratio))} latents in {len(seen)} bins, and noise alone."
    chart = Chart(
        name,
        title,
        told,
        (low, high),
        (0.0, 1.08 * float(max(seen.max(), expected.max()))),
        ("mass / wanted mass", "latents"),
    )
    ranges = [f"{number(a, 3)} to {number(b, 3)}" for a, b in pairwise(edges)]
    tips = [
        f"{where}: {count(k)} latents, {number(e, 3)} by noise alone"
        for where, k, e in zip(ranges, seen, expected, strict=True)
    ]
    chart.bars(edges, [float(k) for k in seen], "one", tips)
    chart.line(0.5 * (edges[:-1] + edges[1:]), expected, "two")
    chart.rule("goal", "as wanted", x=1.0)
    caption = (
        f"From {count(m)} fresh samples, {number(m / len(ratio), 3)} a latent. The spread is "
        f"{percent(spread**0.5)}, of which noise of this measurement alone makes {percent(noise**0.5)}; what is left, "
        f"{percent(rest)}, is the map's."
    )
    rows = [(where, count(k), number(e, 3)) for where, k, e in zip(ranges, seen, expected, strict=True)]
    legend = (("one bar", "latents"), ("two", "if all masses were exact: noise of the measurement"))
    return Figure(
        name, title, caption, chart.markup, ("mass / wanted", "latents", "by noise alone"), tuple(rows), legend
    )


def _noise(sums: Sums) -> float:
    """Variance of the counts over that of independent samples; orbits make it another number than 1."""
    squares = float((sums.squares - sums.total**2 / max(sums.orbits, 1)).sum())
    return max(squares / max(float(sums.total.sum()), 1.0), 1e-12)


def shrunk(cells: Cells, sums: Sums) -> Array:
    """Mass over wanted mass (N,), drawn towards 1 by the share of its variance that is noise (empirical Bayes)."""
    ratio = np.where(cells.wanted > 0, cells.mass / np.maximum(cells.wanted, 1e-300), 1.0)
    spread = float(cells.wanted @ (ratio - 1) ** 2)
    noise = _noise(sums) * float((cells.wanted > 0).sum()) / cells.samples
    signal = max(0.0, 1 - noise / spread) if spread > 0 else 0.0
    return np.asarray(1 + signal * (ratio - 1), dtype=np.float64)


def _ratio_edges(ratio: Array, wanted: Array, m: float) -> Array:
    """Edges of bins; where all latents want the same, in the middle between counts, so that no bin can stay empty for
    want of a number in it."""
    high = float(max(np.quantile(ratio, 0.999) * 1.05, 1.2))
    low = float(max(min(np.quantile(ratio, 0.001) * 0.95, 0.8), 0.0))
    low = 0.0 if low < 0.2 else low
    if np.ptp(wanted) > 1e-9 * wanted[0]:
        return np.linspace(low, high, BINS + 1)
    each = m * float(wanted[0])
    step = max(1, round((high - low) * each / BINS))
    first = max(0, round(low * each))
    number_of = int(np.ceil((high * each - first) / step)) + 1
    return np.asarray((first - 0.5 + step * np.arange(number_of + 1)) / each, dtype=np.float64)


def _by_chance(edges: Array, variance: Array) -> Array:
    """Expected latents in each bin if ratios had mean 1 and these variances (N,): gamma laws from -1 on, which have the
    skewness of counts, for 64 groups of them."""
    groups = np.array_split(np.sort(variance), min(64, len(variance)))
    found = np.zeros(len(edges) - 1)
    for group in groups:
        typical = float(group.mean())
        below = gammainc(4 / typical, 2 * np.maximum(edges + 1, 0) / typical)
        below[0], below[-1] = 0.0, 1.0
        found += len(group) * np.diff(below)
    return found


def margins(cells: Cells) -> Figure | None:
    """How clearly samples belong to their cells."""
    known = cells.margin[np.isfinite(cells.margin) & (cells.margin > 0)]
    if len(known) < 2:
        return None
    low, high = span(np.quantile(known, [0.001, 0.999]).tolist(), log=True, room=0.02)
    edges = np.geomspace(low, high, BINS + 1)
    seen, _ = np.histogram(np.clip(known, low, high), edges)
    name, title, middle = "margins", "How clear the choice is", float(np.median(known))
    told = f"Histogram of mean margins of {count(len(known))} cells, the median is {number(middle, 3)}."
    chart = Chart(
        name, title, told, (low, high), (0.0, 1.08 * float(seen.max())), ("mean margin of a cell", "cells"), True
    )
    ranges = [f"{number(a, 3)} to {number(b, 3)}" for a, b in pairwise(edges)]
    chart.bars(
        edges, [float(k) for k in seen], "three", [f"{r}: {count(k)} cells" for r, k in zip(ranges, seen, strict=True)]
    )
    chart.rule("goal", f"median {number(middle, 3)}", x=middle)
    caption = (
        "The margin of a sample is its best score less the second best, in units of cost: how much the next latent "
        "would have to be raised to get it. Small margins are cells that share their samples' neighbourhood "
        "with many others."
    )
    rows = tuple((r, count(k)) for r, k in zip(ranges, seen, strict=True))
    return Figure(name, title, caption, chart.markup, ("margin", "cells"), rows, (("three bar", "cells"),))


def speed(story: Story) -> Figure | None:
    """Samples a second while the run was at work, over all its sessions."""
    at, rate, before = [], [], 0.0
    for session in story.sessions:
        heard = [e for e in session.events if e["event"] in ("begin", "resume", "step", "check")]
        for a, b in pairwise(heard):
            if b["seconds"] > a["seconds"] and b["samples"] > a["samples"]:
                at.append((before + a["seconds"], before + b["seconds"]))
                rate.append((b["samples"] - a["samples"], b["seconds"] - a["seconds"]))
        before += session.seconds
    if len(at) < 3:
        return None
    groups = np.array_split(np.arange(len(at)), min(MOST_POINTS, len(at)))
    middle = np.array([(at[g[0]][0] + at[g[-1]][1]) / 2 for g in groups])
    mean = np.array([sum(rate[i][0] for i in g) / sum(rate[i][1] for i in g) for g in groups])
    name, title = "speed", "How fast it went"
    told = f"Samples a second over {duration(before)}, between {count(mean.min())} and {count(mean.max())}."
    chart = Chart(
        name,
        title,
        told,
        span([0.0, middle[-1]], room=0.01),
        (0.0, 1.1 * float(mean.max())),
        ("seconds at work", "samples a second"),
    )
    chart.line(middle, mean, "one")
    tips = [f"after {duration(t)}: {count(v)} samples a second" for t, v in zip(middle, mean, strict=True)]
    chart.dots(middle, mean, "one", tips, 3.5 if len(groups) < 40 else 2.0)
    caption = "Search work in plain samples, as the goal counts it; looks at chi2 and checkpoints are part of the time."
    rows = [(duration(t), count(v)) for t, v in zip(middle, mean, strict=True)]
    every = -(-len(rows) // ROWS)
    return Figure(name, title, caption, chart.markup, ("at", "samples a second"), tuple(rows[::every]))


PHASES = (("search", "one"), ("update", "two"), ("store", "three"), ("waited", "four"))


def processes(session: Session) -> list[dict[str, object]]:
    """Seconds of each process by phase, and megabytes sent, from the last event "grid" of a session."""
    told = session.last("grid")
    if told is None:
        return []
    rows: list[dict[str, object]] = []
    totals = [sum(told.get(name, [0.0] * 1024)[rank] for name, _ in PHASES) for rank in range(len(told["sent"]))]
    most = max([*totals, 1e-9])
    for rank, sent in enumerate(told["sent"]):
        parts = [(name, kind, float(told[name][rank])) for name, kind in PHASES if name in told]
        bars = [(name, kind, seconds, 100 * seconds / most) for name, kind, seconds in parts]
        rows.append({"rank": rank, "bars": bars, "sent": sent, "slowest": rank == told["slowest"]})
    return rows


def worst(cells: Cells, sums: Sums, rows: int = 12) -> tuple[list[tuple[str, ...]], list[int]]:
    """Latents whose mass is off by most standard errors: index, wanted, got, ratio, cost; and all that got nothing."""
    m = float(cells.samples)
    error = np.sqrt(np.maximum(cells.mass_error**2, _noise(sums) * cells.wanted / m))
    sigma = np.where(cells.wanted > 0, (cells.mass - cells.wanted) / np.maximum(error, 1e-300), 0.0)
    order = np.argsort(-np.abs(sigma), kind="stable")[:rows]
    found: list[tuple[str, ...]] = [
        (
            str(i),
            number(cells.wanted[i], 3),
            plus_minus(cells.mass[i], cells.mass_error[i]) if cells.mass[i] else "0",
            number(cells.mass[i] / cells.wanted[i], 3),
            f"{sigma[i]:+.1f}".replace("-", "−"),
            number(cells.cost[i], 4),
        )
        for i in order.tolist()
        if cells.wanted[i] > 0
    ]
    return found, np.flatnonzero((cells.wanted > 0) & (cells.mass == 0)).tolist()
