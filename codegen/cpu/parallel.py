"""Sharing of independent work among threads, whole heads at a time.

Splitting each small product over the cores costs a barrier a product; a barrier waits for the slowest thread, which on a busy machine is
most of the time. Here each thread takes whole pieces of work and computes them alone. torch releases the GIL inside its kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier, Lock
from typing import TypeVar

import torch

T = TypeVar("T")

_MOST_WORKERS = 8  # Python between kernels runs one thread at a time: with more cores, workers split their kernels again
_lock = Lock()
_pools: dict[int, ThreadPoolExecutor] = {}  # by torch's number of threads


def worker_count() -> int:
    """Threads that `share` uses: torch's number of threads, up to a limit."""
    return min(torch.get_num_threads(), _MOST_WORKERS)


def share(items: Iterable[T], work: Callable[[Iterator[T]], None]) -> None:
    """Call `work` once in each worker with one common iterator over `items`; each item is taken once.

    What the first failing worker raises is raised. The workers' results must not depend on who takes which item.
    """
    common = iter(list(items))
    if worker_count() == 1:
        work(common)
        return
    futures = [_pool(torch.get_num_threads()).submit(_without_grad, work, common) for _ in range(worker_count())]
    wait(futures)
    for future in futures:
        future.result()


def _without_grad(work: Callable[[Iterator[T]], None], common: Iterator[T]) -> None:
    # A worker does not inherit that autograd is off inside the op that waits for it.
    with torch.no_grad():
        work(common)


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            workers = min(threads, _MOST_WORKERS)
            pool = ThreadPoolExecutor(workers, "sptc", _start, (threads // workers,))
            started = Barrier(workers)
            wait([pool.submit(started.wait) for _ in range(workers)])  # every thread has run its initializer
            torch.set_num_threads(threads)  # threads that start later take over the number that was set last
            _pools[threads] = pool
        return _pools[threads]


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.get_num_threads()  # a thread settles its own number at the first look; until then it would follow the number set last


def _forget_pools() -> None:
    global _lock
    _lock = Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget_pools)  # a forked process has the pools but none of their threads
