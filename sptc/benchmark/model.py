"""The model of a job, ready to be trained, and the loss of what it returns."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sptc.benchmark.job import DTYPES, Job
from sptc.benchmark.variants import BenchError
from sptc.model.capture import call_arguments

IGNORED = -100  # the label that cross entropy leaves out
_SCALE = 0.01  # of the new adapters' second factor: as if a little trained, so that both factors have gradients


def make(job: Job, reference: bool = False) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], list[str]]:
    """(model, positional arguments, keyword arguments, notes) in train mode and on the job's device.

    Its dtype is the job's, or a wider one for a reference: fp64, and fp32 for those in bf16.

    Raises:
        BenchError: the model can't be given what the job asks for.
        ModelError: as `sptc.model.load`.
    """
    model, inputs, notes = job.source.load(job.batch, job.length)
    if not isinstance(model, nn.Module):
        raise BenchError(f"a benchmark trains a torch.nn.Module, not {type(model).__name__}")
    args, kwargs = call_arguments(inputs)
    model.train()
    _add_labels(model, args, kwargs, job.counted)
    if job.lora:
        _add_adapters(model, job.lora)
    if not any(p.requires_grad for p in model.parameters()):
        raise BenchError("nothing in the model requires a gradient; give --lora a rank")
    if job.checkpointing:
        _checkpoint(model)
    kinds = [DTYPES[job.dtype]] if job.dtype is not None else []
    if reference:  # of the weights that the variants have
        kinds.append(torch.float64 if job.dtype in (None, "fp32") else torch.float32)
    for kind in kinds:
        model = _cast_adapters(model.to(kind))
        args, kwargs = tree_map_only(Tensor, functools.partial(_cast, kind), (args, kwargs))
    model = model.to(job.device)
    args, kwargs = tree_map_only(Tensor, lambda t: t.to(job.device), (args, kwargs))
    return model, args, kwargs, notes


def loss_of(output: Any) -> Tensor:
    """The loss that a model returns: `output.loss`, or the only number in it; without one, the mean square of what it returns first.

    Raises:
        BenchError: it returns nothing with a gradient.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    tensors = [t for t in tree_leaves(_plain(output)) if isinstance(t, Tensor) and t.requires_grad]
    numbers = [t for t in tensors if t.dim() == 0]
    if numbers:
        return numbers[0]
    if not tensors:
        raise BenchError("the model returns no tensor that requires a gradient")
    return tensors[0].float().square().mean() if tensors[0].dtype != torch.float64 else tensors[0].square().mean()


def _plain(output: Any) -> Any:
    """Outputs of transformers are no pytrees until they are registered."""
    return dict(output) if isinstance(output, Mapping) else output


def _add_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], counted: float) -> None:
    """Give a model that takes labels some that fit its logits; of each sequence the last share `counted` counts."""
    parameters = inspect.signature(model.forward).parameters
    if "labels" in parameters and kwargs.get("labels") is None and not args:
        kwargs["labels"] = _labels(model, kwargs)
    labels = kwargs.get("labels")
    if counted == 1:
        return
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        raise BenchError("--counted needs a model with a label for each token; this one has none")
    length = labels.shape[1]
    kwargs["labels"] = labels.clone()
    kwargs["labels"][:, : length - max(1, round(length * counted))] = IGNORED


def _labels(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """The next tokens, or classes by turns, as the shape of the logits has it; None for a model without."""
    model.eval()
    with torch.no_grad():
        output: Any = model(**kwargs)
    model.train()
    logits = getattr(output, "logits", None)
    ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
    if not isinstance(logits, Tensor):
        return None
    if isinstance(ids, Tensor) and logits.shape[:2] == ids.shape:
        return ids % logits.shape[-1]
    return torch.arange(logits.shape[0]) % logits.shape[-1]


def _add_adapters(model: nn.Module, rank: int) -> None:
    """LoRA inside the model, whose modules keep their names: what `sptc plan` says of the bare model holds."""
    from peft import LoraConfig, inject_adapter_in_model  # checked before any work starts
    from transformers import PreTrainedModel

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets: str | list[str] = "all-linear" if isinstance(model, PreTrainedModel) else linear
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets), model)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(_SCALE * torch.randn(parameter.shape, generator=numbers))


def _cast(kind: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(kind) if tensor.is_floating_point() else tensor


def _cast_adapters(model: nn.Module) -> nn.Module:
    """Adapters in 16 bits to fp32, as PEFT keeps them beside weights in 16 bits."""
    if importlib.util.find_spec("peft") is None:
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype

    names = {name for module in model.modules() if isinstance(module, BaseTunerLayer) for name in module.active_adapters}
    for name in sorted(names):
        cast_adapter_dtype(model, name, autocast_adapter_dtype=True)
    return model


def _checkpoint(model: nn.Module) -> None:
    enable: Callable[..., Any] | None = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise BenchError(
            f"--checkpointing: {type(model).__name__} has no gradient_checkpointing_enable; checkpoint in a factory of your own"
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that train."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
