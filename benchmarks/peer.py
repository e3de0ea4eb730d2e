"""The end-to-end peer, run by test_end_to_end.py as `python benchmarks/peer.py RUN [--compile]`.

The loop that a practitioner writes with transformers, peft and torch.optim.AdamW(fused=True): the
model in the run's precision, the same weights, batches, order, loss and clipping as the gradsmith
run in the folder RUN. In bf16 its optimizer keeps bf16 moments and no float32 master weights, which
is less work and less precise than what gradsmith does. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import torch.nn.functional as F

from gradsmith.data.loader import Loader
from gradsmith.data.prepared import PreparedData
from gradsmith.models.base import base_of
from gradsmith.models.build import DTYPES
from gradsmith.run import Run


def flops_per_token(model: Any, sequence_length: int) -> float:
    """What a training step must compute for a token, recomputation and padding not counted.

    A weight that is trained costs 6 (2 forward, 2 for the gradient of its input, 2 for its own), a
    frozen one 4; the input embedding is a look-up and costs nothing, unless it is the output layer
    too. Causal attention adds 6 · layers · hidden size · sequence length, as if every sequence were
    one document.
    """
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = sum(
        p.numel() * (6 if p.requires_grad else 4)
        for p in model.parameters()
        if tied or p is not embedding
    )
    config = model.config
    attention = 6 * config.num_hidden_layers * config.hidden_size * sequence_length
    return float(weights + attention)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("precision", choices=DTYPES)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()

    from transformers import AutoModelForCausalLM

    run = Run.open(arguments.run)
    recipe = run.recipe()
    training: Any = recipe.training
    adapter: Any = recipe.model.adapter
    data = PreparedData.open(run.data)
    rows = data.processor(recipe).dataset(data.split("train"))
    loader = Loader(rows, seed=recipe.seed, global_batch=training.global_batch)

    dtype = DTYPES[arguments.precision]
    base = base_of(run, recipe).place
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).train()
    if adapter is not None:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=adapter.target,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    flops = flops_per_token(model, recipe.data.sequence_length)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=training.optimizer.lr,
        betas=tuple(training.optimizer.betas),
        eps=training.optimizer.eps,
        weight_decay=training.optimizer.weight_decay,
        fused=True,
    )
    forward = torch.compile(model) if arguments.compile else model

    losses, seconds = [], []
    for step in range(training.steps):
        begin = time.perf_counter()
        targets = loader.items(step)
        total = 0.0
        micro_batches = loader.micro_batches(
            step, rank=0, world=1, micro_batch=training.micro_batch
        )
        for batch in micro_batches:
            logits = forward(**batch.inputs, use_cache=False).logits
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), batch.labels["labels"].flatten(), reduction="sum"
            )
            torch.autograd.backward(loss / targets)
            total += loss.item() / targets
        torch.nn.utils.clip_grad_norm_(trained, training.clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(total)
    print(json.dumps({"losses": losses, "seconds": seconds, "flops_per_token": flops}))


if __name__ == "__main__":
    main()
