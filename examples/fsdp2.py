"""LoRA on several devices, weights sharded: `torchrun --nproc-per-node 2 examples/fsdp2.py [Hugging Face name or folder]`."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from task import examples, load
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import sptc

BATCH, STEPS = 4, 20

kind = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))
if kind == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.manual_seed(0)  # the same adapter everywhere

model, tokenizer = load(next(iter(sys.argv[1:]), None))
model.to(kind).train()
for layer in model.get_decoder().layers:
    # No loss is in a layer's graph, by which how much it bears could be measured.
    layer.compile(backend="spt", options={"attention.density": 0.5, "ffn.density": 0.75})
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

data = examples(tokenizer, BATCH * STEPS * dist.get_world_size())
for step, batch in enumerate(DataLoader(data, BATCH, sampler=DistributedSampler(data))):
    # Padding is on the right, where causal attention does not see it; without a mask a layer can tell that it is causal.
    loss = model(input_ids=batch["input_ids"].to(kind), labels=batch["labels"].to(kind)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)

adapter = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))
if dist.get_rank() == 0:
    model.save_pretrained("adapter", state_dict=adapter)  # plain PEFT's; it is served without sptc
    print(sptc.report(model))
dist.destroy_process_group()
