"""Planted regions of random programs: FFNs and attention in many spellings, as data that renders itself to a module's source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WIDTH, HIDDEN, HEADS, HEAD = 8, 12, 2, 4

# Of each table what is common comes first.

# How y = x W^T (+ b) is spelled: lines of __init__ and the expression. {n} the name, {i} and {o} the widths, {x} the input.
PROJECTIONS = {
    "linear": ("self.{n} = nn.Linear({i}, {o})", "self.{n}({x})"),
    "no_bias": ("self.{n} = nn.Linear({i}, {o}, bias=False)", "self.{n}({x})"),
    "frozen": ("self.{n} = nn.Linear({i}, {o}).requires_grad_(False)", "self.{n}({x})"),
    "functional": ("self.{n}, self.{n}_b = weight({o}, {i}), weight({o})", "F.linear({x}, self.{n}, self.{n}_b)"),
    "late_bias": ("self.{n}, self.{n}_b = weight({o}, {i}), weight({o})", "(F.linear({x}, self.{n}) + self.{n}_b)"),
    "conv1d": (
        "self.{n}, self.{n}_b = weight({i}, {o}), weight({o})",
        "torch.addmm(self.{n}_b, {x}.view(-1, {i}), self.{n}).view(*{x}.shape[:-1], {o})",
    ),
    "matmul": ("self.{n}, self.{n}_b = weight({i}, {o}), weight({o})", "({x} @ self.{n} + self.{n}_b)"),
    "matmul_t": ("self.{n} = weight({o}, {i})", "torch.matmul({x}, self.{n}.t())"),
    "lora": (
        "self.{n} = nn.Linear({i}, {o}).requires_grad_(False); self.{n}_A, self.{n}_B = nn.Linear({i}, 2), nn.Linear(2, {o})",
        "(self.{n}({x}) + self.{n}_B(self.{n}_A({x})) * 0.5)",
    ),
    "computed": ("self.{n} = weight({o}, {i})", "F.linear({x}, self.{n} * 1.5)"),
    "einsum": ("self.{n} = weight({o}, {i})", "torch.einsum('bnd,od->bno', {x}, self.{n})"),
    "convolution": ("self.{n} = nn.Conv1d({i}, {o}, 1)", "self.{n}({x}.transpose(1, 2)).transpose(1, 2)"),
    "lora_inplace": (
        "self.{n} = nn.Linear({i}, {o}); self.{n}_A, self.{n}_B = weight(2, {i}), weight({o}, 2)",
        "self.{n}({x}).add_(({x} @ self.{n}_A.T @ self.{n}_B.T).mul_(0.5))",
    ),
}
ACTIVATIONS = {
    "relu": "F.relu(h)",
    "relu_": "h.relu_()",
    "gelu": "F.gelu(h)",
    "gelu_tanh": "0.5 * h * (1 + torch.tanh(0.7978845608 * (h + 0.044715 * h * h * h)))",
    "silu": "F.silu(h)",
    "silu_": "F.silu(h, inplace=True)",
    "quick": "h * torch.sigmoid(1.702 * h)",
    "squared": "F.relu(h).square()",
    "tanh": "torch.tanh(h)",
    "leaky": "F.leaky_relu(h, 0.1)",
    "where": "torch.where(h > 0, h, 0.1 * h)",
    "clamp": "h.clamp(-0.5, 0.5)",
    "softplus": "F.softplus(h)",
    "float": "F.gelu(h.float()).to(h.dtype)",
    "norm": "F.gelu(F.layer_norm(h, (12,)))",
    "custom": "Doubled.apply(h)",
    "custom_after": "Kept.apply(F.gelu(h))",
    "detach": "F.silu(h.detach()) + h",
    "data": "written(F.gelu(h))",
    "copy": "torch.empty_like(h).copy_(F.gelu(h))",
    "setitem": "halved(F.gelu(h))",
}
GATES = ("none", "two", "chunk", "split", "slice", "unbind")
# What else an FFN does, before it goes down: hazards for whoever replaces the region.
FFN_HAZARDS = {
    "none": "",
    "input": "x.data.mul_(0.5)",
    "weight": "self.first().data.clamp_(-0.2, 0.2)",
    "weight_no_grad": "torch._foreach_mul_([self.kept], 2.0)",
    "escape": "self.kept.copy_(a.detach().mean((0, 1)))",
    "hidden": "a.add_(1)",
    "view": "a[:, 0].zero_()",
    "flip": "a.data[..., :2].neg_()",
}


def _projection(name: str, spelling: str, i: int, o: int, x: str) -> tuple[str, str]:
    init, call = PROJECTIONS[spelling]
    return init.format(n=name, i=i, o=o, x=x), call.format(n=name, i=i, o=o, x=x)


@dataclass(frozen=True)
class Ffn:
    """down(act(up(x))), maybe gated."""

    up: str
    down: str
    activation: str
    gate: str
    hazard: str
    kind: Literal["ffn"] = "ffn"

    def render(self, name: str) -> list[str]:
        """A class called `name`."""
        fused = self.gate not in ("none", "two")
        inits, body = [], []
        up_init, up = _projection("up", self.up, WIDTH, 2 * HIDDEN if fused else HIDDEN, "x")
        down_init, down = _projection("down", self.down, HIDDEN, WIDTH, "a")
        inits += [up_init, down_init, f"self.register_buffer('kept', torch.ones({HIDDEN}))"]
        body.append(f"h = {up}")
        if self.gate == "two":
            gate_init, gate = _projection("gate", self.up, WIDTH, HIDDEN, "x")
            inits.append(gate_init)
            body.append(f"g = {gate}")
        body += {
            "chunk": ["h, g = h.chunk(2, -1)"],
            "split": [f"h, g = torch.split(h, [{HIDDEN}, {HIDDEN}], dim=-1)"],
            "slice": [f"h, g = h[..., :{HIDDEN}], h[..., {HIDDEN}:]"],
            "unbind": [f"h, g = h.unflatten(-1, (2, {HIDDEN})).unbind(-2)"],
        }.get(self.gate, [])
        body.append(f"a = {ACTIVATIONS[self.activation]}")
        if self.gate != "none":
            body.append("a = a * g")
        if FFN_HAZARDS[self.hazard]:
            body.append(FFN_HAZARDS[self.hazard])
        body.append(f"return {down}")
        first = ["def first(self):", "    return next(iter(self.parameters()))"]
        return _class(name, inits, "self, x, mask", body, first)


QKV = ("three", "chunk", "split", "unbind")
ATTENTIONS = ("sdpa", "softmax", "softmax_float", "einsum", "baddbmm", "exp")
GROUPS = ("none", "expand", "repeat", "gqa")
MASKS = {  # spelling: (its tensor, whether it is added)
    "none": ("None", True),
    "causal": ("torch.ones(n, n, dtype=torch.bool).tril()", False),
    "is_causal": ("torch.ones(n, n, dtype=torch.bool).tril()", False),
    "window": ("(places[:, None] >= places) & (places[:, None] - places < 3)", False),
    "padding": ("mask[:, None, None, :]", False),
    "causal_padding": ("(places[:, None] >= places) & mask[:, None, None, :]", False),
    "added": ("torch.full((n, n), float('-inf'), dtype=x.dtype).triu(1)", True),
    "added_min": ("torch.where(mask[:, None, None, :], x.new_zeros(()), torch.finfo(x.dtype).min)", True),
    "filled": ("torch.zeros(n, n, dtype=x.dtype).masked_fill_(places[:, None] < places, -1e9)", True),
    "setitem": ("upper(n, x.dtype)", True),
    "alibi": ("(-0.5 * (places[:, None] - places).abs()).to(x.dtype)", True),
    "buffer": ("self.allowed", False),
    "learned": ("self.bias", True),
}
ATTENTION_HAZARDS = {
    "none": "",
    "keys": "k.data.mul_(0.5)",
    "values": "v = v.clone(); v[:, :, 0] = 0",
    "input": "x.data.add_(0.1)",
    "weight": "next(iter(self.parameters())).data.mul_(0.9)",
    "rotary": "q = q * angle.cos() + rotated(q) * angle.sin(); k = k * angle.cos() + rotated(k) * angle.sin()",
    "custom": "k = Doubled.apply(k)",
    "query": "q = q.mul_(0.5)",
    "buffer": "self.allowed.logical_and_(places[:, None] >= places)",
}


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T + mask) v, with projections in and out."""

    projection: str
    qkv: str
    spelling: str
    group: str
    mask: str
    hazard: str
    kind: Literal["attention"] = "attention"

    def render(self, name: str) -> list[str]:
        """A class called `name`."""
        grouped = self.group != "none" and self.qkv == "three"
        kv = 1 if grouped else HEADS
        inits = [
            "self.register_buffer('allowed', torch.ones(5, 5, dtype=torch.bool).tril(1))",
            "self.bias = weight(2, 5, 5)",
        ]
        body = ["b, n, _ = x.shape", "places = torch.arange(n)", f"angle = places[:, None] / 10 ** (torch.arange({HEAD}) % 2).to(x.dtype)"]
        if self.qkv == "three":
            for letter, heads in (("q", HEADS), ("k", kv), ("v", kv)):
                init, call = _projection(letter, self.projection, WIDTH, heads * HEAD, "x")
                inits.append(init)
                body.append(f"{letter} = {call}.view(b, n, {heads}, {HEAD}).transpose(1, 2)")
        else:
            init, call = _projection("qkv", self.projection, WIDTH, 3 * WIDTH, "x")
            inits.append(init)
            parts = {
                "chunk": f"(t.view(b, n, {HEADS}, {HEAD}).transpose(1, 2) for t in {call}.chunk(3, -1))",
                "split": f"(t.reshape(b, n, {HEADS}, {HEAD}).transpose(1, 2) for t in {call}.split({WIDTH}, dim=-1))",
                "unbind": f"{call}.reshape(b, n, 3, {HEADS}, {HEAD}).permute(2, 0, 3, 1, 4).unbind(0)",
            }
            body.append(f"q, k, v = {parts[self.qkv]}")
        if ATTENTION_HAZARDS[self.hazard]:
            body.append(ATTENTION_HAZARDS[self.hazard])
        if grouped and self.group == "expand":
            body += [f"{t} = {t}[:, :, None].expand(b, {kv}, {HEADS}, n, {HEAD}).reshape(b, {HEADS}, n, {HEAD})" for t in "kv"]
        elif grouped and not (self.group == "gqa" and self.spelling == "sdpa"):
            body += [f"{t} = {t}.repeat_interleave({HEADS}, dim=1)" for t in "kv"]
        body += [*self._scores(grouped and self.group == "gqa")]
        init, out = _projection("out", self.projection, WIDTH, WIDTH, "y")
        inits.append(init)
        body += [f"y = y.transpose(1, 2).reshape(b, n, {WIDTH})", f"return {out}"]
        return _class(name, inits, "self, x, mask", body, [])

    def _scores(self, gqa: bool) -> list[str]:
        text, added = MASKS[self.mask]
        if self.spelling == "sdpa":
            how = "is_causal=True" if self.mask == "is_causal" else f"attn_mask={text}"
            return [f"y = F.scaled_dot_product_attention(q, k, v, {how}{', enable_gqa=True' if gqa else ''})"]

        def rows(t: str) -> str:
            return f"{t}.reshape(-1, n, {HEAD})"

        scores = {
            "einsum": "s = torch.einsum('bhqd,bhkd->bhqk', q, k) / 2",
            "baddbmm": f"s = torch.baddbmm(q.new_zeros(1), {rows('q')}, {rows('k')}.transpose(1, 2), alpha=0.5).view(b, {HEADS}, n, n)",
        }.get(self.spelling, "s = (q * 0.5) @ k.transpose(-1, -2)")
        mask = [f"s = s + {text}" if added else f"s = s.masked_fill(~({text}), float('-inf'))"] if text != "None" else []
        softmax = {
            "softmax_float": "p = F.softmax(s, -1, dtype=torch.float32).to(q.dtype)",
            "exp": "p = (s - s.amax(-1, keepdim=True).detach()).exp(); p = p / p.sum(-1, keepdim=True)",
        }.get(self.spelling, "p = s.softmax(-1)")
        product = "y = torch.einsum('bhqk,bhkd->bhqd', p, v)" if self.spelling == "einsum" else "y = p @ v"
        return [scores, *mask, softmax, product]


def _class(name: str, inits: list[str], arguments: str, body: list[str], more: list[str]) -> list[str]:
    return [
        f"class {name}(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *(f"        {line}" for line in inits),
        f"    def forward({arguments}):",
        *(f"        {line}" for line in body),
        *(f"    {line}" for line in more),
    ]
