"""LoRA in a loop of your own: `python examples/plain_loop.py [Hugging Face name or folder]`."""

from __future__ import annotations

import sys

import torch
from task import examples, load
from torch.utils.data import DataLoader

import sptc

BATCH, STEPS = 4, 20

device = "cuda" if torch.cuda.is_available() else "cpu"
model, tokenizer = load(next(iter(sys.argv[1:]), None))
model.to(device).train()
model.compile(backend="spt")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

for step, batch in enumerate(DataLoader(examples(tokenizer, BATCH * STEPS), BATCH)):
    loss = model(**{name: x.to(device) for name, x in batch.items()}).loss  # labels go in, so that the loss is in the graph
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}", flush=True)

model.save_pretrained("adapter")  # plain PEFT's; it is served without sptc
print(sptc.report(model))
