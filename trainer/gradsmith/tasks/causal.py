"""What the tasks of causal language models share: the model, and how it meets the tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError
from .task import Task


def vocabulary(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer decides of the config of a model that is made new."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def token_on_meta() -> dict[str, torch.Tensor]:
    """The inputs that show whether a text model's layers fit together."""
    return {"input_ids": torch.zeros(1, 2, dtype=torch.long, device="meta")}


class CausalTask(Task):
    """A task of a causal language model; its processor has a tokenizer."""

    auto_class = "AutoModelForCausalLM"
    architectures = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    models_are = "causal language models"
    for_example = "llama, qwen3, gpt2"
    peft_type = "CAUSAL_LM"
    processor: Any

    @classmethod
    def meta_inputs(cls, recipe: Any) -> dict[str, torch.Tensor]:
        return token_on_meta()

    def config(self) -> dict[str, Any]:
        return vocabulary(self.processor.tokenizer)

    def check_model(self, model: Any) -> None:
        rows, tokens = model.get_input_embeddings().weight.shape[0], len(self.processor.tokenizer)
        if tokens > rows:
            raise UserError(
                f"data.tokenizer: has {tokens} tokens, but the model at "
                f"{self.recipe.model.from_} has embeddings for {rows}; leave data.tokenizer out "
                "to take the model's own"
            )
