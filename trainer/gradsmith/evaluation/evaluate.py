"""`gradsmith evaluate`: a run's model on held-out text, beside its base and beside yardsticks."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import quiet
from ..errors import UserError
from ..files import read_json, write_json
from ..run import Run
from .generate import Prompt, complete, encode_prompt, encode_text

if TYPE_CHECKING:
    from ..data.prepared import PreparedData
    from ..models.base import Model
    from ..recipe import Recipe

ROUGE_PAIRS = 32


def evaluate(run: Run | str | Path, *, split: str = "test") -> dict[str, Any]:
    """Measures a run's newest checkpoint on a held-out split and writes evaluation.json.

    Returns:
        split: its name.
        step: of the checkpoint.
        metrics: of the model, see `metrics.evaluate_split`; for chat also `rouge_l`, the mean over
            `rouge_l_pairs` held-out pairs, evenly spaced, of ROUGE-L between the greedy answer and
            the reference.
        base: the same of the model that a fine-tuned run started from, or None.
        yardsticks: {"xz": ..., "ngram": ...}, see `yardsticks`, over the bytes that the targets
            stand for: for language modelling the held-out text, for chat the answers alone.
        samples: [{"prompt", "output", "reference" or None, "base_output" or None}].
        generation: how the samples were drawn.

    Raises:
        UserError: no such run, a split that is not held out or is empty, nothing trained yet; or
            the data is not what the model was trained on, or damaged.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    with run.lock("results"), quiet(run.logs / "evaluate.log"):
        result = _evaluate(run, split)
        write_json(run.evaluation_path, result)
    return result


def _evaluate(run: Run, split: str) -> dict[str, Any]:
    from ..data.prepared import PreparedData
    from ..models.base import open_model

    recipe = run.recipe()
    prepared = PreparedData.open(run.data)
    documents = prepared.held_out(split)  # before the model: a wrong split is said at once
    with open_model(run.folder) as found:
        assert found.checkpoint is not None
        if read_json(found.checkpoint / "state.json")["data"] != prepared.fingerprint:
            raise UserError(
                f"{run.data}: is not the data that {found.checkpoint} was trained on, so nothing "
                "in it is held out; train again with --fresh, or prepare the old data again"
            )
        prepared.verify(split, *(["train"] if recipe.evaluation.yardsticks else []))
        return _results(run, recipe, prepared, split, documents, found)


def _results(
    run: Run,
    recipe: Recipe,
    prepared: PreparedData,
    split: str,
    documents: Sequence[dict[str, Any]],
    found: Model,
) -> dict[str, Any]:
    from ..models.build import load_for_inference

    model, tokenizer = load_for_inference(found)
    asked, scored = _questions(tokenizer, recipe, documents)
    measure = functools.partial(_measure, tokenizer, recipe, prepared, split, asked, scored)
    metrics, outputs = measure(model)
    base = base_outputs = None
    with _base(model, run, recipe) as base_model:
        if base_model is not None:
            base, base_outputs = measure(base_model)
    samples = [
        {
            "prompt": _as_text(prompt),
            "output": outputs[place],
            "reference": reference,
            "base_output": base_outputs[place] if base_outputs else None,
        }
        for place, (prompt, reference) in enumerate(asked)
    ]
    generation = recipe.evaluation.generation
    return {
        "split": split,
        "step": found.step,
        "task": prepared.task,
        "metrics": metrics,
        "base": base,
        "yardsticks": _yardsticks(recipe, prepared, split),
        "samples": samples,
        "generation": {
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "max_new_tokens": generation.max_new_tokens,
            "seed": recipe.seed,
        },
    }


Question = tuple[Prompt, str | None]  # and, where there is one, the reference


def _questions(
    tokenizer: Any, recipe: Recipe, documents: Sequence[dict[str, Any]]
) -> tuple[list[Question], list[Question]]:
    """What the samples are drawn for, and for chat what ROUGE-L is measured on."""
    generation = recipe.evaluation.generation
    asked: list[Question]
    scored: list[Question] = []
    if recipe.data.task == "chat":
        pairs = [_question_and_answer(document) for document in documents]
        fitting = [
            (question, answer)
            for question, answer in pairs
            if len(_encode(tokenizer, recipe, question)) < recipe.data.sequence_length
        ]
        asked, scored = _evenly(fitting, generation.count), _evenly(fitting, ROUGE_PAIRS)
    else:
        asked = _evenly(_beginnings(tokenizer, recipe, documents), generation.count)
    if generation.prompts:
        asked = [(prompt, None) for prompt in generation.prompts]
    return asked, scored


def _measure(
    tokenizer: Any,
    recipe: Recipe,
    prepared: PreparedData,
    split: str,
    asked: Sequence[Question],
    scored: Sequence[Question],
    model: Any,
) -> tuple[dict[str, Any], list[str]]:
    """The metrics of one model, and what it says to what it is asked."""
    from ..tasks import make_task
    from .measure import measure

    processor = prepared.processor(recipe)
    task = make_task(recipe, processor)
    dataset = processor.dataset(prepared.split(split))
    sums = measure(task, model, dataset, batch=recipe.training.micro_batch)
    metrics: dict[str, Any] = task.summarize(sums)
    generation = recipe.evaluation.generation

    def outputs(questions: Sequence[Question], temperature: float) -> list[str]:
        return complete(
            model,
            tokenizer,
            [_encode(tokenizer, recipe, question) for question, _ in questions],
            max_new_tokens=generation.max_new_tokens,
            temperature=temperature,
            top_p=generation.top_p,
            seed=recipe.seed,
        )

    if scored:
        answers = outputs(scored, 0.0)
        scores = [rouge_l(a, r or "") for a, (_, r) in zip(answers, scored, strict=True)]
        metrics["rouge_l"] = sum(scores) / len(scores)
        metrics["rouge_l_pairs"] = len(scores)
    return metrics, outputs(asked, generation.temperature)


def _encode(tokenizer: Any, recipe: Recipe, question: Prompt) -> list[int]:
    data = recipe.data
    return encode_prompt(tokenizer, question, chat=data.task == "chat", system=data.chat.system)


@contextlib.contextmanager
def _base(model: Any, run: Run, recipe: Recipe) -> Iterator[Any]:
    """What a fine-tuned model started from; None for one trained from nothing."""
    from ..models.base import base_of, check_base, is_base
    from ..models.build import load_for_inference

    if recipe.model.from_ is None:
        yield None
    elif recipe.model.adapter is not None:
        with model.disable_adapter():
            yield model
    else:
        if is_base(run.base):
            check_base(run.base)
        yield load_for_inference(base_of(run, recipe))[0]


def _yardsticks(recipe: Recipe, prepared: PreparedData, split: str) -> dict[str, Any]:
    from .yardsticks import NGRAM_TRAIN_BYTES, ngram_bits_per_byte, xz_bits_per_byte

    if not recipe.evaluation.yardsticks:
        return {}
    held_out = target_text(prepared, split)
    train = target_text(prepared, "train", at_most=NGRAM_TRAIN_BYTES, seed=recipe.seed)
    functions = {"xz": xz_bits_per_byte, "ngram": ngram_bits_per_byte}
    found = {name: functions[name](train, held_out) for name in recipe.evaluation.yardsticks}
    return {name: {**values, "bytes": len(held_out)} for name, values in found.items()}


def target_text(
    prepared: PreparedData, split: str, *, at_most: int | None = None, seed: int = 0
) -> bytes:
    """The bytes that a split's targets stand for, documents one behind the other.

    With `at_most`, whole documents in a seeded random order until there are that many bytes, so
    that a part of a large split speaks for all of it; without, all documents in their order.
    """
    import numpy as np

    tokens_of = prepared.split(split)
    token_bytes, tokenizer = prepared.token_bytes(), prepared.tokenizer()
    order: Sequence[int] = range(len(tokens_of))
    if at_most is not None:
        order = np.random.default_rng(seed).permutation(len(tokens_of)).tolist()
    parts: list[bytes] = []
    size = 0
    for index in order:
        tokens, is_target = tokens_of.document(index)
        wanted = tokens[np.asarray(is_target, dtype=bool) & (token_bytes[tokens] > 0)]
        text = tokenizer.decode(wanted.tolist(), clean_up_tokenization_spaces=False)
        parts.append(text.encode())
        size += len(parts[-1])
        if at_most is not None and size >= at_most:
            break
    return b"".join(parts)[:at_most]


def _beginnings(
    tokenizer: Any, recipe: Recipe, documents: Sequence[dict[str, Any]]
) -> list[Question]:
    """Held-out documents as (beginning, how it went on), where they are long enough."""
    begin = max(1, min(64, recipe.data.sequence_length // 4))
    go_on = recipe.evaluation.generation.max_new_tokens
    pairs: list[Question] = []
    for document in _evenly(documents, 4 * recipe.evaluation.generation.count):
        ids = encode_text(tokenizer, document["text"])
        if len(ids) >= 2 * begin:
            beginning, rest = ids[:begin], ids[begin : begin + go_on]
            pairs.append((tokenizer.decode(beginning), tokenizer.decode(rest)))
    return pairs


def _question_and_answer(document: dict[str, Any]) -> tuple[Prompt, str]:
    from ..data.chat import prompt_of

    question = prompt_of(document["messages"])
    return question, document["messages"][len(question)]["content"]


def _as_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 over the longest common subsequence of lower-cased words, 0 to 1."""
    words, expected = (re.findall(r"\w+", t.lower()) for t in (text, reference))
    if not words or not expected:
        return float(words == expected)
    row = [0] * (len(expected) + 1)
    for word in words:
        diagonal = 0
        for i, other in enumerate(expected, 1):
            longest = diagonal + 1 if word == other else max(row[i], row[i - 1])
            diagonal, row[i] = row[i], longest
    return 2 * row[-1] / (len(words) + len(expected))


def format_evaluation(result: dict[str, Any]) -> Any:
    """An evaluation as a rich table: a row for the model, its base and each yardstick."""
    from rich.table import Table

    model, base = result["metrics"], result.get("base")
    rouge = "rouge_l" in model
    table = Table(
        title=f"step {result['step']}, {result['split']} split: "
        f"{model['target_tokens']:,} target tokens, {model['bytes']:,} bytes",
        title_justify="left",
    )
    table.add_column("")
    columns = ["bits per byte", "loss (nats/token)", "perplexity", "accuracy"]
    for column in [*columns, *(["ROUGE-L"] if rouge else [])]:
        table.add_column(column, justify="right")

    def row(name: str, metrics: dict[str, Any], style: str | None = None) -> None:
        table.add_row(
            name,
            f"{metrics['bits_per_byte']:.3f}",
            f"{metrics['loss']:.3f}",
            f"{metrics['perplexity']:.4g}",
            f"{metrics['accuracy']:.1%}",
            *([f"{metrics['rouge_l']:.3f}"] if "rouge_l" in metrics else []),
            style=style,
        )

    row("fine-tuned" if base else "model", model, "bold")
    if base:
        row("base", base)
    for name, value in yardstick_rows(result):
        table.add_row(name, f"{value:.3f}")
    return table


def yardstick_rows(result: dict[str, Any]) -> list[tuple[str, float]]:
    """(what it is, bits per byte) of each yardstick of an evaluation."""
    rows = []
    yardsticks = result.get("yardsticks") or {}
    if "xz" in yardsticks:
        xz = yardsticks["xz"]
        rows.append(("xz -9e", xz["bits_per_byte"]))
        if xz["primed_bits_per_byte"] is not None:
            size = _megabytes(xz["train_bytes"])
            rows.append((f"xz -9e behind {size} of training text", xz["primed_bits_per_byte"]))
    if "ngram" in yardsticks:
        ngram = yardsticks["ngram"]
        name = f"byte {ngram['order']}-gram (Kneser-Ney, {_megabytes(ngram['train_bytes'])})"
        rows.append((name, ngram["bits_per_byte"]))
    return rows


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
