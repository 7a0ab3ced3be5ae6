"""Names of regions that hold in every process and layer: module path, kind, and which of its kind it is in that module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sptc.ir.region import Region


def region_keys(regions: Sequence[Region]) -> dict[Region, str]:
    """The key of each region of one graph, such as "layers.0.mlp:ffn0"; `regions` are in the order in which the graph computes them."""
    seen: Counter[tuple[str, str]] = Counter()
    keys = {}
    for region in regions:
        place = (region.site.module, region.kind)
        keys[region] = f"{region.site.module}:{region.kind}{seen[place]}"
        seen[place] += 1
    return keys
