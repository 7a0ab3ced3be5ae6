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
from torch import Tensor, fx, nn
from torch._logging import warning_once
from torch._subclasses.fake_tensor import FakeTensor

from sptc.ir.errors import SptcError

log = logging.getLogger(__name__)

CODEBOOK_DECAY = 0.9  # of a codeword in `step`; the rest comes from the mean of its vectors

_library = torch.library.Library("sptc", "FRAGMENT")
_library.define("mark(Tensor(a) x, Tensor[] state, str layout, bool training) -> Tensor(a)")


def _mark(x: Tensor, state: list[Tensor], layout: str, training: bool) -> Tensor:
    if not isinstance(x, FakeTensor):  # fakes are Dynamo's and our passes'; what remains is compiled or run as it is
        warning_once(
            log,
            "a model prepared by sptc was compiled, but not by backend 'spt' with its passes: it runs dense, without its routers and "
            'codebooks; compile it with backend="spt"',
        )
    return x.view(x.shape)


_library.impl("mark", _mark, "CompositeImplicitAutograd")
MARK = torch.ops.sptc.mark.default


def erase_marks(gm: fx.GraphModule) -> None:
    """Take the marks out of a graph of Dynamo's and the graphs in it, in place, before it is run as it is."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=MARK):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
            module.recompile()


class Router(nn.Module):
    """State of an FFN region: which of G blocks of hidden units a token uses, how much each counts, and what stands in for the others.

    The best blocks by x (start_weight + weight)^T + start_bias + bias are active. Their hidden units are scaled by
    2 sigmoid(x weight^T + bias). A token that leaves out a share s of its blocks gets 2 s (x low^T high^T + constant) instead.
    `weight` and `bias` start at 0, so scales start at 1: a prepared FFN begins with what its pretrained blocks compute.

    Args:
        start: weight [G, d] and bias [G] of the first choice, which stay as they are.
        stand_in: low [r, d], high [d_out, r] and constant [d_out], the start of what is trained.
        down: owner-local name of the FFN's down weight, for example "mlp.down_proj.weight": what the slot belongs to.
    """

    kind = "ffn"
    start_weight: Tensor
    start_bias: Tensor

    def __init__(self, start: tuple[Tensor, Tensor], stand_in: tuple[Tensor, Tensor, Tensor], down: str) -> None:
        super().__init__()
        weight, bias = (t.detach().clone() for t in start)
        self.weight, self.bias = nn.Parameter(torch.zeros_like(weight)), nn.Parameter(torch.zeros_like(bias))
        self.register_buffer("start_weight", weight)
        self.register_buffer("start_bias", bias)
        self.low, self.high, self.constant = (nn.Parameter(t.detach().clone()) for t in stand_in)
        self.down = down

    def tensors(self) -> list[Tensor]:
        return [self.weight, self.bias, self.start_weight, self.start_bias, self.low, self.high, self.constant]


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

    def __reduce__(self) -> Any:
        return DenseNotice, ()  # a copy of the model is one that has not been told: it lost what `Module.compile` did

    def say(self, owner: nn.Module) -> None:
        if not self._said:
            self._said = True
            log.warning(
                'a model prepared by sptc runs eagerly (%s): dense, without its routers and codebooks; compile it with backend="spt"',
                type(owner).__name__,
            )


class ExportError(SptcError, RuntimeError):
    """A prepared model is exported: what it trained would be left out."""


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
        return 7 if self.kind == Router.kind else 3


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
    if _exporting():
        raise ExportError(
            "a model prepared by sptc can't be exported: backend 'spt' alone computes its routers and codebooks, and without them it is "
            "another model; sptc.detach(model) takes them away (save them before) and gives back the plain model, which can be exported"
        )
    state: Any = module.spt
    if getattr(state, "disable_adapters", False):  # PEFT's wrapper: what it wraps is not part of the base model either
        return None
    tensors, layout, training = state.tensors(), state.layout, module.training
    return map_first_floating(output, lambda x: MARK(x, tensors, layout, training))


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    """`torch.compiler.is_exporting()`, which Dynamo of torch 2.11 takes to be true whenever it traces. An export traces anew."""
    return torch.compiler.is_exporting()


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
                return True, type(value)(**entries) if _is_dataclass(value) else entries
        return False, value
    if _is_dataclass(value):
        for field in dataclasses.fields(value):
            changed, new = _map_first(getattr(value, field.name), f)
            if changed:
                return True, dataclasses.replace(value, **{field.name: new})
    return False, value


def _is_dataclass(value: Any) -> bool:
    """`dataclasses.is_dataclass` of an object: Dynamo of torch 2.11 can't trace it for None or a number, and would part hook and layer."""
    return hasattr(value, "__dataclass_fields__") and not isinstance(value, type)


def attach(owner: nn.Module, state: TrainableState) -> None:
    """Make `state` the submodule `spt` of `owner`, in its train or eval mode, and install the hook."""
    owner.spt = state.train(owner.training)
    owner.register_forward_hook(mark_output)


def strip(owner: nn.Module) -> None:
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
