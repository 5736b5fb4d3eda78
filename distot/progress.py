"""Live progress on a terminal: a listener of the events that ``Watch`` tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from distot.errors import without_passwords
from distot.watch import Event, Ours, together

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROLS |= dict.fromkeys(
    [0x7F, *range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD
)


class Screen(Console):
    """Prints text as it is: [brackets] and :colons: belong to paths. What cannot be written is an OSError.

    Control characters are shown and not sent, for names and texts from files must not give orders to a terminal; nor is
    a password in an address printed.
    """

    def __init__(self, *, stderr: bool) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(harmless, objects), **options)

    def on_broken_pipe(self) -> None:
        raise  # where rich would end the process


def harmless(text: Any) -> Any:
    """A text for the terminal, with a visible sign for each control character."""
    if isinstance(text, Text):
        shown = text.copy()
        shown.plain = text.plain.translate(CONTROLS)  # as long as before, so that styles stay where they are
        return shown
    return without_passwords(text).translate(CONTROLS) if isinstance(text, str) else text


@contextmanager
def listener(show: bool | None, also: Callable[[Event], None] | None) -> Iterator[Callable[[Event], None] | None]:
    """A listener that draws on stderr (``show``; None: if it is a terminal) and passes every event on to ``also``."""
    console = Screen(stderr=True)
    if not (console.is_terminal if show is None else show):
        yield also
        return
    with Display(console) as display:
        yield together(Ours("the terminal", display), also)


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 20 s or 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:02.0f} min"


class Display:
    """One line that moves, and a line that stays for everything worth remembering."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task("reading", total=None, state="")
        self.chi2 = ""
        self.atoms, self.assigner = 1, ""

    def __enter__(self) -> Display:
        with suppress(OSError):  # the first event will meet it again
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # of a terminal that is gone
            self.bar.stop()

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def say(self, text: str | Text) -> None:
        self.bar.console.print(text, soft_wrap=True)

    def on_workers(self, e: Event) -> None:
        self.say(f"{len(e['pids'])} workers on {len(set(e['nodes']))} nodes")

    def on_begin(self, e: Event) -> None:
        self.atoms, self.assigner = e["atoms"], e["assigner"]
        self.say(
            f"{e['latents']:,} latents of dimension {e['dim']}, source {e['source']}; "
            f"search by {e['assigner']} on {e['device']}"
        )
        self.bar.update(self.task, description="start")

    def on_assigner(self, e: Event) -> None:
        if self.assigner != (changed := e["assigner"]):
            self.assigner = changed
            self.say(f"search by {changed}: {e['why']}")

    def on_resume(self, e: Event) -> None:
        self.on_begin(e)
        self.say(f"going on from step {e['step']:,}, {e['samples']:,} samples")

    def on_note(self, e: Event) -> None:
        self.say(Text.assemble(("note", "yellow"), f": {e['text']}"))

    def on_warning(self, e: Event) -> None:
        self.say(Text.assemble(("warning", "red"), f": {e['text']}"))

    def on_signal(self, e: Event) -> None:
        self.say(f"{e['signal']}: saving; press Ctrl-C again to quit without")

    def on_start(self, e: Event) -> None:
        self.bar.update(self.task, description="start", state=f"from {min(e['nodes'], default=0):,} centroids")

    def on_step(self, e: Event) -> None:
        rate, wanted = e["samples_per_second"], e["wanted"]
        eta = "" if wanted is None else f", about {duration(max(0.0, wanted - e['samples']) / rate)} left"
        self.bar.update(
            self.task,
            description="solve",
            total=wanted,
            completed=e["samples"],
            state=f"{e['samples'] / self.atoms:.1f} samples/atom, {rate:,.0f}/s{self.chi2}{eta}",
        )

    def on_check(self, e: Event) -> None:
        self.chi2 = f", chi2 {e['chi2']:.4f} ± {e['error']:.4f}"
        self.say(f"{e['samples'] / self.atoms:7.1f} samples per atom   chi2 {e['chi2']:.4f} ± {e['error']:.4f}")

    def on_newton(self, e: Event) -> None:
        state = f"step {e['iteration']}, chi2 {e['chi2']:.1e}, largest error {e['error']:.1e}"
        self.bar.update(self.task, description="exact", total=None, state=state)

    def on_stop(self, e: Event) -> None:
        self.say(f"stopped: {e['text']}")

    def on_certify(self, e: Event) -> None:
        self.bar.update(self.task, description="certify", total=None, state=f"{e['samples']:,} samples")
