"""Which tile sizes were measured best on a device: one small file for each question, in the private cache folder.

A file is written whole or not at all, so processes that measure at the same time do no harm: the last one stays. A file that holds
anything else counts as missing. What it names is used only while it is among the candidates that fit (`tiling.Question.answer`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from sptc.device.cache import cache_folder, private_folder, write_whole

log = logging.getLogger(__name__)

Facts = tuple[tuple[str, int], ...]


@functools.lru_cache(maxsize=4096)
def recall(device: str, template: str, facts: Facts) -> Mapping[str, int] | None:
    """The values of the tiling (`Tiling.values`) that was measured best, or None."""
    path = _path(device, template, facts)
    try:
        values = json.loads(path.read_text())["tiling"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s holds no measured tile sizes (%r): the defaults are used until they are measured anew", path, error)
        return None
    return values if isinstance(values, dict) else None


def remember(device: str, template: str, facts: Facts, tiling: Mapping[str, int], milliseconds: Mapping[str, float]) -> None:
    """Keep the best tiling, and for people what each candidate took.

    Raises:
        OSError: the cache folder can't be written, or trusted (CacheError).
    """
    private_folder("tiles")
    record = {"device": device, "triton": _triton(), "template": template, "facts": dict(facts)}
    text = json.dumps({**record, "tiling": dict(tiling), "milliseconds": dict(milliseconds)}, indent=1)
    write_whole(_path(device, template, facts), text)
    recall.cache_clear()


def _path(device: str, template: str, facts: Facts) -> Path:
    key = json.dumps([device, _triton(), template, facts])
    return cache_folder() / "tiles" / f"{template}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _triton() -> str:
    import triton  # only processes that launch kernels get here

    return triton.__version__
