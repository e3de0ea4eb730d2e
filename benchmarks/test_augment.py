"""Augmentation against the libraries that do it today: 500 x 375 uint8 images of a batch of 16, in
turns as test_ops.py has it. The peers that are not installed are named in the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gradsmith_kernels import augment

from . import augment_peers
from .augment_peers import MEAN, STD
from .machine import cpu_clock, rounds_within, summary

BUDGET = 6.0
WARMUP = 2
HEIGHT, WIDTH, SIZE, BATCH = 375, 500, 224, 16

_CROP = [augment.RandomResizedCrop(SIZE), augment.RandomHorizontalFlip()]
_LAST = [augment.Normalize(MEAN, STD)]
CHAINS = {
    "crop": ("RandomResizedCrop + flip + normalise", [*_CROP, *_LAST]),
    "jitter": (
        "RandomResizedCrop + flip + ColorJitter + normalise",
        [*_CROP, augment.ColorJitter(0.4, 0.4, 0.4, 0.1), *_LAST],
    ),
    "rotate": ("rotate 15 + normalise", [augment.RandomRotation(15, "bilinear"), *_LAST]),
    "randaugment": (
        "RandomResizedCrop + flip + RandAugment(2, 9) + normalise",
        [*_CROP, augment.RandAugment(2, 9), *_LAST],
    ),
}


def photos(count: int = BATCH) -> Any:
    """Images with a photo's mixture of smooth areas, edges and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH][..., None] / 97.0
    images = []
    for _ in range(count):
        waves = np.sin(x * rng.uniform(0.5, 3, 3) + y * rng.uniform(0.5, 3, 3))
        pixels = 128 + 80 * waves + rng.normal(0, 10, (HEIGHT, WIDTH, 3))
        images.append(pixels.clip(0, 255).astype(np.uint8))
    return np.stack(images)


def in_turns(
    benchmark: Any, ours: Callable[[], Any], peers: dict[str, Callable[[], Any]], quick: bool
) -> dict[str, Any]:
    rounds = 3 if quick else rounds_within([ours, *peers.values()], cpu_clock, BUDGET)
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def turn_of_the_peers() -> None:
        for name, call in peers.items():
            seconds[name].append(cpu_clock(call))

    benchmark.pedantic(ours, setup=turn_of_the_peers, rounds=rounds, warmup_rounds=WARMUP)
    times = {name: summary(values[WARMUP:]) for name, values in seconds.items()}
    mine = summary(benchmark.stats.stats.data)
    return {
        "times": {"gradsmith": mine, **times},
        "ratios": {name: t["median"] / mine["median"] for name, t in times.items()},
    }


def _parity(pipeline: augment.Compose, images: Any) -> None:
    few = torch.from_numpy(images[:2])
    ours = pipeline(few, seed=0)
    truth = pipeline(few, seed=0, backend="reference")
    assert 255 * 0.226 * (ours - truth).abs().mean() < 1


@pytest.mark.parametrize("case", CHAINS)
def test_chain(case: str, benchmark: Any, rows: list[dict[str, Any]], quick: bool) -> None:
    label, chain = CHAINS[case]
    images = photos()
    batch, pipeline = torch.from_numpy(images), augment.Compose(chain)
    _parity(pipeline, images)
    size = (HEIGHT, WIDTH) if case == "rotate" else (SIZE, SIZE)
    out = torch.empty(BATCH, 3, *size)
    peers, missing = augment_peers.of(case, list(images))
    row = in_turns(benchmark, lambda: pipeline(batch, seed=0, out=out), peers, quick)
    share = 1.0 if case == "rotate" else 0.54  # of the image, that a crop reads in the mean
    row["key"] = f"augment {label}, {BATCH} of 500x375 uint8 to {size[1]}x{size[0]} float32"
    row["bytes"] = BATCH * (int(share * HEIGHT * WIDTH * 3) + 12 * size[0] * size[1])
    row["flops"] = 0
    row["missing"] = missing
    rows.append(row)


def test_mixing(benchmark: Any, rows: list[dict[str, Any]], quick: bool) -> None:
    images, labels = torch.randn(64, 3, SIZE, SIZE), torch.randint(10, (64,))
    mix, cut = augment.MixUp(num_classes=10), augment.CutMix(num_classes=10)

    def ours() -> None:
        mix(images, labels, seed=0)
        cut(images, labels, seed=0)

    found, missing = augment_peers.mixers(10)
    theirs = images.clone()
    peers = {name: (lambda peer=peer: peer(theirs, labels)) for name, peer in found.items()}
    row = in_turns(benchmark, ours, peers, quick)
    row["key"] = "augment MixUp, then CutMix, 64x3x224x224 float32"
    row |= {"bytes": 2 * images.nbytes + images.nbytes, "flops": 0, "missing": missing}
    rows.append(row)


def test_two_threads(benchmark: Any, rows: list[dict[str, Any]], quick: bool) -> None:
    """The same chain on one thread and on two."""
    batch, pipeline = torch.from_numpy(photos()), augment.Compose(CHAINS["crop"][1])
    out = torch.empty(BATCH, 3, SIZE, SIZE)
    before = torch.get_num_threads()

    def run(threads: int) -> Callable[[], None]:
        def call() -> None:
            torch.set_num_threads(threads)
            pipeline(batch, seed=0, out=out)

        return call

    try:
        row = in_turns(benchmark, run(2), {"gradsmith on one thread": run(1)}, quick)
    finally:
        torch.set_num_threads(before)
    row["key"] = f"augment {CHAINS['crop'][0]}, two threads"
    row |= {"bytes": BATCH * (303750 + 12 * SIZE * SIZE), "flops": 0}
    rows.append(row)
