"""Predict the next token: of texts, or of a conversation's answers.

Every target token counts once, with the same weight, however the sequences are packed or batched:

    loss          = Σ nll / N                    nats per target token
    perplexity    = exp(loss)
    bits_per_byte = Σ nll / (ln 2 · Σ bytes)     comparable between tokenizers and compressors
    accuracy      = share of targets that have the highest logit

N counts the target tokens; `bytes` are the UTF-8 bytes that the targets stand for. A document's
EOS is a target that stands for no byte, so the model pays for it and a compressor does not.
Letters: B sequences in a batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from ...blocks import Examination, Metric
from ...data.packing import IGNORED
from ...data.prepared import PreparedData
from ...data.processor import Batch, Dataset
from ...data.text import TextProcessor
from ...errors import UserError
from ...recipe import TextRecipe
from ..causal import CausalTask
from ..task import Subject


class LanguageModeling(CausalTask):
    """Σ −log p(target) over the target tokens; inputs input_ids, position_ids, int64 (B, S).

    Packed documents do not see each other: positions restart at each of them, and without a
    cache transformers derives from the positions where attention has to stop. use_cache=False is
    what that rests on: handed a cache, transformers takes the restarting positions for a continued
    sequence and lets documents see each other.
    """

    unit = "tokens"
    metrics = (
        Metric("loss", "Loss", "nats per target token"),
        Metric("bits_per_byte", "Bits per byte", "of target text"),
        Metric("accuracy", "Next-token accuracy", "of target tokens", True, ".1%"),
    )
    processor: TextProcessor

    @cached_property
    def _token_bytes(self) -> torch.Tensor:
        return torch.from_numpy(self.processor.token_bytes.astype("int64"))

    @classmethod
    def row_length(cls, recipe: TextRecipe) -> int:
        return recipe.data.sequence_length

    def rows_in_words(self, rows: int) -> str:
        return f"{rows:,} sequences of {self.recipe.data.sequence_length}"

    def check_data(self, data: PreparedData, dataset: Dataset) -> None:
        if not dataset.items.any():
            raise UserError("data: the training split has no target token: nothing to learn from")
        train = data.manifest["splits"]["train"]
        if train["eos_targets"] == 0:
            raise UserError(
                "data: the end-of-sequence token is in the loss of none of the "
                f"{train['documents']} training documents, so the model would never learn to stop; "
                "end the chat template's answers with eos_token, or raise data.sequence_length if "
                "everything was truncated"
            )

    def start(self, model: Any, dataset: Dataset) -> None:
        if self.recipe.data.packing:
            check_packing(model)

    @classmethod
    def examined(cls, recipe: TextRecipe, split: str) -> tuple[str, ...]:
        return (split, "train") if recipe.evaluation.yardsticks else (split,)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        labels = batch.labels["labels"]
        if self.fused_loss:
            # transformers' words for: these labels are shifted already, and divide their sum by 1.
            loss: torch.Tensor = model(
                **batch.inputs,
                use_cache=False,
                labels=labels,
                shift_labels=labels,
                num_items_in_batch=1,
            ).loss
            return loss
        return F.cross_entropy(
            self.outputs(model, batch).flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (B, S, V)."""
        logits: torch.Tensor = model(**batch.inputs, use_cache=False).logits
        return logits

    def metric_sums(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """nll, target tokens, bytes, correct, sequences; float64 (5,)."""
        labels = batch.labels["labels"]
        nll = torch.zeros((), dtype=torch.float64, device=labels.device)
        correct = torch.zeros((), dtype=torch.int64, device=labels.device)
        # Row by row: float32 logits of a whole batch would be the evaluation's largest tensor.
        for row_logits, row_labels in zip(outputs, labels, strict=True):
            is_target = row_labels != IGNORED
            target_logits, targets = row_logits[is_target].float(), row_labels[is_target]
            losses = F.cross_entropy(target_logits, targets, reduction="none")
            nll += losses.double().sum()
            correct += (target_logits.argmax(-1) == targets).sum()
        counted = (labels != IGNORED).cpu()
        targets = labels.cpu()[counted]
        rows = counted.any(dim=1).sum()
        size = self._token_bytes[targets].sum()
        sums = (nll, torch.tensor(targets.numel()), size, correct, rows)
        return torch.stack([value.cpu().double() for value in sums])

    def summarize(self, sums: torch.Tensor) -> dict[str, float]:
        return summarize(sums)

    def examine(self, subject: Subject) -> Examination:
        from .examine import examine

        return examine(self.recipe, self.processor, subject)


class Chat(LanguageModeling):
    """The same, over the tokens of the answers."""


def summarize(sums: torch.Tensor) -> dict[str, float]:
    """The metrics that follow from the sums of all batches; NaN where nothing was counted."""
    nll, tokens, size, correct, sequences = sums.tolist()
    loss = nll / tokens if tokens else math.nan
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # beyond lies infinity; NaN stays NaN
        "bits_per_byte": nll / math.log(2) / size if size else math.nan,
        "accuracy": correct / tokens if tokens else math.nan,
        "target_tokens": int(tokens),
        "bytes": int(size),
        "sequences": int(sequences),
    }


def check_packing(model: Any) -> None:
    """Tries whether another first document changes what the model says of the second.

    Args:
        model: the causal LM, or an engine around it; in evaluation mode.

    Raises:
        UserError: it does. transformers has models that do not hand the positions to their masks,
            and a state-space layer carries its state along.
    """
    device = next(model.parameters()).device
    positions = torch.arange(4, device=device).repeat(1, 2)
    found = []
    for first in ([0, 1, 2, 3], [7, 6, 5, 4]):
        tokens = torch.tensor([[*first, 4, 5, 6, 7]], device=device)
        with torch.no_grad():
            output = model(input_ids=tokens, position_ids=positions, use_cache=False)
        found.append(output.logits[:, 4:].double())
    # Experts may get the tokens in another order and round otherwise: 1e-7 in float32. An untrained
    # model of 32 channels says 2e-3 when it leaks, and larger ones more.
    if (found[0] - found[1]).norm() > 1e-3 * found[0].norm():
        raise UserError(
            "data.packing: found true, but this model lets the documents of a row see each other "
            "(transformers keeps them apart in some models only); set data.packing to false"
        )
