"""Exact next-token metrics over a held-out split.

Every target token counts once, with the same weight, however the sequences are packed or batched:

    loss          = Σ nll / N                    nats per target token
    perplexity    = exp(loss)
    bits_per_byte = Σ nll / (ln 2 · Σ bytes)     comparable between tokenizers and compressors
    accuracy      = share of targets that have the highest logit

N counts the target tokens; `bytes` are the UTF-8 bytes that the targets stand for. A document's
EOS is a target that stands for no byte, so the model pays for it and a compressor does not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from ..data.shards import PreparedData

SUMS = ("nll", "target_tokens", "bytes", "correct", "sequences")
"""What `batch_sums` adds up, in this order: over batches and ranks the sums simply add."""


@torch.no_grad()
def batch_sums(model: Any, batch: Any, token_bytes: torch.Tensor) -> torch.Tensor:
    """The sums named in `SUMS` over one batch.

    Args:
        model: a causal LM, an adapter around one, or an engine around either.
        batch: has `input_ids`, `labels` (shifted already, -100 is no target) and `position_ids`,
            all int64 (B, S), on the CPU. Positions restart at each document; from that
            transformers derives that packed documents do not see each other.
        token_bytes: int64 (V,), the UTF-8 bytes that each token id stands for.

    Returns:
        float64 (5,) on the CPU.
    """
    device = next(model.parameters()).device
    labels = batch.labels.to(device)
    # use_cache=False is what the separation rests on: handed a cache, transformers takes the
    # restarting positions for a continued sequence and lets documents see each other.
    logits = model(
        input_ids=batch.input_ids.to(device),
        position_ids=batch.position_ids.to(device),
        use_cache=False,
    ).logits
    nll = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    # Row by row: float32 logits of a whole batch would be the largest tensor of the evaluation.
    for row_logits, row_labels in zip(logits, labels, strict=True):
        is_target = row_labels != -100
        target_logits, targets = row_logits[is_target].float(), row_labels[is_target]
        losses = F.cross_entropy(target_logits, targets, reduction="none")
        nll += losses.double().sum()
        correct += (target_logits.argmax(-1) == targets).sum()
    counted = batch.labels != -100
    targets = batch.labels[counted]
    rows = counted.any(dim=1).sum()
    sums = (nll, torch.tensor(targets.numel()), token_bytes[targets].sum(), correct, rows)
    return torch.stack([value.cpu().double() for value in sums])


def summarize(sums: torch.Tensor) -> dict[str, float | int]:
    """The metrics that follow from the `SUMS` of all batches; NaN where nothing was counted."""
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


def evaluate_split(
    model: Any,
    prepared: PreparedData,
    split: str,
    *,
    sequence_length: int,
    packing: bool,
    batch: int,
    limit: int | None = None,
) -> dict[str, float | int]:
    """Metrics of `model` on a split of prepared data, in this process alone.

    Args:
        split: train, validation or test.
        sequence_length: tokens that the model sees at most.
        batch: sequences in a forward pass; no effect on the result but rounding.
        limit: evaluate the first `limit` sequences only.

    Returns:
        loss (nats per target token), perplexity, bits_per_byte, accuracy, target_tokens, bytes,
        sequences.
    """
    return summarize(
        split_sums(
            model,
            prepared,
            split,
            sequence_length=sequence_length,
            packing=packing,
            batch=batch,
            limit=limit,
        )
    )


def split_sums(
    model: Any,
    prepared: PreparedData,
    split: str,
    *,
    sequence_length: int,
    packing: bool,
    batch: int,
    limit: int | None = None,
) -> torch.Tensor:
    """float64 (5,): the `SUMS` that `evaluate_split` summarizes."""
    from ..data.loader import evaluation_batches
    from ..data.packing import Sequences

    sequences = Sequences(
        prepared.split(split),
        sequence_length,
        packing,
        prepared.task,
        prepared.manifest["pad_id"],
    )
    token_bytes = torch.from_numpy(np.asarray(prepared.token_bytes(), dtype=np.int64))
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for rows in evaluation_batches(sequences, rank=0, world=1, batch=batch, limit=limit):
            total += batch_sums(model, rows, token_bytes)
    finally:
        model.train(was_training)
    return total
