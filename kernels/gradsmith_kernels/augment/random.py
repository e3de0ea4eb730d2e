"""Random numbers by counter: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011) with the seed as its key.

The counter is (place, stream, block): the image's place in the run, the transform's number in the
chain, the block of four numbers. So a parameter depends on nothing else: not on the batch, the
worker, the rank or the backend.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradsmith_kernels.backends import missing

Words = npt.NDArray[np.uint64]

NOISE_STREAMS = 1 << 31  # the streams that give each pixel numbers of its own


def uniform_numbers(
    places: npt.NDArray[Any], seed: int, stream: int, count: int
) -> npt.NDArray[np.float64]:
    """(len(places), count) numbers (word + 1/2) / 2^32, with 32-bit words of Philox."""
    places = np.ascontiguousarray(places, np.uint64)
    if missing("cpu"):
        return uniform_numbers_in_numpy(places, seed, stream, count)
    from gradsmith_kernels import _native

    numbers = np.empty((len(places), count))
    _native.augment_uniform_numbers(
        places.ctypes.data, len(places), seed, stream, count, numbers.ctypes.data
    )
    return numbers


def uniform_numbers_in_numpy(
    places: Words, seed: int, stream: int, count: int
) -> npt.NDArray[np.float64]:
    """The definition of `uniform_numbers`."""
    blocks = -(-count // 4)
    low, high = places & np.uint64(0xFFFFFFFF), places >> np.uint64(32)
    block = np.arange(blocks, dtype=np.uint64)
    words = philox(low[:, None], high[:, None], np.uint64(stream), block[None, :], seed)
    numbers = words.reshape(len(places), -1)[:, :count].astype(np.float64)
    return (numbers + 0.5) / 2.0**32


def philox(a: Any, b: Any, c: Any, d: Any, seed: int) -> Words:
    """(..., 4) words of 32 bits for the counter (a, b, c, d)."""
    a, b, c, d = np.broadcast_arrays(*(np.asarray(x, np.uint64) for x in (a, b, c, d)))
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b = (second >> half) ^ b ^ np.uint64(key0), second & mask
        c, d = (first >> half) ^ d ^ np.uint64(key1), first & mask
        key0, key1 = key0 + 0x9E3779B9 & 0xFFFFFFFF, key1 + 0xBB67AE85 & 0xFFFFFFFF
    return np.stack((a, b, c, d), -1)


@functools.cache
def normal_quantiles() -> npt.NDArray[np.float32]:
    """The normal distribution at 65536 shares, (i + 1/2) / 65536: noise of 16 random bits."""
    share = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    table = torch.special.ndtri(share).float().numpy()
    return np.ascontiguousarray(table)


def normal_numbers(place: int, seed: int, stream: int, count: int) -> npt.NDArray[np.float64]:
    """`count` normal numbers, eight from each counter (place, stream, i // 8)."""
    block = np.arange(-(-count // 8), dtype=np.uint64)
    words = philox(place & 0xFFFFFFFF, place >> 32, stream, block, seed)
    halves = np.stack((words & np.uint64(65535), words >> np.uint64(16)), -1)
    return normal_quantiles()[halves.reshape(-1)[:count]].astype(np.float64)


_TRIES = 8


def gamma_uniforms() -> int:
    """How many uniform numbers `gamma_numbers` takes for one."""
    return 2 * _TRIES + 1


def gamma_numbers(u: npt.NDArray[np.float64], alpha: float) -> npt.NDArray[np.float64]:
    """(B,) numbers of the gamma distribution with shape alpha, from uniform (B, gamma_uniforms()).

    Marsaglia and Tsang (2000): a cube of a normal number, taken with a probability of at least
    0.95; the first of eight that is, so one in 10^10 is not quite of the distribution.
    """
    d = (alpha if alpha >= 1 else alpha + 1) - 1 / 3
    x = torch.special.ndtri(torch.from_numpy(u[:, :_TRIES].copy())).numpy()
    v = np.maximum(1 + x / (9 * d) ** 0.5, 0) ** 3
    safe = np.where(v > 0, v, 1)
    taken = (v > 0) & (np.log(u[:, _TRIES : 2 * _TRIES]) < x * x / 2 + d * (1 - v + np.log(safe)))
    taken[:, -1] = True
    drawn: npt.NDArray[np.float64] = d * safe[np.arange(len(u)), taken.argmax(1)]
    return drawn if alpha >= 1 else drawn * u[:, -1] ** (1 / alpha)
