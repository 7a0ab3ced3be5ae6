"""LLaMA-shaped language models that one half of the standard library can pretrain on a CPU, and their cache."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from bench.quality.text import library_halves, read
from bench.quality.tokens import cut, train_tokenizer
from sptc.device.cache import private_folder, write_whole

HELD_OUT = 16  # sequences of the last files that pretraining does not see


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    vocabulary: int = 4096
    width: int = 320
    hidden: int = 896
    layers: int = 6
    heads: int = 5
    length: int = 512


@dataclass(frozen=True)
class Pretraining:
    """What makes a pretrained model; equal settings on equal text give the same one."""

    shape: Shape = field(default_factory=Shape)
    steps: int = 600
    batch: int = 8
    learning_rate: float = 2e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    seed: int = 0


MODELS = {
    "10M": Pretraining(seed=1),  # the results in the docs are of this one
    "10M-muon": Pretraining(optimizer="muon"),
    "4M": Pretraining(Shape(vocabulary=2048, width=256, hidden=704, layers=4, heads=4), steps=400, batch=4),
}


@dataclass(frozen=True)
class Pretrained:
    """A tokenizer, and the weights of the model that was trained on its tokens."""

    tokenizer: Tokenizer
    shape: Shape
    weights: dict[str, Tensor]
    loss: float  # on held-out files of the same half

    def model(self) -> LlamaForCausalLM:
        """A new model with these weights."""
        model = new_model(self.shape)
        model.load_state_dict(self.weights)
        return model


def new_model(shape: Shape) -> LlamaForCausalLM:
    """A model with random weights."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def pretrained(settings: Pretraining, files: Sequence[Path] | None = None) -> Pretrained:
    """The model of `settings`, from the cache or trained now, dense, in eager mode.

    Args:
        settings: sizes and budget.
        files: what to train on; by default the first half of the standard library.
    """
    texts = [read(path) for path in (files or library_halves()[0])]
    digest = hashlib.sha256(json.dumps([asdict(settings), texts]).encode()).hexdigest()[:16]
    folder = private_folder("quality")
    weights, tokens = folder / f"{digest}.pt", folder / f"{digest}.json"
    if weights.exists() and tokens.exists():
        state = torch.load(weights, weights_only=True)
        return Pretrained(Tokenizer.from_file(str(tokens)), settings.shape, state["weights"], state["loss"])
    result = _train(settings, texts)
    write_whole(tokens, result.tokenizer.to_str())
    _save(weights, {"weights": result.weights, "loss": result.loss})
    return result


def _save(path: Path, state: dict[str, object]) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content.getvalue())
    os.replace(file.name, path)


def _train(settings: Pretraining, texts: Sequence[str]) -> Pretrained:
    shape = settings.shape
    tokenizer = train_tokenizer(texts, shape.vocabulary)
    pieces = cut(tokenizer, texts, shape.length)
    held_out, train = pieces[-HELD_OUT:], pieces[:-HELD_OUT]
    torch.manual_seed(settings.seed)
    model = new_model(shape)
    optimizers = _optimizers(model, settings)
    rates = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
        )
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(settings.seed)
    rounds = -(-settings.steps * settings.batch // len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(rounds)])
    parameters = sum(p.numel() for p in model.parameters())
    with tqdm(total=settings.steps, desc=f"pretraining {parameters / 1e6:.1f}M on {train.numel() / 1e6:.2f}M tokens", unit="step") as bar:
        for step in range(settings.steps):
            batch = train[order[step * settings.batch : (step + 1) * settings.batch]]
            loss = _loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                rate.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    with torch.no_grad():
        final = sum(_loss(model, part).item() * len(part) for part in held_out.split(settings.batch)) / len(held_out)
    return Pretrained(tokenizer, shape, {name: value.detach() for name, value in model.state_dict().items()}, final)


def _optimizers(model: LlamaForCausalLM, settings: Pretraining) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices of the layers, which gets further in few steps, and AdamW for the rest."""
    rate = settings.learning_rate
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2 and settings.optimizer == "muon"]
    inner = set(matrices)
    rest = [p for p in model.parameters() if p not in inner]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    return found


def _loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids).logits
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
