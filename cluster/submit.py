"""Ray jobs from the command line: submit once, follow the log, come back to it.

A submission is named after its run, so the same command given twice follows the job that is there; once that job has
ended, it starts the next one, which goes on from the newest checkpoint.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from aiohttp import ClientError
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from distot import cli
from distot.console import UsageError
from distot.errors import DistotError, InputError, without_passwords

READY = 60.0  # seconds that a new cluster may need before it takes jobs
SCHEMES = ("", "http", "https", "ray")  # Ray would import a module of any other name
JOB = ["python", "-m", "jobs.solve"]
REFUSED = (OSError, RuntimeError, ValueError, TypeError, RayError)  # what Ray raises, and what it lets through


class JobFailed(DistotError):
    """The job ended without success; its log says why."""


def submit(
    words: list[str],
    address: str | None = None,
    name: str | None = None,
    runtime_env: dict[str, Any] | None = None,
    wait: bool = True,
    show: Callable[[str], None] = print,
) -> str:
    """Runs ``python -m jobs.solve`` with ``words`` (LATENTS RUN and options) on a cluster; the submission's name.

    address: that of the dashboard, http://HOST:8265; None is the environment's RAY_API_SERVER_ADDRESS, or this machine.
    name: of the submission, without the number of the attempt; by default it follows from the paths in ``words``.
    runtime_env: as Ray takes it; nothing is uploaded or installed unless it says so.
    wait: passes the log on to ``show`` until the job ends, then raises JobFailed if it did not succeed.

    Raises InputError if there is no dashboard at the address, the words are no task, or a job of this name is at work
    on another one.
    """
    task = parsed(words)
    if not isinstance(runtime_env or {}, dict):
        raise InputError(f"runtime_env must be a dict, as Ray takes it, not {runtime_env!r}")
    client, known = _connected(address)
    stem = name or f"distot-{hashlib.sha256(' '.join([task['latents'], task['run']]).encode()).hexdigest()[:12]}"
    attempts = [f"{stem}-{number}" for number in range(1, len(known) + 2)]
    last = next((attempt for attempt in reversed(attempts) if attempt in known), None)
    if last is not None and not known[last].status.is_terminal():
        _check_same(task, last, known[last].entrypoint)
        show(f"{last} is there already: {known[last].status.value.lower()}")
    else:
        last = attempts[attempts.index(last) + 1] if last is not None else attempts[0]
        entrypoint = shlex.join([*JOB, *words])
        _submit(client, entrypoint, last, runtime_env or {})
        show(without_passwords(f"{last} submitted: {entrypoint}"))
    if not wait:
        return last
    try:
        asyncio.run(_follow(client, last, show))
        status = client.get_job_status(last)
        message = (client.get_job_info(last).message or "").partition(", last available logs")[0]
    except (*REFUSED, ClientError) as error:
        raise JobFailed(
            f"{last} cannot be followed any more ({_first_line(error)}); submit it again to see it"
        ) from error
    if status != JobStatus.SUCCEEDED:
        raise JobFailed(f"{last} {status.value.lower()}: {message.strip()}; submit it again to go on where it stopped")
    return last


def parsed(words: list[str]) -> dict[str, str]:
    """The words of a task by the names of ``distot solve``'s arguments, as they were written.

    Raises InputError for words that it does not take.
    """
    solve: Any = typer.main.get_command(cli.app).commands["solve"]  # type: ignore[attr-defined]
    try:
        solve.make_context("distot solve", list(words))
        found: dict[str, str] = solve.make_parser(solve.context_class(solve)).parse_args(list(words))[0]
    except (UsageError, typer.Exit) as error:
        why = error.format_message().rstrip(".") if isinstance(error, UsageError) else "that asks for help alone"
        raise InputError(
            f"a job needs LATENTS.zarr and RUN.zarr, paths that all nodes see, and options of `distot solve`: {why}"
        ) from error
    return found


def environment(file: Path) -> dict[str, Any]:
    """The Ray runtime environment in a JSON file. Raises InputError if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--runtime-env {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--runtime-env {file} is no JSON ({error}); mend it, or leave it out") from error
    if not isinstance(found, dict):
        raise InputError(f'--runtime-env {file} holds no JSON object; write {{"env_vars": {{...}}}} or the like')
    return found


def _connected(address: str | None) -> tuple[JobSubmissionClient, dict[str, Any]]:
    """The dashboard, and its jobs by name."""
    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine"
    secret = "@" in where or "?" in where  # then what Ray says may show it
    shown = f"{where.partition('://')[0]}://***" if secret and "://" in where else "***" if secret else where
    remedy = "give its address, http://HOST:8265, with --address"
    if address is not None and (address.partition("://")[0] if "://" in address else "") not in SCHEMES:
        raise InputError(f"{shown} is no address of a Ray dashboard; {remedy}")
    try:
        client = JobSubmissionClient(address)
        return client, {str(job.submission_id): job for job in client.list_jobs()}
    except (*REFUSED, AssertionError) as error:
        why = "" if secret else f" ({_first_line(error)})"
        raise InputError(f"no Ray dashboard at {shown}{why}; {remedy}") from (None if secret else error)


def _check_same(task: dict[str, str], name: str, entrypoint: str) -> None:
    """Raises InputError if the job that is at work was given another task."""
    words = shlex.split(entrypoint)
    if words[: len(JOB)] != JOB or parsed(words[len(JOB) :]) != task:
        raise InputError(
            f"{name} is at work on something else: {entrypoint}; give those words to follow it, wait for its end, stop "
            f"it (ray job stop {name}), or choose another --name"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _submit(client: JobSubmissionClient, entrypoint: str, name: str, runtime_env: dict[str, Any]) -> None:
    """Submits, and tries again for a while as long as a cluster that has just started is not ready for jobs."""
    deadline = time.monotonic() + READY
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime_env)
            return
        except REFUSED as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise JobFailed(f"the cluster did not take the job: {_first_line(error)}") from error
            time.sleep(1.0)


async def _follow(client: JobSubmissionClient, name: str, show: Callable[[str], None]) -> None:
    async for lines in client.tail_job_logs(name):
        show(lines.rstrip("\n"))
