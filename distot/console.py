"""What the commands print, and how they end: reports, messages, events, JSON, exit codes."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import typer
from rich.text import Text

from distot.errors import DistotError
from distot.progress import Screen
from distot.signals import Stopped, raised
from distot.solution import Interrupted, Solution
from distot.store import Place, typed

out, err = Screen(stderr=False), Screen(stderr=True)

SPELLED = {"±": "+-", "²": "^2", "≥": ">=", "½": "1/2", "×": "x", "−": "-"}  # where a stream has no such characters

PRINTING = (errno.EPIPE, errno.EIO, errno.ENOSPC)  # what goes wrong where nobody reads, or the disk is full

# typer uses the package click or one of its own, by version; BadParameter, which it always exports, leads to either
UsageError: Any = typer.BadParameter.__mro__[1]


def execute(app: typer.Typer, name: str, given: list[str]) -> NoReturn:
    """Runs a command and exits with its code; errors are one sentence, never a traceback."""
    _writable()
    try:
        with raised():
            code = _done(app, name, given)
            if (why := _flushed(sys.stdout)) and not code:
                say("error", "red", f"not all that was printed could be written: {why}")
                code = 1
            _flushed(sys.stderr)
    except KeyboardInterrupt as stopped:  # just before a command began, or just after it
        code = _stopped(stopped)
    sys.exit(code)


def _done(app: typer.Typer, name: str, given: list[str]) -> Any:
    """The exit code of a command."""
    try:
        command = typer.main.get_command(app)
        # app() itself would turn Interrupted, as it does any KeyboardInterrupt, into 130 without a word
        with command.make_context(name, given) as context:
            return command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except Interrupted as interrupted:
        whisper(str(interrupted))
        return 128 + interrupted.signal
    except KeyboardInterrupt as stopped:
        return _stopped(stopped)
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else name
        say("error", "red", f"{error.format_message().rstrip('.')}; see {where} --help")
    except (DistotError, OSError) as error:
        printing = isinstance(error, OSError) and error.filename is None and error.errno in PRINTING
        say("error", "red", f"not all that was printed could be written: {error}" if printing else str(error))
    return 1


def _stopped(by: KeyboardInterrupt) -> int:
    """Says that a command ends in its midst; the exit code."""
    whisper("stopped at once; the run, if it has begun, is as of its last checkpoint")
    return 128 + (by.signal if isinstance(by, Stopped) else signal.SIGINT)


def _writable() -> None:
    """What a stream cannot encode does not end a command: mathematics is spelled out, bytes of paths are kept."""
    codecs.register_error("distot", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="distot")


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """Stands in for characters that cannot be encoded."""
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a path that is no text
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return SPELLED.get(character, "?"), error.start + 1


def _flushed(stream: Any) -> str:
    """Why a stream cannot be written, if it cannot; then it is given up, so that nothing else fails by it."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return str(error)
    return ""


def start(main: Callable[..., None]) -> NoReturn:
    """Runs a module whose one command is ``main``; its arguments are the options."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    spec = sys.modules["__main__"].__spec__
    execute(app, f"python -m {spec.name}" if spec else sys.argv[0], sys.argv[1:])


def speak(event: dict[str, Any]) -> None:
    """Off the terminal, where no progress is drawn, the milestones go to standard error as plain lines."""
    if err.is_terminal:
        return
    if event["event"] in ("note", "warning"):
        err.print(labelled(event["event"], "yellow", event["text"]), soft_wrap=True)
    if event["event"] == "newton":
        err.print(f"newton {event['iteration']}: chi2 {event['chi2']:.1e}, largest error {event['error']:.1e}")
    if event["event"] == "check":
        err.print(f"{event['samples']:,} samples: chi2 {event['chi2']:.4f} +- {event['error']:.4f}", soft_wrap=True)


def report(solution: Solution, run: Place, as_json: bool) -> None:
    plane = solution.reason == "exact" and solution.facts.shape[1] == 2  # on a line there is a formula, without cells
    c, cells = solution.certificate, solution.exact_cells() if plane else None
    if as_json:
        print_json(
            {
                "run": str(run),
                "reason": solution.reason,
                "samples": solution.samples,
                "efficiency": solution.efficiency,
                "certificate": c.to_dict(),
                "notes": list(solution.notes),
                "history": [check.to_dict() for check in solution.history],
                "exact": cells.summary() if cells else None,
            }
        )
        return
    value, paid = ("cost", "-log<x, T(x)>") if c.cost == "log" else ("W2²", "|x - T(x)|²")
    rows = [
        (
            "samples",
            f"{solution.samples:,}",
            f"{solution.samples / c.atoms:.1f} per latent, efficiency {solution.efficiency:.2f}",
        ),
        ("chi2", f"{c.chi2:.4f} ± {c.chi2_error:.4f}", "squared relative error of the cell masses; 0 is exact"),
        (
            "empty cells",
            f"{c.empty:,} of {c.atoms:,}",
            f"{c.empty_by_chance:.1f} by chance in {c.samples:,} fresh samples",
        ),
        (value, f"{c.bound:.6g} ± {c.bound_error:.2g}", "lower bound, exact as chi2 -> 0"),
        ("", f"≥ {c.limit:.6g}", f"with {c.level:.0%} confidence"),
        ("map cost", f"{c.map_cost:.6g} ± {c.map_cost_error:.2g}", f"mean of {paid}"),
        (
            "mismatch",
            f"{c.mismatch:.2g} ± {c.mismatch_error:.2g}",
            f"{value} bound - map cost; 0 when all masses are exact",
        ),
    ]
    if c.unseen:
        rows.append(("unseen", f"{c.unseen:,} of {c.samples:,}", "samples without a latent at finite cost"))
    if cells:
        rows += [
            ("exact", f"{cells.w2_squared_bound:.15g}", "W2² from exact cells, without sampling"),
            ("", f"{cells.error:.1e}", f"largest relative error of a mass; chi2 {cells.chi2:.1e}"),
        ]
    out.print(Text.assemble("\n", (str(run), "bold"), f": {solution.explanation}"), soft_wrap=True)
    for name, figure, meaning in rows:
        out.print(f"  {name:<12} {figure:<22} {meaning}", soft_wrap=True)
    if solution.reason not in ("until_chi2", "exact"):
        more = f" --max-samples {2 * solution.samples}" if solution.reason == "max_samples" else ""
        out.print(f"go on: distot resume {typed(run)}{more}", soft_wrap=True)


def say(label: str, style: str, text: str) -> None:
    whisper(labelled(label, style, text))


def whisper(text: str | Text) -> None:
    """Prints on standard error, if anybody is there to read it."""
    with suppress(OSError):
        err.print(text, soft_wrap=True)


def labelled(label: str, style: str, text: str) -> Text:
    return Text.assemble((label, style), f": {text}")


def answer(text: str) -> None:
    """A line of what a command has found."""
    out.print(text, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))
