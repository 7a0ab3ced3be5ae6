"""`python -m bench.gpu` (`make gpu`): the stages in order, each in a process of its own, a summary at the end whatever happens.

This process imports neither torch nor Triton: nothing on the device can harm it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from bench.gpu.journal import Journal
from bench.gpu.stage import CONTEXT_DIED
from bench.gpu.summary import summary

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
STAGES = "bench.gpu.stages"
NAMES = ("start", "warm", "correct", "kernels", "layers", "training", "tuning", "flex")  # most important first; `stages` says what they are
_ENDING = 15.0  # seconds beyond the end of a stage after which its process is killed


class Runner:
    """Gives jobs to children. One child is always started ahead of its job."""

    def __init__(self, journal: Journal, stages: str, dry: bool, end: float) -> None:
        self.journal, self.stages, self.dry, self.end = journal, stages, dry, end
        self.folder = tempfile.TemporaryDirectory()
        self.trail = Path(self.folder.name, "trail")
        self.spare = self._child()

    def run(self, stage: str) -> None:
        """Do a stage, with as many processes as it takes: each that dies leaves one case fewer."""
        while (code := self._job(stage)) != 0:
            case, _, trace = self.trail.read_text().partition("\n") if self.trail.exists() else ("", "", "")
            self.trail.unlink(missing_ok=True)
            if case:  # the main thread's stack stands last
                self.journal.write(
                    stage, case, {"status": "died", "error": f"exit code {code}", "trace": trace[trace.rfind("hread 0x") :][:1500]}
                )
            elif code != CONTEXT_DIED:
                self.journal.write(stage, "all of it", {"status": "died", "error": f"exit code {code}, in no case"})
                return

    def close(self) -> None:
        """End whatever still runs."""
        _kill(self.spare)
        self.folder.cleanup()

    def _job(self, stage: str) -> int:
        """The exit code of a child that did what was left of the stage; negative where it was killed."""
        child, self.spare = self.spare, self._child()
        journal = {key: str(value) if key == "path" else value for key, value in asdict(self.journal).items()}
        job = {**journal, "stage": stage, "dry": self.dry, "end": self.end, "trail": str(self.trail)}
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.close()
            return child.wait(max(0.0, self.end - time.monotonic()) + _ENDING)
        except BrokenPipeError:  # it died at its imports
            return child.wait() or 1
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            _kill(child)  # and the compilers that it started

    def _child(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-m", "bench.gpu", "--child", self.stages]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True, process_group=0)


def _kill(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", default=os.environ.get("GPU_DRY") == "1", help="small, on a CPU (also: GPU_DRY=1)")
    parser.add_argument("--minutes", type=float, help="of the whole run (default: 8; dry: 60)")
    parser.add_argument("--stage", choices=NAMES, action="append", help="default: all")
    parser.add_argument("--stages", default=STAGES, help=argparse.SUPPRESS)  # another module that has them, for tests
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        from bench.gpu import child  # imports torch

        child.main(arguments.child)
        return 0
    device = "dry" if arguments.dry else device_name()
    if device is None:
        print("`make gpu` needs a GPU, and nvidia-smi names none; `GPU_DRY=1 make gpu` runs it at small sizes on a CPU", file=sys.stderr)
        return 2
    start, minutes = time.monotonic(), arguments.minutes or (60.0 if arguments.dry else 8.0)
    folder = Path(os.environ.get("OUT") or RESULTS)
    journal = Journal(folder / f"gpu_{device}.jsonl", datetime.now(UTC).isoformat(timespec="seconds"), start)
    journal.write("run", "begins", {"commit": commit(), "device": device, "minutes": minutes})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    runner = Runner(journal, arguments.stages, arguments.dry, start + 60 * minutes - _ENDING)
    try:
        for stage in arguments.stage or NAMES:
            runner.run(stage)
    finally:
        runner.close()
        print(summary(journal.rows()), flush=True)
    return 0 if all(row.get("status", "ok") == "ok" and not row.get("wrong") for row in journal.rows()) else 1


def device_name() -> str | None:
    """The GPU's name as a part of a file's; None without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return re.sub(r"\W+", "_", names[0].lower()).strip("_") if names else None


def commit() -> str:
    """The commit of the working tree, "+" after it if files differ; "unknown" outside a repository."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
