"""How exact products of fp32 operands are."""

from __future__ import annotations

import torch

from sptc.codegen.triton.target import target_of


def product_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Triton's `input_precision` for operands of `dtype`: as the user has set torch's own products; 16-bit operands have no choice."""
    # The newer of torch's two switches; it follows the older one, which raises where somebody has set the newer one.
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return full_precision(device)


def full_precision(device: torch.device) -> str:
    """What comes near products in fp32 on matrix units: three TF32 products on NVIDIA, fp32 matrix units on AMD.

    NVIDIA has no fp32 matrix units: "ieee" would mean multiply-adds, at about a tenth of that speed.
    """
    return "ieee" if target_of(device).backend == "hip" else "tf32x3"
