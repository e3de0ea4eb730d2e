"""What an evaluation of a language model says: results, baselines, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...blocks import Examination, Metric, Result

if TYPE_CHECKING:
    from ...data.text import TextProcessor
    from ...recipe import TextRecipe
    from ..task import Subject


def examine(recipe: TextRecipe, processor: TextProcessor, subject: Subject) -> Examination:
    """What a model says, how it scores, and what it stands beside.

    Returns:
        For chat the results gain `rouge_l`, the mean over `rouge_l_pairs` held-out pairs, evenly
        spaced, of ROUGE-L between the greedy answer and the reference.
    """
    from .baselines import baseline_results
    from .samples import questions, samples_block

    data, split = subject.data, subject.split
    put = questions(recipe, processor.tokenizer, data.held_out(split))
    results = [result.copy() for result in subject.measured]
    said = []
    for result, model in zip(results, [subject.model, subject.base][: len(results)], strict=True):
        if put.scored:
            more = {"rouge_l": put.rouge_l(model), "rouge_l_pairs": len(put.scored)}
            result["values"] = result["values"] | more
        said.append(put.samples(model))
    block = samples_block(put, said[0], said[1] if subject.base is not None else None)
    baselines = baseline_results(recipe.evaluation.yardsticks, processor, data, split, recipe.seed)
    chat = recipe.data.task == "chat"
    return Examination(
        results=[*results, *baselines],
        definitions=definitions(results[0]["values"], chat),
        blocks=[block] if put.asked else [],
        lead=lead(results, chat),
        note=note(results[0]["values"], split, baselines, chat),
    )


def definitions(values: dict[str, float], chat: bool) -> tuple[Metric, ...]:
    """The columns of the results: what baselines have, what answers score, the rest."""
    unit = "of held-out answers" if chat else "of held-out text"
    columns = [Metric("bits_per_byte", "Bits per byte", unit, False, ".3f")]
    if "rouge_l" in values:
        pairs = f"{values['rouge_l_pairs']:,} held-out pairs, greedy"
        columns.append(Metric("rouge_l", "ROUGE-L of its answers", pairs, True, ".3f"))
    perplexity = Metric("perplexity", "Perplexity", "", False, ".4g")
    accuracy = Metric("accuracy", "Next-token accuracy", "of target tokens", True, ".1%")
    loss = Metric("loss", "Loss", "nats per target token", False, ".3f")
    return (*columns, accuracy, loss, perplexity)


def lead(results: Sequence[Result], chat: bool) -> str:
    """What fine-tuning has changed, in a sentence."""
    if len(results) < 2:
        return ""
    after, before = (result["values"] for result in results[:2])
    if not all(abs(values["loss"]) < float("inf") for values in (before, after)):
        return ""  # infinite, or no number
    return (
        f"Loss on held-out {'answers' if chat else 'text'}: {before['loss']:.2f} nats per token "
        f"before fine-tuning, {after['loss']:.2f} after ({after['loss'] / before['loss'] - 1:+.0%}"
        f"). Next-token accuracy: {before['accuracy']:.1%} before, {after['accuracy']:.1%} after."
    )


def note(values: dict[str, float], split: str, baselines: Sequence[Result], chat: bool) -> str:
    """What was measured on, and how to read it."""
    text = (
        f"The {split} split: {values['bytes']:,} bytes, {values['target_tokens']:,} target "
        "tokens, held out from training."
    )
    if chat:
        text += " Only the answers count; the model sees the questions"
        text += ", the baselines do not." if baselines else "."
    if "rouge_l" in values:
        text += (
            " ROUGE-L is the F1 of the longest common subsequence of words of a greedy answer "
            f"and the reference, the mean over {values['rouge_l_pairs']:,} held-out pairs."
        )
    if baselines:
        text += (
            " xz compresses the same bytes as one stream; the n-gram is trained on the training "
            "split's text and predicts each byte from those before it. The model pays for the "
            "ends of documents too, the baselines do not."
        )
    return text
