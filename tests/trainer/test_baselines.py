from __future__ import annotations

import lzma
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsmith.tasks.language_modeling.baselines import (
    ByteNgram,
    ngram_bits_per_byte,
    xz_bits_per_byte,
)

TEXT = b"".join(
    b"def name_%d(first, second):\n    return first * %d + second\n" % (i, i % 7)
    for i in range(400)
)


def packed(context: bytes, order: int) -> np.ndarray:
    """The n-grams of all 256 bytes behind a context."""
    tail = context[-(order - 1) :] if order > 1 else b""
    return np.array([int.from_bytes(tail + bytes([s]), "big") for s in range(256)], np.uint64)


@pytest.mark.parametrize("order", [1, 2, 5, 8])
@pytest.mark.parametrize("data", [b"", b"a", b"aaaaaaaa", bytes(range(256)), TEXT])
def test_the_ngram_is_a_distribution(order, data):
    model = ByteNgram(data, order)
    random = np.random.default_rng(0)
    contexts = [b"", b"def name", b"\x00\xff\x80", random.bytes(12), data[-9:], data[3:14]]
    for context in contexts:
        p = model.probabilities(packed(context.rjust(8, b"\0"), order))
        assert p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=300), context=st.binary(min_size=8, max_size=8))
def test_the_ngram_is_a_distribution_whatever_it_counted(data, context):
    for order in (1, 3, 8):
        p = ByteNgram(data, order).probabilities(packed(context, order))
        assert p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)


def slow_kneser_ney(data: bytes, order: int, context: bytes, symbol: int) -> float:
    """The same formula with dictionaries, one n-gram at a time."""
    padded = bytes(order - 1) + data
    grams = [padded[i : i + order] for i in range(len(data))]
    levels = [Counter(grams)]
    for length in range(order - 1, 0, -1):
        levels.append(Counter(gram[-length:] for gram in levels[-1]))
    p = 1 / 256
    for length, counts in enumerate(reversed(levels), 1):
        of = Counter(counts.values())
        discount = {1: 0.5, 2: 0.5, 3: 0.5}
        if of[1] and of[2]:
            y = of[1] / (of[1] + 2 * of[2])
            for c in (1, 2, 3):
                if of[c]:
                    estimate = min(c - (c + 1) * y * of[c + 1] / of[c], c)
                    discount[c] = estimate if estimate > 0 else 0.5
        here = context[len(context) - length + 1 :] if length > 1 else b""
        behind = {g: n for g, n in counts.items() if g[:-1] == here}
        if not behind:
            continue
        total = sum(behind.values())
        n = behind.get(here + bytes([symbol]), 0)
        left_over = sum(discount[min(m, 3)] for m in behind.values()) / total
        p = (n - discount[min(n, 3)] if n else 0) / total + left_over * p
    return p


def test_the_ngram_follows_its_formula():
    data, held_out, order = TEXT[:1500], TEXT[9000:9060] + b"unseen \xff", 4
    found = ByteNgram(data, order).log2_probabilities(held_out)
    padded = bytes(order - 1) + held_out
    expected = [
        math.log2(slow_kneser_ney(data, order, padded[i : i + order - 1], byte))
        for i, byte in enumerate(held_out)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_ngram_is_causal():
    model = ByteNgram(TEXT, 8)
    whole, changed = TEXT[:200], TEXT[:150] + b"x" * 50
    np.testing.assert_array_equal(
        model.log2_probabilities(whole)[:150], model.log2_probabilities(changed)[:150]
    )


def test_knowing_more_costs_fewer_bits():
    noise = np.random.default_rng(1).bytes(5000)
    like, unlike = TEXT[:8000], noise
    for baseline, key in ((xz_bits_per_byte, "primed_bits_per_byte"),
                           (ngram_bits_per_byte, "bits_per_byte")):  # fmt: skip
        assert baseline(TEXT[8000:], like)[key] < 1.5
        assert baseline(TEXT[8000:], unlike)[key] > 7.9
    assert (
        ngram_bits_per_byte(TEXT[8000:], like)["bits_per_byte"]
        < ngram_bits_per_byte(noise, like)["bits_per_byte"]
    )


def test_xz_is_what_xz_writes():
    found = xz_bits_per_byte(TEXT[5000:], TEXT[:5000])
    alone = len(lzma.compress(TEXT[:5000], preset=9 | lzma.PRESET_EXTREME))
    assert found["bits_per_byte"] == alone * 8 / 5000
    assert found["primed_bits_per_byte"] < found["bits_per_byte"]
    assert found["train_bytes"] == len(TEXT) - 5000
    assert xz_bits_per_byte(b"", TEXT)["primed_bits_per_byte"] is None


@pytest.mark.parametrize("order", [0, 9])
def test_orders_that_do_not_pack_are_refused(order):
    with pytest.raises(ValueError, match="1 to 8"):
        ByteNgram(TEXT, order)
