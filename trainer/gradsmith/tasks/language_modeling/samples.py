"""What a model says to held-out prompts, beside what its base says and what was there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...blocks import Part, Samples
from ...recipe import TextRecipe
from .generate import Prompt, complete, encode_prompt, encode_text

ROUGE_PAIRS = 32

Question = tuple[Prompt, str | None]  # and, where there is one, the reference


@dataclass
class Questions:
    """What is put to a model.

    Attributes:
        asked: what the samples are drawn for.
        scored: for chat what ROUGE-L is measured on; else [].
    """

    recipe: TextRecipe
    tokenizer: Any
    asked: list[Question]
    scored: list[Question]

    def samples(self, model: Any) -> list[str]:
        """What a model says to what is asked, drawn as the recipe says."""
        return self._put(model, self.asked, self.recipe.evaluation.generation.temperature)

    def rouge_l(self, model: Any) -> float:
        """The mean ROUGE-L of its greedy answers and the references."""
        answers = self._put(model, self.scored, 0.0)
        pairs = zip(answers, self.scored, strict=True)
        return sum(rouge_l(a, reference or "") for a, (_, reference) in pairs) / len(answers)

    def _put(self, model: Any, questions: Sequence[Question], temperature: float) -> list[str]:
        generation = self.recipe.evaluation.generation
        return complete(
            model,
            self.tokenizer,
            [_encode(self.tokenizer, self.recipe, question) for question, _ in questions],
            max_new_tokens=generation.max_new_tokens,
            temperature=temperature,
            top_p=generation.top_p,
            seed=self.recipe.seed,
        )


def questions(recipe: TextRecipe, tokenizer: Any, documents: Sequence[dict[str, Any]]) -> Questions:
    """The recipe's own prompts, else held-out documents, evenly spaced."""
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
        asked = _evenly(_beginnings(recipe, tokenizer, documents), generation.count)
    if generation.prompts:
        asked = [(prompt, None) for prompt in generation.prompts]
    return Questions(recipe, tokenizer, asked, scored)


def samples_block(
    questions: Questions, said: Sequence[str], base_said: Sequence[str] | None
) -> Samples:
    """The samples as a block: each prompt, what the model says, its base, and the reference."""
    recipe = questions.recipe
    chat = recipe.data.task == "chat"
    samples = []
    for place, (prompt, reference) in enumerate(questions.asked):
        parts: list[Part] = [
            {"name": "The question" if chat else "It begins", "text": _as_text(prompt)},
            {
                "name": "its answer" if chat else "the model goes on",
                "text": said[place],
                "ours": True,
            },
        ]
        if base_said is not None:
            parts.append({"name": "the base, before fine-tuning", "text": base_said[place]})
        if reference is not None:
            parts.append({"name": "the reference" if chat else "as it was", "text": reference})
        samples.append(parts)
    generation = recipe.evaluation.generation
    return {
        "kind": "samples",
        "title": "Samples",
        "samples": samples,
        "settings": {
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "max_new_tokens": generation.max_new_tokens,
            "seed": recipe.seed,
        },
    }


def _encode(tokenizer: Any, recipe: TextRecipe, question: Prompt) -> list[int]:
    data = recipe.data
    return encode_prompt(tokenizer, question, chat=data.task == "chat", system=data.chat.system)


def _beginnings(
    recipe: TextRecipe, tokenizer: Any, documents: Sequence[dict[str, Any]]
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
    from ...data.chat import prompt_of

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
