"""A digest of this package's own source, for caches of compiled graphs that outlive it.

AOTAutograd stores graphs into which fakes, autograd and autocast rules of our operators were traced, under a key that holds no more of an
operator than its name and arguments. Whatever of ours could change such a graph is text of this package: Python, C++ and templates.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

_SOURCES = (".py", ".cpp", ".h")


@functools.cache
def fingerprint() -> str:
    """32 hexadecimal digits, the same in every process that runs the same sources, wherever they lie."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder, _, names in sorted(os.walk(root, followlinks=True)):  # passes/ and codegen/ are links in a checkout
        for path in (Path(folder, name) for name in sorted(names) if name.endswith(_SOURCES)):
            text = path.read_bytes()
            digest.update(f"{path.relative_to(root)} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:32]
