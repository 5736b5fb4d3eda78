"""Real processes for tests, started in milliseconds: a Python that has imported distot forks one for each job.

A job is a function of this file, run with one thread; ``command`` is the command line itself.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import distot
import distot.cli
from distot import console, readers, solver, watch
from distot.store import Run

LIMIT = 60.0  # seconds that anything awaited may take


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory, where there is one: hundreds of checkpoints need not wait for a busy disk."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """As if the disk were full for larger files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for(what: str, condition: Callable[[], Any], child: Child | None = None, limit: float = LIMIT) -> Any:
    """The first true value of ``condition``; fails after ``limit`` seconds, or when ``child`` ends without it."""
    end = time.monotonic() + limit
    while True:
        over = child is not None and child.poll() is not None
        value = condition()
        if value:
            return value
        if over or time.monotonic() > end:
            state = f"{child}: {child.stderr()}" if child is not None else ""
            raise AssertionError(f"waited in vain for {what}. {state}")
        time.sleep(0.002)


class Child:
    """A process started by ``Launcher``."""

    def __init__(self, launcher: Launcher, pid: int, folder: Path) -> None:
        self.launcher, self.pid, self.folder = launcher, pid, folder
        self.returncode: int | None = None  # as in subprocess: minus the signal if killed by one

    def __repr__(self) -> str:
        return f"process {self.pid}, return code {self.returncode}"

    def poll(self) -> int | None:
        """The return code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self.launcher.ask({"poll": self.pid})["returncode"]
        return self.returncode

    def wait(self, limit: float = LIMIT) -> int:
        """The return code, once it has ended."""
        end = time.monotonic() + limit
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
                raise AssertionError(f"{self} did not end within {limit} s: {self.stderr()}")
            time.sleep(0.002)
        return code

    def kill(self, number: int) -> None:
        """Sends it a signal. Its number stays its own until ``poll`` has seen it end."""
        os.kill(self.pid, number)

    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()


class Launcher:
    """Starts jobs; all that still run are killed when it is closed. ``prefix``: a command that runs the Python."""

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        self.folder = folder
        self.children: list[Child] = []
        self.server = subprocess.Popen(
            [*prefix, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.ask({})

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()  # at this it kills its children and ends
        self.server.wait(LIMIT)
        self.server.stdout.close()

    def stop_all(self) -> None:
        """Kills what a failed test has left running."""
        for child in self.children:
            if child.poll() is None:
                child.kill(signal.SIGKILL)
                child.wait()

    def ask(self, job: dict[str, Any]) -> Any:
        """Sends one line to the server and reads its answer."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job).encode() + b"\n")
        self.server.stdin.flush()
        ready, _, _ = select.select([self.server.stdout], [], [], LIMIT)
        assert ready, "the server of processes does not answer"
        return json.loads(self.server.stdout.readline())

    def start(self, function: str, *arguments: Any) -> Child:
        """Starts a function of this file."""
        folder = self.folder / f"process-{len(self.children):03d}"
        folder.mkdir(parents=True)
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        job = {"function": function, "arguments": arguments, "folder": str(folder)}
        child = Child(self, self.ask(job)["pid"], folder)
        self.children.append(child)
        return child

    def command(self, *arguments: object) -> Child:
        """Starts ``distot`` with these arguments."""
        return self.start("command", [str(argument) for argument in arguments])

    def run(self, *arguments: object) -> Child:
        """Runs ``distot`` with these arguments to its end."""
        child = self.command(*arguments)
        child.wait()
        return child

    def call(self, function: str, *arguments: Any) -> Any:
        """The value of a function of this file, run in a process of its own."""
        child = self.start(function, *arguments)
        assert child.wait() == 0, child.stderr()
        return json.loads(child.stdout())


# ------------------------------------------------------------------------------------- in the server


def serve() -> None:
    """Answers jobs until its input ends; each is done in a forked child."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    children: dict[int, int | None] = {}
    while line := sys.stdin.readline():
        job = json.loads(line)
        answer: dict[str, Any] = {}
        if "function" in job:
            pid = os.fork()
            if pid == 0:
                work(job)
            children[pid] = None
            answer = {"pid": pid}
        elif "poll" in job:
            pid = job["poll"]
            if children[pid] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                children[pid] = os.waitstatus_to_exitcode(status) if done else None
            answer = {"returncode": children[pid]}
        print(json.dumps(answer), flush=True)
    for pid, code in children.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def work(job: dict[str, Any]) -> None:
    """Does a job in this process, with its own standard streams."""
    folder = Path(job["folder"])
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "stdout", 0o1101), (2, "stderr", 0o1101)):
        descriptor = os.open(folder / name, flags, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    code: Any = 0
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which may be ignored where the tests themselves outlive a terminal
    try:
        globals()[job["function"]](*job["arguments"])
    except SystemExit as done:
        code = done.code
    sys.stdout.flush()
    os._exit(code)  # taking torch down in good order costs half a second


def command(arguments: list[str]) -> None:
    """The command line."""
    distot.cli.main(arguments)


def unheard(arguments: list[str]) -> None:
    """The command line, with nobody to read its standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    sys.stderr = os.fdopen(writer, "w", buffering=1)
    distot.cli.main(arguments)


def onto(file: str, arguments: list[str]) -> None:
    """The command line, with its standard output going to ``file``."""
    sys.stdout = Path(file).open("w")  # noqa: SIM115  # open until the end of the process
    distot.cli.main(arguments)


def ignoring(number: int, arguments: list[str]) -> None:
    """The command line as ``nohup`` starts it."""
    signal.signal(number, signal.SIG_IGN)
    distot.cli.main(arguments)


def encoded(encoding: str, arguments: list[str]) -> None:
    """The command line where streams have an encoding other than UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=encoding, errors="strict")  # type: ignore[union-attr]
    distot.cli.main(arguments)


class Clock:
    """Stands in for the module ``time``: a moment passes with each look at it, however busy the machine is."""

    time = staticmethod(time.time)

    def __init__(self, moment: float = 0.002) -> None:
        self.now, self.moment = 0.0, moment

    def monotonic(self) -> float:
        self.now += self.moment
        return self.now


def clocked(arguments: list[str]) -> None:
    """The command line by such a clock."""
    vars(watch)["time"] = vars(solver)["time"] = Clock()
    distot.cli.main(arguments)


def early(number: int, arguments: list[str]) -> None:
    """The command line, struck by a signal when it is about to begin."""
    begin = console._done

    def struck(*given: Any) -> Any:
        signal.raise_signal(number)
        return begin(*given)

    console._done = struck  # type: ignore[assignment]
    distot.cli.main(arguments)


def struck(number: int, arguments: list[str]) -> None:
    """The command line, struck by a signal when some blocks of a source of latents were read."""
    rows = readers.Reader.rows

    def blocks(self: readers.Reader) -> Iterator[np.ndarray]:
        for count, block in enumerate(rows(self)):
            if count == 3:
                signal.raise_signal(number)
            yield block

    readers.BLOCK_BYTES = 1 << 10
    readers.Reader.rows = blocks  # type: ignore[method-assign]
    distot.cli.main(arguments)


class Normal:
    """A user's own source, N(0, I), that can strike the process with signals at one of its calls."""

    def __init__(self, dim: int, at: int = 0, signals: Sequence[int] = ()) -> None:
        self.dim, self.at, self.signals = dim, at, signals
        self.calls = 0

    def __call__(self, generator: np.random.Generator, n: int) -> np.ndarray:
        self.calls += 1
        if self.calls == self.at:
            for number in self.signals:
                signal.raise_signal(number)
        return generator.standard_normal((n, self.dim))


def solve(latents: str, run: str | None, options: dict[str, Any], at: int = 0, signals: Sequence[int] = ()) -> None:
    """Solves for ``Normal``; prints what came out, or what Interrupted carries."""
    source = Normal(np.load(latents).shape[1], at, signals)
    report(lambda: distot.solve(np.load(latents), source, run=run, **options), source)


def resume(latents: str, run: str, options: dict[str, Any], at: int = 0, signals: Sequence[int] = ()) -> None:
    """The same for a run."""
    source = Normal(np.load(latents).shape[1], at, signals)
    report(lambda: distot.resume(run, source=source, **options), source)


def certify(latents: str, run: str) -> None:
    source = Normal(np.load(latents).shape[1])
    report(lambda: distot.certify(run, source=source), source)


def report(work: Callable[[], distot.Solution], source: Normal) -> None:
    caught = ""
    try:
        solution = work()
    except KeyboardInterrupt as stop:  # the class that a user's own handler names
        caught = f"{type(stop).__name__}: {stop}"
        if not isinstance(stop, distot.Interrupted):
            print(json.dumps({"caught": caught}))
            return
        solution = stop.solution
    print(
        json.dumps(
            {
                "caught": caught,
                "reason": solution.reason,
                "samples": solution.samples,
                "heights": solution.heights.tolist(),
                "history": [check.to_dict() for check in solution.history],
                "certificate": solution.certificate.to_dict(),
                "calls": source.calls,
            }
        )
    )


def load(run: str) -> None:
    """Prints the samples of a run, read many times over."""
    print(json.dumps([distot.load(run).samples for _ in range(8)]))


def read_for_ever(run: str) -> None:
    """Prints the step of the newest checkpoint and the remarks on others, again and again."""
    while found := Run(run).load_checkpoint():
        print(json.dumps([found.scalars["step"], found.remarks]), flush=True)


def mount(folder: str, options: str) -> None:
    """Makes ``folder`` a small disk, in the mount namespace of the launcher."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    print("null")


def make_read_only(folder: str) -> None:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    print("null")


if __name__ == "__main__":
    serve()
