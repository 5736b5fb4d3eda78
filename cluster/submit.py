"""Ray jobs from the command line: submit once, follow the log, come back to it.

A submission is named after its run, so the same command given twice follows the job that is there; once that job has
ended, it starts the next one, which goes on from the newest checkpoint.
"""

from __future__ import annotations

import asyncio
import hashlib
import shlex
import time
from collections.abc import Callable
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from distot.errors import DistotError, InputError

READY = 60.0  # seconds that a new cluster may need before it takes jobs


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

    Raises InputError if there is no dashboard at the address, or the words are no task.
    """
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise InputError(
            "a job needs LATENTS.zarr and RUN.zarr first, as `distot solve` does; paths that all nodes see"
        )
    try:
        client = JobSubmissionClient(address)
        known = {job.submission_id: job.status for job in client.list_jobs()}
    except (ConnectionError, RuntimeError) as error:
        raise InputError(
            f"no Ray dashboard at {address or 'this machine'} ({str(error).splitlines()[0]}); give its address, "
            "http://HOST:8265, with --address"
        ) from error
    stem = name or f"distot-{hashlib.sha256(' '.join(words[:2]).encode()).hexdigest()[:12]}"
    attempts = [f"{stem}-{number}" for number in range(1, len(known) + 2)]
    last = next((attempt for attempt in reversed(attempts) if attempt in known), None)
    if last is not None and not known[last].is_terminal():
        show(f"{last} is there already: {known[last].value.lower()}")
    else:
        last = attempts[attempts.index(last) + 1] if last is not None else attempts[0]
        entrypoint = shlex.join(["python", "-m", "jobs.solve", *words])
        _submit(client, entrypoint, last, runtime_env or {})
        show(f"{last} submitted: {entrypoint}")
    if not wait:
        return last
    asyncio.run(_follow(client, last, show))
    status = client.get_job_status(last)
    if status != JobStatus.SUCCEEDED:
        message = (client.get_job_info(last).message or "").partition(", last available logs")[0]
        raise JobFailed(f"{last} {status.value.lower()}: {message.strip()}; submit it again to go on where it stopped")
    return last


def _submit(client: JobSubmissionClient, entrypoint: str, name: str, runtime_env: dict[str, Any]) -> None:
    """Submits, and tries again for a while as long as a cluster that has just started is not ready for jobs."""
    deadline = time.monotonic() + READY
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime_env)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise JobFailed(f"the cluster did not take the job: {error}") from error
            time.sleep(1.0)


async def _follow(client: JobSubmissionClient, name: str, show: Callable[[str], None]) -> None:
    async for lines in client.tail_job_logs(name):
        show(lines.rstrip("\n"))
