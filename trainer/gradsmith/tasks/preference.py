"""Which of two answers is better: DPO and its relatives.

Letters: B pairs of a batch, P sequences of a pair (its two sides, and for KTO a third that does
not belong together), S tokens of a sequence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..blocks import Examination
from ..data.packing import IGNORED
from ..data.pairs import PairProcessor
from ..data.processor import Batch
from ..recipe import PreferenceRecipe
from .causal import CausalTask
from .metrics import wilson_interval
from .preference_losses import WITHOUT_REFERENCE, Pairs, preference_loss
from .task import Metric, Subject


class Preference(CausalTask):
    """Σ over pairs of the loss that the recipe's objective names.

    Inputs input_ids, int64 (B, P, S); labels targets, int64 (B, P, S), counts, float32 (B,), and
    for a loss with one reference, float32 (B, P). Outputs are (B, P, 2): the log-probability of an
    answer, Σ log p(token), and the number of its tokens.
    """

    unit = "pairs"
    metrics = (
        Metric("loss", "Loss", "nats per pair"),
        Metric("accuracy", "Chosen is rewarded more", "", True, ".1%"),
        Metric("margin", "Reward margin", "", True),
        Metric("likelier", "Chosen is likelier", "", True, ".1%"),
    )
    processor: PairProcessor
    recipe: PreferenceRecipe

    def __init__(self, recipe: PreferenceRecipe, processor: PairProcessor) -> None:
        super().__init__(recipe, processor)
        self.needs_reference = recipe.objective.name not in WITHOUT_REFERENCE
        self.needs_statistics = recipe.objective.name == "kto"

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        ids, targets = batch.inputs["input_ids"], batch.labels.get("targets")
        logits = model(input_ids=ids.flatten(0, 1), use_cache=False).logits
        if targets is None:  # two models are compared on inputs alone
            compared: torch.Tensor = logits
            return compared
        found = []
        # Sequence by sequence, and answers only: float32 logits of all would be the largest tensor.
        for row, labels in zip(logits, targets.flatten(0, 1), strict=True):
            answer = labels != IGNORED
            nll = F.cross_entropy(row[answer].float(), labels[answer], reduction="sum")
            found.append(torch.stack([-nll, answer.sum().float()]))
        return torch.stack(found).unflatten(0, ids.shape[:2])

    def reference(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs[..., 0]

    def statistics(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """How much likelier the model makes answers to other prompts than the reference: the sum
        of the log-ratios, and how many there are."""
        counts = batch.labels["counts"]
        ratios = outputs[:, 2, 0] - batch.labels["reference"][:, 2]
        return torch.stack([(ratios * counts).sum(), counts.sum()]).double().cpu()

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        losses, _ = self._losses(self.outputs(model, batch), batch)
        return losses @ batch.labels["counts"]

    def _losses(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What each pair adds to the loss, and its margin, float32 (B,)."""
        known = batch.labels.get("reference")
        tokens = outputs[..., 1].clamp(min=1)  # a batch that counts for nothing has none
        pairs = Pairs(
            chosen=outputs[:, 0, 0],
            rejected=outputs[:, 1, 0],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
            ref_chosen=None if known is None else known[:, 0],
            ref_rejected=None if known is None else known[:, 1],
        )
        kl = None
        if self.shared is not None:  # the mean over the global batch
            total, count = self.shared.tolist()
            kl = outputs.new_tensor(total / max(1.0, count))
        return preference_loss(self.recipe.objective, pairs, kl)

    def metric_sums(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """loss, right, margin, likelier, pairs; float64 (5,)."""
        counts = batch.labels["counts"].double()
        losses, margins = self._losses(outputs, batch)
        right = (margins > 0) + 0.5 * (margins == 0)  # before training all are equal: a coin's
        likelier = outputs[:, 0, 0] > outputs[:, 1, 0]
        values = torch.stack([losses, right, margins, likelier, torch.ones_like(losses)])
        return (values.double() @ counts).cpu()

    def summarize(self, sums: torch.Tensor) -> dict[str, float]:
        *totals, pairs = sums.tolist()
        means = [total / pairs if pairs else math.nan for total in totals]
        named = dict(zip(("loss", "accuracy", "margin", "likelier"), means, strict=True))
        return {**named, "pairs": int(pairs)}

    def examine(self, subject: Subject) -> Examination:
        """How often the chosen answer has the greater reward, and is likelier, before and after."""
        measured = subject.measured
        pairs = int(measured[0]["values"]["pairs"])

        def block(name: str, title: str, note: str) -> Any:
            bars = []
            for result in reversed(measured):
                share = result["values"][name]
                low, high = wilson_interval(share * pairs, pairs)
                bar = {"name": result["name"], "value": share, "low": low, "high": high}
                bars.append({**bar, "ours": bool(result.get("ours"))})
            return {"kind": "bars", "title": title, "note": note, "format": ".1%", "bars": bars}

        note = f"The {subject.split} split, {pairs:,} pairs held out from training. "
        if self.needs_reference:
            note += (
                "A reward is the log-ratio to the model before training, scaled by beta; before "
                "training all are equal. "
            )
        note += "Equal rewards count half. Intervals are of 95 % (Wilson)."
        shown = {metric.name: metric for metric in self.metrics}
        blocks = [
            block("accuracy", shown["accuracy"].title, "share of the pairs; equal ones count half"),
            block("likelier", "The chosen answer is likelier than the rejected one",
                  "share of the pairs"),
        ]  # fmt: skip
        order = ("accuracy", "likelier", "margin", "loss")
        definitions = tuple(shown[name] for name in order)
        return Examination(list(measured), definitions, blocks, note)

    def decode(self, outputs: torch.Tensor) -> list[dict[str, Any]]:
        """Which of the two answers is likelier, and the log-probability of each."""
        found = []
        for row in outputs[..., 0].cpu().tolist():
            scores = {"chosen": row[0], "rejected": row[1]}
            found.append({"label": "chosen" if row[0] > row[1] else "rejected", "scores": scores})
        return found
