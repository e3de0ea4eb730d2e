"""The tokenizer: trained here as a byte-level BPE, or taken from a folder."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..gguf import find_gguf
from ..gguf import place as gguf_place
from ..hub import hub_name
from ..reading import reading

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]  # there from the start: fine-tuning adds no ids


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """A byte-level BPE over `texts` (any text encodes and decodes to itself); deterministic.

    Returns:
        A transformers PreTrainedTokenizerFast with BOS, EOS, PAD and ChatML's tokens. Its
        vocabulary is smaller than asked where the texts have no more pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, *CHAT_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _interruptible(lambda: bpe.train_from_iterator(texts, trainer))
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=CHAT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _interruptible(work: Callable[[], object]) -> None:
    """Runs `work` on another thread: Rust does not look for signals, and this thread does."""
    failed: list[BaseException] = []
    ended = threading.Event()  # an interrupted `join` takes a thread for ended that is not

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        ended.wait()
    except KeyboardInterrupt:
        atexit.register(_end_process_unless, ended)
        raise
    if failed:
        raise failed[0]


def _end_process_unless(ended: threading.Event) -> None:
    """Ends the process, as Ctrl-C does, while a thread is in Rust.

    Python would end such a thread when it next asks for the interpreter, by unwinding its stack,
    which Rust does not let through: the process would abort.
    """
    if not ended.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT)


def find_tokenizer(path: str, key: str) -> str:
    """Where the tokenizer is: in a folder, a run, a checkpoint or its model folder, or on the hub.

    Args:
        path: the recipe's value.
        key: the recipe's key, for the message.

    Raises:
        UserError: there is none.
    """
    folder = Path(path)
    if find_gguf(folder):
        return path
    if not folder.exists():
        return hub_name(path, key, "a tokenizer")
    inside = [folder, folder / "tokenizer", folder / "model", folder / "data" / "tokenizer"]
    # runs/NAME/checkpoints/step-000100[/model]: the run's own
    run = [parent / "data" / "tokenizer" for parent in folder.resolve().parents[:3]]
    for candidate in [*inside, *run]:
        if (candidate / "tokenizer.json").is_file():
            return str(candidate)
    raise UserError(
        f"{key}: no tokenizer.json in {path}, nor in the data/tokenizer of a run there; "
        "give a tokenizer's or model's folder, or a run that `gradsmith prepare` has prepared"
    )


def load_tokenizer(place: str, key: str, *, needs_eos: bool = True) -> Any:
    """A fast tokenizer; PAD defaults to EOS where it has none.

    Args:
        place: a folder, a GGUF file or a hub name.
        key: the recipe's key, for messages.
        needs_eos: whether it must have a token that ends a text.

    Raises:
        UserError: it cannot be loaded, is not backed by `tokenizers`, or has no EOS.
    """
    from transformers import AutoTokenizer

    with reading(key, f"cannot load a tokenizer from {place}"):
        tokenizer = AutoTokenizer.from_pretrained(**gguf_place(place), trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{key}: {place} holds a {type(tokenizer).__name__} without tokenizer.json")
    if tokenizer.eos_token is None and (needs_eos or tokenizer.pad_token is None):
        raise UserError(f"{key}: the tokenizer in {place} has no EOS token, so nothing could stop")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def token_bytes(tokenizer: Any) -> np.ndarray:
    """How many UTF-8 bytes of text each id stands for, int32 (V,); special tokens: 0."""
    backend = tokenizer.backend_tokenizer
    parts = json.dumps([json.loads(backend.to_str()).get(k) for k in ("pre_tokenizer", "decoder")])
    byte_level = '"ByteLevel"' in parts
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    sizes = np.zeros(len(tokenizer), np.int32)
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index in special:
            continue
        if byte_level and token not in added:
            sizes[index] = len(token)  # one character of the alphabet for each byte
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            sizes[index] = 1  # SentencePiece's byte fallback
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode("utf-8"))
    return sizes


@contextlib.contextmanager
def special_tokens_as_text(tokenizer: Any) -> Iterator[Any]:
    """The backend, with "<|eos|>" in a raw text read as those characters and not as the token."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        yield backend
    finally:
        backend.encode_special_tokens = before
