"""How exact products of fp32 operands are."""

from __future__ import annotations

import torch


def product_precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision` for operands of `dtype`: as the user has set torch's own products; 16-bit operands have no choice."""
    # The newer of torch's two switches; it follows the older one, which raises where somebody has set the newer one.
    return "ieee" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32"
