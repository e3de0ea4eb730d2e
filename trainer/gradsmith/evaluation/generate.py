"""Text from a trained model: transformers' own generation with its key/value cache, seeded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console import quiet
from ..data.template import apply_template
from ..errors import RunError, UserError
from ..recipe import SMALLEST_TEMPERATURE

Prompt = str | list[dict[str, str]]
"""Text to continue or to answer, or a conversation as a list of {"role", "content"}."""

BATCH = 16


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


def encode_prompt(
    tokenizer: Any, prompt: Prompt, *, chat: bool, system: str | None = None
) -> list[int]:
    """Token ids of a prompt as in training: behind BOS, or in the chat template."""
    if not chat:
        assert isinstance(prompt, str)
        bos = tokenizer.bos_token_id
        return [tokenizer.eos_token_id if bos is None else bos, *encode_text(tokenizer, prompt)]
    if tokenizer.chat_template is None:
        raise UserError("chat: this model's tokenizer has no chat template; generate without chat")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    text = apply_template(tokenizer, messages, "prompt", add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of raw text as `prepare` makes them: "<|eos|>" in it is text, not the token."""
    from ..data.tokenizer import special_tokens_as_text

    with special_tokens_as_text(tokenizer) as backend:
        return list(backend.encode(text, add_special_tokens=False).ids)


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[str]:
    """The new text behind each prompt of token ids, without special tokens.

    A text depends on its own prompt, the seed and its place in the list. The caller's random
    state is left as it was.
    """
    import torch
    from transformers import GenerationConfig

    room = getattr(model.config, "max_position_embeddings", None)
    for prompt in prompts:
        if room is not None and len(prompt) >= room:
            raise UserError(
                f"prompt: {len(prompt)} tokens; this model takes at most {room - 1} and one new one"
            )
    device = next(model.parameters()).device
    eos = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None}
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    whole = [i for i, p in enumerate(prompts) if room is None or len(p) + max_new_tokens <= room]
    batches = [whole[first : first + BATCH] for first in range(0, len(whole), BATCH)]
    # A prompt that leaves no room for all new tokens goes alone: it must not shorten others'.
    batches += [[i] for i in range(len(prompts)) if i not in set(whole)]
    texts = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for batch in batches:
                rows = [prompts[i] for i in batch]
                longest = max(len(row) for row in rows)
                ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
                mask = torch.zeros_like(ids)
                for target, is_token, row in zip(ids, mask, rows, strict=True):
                    target[longest - len(row) :] = torch.tensor(row)
                    is_token[longest - len(row) :] = 1
                new = max_new_tokens if room is None else min(max_new_tokens, room - longest)
                config = GenerationConfig(
                    max_new_tokens=new,
                    eos_token_id=sorted(eos) or None,
                    pad_token_id=pad,
                    use_cache=True,
                    **(sampling if temperature > 0 else {"do_sample": False}),
                )
                try:
                    with torch.no_grad():
                        out = model.generate(
                            input_ids=ids.to(device),
                            attention_mask=mask.to(device),
                            generation_config=config,
                        )
                except RuntimeError as error:
                    if "probability tensor contains" not in str(error):
                        raise
                    raise RunError("the model's logits are not finite: nothing to draw") from None
                for i, row in zip(batch, out.tolist(), strict=True):
                    texts[i] = tokenizer.decode(
                        row[longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False
                    )
    finally:
        model.train(was_training)
    return texts


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
