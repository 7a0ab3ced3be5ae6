"""LoRA with Hugging Face's Trainer: `python examples/trainer.py [Hugging Face name or folder]`."""

from __future__ import annotations

import sys

from task import examples, load
from transformers import Trainer, TrainingArguments

import sptc

BATCH, STEPS = 4, 20

model, tokenizer = load(next(iter(sys.argv[1:]), None))
# In place, instead of TrainingArguments(torch_compile=True): Trainer takes the model as it is. It reads logits in evaluation only.
model.compile(backend="spt")

arguments = TrainingArguments(
    output_dir="checkpoints",
    max_steps=STEPS,
    per_device_train_batch_size=BATCH,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
data = examples(tokenizer, BATCH * STEPS)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:BATCH])
trainer.train()
print(trainer.evaluate())  # dense, as `generate` is

model.save_pretrained("adapter")  # plain PEFT's; it is served without sptc
print(sptc.report(model))
