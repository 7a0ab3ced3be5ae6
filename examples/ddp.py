"""LoRA on several devices by DistributedDataParallel: `torchrun --nproc-per-node 2 examples/ddp.py [Hugging Face name or folder]`."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from task import examples, load
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import sptc

BATCH, STEPS = 4, 20

local = int(os.environ["LOCAL_RANK"])
device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group()

torch._dynamo.config.optimize_ddp = False  # it cuts the model where buckets of gradients end; under LoRA these are small
model, tokenizer = load(next(iter(sys.argv[1:]), None))
parallel = DistributedDataParallel(model.to(device).train())
parallel.compile(backend="spt")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

data = examples(tokenizer, BATCH * STEPS * dist.get_world_size())
for step, batch in enumerate(DataLoader(data, BATCH, sampler=DistributedSampler(data))):
    loss = parallel(**{name: x.to(device) for name, x in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)

if dist.get_rank() == 0:
    model.save_pretrained("adapter")  # plain PEFT's; it is served without sptc
    print(sptc.report(parallel))
dist.destroy_process_group()
