"""What a repro script (`sptc/reports/repro.py`) does. Its functions are copied into the script.

The script is then read and changed by itself.
"""

from __future__ import annotations

import contextlib
import sys
import traceback

import torch


def floats(shape, stride, dtype, device, mean, deviation, requires_grad, parameter):
    """Normal numbers in the layout of the tensor that they stand for."""
    drawn = mean + deviation * torch.randn(shape)
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(drawn)
    return torch.nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)


def integers(shape, stride, dtype, device, low, high, share):
    """Numbers from low to high; where low stands for none (-100 of labels, False), a share of low and the others from 0 on."""
    first = max(low, 0) if share < 1 and low < 0 else low
    drawn = torch.randint(first, high + 1, shape)
    if share:
        drawn = torch.where(torch.rand(shape) < share, low, torch.clamp(drawn, min=min(low + 1, high)))
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(drawn)


def step(call, inputs, autocast):
    """Outputs that are floating, and gradients of their mean squares, by name."""
    torch.manual_seed(0)
    with torch.autocast(autocast[0], getattr(torch, autocast[1])) if autocast else contextlib.nullcontext():
        found = call(*inputs)
    outputs = [o for o in (found if isinstance(found, (tuple, list)) else [found]) if torch.is_tensor(o) and o.is_floating_point()]
    values = {f"output {i}": o.detach().double() for i, o in enumerate(outputs)}
    wanted = [o.double().square().mean() for o in outputs if o.requires_grad]
    leaves = {i: x for i, x in enumerate(inputs) if torch.is_tensor(x) and x.requires_grad}
    if wanted and leaves:
        gradients = torch.autograd.grad(torch.stack(wanted).sum(), list(leaves.values()), allow_unused=True)
        values |= {f"gradient of input {i}": g.double() for i, g in zip(leaves, gradients, strict=True) if g is not None}
    return values


def main(graph, inputs, options, autocast):
    """Print by how much each compiled form differs from the eager one; the exit status is 1 if one raises or should not differ and does."""
    print("torch", torch.__version__)
    half = autocast is not None or any(torch.is_tensor(x) and x.dtype in (torch.bfloat16, torch.float16) for x in inputs)
    allowed, bad = 5e-2 if half else 1e-3, False
    want = step(graph, inputs, autocast)
    whole = {"decline": "never", "attention.density": 1.0, "ffn.density": 1.0, "ffn.context_density": None, "ffn.padding": "compute"}
    forms: dict[str, tuple] = {"inductor": ("inductor", None), "spt at density 1": ("spt", whole), "spt": ("spt", options or None)}
    for name, (backend, given) in forms.items():
        torch._dynamo.reset()
        try:
            found = step(torch.compile(graph, backend=backend, options=given), inputs, autocast)
        except Exception:
            bad = True
            print(f"{name} raises")
            traceback.print_exc()
            continue
        largest = max((float(w.abs().max()) for w in want.values() if w.numel()), default=1.0)
        errors = {
            key: float((found[key] - w).abs().max()) / max(float(w.abs().max()), 1e-2 * largest, 1e-30) if key in found else float("inf")
            for key, w in want.items()
            if w.numel()
        }
        worst = max(errors, key=lambda key: errors[key])
        wrong = not errors[worst] <= allowed and name != "spt"
        bad = bad or wrong
        print(f"{name}: {worst} differs by {errors[worst]:.2g} (relative){', MORE THAN IT MAY' if wrong else ''}")
    sys.exit(bad)
