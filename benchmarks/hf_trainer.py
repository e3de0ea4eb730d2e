"""A user's loop with the Trainer of transformers, run by test_end_to_end.py as
`python -m benchmarks.hf_trainer CONFIG [--accelerate]`: the same random tokens and weights, with
gradsmith's kernels under the model or without. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gradsmith_kernels import accelerate

STEPS, BATCH, ACCUMULATION, LENGTH, VOCABULARY = 10, 4, 2, 512, 4096


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    tokens = torch.stack([row[0] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=json.loads)
    parser.add_argument("--accelerate", action="store_true")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(**arguments.config, vocab_size=VOCABULARY)
    model = LlamaForCausalLM(config).bfloat16()
    if arguments.accelerate:
        accelerate(model)
    rows = TensorDataset(torch.randint(VOCABULARY, (STEPS * BATCH * ACCUMULATION, LENGTH)))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = Trainer(
            model, settings, data_collator=collate, train_dataset=rows, callbacks=[clock]
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    tokens = ACCUMULATION * BATCH * LENGTH
    print(json.dumps({"losses": losses, "seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
