"""Two processes with a gloo group between them, started once and given one function after another."""

from __future__ import annotations

import datetime
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
_START, _JOB = 120.0, 300.0  # seconds


class RankError(AssertionError):
    """A function raised in one of the processes; the message is its traceback."""


class Ranks:
    """`Ranks(folder).run(function, *arguments)` calls the function in both processes and returns both results, that of rank 0 first."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(WORLD):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, port, str(folder / "store"), theirs), daemon=True)
            process.start()
            self._ends.append(mine)
            self._processes.append(process)
        self.alive = True

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for end in self._ends:
            end.send((function, arguments))
        results = []
        for rank, end in enumerate(self._ends):
            if not end.poll(_START + _JOB):
                self.stop()
                raise RankError(f"rank {rank} said nothing for {_START + _JOB:.0f} s")
            try:
                results.append(end.recv())
            except EOFError:
                self.stop()
                raise RankError(f"rank {rank} died") from None
        failures = [f"rank {rank}: {value}" for rank, (fine, value) in enumerate(results) if not fine]
        if failures:
            self.stop()  # they may be at different places
            raise RankError("\n".join(failures))
        return [value for _, value in results]

    def stop(self) -> None:
        self.alive = False
        for process in self._processes:
            process.kill()
            process.join()


def _work(rank: int, port: int, store: str, end: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)  # one that raises while the other waits in a collective is found out by then
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD, timeout=timeout)
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send((True, function(*arguments)))
        except BaseException:
            end.send((False, traceback.format_exc()))
