"""The page: what each part of it says, put into its template.

Legend: N latents, d dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from distot.cells import Cells, Sums
from distot.report import charts, words
from distot.report.figures import Figure
from distot.report.story import Story
from distot.store import Place, explained, typed

MARK = '<meta name="generator" content="distot report">'  # in page.html: the next page may replace this one
HEAD = 4096  # bytes of a page in which it stands
FEW = 24  # empty latents that are named
STATES = {  # of a run, by its reason to stop: (kind of badge, words)
    "until_chi2": ("good", "goal reached"),
    "exact": ("good", "exact"),
    "max_samples": ("fair", "samples spent"),
    "max_seconds": ("fair", "time is up"),
    "sampled": ("fair", "not exact"),
    "interrupted": ("fair", "interrupted"),
}


@dataclass(frozen=True)
class Detail:
    """What the latents add; ``why`` says what of it is not here."""

    why: tuple[str, ...] = ()
    cells: Cells | None = None
    sums: Sums | None = None
    figures: tuple[Figure, ...] = field(default=())


def render(story: Story, detail: Detail, written: str) -> str:
    """The page, whole: no file or address is needed to show it."""
    environment = Environment(
        loader=PackageLoader("distot", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(words=words)
    cells, sums = detail.cells, detail.sums
    known = cells is not None and sums is not None
    some = [charts.progress(story), charts.cost(story)]
    if cells is not None and sums is not None:
        some += [charts.masses(cells, sums), charts.margins(cells)]
    rows, empty = charts.worst(cells, sums) if cells is not None and sums is not None else ([], [])
    return environment.get_template("page.html").render(
        title=headline(story),
        badge=badge(story),
        path=str(story.run.path),
        written=written,
        lead=lead(story),
        tiles=tiles(story),
        figures=[figure for figure in some if figure is not None],
        pictures=detail.figures,
        speed=charts.speed(story),
        worst=rows,
        known=known,
        empty=[str(i) for i in empty[:FEW]],
        empties=len(empty),
        missing=detail.why,
        notes=story.notes,
        sessions=sessions(story),
        processes=charts.processes(story.sessions[-1]) if story.sessions else [],
        phases=[name for name, _ in charts.PHASES],
        options=options(story),
        environment=environment_of(story),
        commands=commands(story),
    )


def is_ours(place: Place) -> bool:
    """Whether the file at a place is a page of this kind."""
    with explained("read", place):
        if not place.is_file():
            return False
        if isinstance(place, Path):
            with place.open("rb") as file:
                return MARK.encode() in file.read(HEAD)
        return MARK.encode() in place.read_bytes()[:HEAD]


def headline(story: Story) -> str:
    n, d = story.shape
    many = "1 dimension" if d == 1 else f"{words.count(d)} dimensions"
    return f"{_source(story)} to {words.count(n)} latents in {many}"


def _source(story: Story) -> str:
    kind = str(story.config["source"]["kind"])
    names = {
        "gaussian": "Gaussian noise",
        "cube": "A cube",
        "ball": "A ball",
        "sphere": "A sphere",
        "samples": "Samples",
    }
    return names.get(kind, f"A source ({kind})")


def badge(story: Story) -> tuple[str, str]:
    if story.reason is not None:
        return STATES[story.reason]
    if story.running:
        return "fair", "at work"
    return "poor", "not finished" if story.checkpoint is not None else "no checkpoint yet"


def lead(story: Story) -> list[str]:
    """What was done and what came out, for somebody who sees this for the first time."""
    many, options = words.count(story.shape[0]), story.options
    share = "the share of the noise that its mass asks for" if story.config["mass"] else "an equal share of the noise"
    done = (
        f"The space of the noise was split into {many} cells, one for each latent, so that every latent gets {share}, "
        "at the least mean squared distance between the two."
    )
    if options["epsilon"] is not None:
        done = (
            f"Noise was shared among {many} latents by the entropic plan at temperature "
            f"{words.number(options['epsilon'])}: every latent gets {share}, at the least cost plus blur."
        )
    return [done, _ending(story), _verdict(story)]


def _ending(story: Story) -> str:
    if story.reason is not None:
        return f"It stopped because {story.explanation}."
    spoke = "" if story.spoke is None else f"; its last sign of life was {words.ago(story.spoke)}"
    state = "at work" if story.running else "not finished: it was killed, or its machine went away"
    return f"It is {state}{spoke}."


def _verdict(story: Story) -> str:
    """What the certificate says, in words."""
    found = story.certificate
    if found is None:
        return _uncertified(story)
    drawn, off = words.count(found.samples), words.percent(max(found.chi2, 0.0) ** 0.5)
    text = f"Measured on {drawn} fresh samples, the shares are off by {off}, root mean square"
    if found.chi2 < 2 * found.chi2_error:
        most = words.percent(max(found.chi2_upper, 0.0) ** 0.5)
        text = (
            f"On {drawn} fresh samples no error of the shares can be told from chance: at most {most}, root mean square"
        )
    if found.epsilon is not None:
        return f"{text}."
    if found.empty == 0:
        return f"{text}; every cell won at least one of them."
    chance = words.number(found.empty_by_chance, 2)
    return f"{text}; {words.count(found.empty)} cells won none of them ({chance} would by chance alone)."


def _uncertified(story: Story) -> str:
    if story.stored is not None:
        return "The certificate in the folder is of earlier heights, so it is not shown as the result."
    if story.history:
        last = story.history[-1]
        return f"There is no certificate yet; at the last look chi2 was {words.plus_minus(last.chi2, last.error)}."
    return "There is no certificate yet, and chi2 has not been looked at."


def tiles(story: Story) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of the figures to look at first."""
    found, goal = story.certificate, story.options["until_chi2"]
    shown: list[tuple[str, str, str]] = []
    aim = "no goal was set" if goal is None else f"the goal was {words.compact(goal)}"
    meaning = f"squared relative error of the cell masses; {aim}"
    if found is not None:
        shown.append(("chi2", words.plus_minus(found.chi2, found.chi2_error), meaning))
        what = "W2²" if found.epsilon is None else "entropic cost, twice"
        what = "least cost" if found.cost == "log" else what
        guess = words.plus_minus(found.w2_squared_bound, found.w2_squared_bound_error)
        sure = f"the true value is above this with {found.level:.0%} confidence; best guess {guess}"
        shown.append((what, f"≥ {words.number(found.w2_squared_limit, 5)}", sure))
    elif story.history:
        last = story.history[-1]
        shown.append(("chi2, last look", words.plus_minus(last.chi2, last.error), meaning))
    each = f"{words.number(story.samples / max(story.atoms, 1), 3)} a latent"
    if found is not None and story.samples:
        efficiency = (found.atoms - 1) / (story.samples * max(found.chi2, found.chi2_error))
        each += f"; efficiency {words.number(efficiency, 2)}, where plain samples without waste give 1"
    shown.append(("samples", words.count(story.samples), each))
    if story.sessions:
        seconds = sum(session.seconds for session in story.sessions)
        times = "" if len(story.sessions) == 1 else f" in {len(story.sessions)} sessions"
        grid = story.sessions[-1].events[0].get("grid", [1, 1])
        on = "one process" if grid[0] * grid[1] == 1 else f"{grid[0] * grid[1]} processes, {grid[0]} × {grid[1]}"
        shown.append(("time", words.duration(seconds), f"at work{times}, {on}"))
    return shown


def sessions(story: Story) -> list[dict[str, Any]]:
    """What each session has spent its time on."""
    found, longest = [], max((session.seconds for session in story.sessions), default=0.0) or 1.0
    for number, session in enumerate(story.sessions, 1):
        begin, stop, saved = (
            session.events[0],
            session.last("stop"),
            [e for e in session.events if e["event"] == "checkpoint"],
        )
        found.append(
            {
                "number": number,
                "what": "began"
                if begin["event"] == "begin"
                else f"went on from {words.count(begin['samples'])} samples",
                "bars": [
                    (name, kind, s, 100 * s / longest)
                    for (name, s), kind in zip(session.phases.items(), ("three", "one", "two"), strict=True)
                ],
                "seconds": session.seconds,
                "saved": len(saved),
                "saving": sum(e["took"] for e in saved),
                "end": "no word of its end" if stop is None else STATES[stop["reason"]][1],
                "workers": begin.get("grid", [1, 1]),
            }
        )
    return found[-20:]


def options(story: Story) -> list[tuple[str, str]]:
    chosen: list[tuple[str, str]] = [
        ("latents", str(story.config["latents"])),
        ("source", _described(story.config["source"])),
    ]
    chosen += [("masses", "given" if story.config["mass"] else "equal")]
    chosen += [(name.replace("_", " "), str(value)) for name, value in story.options.items() if value is not None]
    return [
        *chosen,
        ("fingerprint of latents", str(story.config["fingerprint"])[:16]),
        ("created", story.config["created"]),
    ]


def _described(spec: dict[str, Any]) -> str:
    return ", ".join(str(v) if k == "kind" else f"{k} {v}" for k, v in spec.items())


def environment_of(story: Story) -> list[tuple[str, str]]:
    found = {name: str(value) for name, value in story.environment.items()}
    if story.sessions:
        begin = story.sessions[-1].events[0]
        found |= {
            "device": begin["device"],
            "search by": begin["assigner"],
            "latents kept as": begin.get("kept", "float32"),
        }
        changed = story.sessions[-1].last("assigner")
        found |= {} if changed is None else {"search by": f"{changed['assigner']}: {changed['why']}"}
    return list(found.items())


def commands(story: Story) -> list[tuple[str, str]]:
    """(what for, command) of what can be done next; the first is what this run wants most."""
    run, goal = typed(story.run.path), story.options["until_chi2"]
    on, certify = (
        ("go on", f"distot resume {run}"),
        ("measure with other samples", f"distot certify {run} --seed-step 1"),
    )
    if story.reason == "max_samples":
        on = ("go on with twice the budget", f"distot resume {run} --max-samples {2 * story.samples}")
    if story.reason == "until_chi2" and goal is not None:
        on = ("go on to a finer answer", f"distot resume {run} --until-chi2 {goal / 2:g}")
    if story.reason == "until_chi2" and story.certificate is None:
        certify = ("certify", f"distot certify {run}")
    use = [
        ("latents of your noise", f"distot assign {run} noise.npy index.npy"),
        ("in Python", f"solution = distot.load({str(story.run.path)!r}); solution.map(noise)"),
        ("this page again", f"distot report {run} -o report.html"),
    ]
    if story.checkpoint is None:
        return [on]
    if story.reason == "exact":  # nothing is left to do
        return [certify, *use]
    first = [certify, on] if story.reason == "until_chi2" else [on, certify]
    return first + use
