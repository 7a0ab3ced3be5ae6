"""The private folder for what outlives a process: measurements of the device, emitted kernels.

What lies in it is trusted: emitted kernels are run. So a folder that another user owns or can write to is refused.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

from sptc.ir.errors import SptcError

log = logging.getLogger(__name__)


class CacheError(SptcError, OSError):
    """The cache folder cannot be trusted."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/sptc` or `~/.cache/sptc`, or what stands in for it in this process; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base if base and os.path.isabs(base) else Path(os.path.expanduser("~"), ".cache")) / "sptc"
    return _stand_ins.get(folder, folder)


_stand_ins: dict[Path, Path] = {}  # for folders that can't be written: one that lasts as long as this process


def private_folder(name: str = "") -> Path:
    """The cache folder or its subfolder `name`, made with mode 0700 if it is missing.

    Where it cannot be made or written, a warning says so once, and a temporary folder takes its place until this process ends.

    Raises:
        CacheError: it, or the cache folder around it, is a link, belongs to somebody else, or can be written to by others.
        OSError: not even a temporary folder can be made.
    """
    folder = cache_folder()
    try:
        return _made(folder, name)
    except CacheError:
        raise
    except OSError as error:
        log.warning(
            "sptc cannot keep kernels and measurements in %s (%s): they last as long as this process; "
            "set XDG_CACHE_HOME to a folder that can be written",
            folder,
            error.strerror or error,
        )
        _stand_ins[folder] = temporary = Path(tempfile.mkdtemp(prefix="sptc-"))
        atexit.register(_remove, temporary, os.getpid())
        return _made(temporary, name)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a child that was forked
        shutil.rmtree(folder, ignore_errors=True)


def _made(folder: Path, name: str) -> Path:
    if not folder.is_absolute():
        raise FileNotFoundError(errno.ENOENT, "there is no home folder")
    for path in (folder, folder / name) if name else (folder,):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            reason = "it is a symbolic link"
        elif status.st_uid != os.getuid():
            reason = f"it belongs to user {status.st_uid}"
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = f"others can write to it (mode {stat.S_IMODE(status.st_mode):04o})"
        elif not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it cannot be written")
        else:
            continue
        raise CacheError(
            f"sptc keeps the kernels that it runs in {path}, and will not use that folder: {reason}. "
            "Remove it or `chmod 700` it, or set XDG_CACHE_HOME to a folder of your own"
        )
    return folder / name


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, so that readers see the old file or the new one, and several processes may do so at once."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix + ".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
