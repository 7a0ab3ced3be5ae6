"""Random programs as data: what a model does to its residual stream, statement by statement, and its source text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.fuzz.regions import Attention, Ffn

PRELUDE = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def weight(*size):
    return nn.Parameter(torch.randn(size) / 3)


def rotated(x):
    return torch.cat((-x[..., 2:], x[..., :2]), -1)


def written(x):
    x.data.mul_(2).add_(0.5)
    return x


def halved(x):
    x = x.clone()
    x[..., ::2] /= 2
    return x


def upper(n, dtype):
    mask = torch.zeros(n, n, dtype=dtype)
    mask[torch.ones(n, n, dtype=torch.bool).triu(1)] = float("-inf")
    return mask


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        h = x * 0
        h.add_(x)
        return h.tanh() * 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        out = torch.empty_like(grad)
        out.copy_(grad)
        out.mul_(2)
        return out * (1 - x.tanh() ** 2)


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.width = 2
        return x.clone().clamp_(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[..., : ctx.width] = 0
        return grad
"""

# What a line does to the stream `x`; {i} numbers what it owns.
STATEMENTS = {
    "layer_norm": ("self.n{i} = nn.LayerNorm(8)", "x = self.n{i}(x)"),
    "rms_norm": ("self.n{i} = nn.RMSNorm(8)", "x = self.n{i}(x)"),
    "spelled_norm": ("self.n{i} = weight(8)", "x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.n{i}"),
    "batch_norm": ("self.n{i} = nn.BatchNorm1d(8)", "x = self.n{i}(x.transpose(1, 2)).transpose(1, 2)"),
    "clone_add": ("", "x = x.clone().add_(0.5)"),
    "add_": ("", "x.add_(0.25)"),
    "view_write": ("", "x = x.clone(); x[:, 0].mul_(2)"),
    "setitem": ("", "x = x.clone(); x[..., :2] = x[..., 2:4] * 3"),
    "row_write": ("", "x = x * 1; y = x.transpose(0, 1)[1:]; y.mul_(0.5)"),
    "data": ("", "x.data.add_(0.1)"),
    "data_view": ("", "x = x * 1; x.data[:, 1:].clamp_(-0.5, 0.5)"),
    "detach": ("", "x = x.detach() * 0.5 + x"),
    "detach_write": ("", "x = x * 1; x.detach().mul_(0.5)"),
    "input_write": ("", "given.mul_(0.5)"),
    "input_read": ("", "x = x + given * 0.25"),
    "mask_write": ("", "mask[:, 1:].logical_not_()"),
    "count": ("self.register_buffer('c{i}', torch.zeros(()))", "self.c{i}.add_(1); x = x + self.c{i} * 0.1"),
    "ema": (
        "self.register_buffer('c{i}', torch.zeros(8))",
        "self.c{i}.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1); x = x - self.c{i}",
    ),
    "assigned": ("self.register_buffer('c{i}', torch.zeros(8))", "self.c{i} = self.c{i} + x.detach().mean((0, 1)); x = x + self.c{i}"),
    "scale": ("self.w{i} = weight(8)", "x = x * self.w{i}"),
    "param_data": ("self.w{i} = weight(8)", "self.w{i}.data.clamp_(-0.1, 0.1); x = x * self.w{i}"),
    "param_no_grad": ("self.w{i} = weight(8)", "\nwith torch.no_grad():\n    self.w{i}.mul_(0.5)\nx = x + self.w{i}"),
    "param_set": ("self.w{i} = weight(8)", "self.w{i}.data = self.w{i}.data.clamp(-0.1, 0.1); x = x * self.w{i}"),
    "doubled": ("", "x = Doubled.apply(x)"),
    "kept": ("", "x = x + Kept.apply(x)"),
    "dropout": ("", "x = F.dropout(x, 0.25, True)"),
    "noise": ("", "x = x + torch.rand_like(x) * 0.1"),
    "tuple": ("", "x, *rest = (x, x * 2, {{'more': x + 1}}); x = x + rest[0] * 0.1 + rest[1]['more']"),
    "break": ("", "torch._dynamo.graph_break()"),
    "out": ("", "y = torch.empty(2, 5, 8, dtype=x.dtype); torch.add(x.detach(), 1, out=y); x = x + y"),
    "kept_alive": ("self.register_buffer('c{i}', torch.zeros(2, 5, 8))", "self.c{i}.copy_(x.detach()); x = x + self.c{i}.mean()"),
}
WRAPS = {  # lines around a call of the part
    "checkpoint": "x = checkpoint(self.part{i}, x, given, mask, use_reentrant=False)",
    "reentrant": "x = checkpoint(self.part{i}, x, given, mask, use_reentrant=True)",
    "no_grad": "\nwith torch.no_grad():\n    y = self.part{i}(x, given, mask)\nx = x + y",
    "enable_grad": "\nwith torch.no_grad():\n    with torch.enable_grad():\n        x = self.part{i}(x, given, mask)",
    "autocast": "\nwith torch.autocast('cpu', dtype=torch.bfloat16):\n    y = self.part{i}(x, given, mask)\nx = x + y.to(x.dtype)",
    "no_autocast": "\nwith torch.autocast('cpu', enabled=False):\n    x = self.part{i}(x, given, mask)",
    "loop": "\nfor _ in range(2):\n    x = self.part{i}(x, given, mask)",
    "call": "x = self.part{i}(x, given, mask)",
}
OUTPUTS = {
    "tensor": "return x",
    "tuple": "return x, x.mean(1), None",
    "dict": "return {'last': x, 'sum': x.sum(), 'state': (x[:, 0], [x * 2])}",
    "view": "return x.transpose(0, 1), given",
    "detached": "return x, x.detach(), x.data",
}


@dataclass(frozen=True)
class Line:
    """One line of STATEMENTS."""

    name: str


@dataclass(frozen=True)
class Use:
    """A planted region, added to the stream or in its place."""

    region: Ffn | Attention
    residual: bool


@dataclass(frozen=True)
class Wrap:
    """Statements under one of WRAPS."""

    name: str
    body: tuple[Statement, ...]


Statement = Line | Use | Wrap


@dataclass(frozen=True)
class Program:
    """A module and how it is called."""

    body: tuple[Statement, ...]
    output: str
    dtype: str
    train: bool  # with gradients, and in training mode
    input_grad: bool  # x comes from what requires a gradient

    def planted(self) -> dict[str, str]:
        """Kinds of the planted regions by the names of their modules."""
        return {f"r{i}": s.region.kind for i, s in enumerate(_flat(self.body)) if isinstance(s, Use)}

    def render(self) -> str:
        """The source of a class `Model`."""
        numbers = {id(s): i for i, s in enumerate(_flat(self.body))}
        classes, inits, parts = [], [], []

        def lines(body: tuple[Statement, ...]) -> Iterator[str]:
            for s in body:
                i = numbers[id(s)]
                if isinstance(s, Use):
                    classes.append("\n".join(s.region.render(f"R{i}")))
                    inits.append(f"self.r{i} = R{i}()")
                    yield f"x = {'x + ' if s.residual else ''}self.r{i}(x, mask)"
                    continue
                init, text = STATEMENTS[s.name] if isinstance(s, Line) else ("", WRAPS[s.name])
                if init:
                    inits.append(init.format(i=i))
                yield from text.format(i=i).strip("\n").split("\n")
                if isinstance(s, Wrap):
                    parts.append([f"def part{i}(self, x, given, mask):", *(f"    {line}" for line in lines(s.body)), "    return x"])

        body = ["def forward(self, x, mask):", "    given = x", "    x = x * 1.0", *(f"    {line}" for line in lines(self.body))]
        body.append(f"    {OUTPUTS[self.output]}")
        init = ["def __init__(self):", "    super().__init__()", *(f"    {line}" for line in inits)]
        members = [line for member in (init, *parts, body) for line in ("", *member)]
        model = "\n".join(["class Model(nn.Module):", *(f"    {line}" if line else "" for line in members[1:])])
        return "\n\n\n".join([PRELUDE.rstrip(), *classes, model]) + "\n"


def _flat(body: tuple[Statement, ...]) -> Iterator[Statement]:
    for s in body:
        yield s
        if isinstance(s, Wrap):
            yield from _flat(s.body)
