"""Conversations: where they come from, how they are rendered, and which tokens are the answer."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from .example import Example, Ledger, Messages
from .template import apply_template

INSTRUCTION = "Write the docstring of this Python function."
DOCSTRING_LENGTH = (20, 600)  # characters
FUNCTION_LENGTH = (40, 4000)

# Roles as in ChatML, but an answer ends with the tokenizer's own EOS token, so that learning to
# answer is learning to stop. Generation markers tell transformers which part is the answer.
CHATML = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message.content + '<|im_end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def prompt_of(messages: Messages) -> Messages:
    """What comes before the last answer."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    return messages[:last]


# ------------------------------------------------------------------- function -> docstring pairs


def docstring_pairs(tree: ast.Module, file: Example, ledger: Ledger) -> Iterator[Example]:
    """For each documented function of a file: its source without the docstring -> the docstring.

    All pairs of a file are in one group, so a held-out file's functions are held out with it.
    """
    lines = [line + "\n" for line in file.text.split("\n")]  # as ast counts them; no form feeds
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        ledger.add("extract", "in", source=file.source.partition(":")[0])
        function = _without_docstring(node, lines)
        reason = _reason_to_skip(function, docstring.strip())
        if reason:
            ledger.add("extract", "dropped", reason=reason, source=file.source.partition(":")[0])
            continue
        ledger.add("extract", "kept", source=file.source.partition(":")[0])
        messages = [
            {"role": "user", "content": f"{INSTRUCTION}\n\n{function}"},
            {"role": "assistant", "content": docstring.strip()},
        ]
        yield Example(f"{file.source}:{node.lineno}", messages, group=file.group)


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str | None:
    """The function's source, dedented; None where nothing but the docstring is in its body."""
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    assert node.end_lineno is not None
    if len(node.body) == 1 or docstring.end_lineno >= node.body[1].lineno:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = lines[first - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("".join(kept)).strip("\n")


def _reason_to_skip(function: str | None, docstring: str) -> str:
    if function is None:
        return "function: nothing in it but the docstring"
    for name, text, (shortest, longest) in (
        ("docstring", docstring, DOCSTRING_LENGTH),
        ("function", function, FUNCTION_LENGTH),
    ):
        if len(text) < shortest:
            return f"{name}: shorter than {shortest} characters"
        if len(text) > longest:
            return f"{name}: longer than {longest} characters"
    if len([word for word in docstring.split() if word.isalpha()]) < 3:
        return "docstring: fewer than 3 words"
    return ""


# ---------------------------------------------------------------------------------- rendering


def render(tokenizer: Any, messages: Messages, source: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation through the tokenizer's chat template.

    Returns:
        The text, and the [start, end) characters of each answer in it, EOS included.

    Raises:
        UserError: the template fails, or shows no way to tell the answers from the rest.
    """
    text = apply_template(tokenizer, messages, source)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = apply_template(tokenizer, messages[:i], source, add_generation_prompt=True)
        whole = i == len(messages) - 1
        after = text if whole else apply_template(tokenizer, messages[: i + 1], source)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{source}: the chat template renders message {i} differently once more messages "
                "follow, so its answer cannot be told from the prompt; set data.chat.template to "
                "a template in which a conversation's beginning renders as the beginning of it"
            )
        # some templates end a turn with a line break after EOS: nothing that an answer is made of
        end = after.rfind(tokenizer.eos_token, len(before))
        spans.append((len(before), len(after) if end < 0 else end + len(tokenizer.eos_token)))
    return text, spans
