"""Trainable state of a prepared model: routers and codebooks, and the mark that makes them inputs of the captured graph.

`sptc.prepare` gives the module that owns a region (its owner) a submodule `spt` with one slot a region, `ffn0`, `attention0`, `attention1`,
..., and one forward hook. Under Dynamo the hook passes the owner's output through `sptc::mark`, an identity that carries the slots'
tensors: they become inputs of the graph, of the right instance, without a guard that differs between layers. In eager mode the hook
computes nothing.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

CODEWORDS = 16  # E: codewords of a subspace (PAPER.md, Sparse MHA)
SUBVECTOR = 8  # elements of a sub-vector (PAPER.md)
RIDGE = 0.3  # of the mean square of a router's inputs, in the regression that it starts from: for batches of few tokens
CODEBOOK_DECAY = 0.9  # of a codeword in `step`; the rest comes from the mean of its vectors

_library = torch.library.Library("sptc", "FRAGMENT")
_library.define("mark(Tensor(a) x, Tensor[] state, str layout, bool training) -> Tensor(a)")


def _mark(x: Tensor, state: list[Tensor], layout: str, training: bool) -> Tensor:
    return x.view(x.shape)


_library.impl("mark", _mark, "CompositeImplicitAutograd")
MARK = torch.ops.sptc.mark.default


class Router(nn.Module):
    """State of an FFN region: p = sigmoid(x weight^T + bias) over G blocks of hidden units.

    Args:
        weight: [G, d], the start of the router.
        bias: [G].
        down: owner-local name of the FFN's down weight, for example "mlp.down_proj.weight": what the slot belongs to.
    """

    kind = "ffn"

    def __init__(self, weight: Tensor, bias: Tensor, down: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.down = down

    def tensors(self) -> list[Tensor]:
        return [self.weight, self.bias]


class Codebook(nn.Module):
    """State of an attention region: codebooks of queries and keys, and what the compiled graph gathered since the last `step`.

    Args:
        codebooks: fp32 [h_kv, M, E, d / M].

    All of it stays fp32 through `.half()` and `.to(bfloat16)` and only moves between devices: statistics overflow or lose counts in half
    precision, and codewords decide codes by small differences of distances.
    """

    kind = "attention"
    codebooks: Tensor
    code_sums: Tensor
    code_counts: Tensor

    def __init__(self, codebooks: Tensor) -> None:
        super().__init__()
        codebooks = codebooks.detach().to(torch.float32).clone()
        self.register_buffer("codebooks", codebooks)
        self.register_buffer("code_sums", torch.zeros_like(codebooks))
        self.register_buffer("code_counts", codebooks.new_zeros(codebooks.shape[:3]))

    def tensors(self) -> list[Tensor]:
        return [self.codebooks, self.code_sums, self.code_counts]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @torch.no_grad()
    def step(self) -> None:
        """Move each codeword towards the mean of its vectors; one that no vector chose stays. Then forget the statistics."""
        counts = self.code_counts.unsqueeze(-1)
        mean = self.code_sums / counts.clamp(min=1)
        self.codebooks.lerp_(mean, (1 - CODEBOOK_DECAY) * (counts > 0).to(mean.dtype))
        self.code_sums.zero_()
        self.code_counts.zero_()


class DenseNotice:
    """Says once a model that it runs without its sparse form; all owners of one model share one."""

    def __init__(self) -> None:
        self._said = False

    def say(self, owner: nn.Module) -> None:
        if not self._said:
            self._said = True
            log.warning(
                'a model prepared by sptc runs eagerly (%s): dense, without its routers and codebooks; compile it with backend="spt"',
                type(owner).__name__,
            )


class TrainableState(nn.Module):
    """The submodule `spt` of an owner: its slots by name, in the order of the mark's tensors."""

    def __init__(self, slots: Mapping[str, Router | Codebook], notice: DenseNotice) -> None:
        super().__init__()
        for name, slot in slots.items():
            self.add_module(name, slot)
        self.notice = notice
        self.layout = ",".join(f"{name}:{slot.down}" if isinstance(slot, Router) else name for name, slot in slots.items())

    def slots(self) -> dict[str, Router | Codebook]:
        return {name: slot for name, slot in self.named_children() if isinstance(slot, (Router, Codebook))}

    def tensors(self) -> list[Tensor]:
        return [tensor for slot in self.slots().values() for tensor in slot.tensors()]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One entry of a mark's layout."""

    name: str  # "ffn0", "attention1"
    down: str  # owner-local name of the down weight; "" for attention

    @property
    def kind(self) -> str:
        return self.name.rstrip("0123456789")

    @property
    def index(self) -> int:
        return int(self.name[len(self.kind) :])

    @property
    def tensors(self) -> int:
        """How many tensors it contributes to the mark: as many as `Router.tensors` or `Codebook.tensors` has."""
        return 2 if self.kind == Router.kind else 3


def parse_layout(layout: str) -> list[Slot]:
    """The slots of a mark, in the order of its tensors."""
    return [Slot(name, down) for name, _, down in (entry.partition(":") for entry in layout.split(",") if entry)]


def mark_output(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of an owner: marks the first floating tensor of its output (a tensor, tuple, list, dict or dataclass).

    Module-level, so that a prepared model can be pickled and deep-copied. Nothing in it may differ between layers of one kind: a constant
    that does would be a guard, hence one compile a layer, and silently dense layers beyond Dynamo's recompile limit.
    """
    if not torch.compiler.is_compiling():
        module.spt.notice.say(module)  # type: ignore[union-attr, operator]
        return None
    state: Any = module.spt
    tensors, layout, training = state.tensors(), state.layout, module.training
    return map_first_floating(output, lambda x: MARK(x, tensors, layout, training))


def map_first_floating(output: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """`output` with `f` applied to its first floating tensor; containers are rebuilt, never changed. Unchanged when there is none."""
    changed, result = _map_first(output, f)
    return result if changed else output


def _map_first(value: Any, f: Callable[[Tensor], Tensor]) -> tuple[bool, Any]:
    if isinstance(value, Tensor):
        return (True, f(value)) if value.is_floating_point() else (False, value)
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            changed, new = _map_first(item, f)
            if changed:
                items = [*value[:i], new, *value[i + 1 :]]
                if hasattr(value, "_make"):  # a named tuple
                    return True, value._make(items)
                return True, tuple(items) if isinstance(value, tuple) else items
        return False, value
    if isinstance(value, dict):  # a ModelOutput is both a dict and a dataclass
        for key, item in value.items():
            changed, new = _map_first(item, f)
            if changed:
                entries = {**value, key: new}
                return True, type(value)(**entries) if dataclasses.is_dataclass(value) else entries
        return False, value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            changed, new = _map_first(getattr(value, field.name), f)
            if changed:
                return True, dataclasses.replace(value, **{field.name: new})
    return False, value


def attach(owner: nn.Module, state: TrainableState) -> None:
    """Make `state` the submodule `spt` of `owner`, in its train or eval mode, and install the hook."""
    owner.spt = state.train(owner.training)
    owner.register_forward_hook(mark_output)


def detach(owner: nn.Module) -> None:
    """Undo `attach`."""
    del owner.spt
    for handle, hook in list(owner._forward_hooks.items()):
        if hook is mark_output:
            del owner._forward_hooks[handle]


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each module of `model` that holds prepared state."""
    for name, module in model.named_modules():
        if any(hook is mark_output for hook in module._forward_hooks.values()):
            yield name, module


def step(model: nn.Module) -> None:
    """Update the codebooks of a prepared model from what its compiled graphs gathered, between two steps of training.

    Codebooks never change inside a graph that reads them. Call it after each optimizer step, or once and for all:

        optimizer.register_step_post_hook(lambda *_: sptc.step(model))

    Under DistributedDataParallel the statistics, as all buffers, are those of rank 0.
    """
    for module in model.modules():
        if isinstance(module, Codebook):
            module.step()


def subvectors(head_size: int) -> int:
    """M: into how many sub-vectors a head is cut; their size is the divisor of the head's that is nearest to 8 (the smaller of two)."""
    size = min((n for n in range(1, head_size + 1) if head_size % n == 0), key=lambda n: (abs(n - SUBVECTOR), n))
    return head_size // size


def fit_codebooks(vectors: Tensor, iterations: int = 8, seed: int = 0) -> Tensor:
    """Codebooks for queries and keys by k-means: Lloyd's iterations from E rows drawn by `seed`, the same on every device.

    Args:
        vectors: [h_kv, N, d], any floating dtype; N rows of queries and keys, after rotary embedding.

    Returns:
        fp32 [h_kv, M, E, d / M].
    """
    heads, rows, d = vectors.shape
    if rows == 0:
        raise ValueError("fit_codebooks needs at least one vector")
    m = subvectors(d)
    points = vectors.detach().to(torch.float32).reshape(heads, rows, m, d // m).transpose(1, 2)  # [h_kv, M, N, ds]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    start = order.repeat(-(-CODEWORDS // rows))[:CODEWORDS].to(points.device)
    codebooks = points.index_select(2, start).clone()  # [h_kv, M, E, ds]
    for _ in range(iterations):
        codes = torch.cdist(points, codebooks).argmin(-1)  # [h_kv, M, N]
        chosen = nn.functional.one_hot(codes, CODEWORDS).to(points.dtype)  # [h_kv, M, N, E]
        counts = chosen.sum(2).unsqueeze(-1)  # [h_kv, M, E, 1]
        mean = chosen.transpose(-1, -2) @ points / counts.clamp(min=1)
        codebooks = torch.where(counts > 0, mean, codebooks)
    return codebooks.contiguous()


def fit_router(x: Tensor, norms: Tensor, rms: float = 1.0) -> tuple[Tensor, Tensor]:
    """The start of a router: ridge regression of how much each block adds to a token's output, from the token.

    Norms are centred over the blocks of a token: which block adds more than others is what chooses. Logits get the RMS `rms` on the batch:
    at 1 the scale 2p of chosen blocks begins above 1, which makes up for some of what the others would add.

    Args:
        x: [N, d] inputs of the region on the example batch.
        norms: [N, G], the L2 norm of each block's output.

    Returns:
        weight [G, d] and bias [G], fp32.
    """
    target = norms.detach().double()
    target = target - target.mean(1, keepdim=True)
    bias = target.mean(0)
    points = x.detach().double()
    centre = points.mean(0)
    points = points - centre
    gram = points.T @ points
    power = gram.diagonal().mean()
    ridge = torch.where(power > 0, RIDGE * power, 1.0) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + ridge, points.T @ (target - bias)).T  # [G, d]
    spread = (points @ weight.T + bias).square().mean().sqrt()
    # Blocks that add alike, as far as the batch shows: no spread to go by.
    floor = (1e-3 * norms.double().square().mean().sqrt()).clamp(min=torch.finfo(torch.float32).tiny)
    scale = rms / torch.maximum(spread, floor)
    return (scale * weight).float(), (scale * (bias - weight @ centre)).float()
