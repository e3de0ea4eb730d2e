"""What text costs without a neural network: compressors and an n-gram, in bits per byte.

All figures are for the same held-out bytes that the model is measured on, as one stream. The
baselines pay nothing for the ends of documents; the model does.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from ...blocks import Result

if TYPE_CHECKING:
    from ...data.prepared import PreparedData
    from ...data.text import TextProcessor, TokenSplit

XZ_TRAIN_BYTES = 8 << 20
NGRAM_TRAIN_BYTES = 16 << 20
NGRAM_ORDER = 8  # the longest that packs into 64 bits; it beats the shorter ones on source code


def xz_bits_per_byte(train: bytes, held_out: bytes) -> dict[str, Any]:
    """`xz -9e`, alone and knowing the training text.

    Returns:
        bits_per_byte: the .xz file of the held-out bytes, one solid stream, over their number.
        primed_bits_per_byte: what the file grows by when the held-out bytes are compressed behind
            the first `train_bytes` bytes of training text (all of it within xz's window, which is
            64 MiB): the compressor's counterpart of having been trained. None without such text.
        train_bytes: how much training text that was.
    """
    train = train[:XZ_TRAIN_BYTES]
    if not held_out:
        return {"bits_per_byte": math.nan, "primed_bits_per_byte": None, "train_bytes": len(train)}
    inputs = [held_out] + ([train, train + held_out] if train else [])
    with ThreadPoolExecutor(2) as pool:  # lzma lets go of the interpreter's lock
        sizes = list(pool.map(_xz_size, inputs))
    primed = (sizes[2] - sizes[1]) * 8 / len(held_out) if train else None
    return {
        "bits_per_byte": sizes[0] * 8 / len(held_out),
        "primed_bits_per_byte": primed,
        "train_bytes": len(train),
    }


def _xz_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def ngram_bits_per_byte(
    train: bytes, held_out: bytes, *, order: int = NGRAM_ORDER
) -> dict[str, Any]:
    """A byte n-gram model with modified Kneser-Ney smoothing, see `ByteNgram`.

    Returns:
        bits_per_byte of the held-out bytes, each predicted from the bytes before it; order;
        train_bytes, the training text that was counted (the first `NGRAM_TRAIN_BYTES` at most).
    """
    train = train[:NGRAM_TRAIN_BYTES]
    bits = -ByteNgram(train, order).log2_probabilities(held_out)
    return {
        "bits_per_byte": float(bits.mean()) if len(bits) else math.nan,
        "order": order,
        "train_bytes": len(train),
    }


class ByteNgram:
    """Interpolated modified Kneser-Ney over bytes (Chen and Goodman 1998, section 4.1.6).

    With c a context of k bytes, c' the same without its oldest byte and s the next byte,

        p(s | c) = (n(c,s) - D[n(c,s)]) / n(c) + γ(c) · p(s | c')      if c was seen, else p(s | c')
        γ(c)     = Σ_s D[n(c,s)] / n(c),      below the empty context p = 1/256

    where n counts occurrences at the highest order and distinct preceding bytes below it, and the
    discounts D[1], D[2], D[3+] of each order come from its counts of counts. Contexts are packed
    into 64-bit integers, so that counting is sorting and looking up is binary search.

    Args:
        data: what to count.
        order: bytes in an n-gram, the predicted one included: 1 to 8.
    """

    def __init__(self, data: bytes, order: int):
        if not 1 <= order <= 8:
            raise ValueError(f"order: found {order}; allowed are 1 to 8")
        self.order = order
        keys, counts = np.unique(_ngrams(data, order), return_counts=True)
        self._levels = [_Level(keys, counts)]
        for length in range(order - 1, 0, -1):
            keys, counts = np.unique(keys & _mask(length), return_counts=True)
            self._levels.insert(0, _Level(keys, counts))

    def probabilities(self, ngrams: np.ndarray) -> np.ndarray:
        """p(last byte | the bytes before it) for n-grams packed big-endian into uint64."""
        p = np.full(len(ngrams), 1 / 256)
        for length, level in enumerate(self._levels, 1):
            p = level.refine(ngrams & _mask(length), p)
        return p

    def log2_probabilities(self, data: bytes) -> np.ndarray:
        """float64 (len(data),): log2 p of each byte given those before it."""
        return np.log2(self.probabilities(_ngrams(data, self.order)))


class _Level:
    """The n-grams of one length: discounted probability of each, left-over mass of each context."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray):
        of_count = [int((counts == c).sum()) for c in range(1, 5)]
        discounts = np.zeros(4)
        if of_count[0] and of_count[1]:
            y = of_count[0] / (of_count[0] + 2 * of_count[1])
            for c in (1, 2, 3):
                if of_count[c - 1]:
                    estimate = c - (c + 1) * y * of_count[c] / of_count[c - 1]
                    discounts[c] = min(max(estimate, 0.0), c)
        # Tiny or odd texts leave an estimate at zero, and with it no mass for unseen bytes.
        discounts = np.where(discounts > 0, discounts, [0.0, 0.5, 0.5, 0.5])
        discount = discounts[np.minimum(counts, 3)]

        contexts = keys >> np.uint64(8)
        starts = np.flatnonzero(np.r_[True, contexts[1:] != contexts[:-1]]) if len(keys) else keys
        starts = starts.astype(np.int64)
        lengths = np.diff(np.r_[starts, len(keys)])
        totals = np.add.reduceat(counts, starts) if len(keys) else counts
        self.keys = keys
        self.contexts = contexts[starts]
        self.seen = (counts - discount) / np.repeat(totals, lengths)
        self.left_over = np.add.reduceat(discount, starts) / totals if len(keys) else discount

    def refine(self, keys: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        if not len(self.keys):
            return shorter
        context, known = _find(self.contexts, keys >> np.uint64(8))
        ngram, met = _find(self.keys, keys)
        p = np.where(met, self.seen[ngram], 0.0) + self.left_over[context] * shorter
        longer: np.ndarray = np.where(known, p, shorter)
        return longer


def _mask(length: int) -> np.uint64:
    return np.uint64((1 << (8 * length)) - 1)


def _ngrams(data: bytes, order: int) -> np.ndarray:
    """uint64 (len(data),): the `order` bytes ending at each position, zeros before the start."""
    stream = np.frombuffer(data, dtype=np.uint8)
    packed = np.zeros(len(stream), dtype=np.uint64)
    for back in range(min(order, len(stream))):
        packed[back:] |= stream[: len(stream) - back].astype(np.uint64) << np.uint64(8 * back)
    return packed


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each key stands in a sorted table, and whether it is there at all."""
    index = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return index, table[index] == keys


def baseline_results(
    names: Sequence[str], processor: TextProcessor, data: PreparedData, split: str, seed: int = 0
) -> list[Result]:
    """What the baselines of those names (xz, ngram) reach on a split, the strongest last.

    Over the bytes that the targets stand for: for language modelling the held-out text, for chat
    the answers alone.
    """
    if not names:
        return []
    held_out = target_text(processor, data.split(split))
    documents = data.split("train")
    train = target_text(processor, documents, at_most=NGRAM_TRAIN_BYTES, seed=seed)
    results: list[Result] = []

    def add(name: str, bits: float, train_bytes: int = 0, note: str = "") -> None:
        values = {"bits_per_byte": bits, "bytes": len(held_out), "train_bytes": train_bytes}
        results.append({"name": name, "values": values, "note": note})

    if "xz" in names:
        found = xz_bits_per_byte(train, held_out)
        add("xz -9e", found["bits_per_byte"])
        if (primed := found["primed_bits_per_byte"]) is not None:
            known = found["train_bytes"]
            add(f"xz -9e behind {_megabytes(known)} of training text", primed, known)
    if "ngram" in names:
        found = ngram_bits_per_byte(train, held_out)
        known = found["train_bytes"]
        note = f"Kneser-Ney, {_megabytes(known)}"
        add(f"byte {found['order']}-gram", found["bits_per_byte"], known, note)
    return results


def target_text(
    processor: TextProcessor, documents: TokenSplit, *, at_most: int | None = None, seed: int = 0
) -> bytes:
    """The bytes that a split's targets stand for, documents one behind the other.

    With `at_most`, whole documents in a seeded random order until there are that many bytes, so
    that a part of a large split speaks for all of it; without, all documents in their order.
    """
    token_bytes, tokenizer = processor.token_bytes, processor.tokenizer
    order: Sequence[int] = range(len(documents))
    if at_most is not None:
        order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    parts: list[bytes] = []
    size = 0
    for index in order:
        tokens, is_target = documents.document(index)
        wanted = tokens[np.asarray(is_target, dtype=bool) & (token_bytes[tokens] > 0)]
        text = tokenizer.decode(wanted.tolist(), clean_up_tokenization_spaces=False)
        parts.append(text.encode())
        size += len(parts[-1])
        if at_most is not None and size >= at_most:
            break
    return b"".join(parts)[:at_most]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
