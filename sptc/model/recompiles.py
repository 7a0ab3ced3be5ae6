"""When code has been compiled as often as Dynamo compiles it: what needs one more graph runs eagerly, and dense."""

from __future__ import annotations

import os
import types

import torch
import torch._dynamo
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import guard_failures


def limit_note(code: types.CodeType, coming: int = 0) -> str | None:
    """A note on code that has reached Dynamo's recompile limit, with what changed last; None below it.

    Args:
        code: of the frame that Dynamo compiles.
        coming: compiles that are not in its cache yet.
    """
    count, limit = len(_debug_get_cache_entry_list(code)) + coming, torch._dynamo.config.recompile_limit
    if count < limit:
        return None
    where = f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
    # Dynamo compares with every graph that it has, the latest first, and says for each "0/3: what failed".
    failed = [reason.partition(": ")[2].splitlines()[0] for reason in guard_failures.get(code, ()) if ": " in reason]
    changed = f"; what changed last: {failed[-1]}" if failed else ""
    return (
        f"{where} was compiled {count} times, as often as torch._dynamo.config.recompile_limit allows: what needs one more graph, such as "
        f"other sizes or another layer, runs eagerly and dense{changed}"
    )
