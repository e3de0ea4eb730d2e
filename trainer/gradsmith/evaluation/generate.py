"""Text from a trained model, wherever it lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..console import quiet
from ..errors import UserError
from ..recipe import SMALLEST_TEMPERATURE
from ..tasks.language_modeling.generate import complete, encode_prompt


def generate(
    path: str | Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool | None = None,
) -> list[str]:
    """What the model at `path` says to each prompt. Equal arguments give equal texts.

    Args:
        path: a run's folder, a checkpoint, a Hugging Face folder or an adapter folder.
        prompts: texts to continue, or, for a chat model, to answer.
        max_new_tokens: at most this many; the end-of-sequence token ends a text before.
        temperature: 0 takes the likeliest token each time.
        top_p: draw from the likeliest tokens that have this much probability together.
        seed: of the drawing.
        chat: put prompts through the chat template. None: as the run was trained, and for a
            folder that is no run, if its tokenizer has a template.

    Raises:
        UserError: no model there, a prompt too long for it, or chat without a template.
    """
    from ..models.base import open_model
    from ..models.build import load_for_inference
    from ..run import Run

    if not prompts:
        raise UserError("generate: no prompt given; pass at least one text")
    if not (temperature == 0 or SMALLEST_TEMPERATURE <= temperature <= 100):
        raise UserError(
            f"temperature: found {temperature:g}; allowed are 0, which takes the likeliest token, "
            f"and {SMALLEST_TEMPERATURE:g} to 100"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: found {top_p:g}; allowed are shares above 0, up to 1")
    run, system = Run(path), None
    is_run = run.recipe_path.is_file()
    if is_run:
        data = run.recipe().data
        chat = data.task == "chat" if chat is None else chat
        system = data.chat.system
    with (
        open_model(path) as found,
        quiet(run.logs / "generate.log" if is_run else Path(os.devnull)),
    ):
        model, tokenizer = load_for_inference(found)
        if chat is None:
            chat = tokenizer.chat_template is not None
        ids = [encode_prompt(tokenizer, prompt, chat=chat, system=system) for prompt in prompts]
        return complete(
            model,
            tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
