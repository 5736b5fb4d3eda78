"""Runs a function on every process of a small grid, on this machine, by gloo."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.multiprocessing as mp

from distot import grid
from distot.grid import Grid


def on_grid(shape: tuple[int, int], work: Callable[..., Any], *arguments: Any, seconds: float = 60.0) -> list[Any]:
    """What ``work(grid, *arguments)`` gives in each process. Raises RuntimeError if one fails."""
    context = mp.get_context("spawn")
    answers: Queue[Any] = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    world = shape[0] * shape[1]
    processes = [
        context.Process(target=_member, args=(answers, address, rank, shape, seconds, work, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < world:
        rank, answer, failure = answers.get(timeout=4 * seconds)
        if failure:
            for process in processes:
                process.kill()
            raise RuntimeError(f"process {rank}: {failure}")
        found[rank] = answer
    for process in processes:
        process.join()
    return [found[rank] for rank in range(world)]


def _member(
    answers: Queue[Any],
    address: str,
    rank: int,
    shape: tuple[int, int],
    seconds: float,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        place = grid.join(address, rank, shape, "cpu", seconds)
        answer = work(place, *arguments)
        grid.leave()
        answers.put((rank, answer, None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        raise


__all__ = ["Grid", "on_grid"]
