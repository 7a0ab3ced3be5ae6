"""Sharing of independent work among threads, whole pieces at a time.

Splitting each small product over the cores costs a barrier a product. A barrier waits for the slowest thread, spinning: on a machine that
does anything else, a product of microseconds takes milliseconds. Here each thread takes whole pieces of work and computes them alone, in
kernels that use one thread. torch releases the GIL inside its kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier, Lock, local
from typing import TypeVar

import torch

T = TypeVar("T")

_MOST_WORKERS = 8  # Python between kernels runs one thread at a time: with more cores, workers split their kernels again
_lock = Lock()
_pools: dict[int, ThreadPoolExecutor] = {}  # by torch's number of threads
_here = local()  # in a worker, `threads`: torch's number of threads where the work came from


def worker_count() -> int:
    """Threads that `share` uses: torch's number of threads, up to a limit."""
    return min(getattr(_here, "threads", 0) or torch.get_num_threads(), _MOST_WORKERS)


def share(items: Iterable[T], work: Callable[[Iterator[T]], None]) -> None:
    """Call `work` once in each worker with one common iterator over `items`; each item is taken once.

    What a failing worker raises is raised. Results must not depend on who takes which item.
    """
    if worker_count() > 1 and not hasattr(_here, "threads"):
        return _pool(torch.get_num_threads()).submit(share, items, work).result()
    common = iter(list(items))
    others = [_pool(_here.threads).submit(work, common) for _ in range(worker_count() - 1)]
    try:
        work(common)
    finally:
        # One that has not started by now has nothing left to do; waiting for it could be waiting for ourselves.
        started = [other for other in others if not other.cancel()]
        wait(started)
    for other in started:
        other.result()
    return None


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            workers = min(threads, _MOST_WORKERS)
            pool = ThreadPoolExecutor(workers, "sptc", _start, (threads, workers))
            ready = Barrier(workers)
            wait([pool.submit(ready.wait) for _ in range(workers)])  # every thread has run its initializer
            torch.set_num_threads(threads)  # threads that start later take over the number that was set last
            _pools[threads] = pool
        return _pools[threads]


def _start(threads: int, workers: int) -> None:
    _here.threads = threads
    torch.set_num_threads(threads // workers)
    torch.get_num_threads()  # a thread settles its own number at the first look; until then it would follow the number set last
    torch.set_grad_enabled(False)  # a worker does not inherit that autograd is off inside the op that waits for it


def _forget_pools() -> None:
    global _lock
    _lock = Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget_pools)  # a forked process has the pools but none of their threads
