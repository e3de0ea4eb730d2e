"""Text from a trained model: transformers' own generation with its key/value cache, seeded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...data.template import apply_template
from ...errors import RunError, UserError

Prompt = str | list[dict[str, str]]
"""Text to continue or to answer, or a conversation as a list of {"role", "content"}."""

BATCH = 16


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
    from ...data.tokenizer import special_tokens_as_text

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
