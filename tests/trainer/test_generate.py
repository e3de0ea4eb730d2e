from __future__ import annotations

import pytest
import torch

from gradsmith.data.chat import CHATML
from gradsmith.data.tokenizer import train_tokenizer
from gradsmith.errors import UserError
from gradsmith.evaluation.generate import complete, encode_prompt, generate

TEXTS = ["the cat sat on the mat", "a dog and a cat", "what is it? it is a mat"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def say(model, tokenizer, prompts, **changes):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 1} | changes
    ids = [encode_prompt(tokenizer, prompt, chat=False) for prompt in prompts]
    return complete(model, tokenizer, ids, **settings)


def test_equal_arguments_give_equal_texts(model, tokenizer):
    prompts = ["the cat", "a"]
    first = say(model, tokenizer, prompts)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert say(model, tokenizer, prompts) == first
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's state has moved"
    torch.random.set_rng_state(state)
    assert say(model, tokenizer, prompts, seed=2) != first


def test_greedy_text_is_the_argmax_of_the_whole_prefix_each_time(model, tokenizer):
    """Cache and left padding change nothing: prompts of three lengths in one batch, against one
    forward pass without a cache for each new token."""
    prompts = ["the cat sat on", "a", "what is it? it is a"]
    found = say(model, tokenizer, prompts, temperature=0.0)
    for prompt, text in zip(prompts, found, strict=True):
        ids = encode_prompt(tokenizer, prompt, chat=False)
        new: list[int] = []
        for _ in range(12):
            with torch.no_grad():
                logits = model(torch.tensor([ids + new]), use_cache=False).logits[0, -1]
            if int(logits.argmax()) == tokenizer.eos_token_id:
                break
            new.append(int(logits.argmax()))
        assert text == tokenizer.decode(new, skip_special_tokens=True)


def always(model, token: int):
    """A hook that makes `token` the certain next one."""

    def force(module, args, output):
        output.logits[..., token] = 1e4
        return output

    return model.register_forward_hook(force)


def test_eos_ends_a_text(model, tokenizer):
    hook = always(model, tokenizer.eos_token_id)
    try:
        assert say(model, tokenizer, ["the cat", "a"]) == ["", ""]
    finally:
        hook.remove()
    assert all(say(model, tokenizer, ["the cat", "a"]))


def test_a_prompt_that_nearly_fills_the_model_shortens_only_its_own_text(model, tokenizer):
    letter = tokenizer.encode("q", add_special_tokens=False)[-1]
    hook = always(model, letter)
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 1}
    try:
        short, long = complete(model, tokenizer, [[letter] * 3, [letter] * 60], **settings)
    finally:
        hook.remove()
    assert (len(short), len(long)) == (12, 4)
    with pytest.raises(UserError, match="64 tokens; this model takes at most 63"):
        complete(model, tokenizer, [[letter] * 64], **settings)


def test_a_small_top_p_is_greedy(model, tokenizer):
    prompts = ["the cat", "a"]
    assert say(model, tokenizer, prompts, top_p=1e-6) == say(
        model, tokenizer, prompts, temperature=0.0
    )


def test_prompts_are_encoded_as_in_training(tokenizer):
    ids = encode_prompt(tokenizer, "the <|eos|>", chat=False)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids, "text that looks like a special token is text"
    assert tokenizer.decode(ids[1:]) == "the <|eos|>"

    ids = encode_prompt(tokenizer, "the cat", chat=True, system="be kind")
    assert tokenizer.decode(ids) == (
        "<|bos|><|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]
    text = tokenizer.decode(encode_prompt(tokenizer, own, chat=True, system="be kind"))
    assert "own" in text
    assert "be kind" not in text


def test_chat_without_a_template_is_refused(tokenizer):
    plain = train_tokenizer(iter(TEXTS), 300)
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(plain, "the cat", chat=True)


def test_from_a_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = ["the cat", "a dog"]
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 1}
    assert generate(tmp_path, prompts, chat=False, **settings) == say(model, tokenizer, prompts)
    as_chat = [encode_prompt(tokenizer, prompt, chat=True) for prompt in prompts]
    answers = complete(model, tokenizer, as_chat, **settings)
    assert generate(tmp_path, prompts, **settings) == answers
    with pytest.raises(UserError, match="no prompt given"):
        generate(tmp_path, [], **settings)
