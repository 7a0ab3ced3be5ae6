"""The private folder for what outlives a process: measurements of the device, emitted kernels.

What lies in it is trusted: emitted kernels are run. So a folder that another user owns or can write to is refused.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


class CacheError(OSError):
    """The cache folder cannot be trusted."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/sptc` or `~/.cache/sptc`; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base and os.path.isabs(base) else Path.home() / ".cache") / "sptc"


def private_folder(name: str = "") -> Path:
    """The cache folder or its subfolder `name`, made with mode 0700 if it is missing.

    Raises:
        CacheError: it, or the cache folder around it, is a link, belongs to somebody else, or can be written to by others.
        OSError: it cannot be made.
    """
    folder = cache_folder()
    for path in (folder, folder / name) if name else (folder,):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            reason = "it is a symbolic link"
        elif status.st_uid != os.getuid():
            reason = f"it belongs to user {status.st_uid}"
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = f"others can write to it (mode {stat.S_IMODE(status.st_mode):04o})"
        else:
            continue
        raise CacheError(
            f"sptc keeps the kernels that it runs in {path}, and will not use that folder: {reason}. "
            "Remove it or `chmod 700` it, or set XDG_CACHE_HOME to a folder of your own"
        )
    return folder / name


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, so that readers see the old file or the new one, and several processes may do so at once."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix + ".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
