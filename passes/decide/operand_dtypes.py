"""Whether sparse attention computes in the dtypes of a region's operands, as autocast leaves them. FFNs do in any, as the dense ones."""

from __future__ import annotations

import torch
from torch.fx import Node

from sptc.device.costs import DeviceCosts
from sptc.ir.region import AttentionRegion
from sptc.passes.graph.modes import autocast_dtype
from sptc.passes.graph.pattern import dtype, value


def misfit(region: AttentionRegion, device: DeviceCosts) -> str:
    """Why they don't, for people; "" if they do."""
    found = {_cast(node, region.y) for node in (region.q, region.k, region.v)} - {None}
    names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in found))
    if len(found) > 1:
        return f"its operands are of {names}, which the sparse operators don't mix"
    return f"the sparse operators don't compute in {names} on this device" if found - device.dtypes else ""


def _cast(node: Node, place: Node) -> torch.dtype | None:
    """The dtype of `node` after what autocast makes of it at `place`; fp64 stays."""
    kind = dtype(node)
    if kind is None or kind == torch.float64:
        return kind
    return autocast_dtype(place, value(node).device.type) or kind
