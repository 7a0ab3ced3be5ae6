"""Times of calls within the limit of a case."""

from __future__ import annotations

from collections.abc import Mapping

from bench.gpu.sizes import Sizes
from bench.gpu.stage import Limit, OutOfTime
from bench.kernels.clock import Call, Timing, alternating


def timed(calls: Mapping[str, Call], sizes: Sizes, limit: Limit) -> dict[str, Timing]:
    """Figures of each call, of as many rounds as there is time for.

    Raises:
        OutOfTime: there was not even time for one.
    """
    times = alternating(calls, sizes.rounds, sizes.device, limit.over)
    if len(times) < len(calls):
        raise OutOfTime
    return times


def one(call: Call, sizes: Sizes, limit: Limit) -> Timing:
    """Figures of a single call."""
    return timed({"": call}, sizes, limit)[""]
