"""LoRA with TRL's SFTTrainer: `python examples/trl_sft.py [Hugging Face name or folder]`. Needs `pip install trl`."""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from task import LENGTH, load, texts
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

import sptc

BATCH, STEPS = 4, 20


class ModelsLoss(SFTTrainer):
    """SFTTrainer's own loss is an operator outside of the graph, by which nothing can be measured: the model computes the same one."""

    compute_loss = Trainer.compute_loss


model, tokenizer = load(next(iter(sys.argv[1:]), None))
model.get_base_model().enable_input_require_grads = lambda: None  # a hook that reentrant checkpoints alone need, and that cuts the graph
model.compile(backend="spt")

arguments = SFTConfig(
    output_dir="checkpoints",
    max_steps=STEPS,
    per_device_train_batch_size=BATCH,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=torch.cuda.is_available(),
    max_length=LENGTH,
    completion_only_loss=True,
    pad_to_multiple_of=LENGTH,  # one length, so that one compile serves all
)
data = Dataset.from_list(texts(BATCH * STEPS))
trainer = ModelsLoss(model, arguments, train_dataset=data, processing_class=tokenizer)
trainer.train()

model.save_pretrained("adapter")  # plain PEFT's; it is served without sptc
print(sptc.report(model))
