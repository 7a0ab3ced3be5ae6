"""A process that acts only when told to, so that several can take turns on one machine."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

_LAST = 20  # lines of a log


class WorkerFailed(RuntimeError):
    """What a process was told to do went wrong: one line, and the traceback where there is one."""

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(reason)
        self.trace = trace


class Worker:
    """The parent's end of a process that runs `make(*arguments)` and then methods of what that returned, each of which is a generator."""

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any, log: Path | None = None) -> None:
        """Start it; its making is waited for. With `log`, what it prints goes to that file, and its end to the trace of a failure.

        Raises:
            WorkerFailed: `make` raised, or the process ended.
        """
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.name, self._log = name, log
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, log), name=name, daemon=True)
        self._process.start()
        theirs.close()
        try:
            list(self._answers())
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *arguments: Any) -> Iterator[Any]:
        """Call a method, and yield what it yields, as it comes.

        Raises:
            WorkerFailed: the method raised, or the process ended.
        """
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._ended() from error
        yield from self._answers()

    def one(self, method: str, *arguments: Any) -> Any:
        """The only answer of a method."""
        (answer,) = self.ask(method, *arguments)
        return answer

    def _answers(self) -> Iterator[Any]:
        while True:
            try:
                kind, *answer = self._connection.recv()
            except (EOFError, OSError) as error:
                raise self._ended() from error
            if kind == "done":
                return
            if kind == "failed":
                raise WorkerFailed(*answer)
            yield answer[0]

    def _ended(self) -> WorkerFailed:
        self._process.join(timeout=10)
        code = self._process.exitcode
        killed = "; the system may have run out of memory" if code == -9 else ""
        said = "" if self._log is None else "\n".join(self._log.read_text(errors="replace").splitlines()[-_LAST:])
        return WorkerFailed(f"its process ended with exit code {code}{killed}", said)

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            try:
                self._connection.send(None)
            except OSError:
                self._process.kill()
            self._process.join(timeout=30)
            self._process.kill()
            self._process.join()
        self._connection.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], log: Path | None) -> None:
    """The child's end."""
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
    try:
        served = make(*arguments)
        connection.send(("done",))
        while (command := connection.recv()) is not None:
            method, given = command
            for answer in getattr(served, method)(*given):
                connection.send(("answer", answer))
            connection.send(("done",))
    except EOFError:
        pass  # the parent is gone
    except Exception as error:  # it belongs to the parent, which goes on with other processes
        cause = getattr(error, "inner_exception", error)  # Dynamo wraps what a backend raises
        first = str(cause).strip().partition("\n")[0]
        connection.send(("failed", f"{type(cause).__name__}: {first}" if first else type(cause).__name__, traceback.format_exc()))
