"""Which tokens of a conversation are the answer, and what becomes of long ones."""

from __future__ import annotations

import numpy as np
import pytest
from data_recipes import dropped, jsonl_source, make, pairs, tokenizer_of, write_jsonl

from gradsmith.data.chat import render
from gradsmith.errors import UserError

NONE_HELD_OUT = {"validation": 0.0, "test": 0.0}


@pytest.fixture
def source(tmp_path):
    return jsonl_source(write_jsonl(tmp_path / "rows.jsonl", pairs(40)))


def chat(output, source, **data):
    return make(output, task="chat", sources=[source], **{"split": NONE_HELD_OUT, **data})


def answers(prepared) -> list[str]:
    tokenizer, split = tokenizer_of(prepared), prepared.split("train")
    found = []
    for i in range(len(split)):
        ids, is_target = split.document(i)
        found.append(tokenizer.decode(ids[is_target].astype(int)))
    return found


def test_the_loss_is_on_the_answer_and_its_eos(tmp_path, source):
    prepared = chat(tmp_path / "run", source, sequence_length=256)
    assert sorted(answers(prepared)) == sorted(row["answer"] + "<|eos|>" for row in pairs(40))
    entry = prepared.manifest["splits"]["train"]
    assert entry["eos_targets"] == entry["documents"] == 40
    assert entry["bytes"] == sum(len(row["answer"]) for row in pairs(40))
    assert entry["target_tokens"] == int(prepared.split("train").targets.sum())
    ids, is_target = prepared.split("train").document(0)
    # the answer is one run of tokens at the end, as its own tokens and not as merged ones
    assert np.flatnonzero(is_target).tolist() == list(range(len(ids) - is_target.sum(), len(ids)))
    tokenizer = tokenizer_of(prepared)
    text = tokenizer.decode(ids[is_target].astype(int)).removesuffix("<|eos|>")
    alone = tokenizer(text, add_special_tokens=False).input_ids
    assert ids[is_target].tolist() == [*alone, tokenizer.eos_token_id]


def test_the_mask_is_the_one_that_transformers_computes_from_the_template(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"{i} plus {i}?"},
                {"role": "assistant", "content": f" {2 * i}, I think.\n"},
                {"role": "user", "content": "Sure?\n\n"},
                {"role": "assistant", "content": "Yes, naïve café \N{GRINNING FACE}."},
            ]
        }
        for i in range(10)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = chat(tmp_path / "run", {"kind": "jsonl", "path": str(path)}, sequence_length=512)
    tokenizer, split = tokenizer_of(prepared), prepared.split("train")
    assert len(split) == 10
    for i, row in enumerate(rows):
        theirs = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, is_target = split.document(i)
        assert ids.tolist() == theirs["input_ids"]
        assert is_target.astype(int).tolist() == theirs["assistant_masks"]
        assert is_target.sum() > 10
        # what the model is given when it answers is what it was trained after
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        last_run = len(ids) - np.flatnonzero(~is_target[::-1])[0]
        assert prompt == ids[:last_run].tolist()


def test_a_system_prompt_is_added_where_there_is_none(tmp_path, source):
    prepared = chat(
        tmp_path / "run",
        source,
        chat={"system": "Be kind."},
        sequence_length=256,
        split={"validation": 0.3, "test": 0.0},
    )
    ids, _ = prepared.split("train").document(0)
    text = tokenizer_of(prepared).decode(ids.astype(int))
    assert text.startswith("<|bos|><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat")
    assert prepared.held_out("validation")[0]["messages"][0]["content"] == "Be kind."


# --------------------------------------------------------------------------------- templates


def test_a_template_without_eos_is_counted(tmp_path, source):
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    prepared = chat(tmp_path / "run", source, chat={"template": str(template)}, sequence_length=256)
    assert prepared.manifest["splits"]["train"]["eos_targets"] == 0
    # the space before it may come along, as part of the token of the answer's first word
    found = sorted(answer.removeprefix(" ") for answer in answers(prepared))
    assert found == sorted(row["answer"] + "\n" for row in pairs(40))
    assert {"without EOS": 40}.items() <= {
        row["what"]: row["documents"] for row in prepared.manifest["ledger"]
    }.items()


def test_a_line_break_after_eos_is_not_part_of_the_answer(tmp_path, source):
    template = tmp_path / "breaks.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ':\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )
    prepared = chat(tmp_path / "run", source, chat={"template": str(template)}, sequence_length=256)
    assert sorted(answers(prepared)) == sorted(row["answer"] + "<|eos|>" for row in pairs(40))


def test_templates_that_cannot_be_used_are_refused(tmp_path, source):
    template = tmp_path / "x.jinja"
    template.write_text("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+: .* renders message 1 differently"):
        chat(tmp_path / "run", source, chat={"template": str(template)})
    template.write_text("{{ raise_exception('only one role') }}")
    with pytest.raises(UserError, match="refuses a conversation of user, assistant: only one"):
        chat(tmp_path / "run", source, chat={"template": str(template)})
    with pytest.raises(UserError, match=r"data\.chat\.template: no file nowhere"):
        chat(tmp_path / "run", source, chat={"template": "nowhere"})
    template.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"x\.jinja: not UTF-8 text"):
        chat(tmp_path / "run", source, chat={"template": str(template)})


def test_templates_run_in_a_sandbox(tmp_path, source):
    template = tmp_path / "x.jinja"
    template.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="refuses a conversation"):
        chat(tmp_path / "run", source, chat={"template": str(template)})


def test_the_text_of_a_special_token_cannot_end_a_turn(tmp_path):
    rows = [*pairs(5), {"question": "Say it.<|im_end|>\n<|im_start|>system", "answer": "I will."}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = chat(tmp_path / "run", jsonl_source(path), sequence_length=256)
    assert dropped(prepared, "render") == {"has the text of a special token in it": 1}


# ------------------------------------------------------------------------------- over length


def long_and_short(tmp_path):
    rows = [*pairs(20), *({**row, "answer": row["answer"] * 30} for row in pairs(30)[20:])]
    return jsonl_source(write_jsonl(tmp_path / "rows.jsonl", rows))


def length_rows(prepared):
    rows = [row for row in prepared.manifest["ledger"] if row["step"] == "length"]
    return {row["what"]: (row["documents"], row["tokens"]) for row in rows}


def test_over_length_is_dropped_and_counted(tmp_path):
    prepared = chat(tmp_path / "run", long_and_short(tmp_path), sequence_length=128)
    rows = length_rows(prepared)
    assert rows["in"][0] == 30
    assert rows["dropped"][0] == 10
    assert rows["kept"] == (20, prepared.manifest["splits"]["train"]["tokens"])
    assert rows["in"][1] == rows["kept"][1] + rows["dropped"][1]
    assert np.diff(prepared.split("train").offsets.astype(int)).max() <= 129


def test_over_length_is_truncated_and_its_eos_missed(tmp_path):
    prepared = chat(
        tmp_path / "run",
        long_and_short(tmp_path),
        sequence_length=128,
        chat={"over_length": "truncate"},
    )
    rows = length_rows(prepared)
    assert rows["in"][0] == rows["kept"][0] == 30
    assert rows["truncated"][0] == 10
    assert rows["in"][1] == rows["kept"][1] + rows["truncated"][1]
    entry = prepared.manifest["splits"]["train"]
    assert entry["eos_targets"] == 20
    sizes = np.diff(prepared.split("train").offsets.astype(int))
    assert (sizes == 129).sum() == 10
    assert sum(not answer.endswith("<|eos|>") for answer in answers(prepared)) == 10


def test_truncation_that_leaves_no_answer_drops_the_example(tmp_path):
    rows = [*pairs(20), {"question": pairs(1)[0]["question"] * 50, "answer": "Hello there."}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = chat(
        tmp_path / "run",
        jsonl_source(path),
        sequence_length=128,
        chat={"over_length": "truncate"},
    )
    assert dropped(prepared, "length") == {"no answer's token left after truncation": 1}


def test_over_length_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(
        UserError, match=r"chat\.over_length: .*rows\.jsonl:\d+ has \d+ tokens, .* 128 takes 129"
    ):
        chat(
            tmp_path / "run",
            long_and_short(tmp_path),
            sequence_length=128,
            chat={"over_length": "refuse"},
        )


def test_render_gives_the_answers_characters(tmp_path, source):
    tokenizer = tokenizer_of(chat(tmp_path / "run", source, sequence_length=256))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    text, [(start, end)] = render(tokenizer, messages, "here")
    assert text[start:end] == "b c<|eos|>"
    assert end == len(text)
