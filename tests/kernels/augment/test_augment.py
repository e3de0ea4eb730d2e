"""Augmentation: every backend and level gives the definition's pixels; the definitions agree with
torchvision's, where it is installed; parameters follow from (seed, place) alone; bad input."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsmith_kernels import _native
from gradsmith_kernels import augment as A
from gradsmith_kernels.augment.pipeline import OP
from gradsmith_kernels.augment.random import (
    gamma_numbers,
    gamma_uniforms,
    philox,
    uniform_numbers,
    uniform_numbers_in_numpy,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVELS = [level for level in _native.isa_levels() if level not in ("amx",)]


@pytest.fixture(params=LEVELS)
def level(request):
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def picture(height, width, channels=3, seed=0):
    """Smooth areas, edges and texture, as in a photo."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width][..., None] / 37.0
    waves = np.sin(x * rng.uniform(0.5, 3, channels) + y * rng.uniform(0.5, 3, channels))
    edges = np.where((x + 0.7 * y) % 1.9 > 1, 60, -60)
    noise = rng.normal(0, 8, (height, width, channels))
    pixels = 128 + 60 * waves + edges + noise
    return torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8))


SIZES = [(75, 100), (100, 64), (41, 57), (3, 9), (1, 1), (1, 33), (20, 1)]
PICTURES = [picture(h, w, seed=i) for i, (h, w) in enumerate(SIZES)]


def errors(ours, truth):
    pairs = zip(ours, truth, strict=True)
    return 255 * torch.cat([(a.double() - b.double()).abs().flatten() for a, b in pairs])


def check(chain, images, seed=0, mean=0.5, most=1.5):
    """Within the bounds of the cpu backend: mean and 99.9th percentile, in 255ths."""
    pipeline = A.Compose(chain)
    ours = pipeline(images, seed=seed, backend="cpu")
    truth = pipeline(images, seed=seed, backend="reference")
    assert [a.shape for a in ours] == [b.shape for b in truth]
    error = errors(ours, truth)
    if any(isinstance(t, A.Normalize) for t in chain):
        error = error * sum(STD) / 3
    assert error.isfinite().all()
    assert error.mean() <= mean
    assert error.quantile(0.999) <= most


# What is discontinuous in its input follows exact geometry only, or a rounding may become a level.
SMOOTH = {
    "crop": [A.RandomResizedCrop(48), A.RandomHorizontalFlip()],
    "crop, wide": [A.RandomResizedCrop((17, 131), ratio=(0.2, 5)), A.RandomVerticalFlip()],
    "bicubic": [A.RandomResizedCrop(32, interpolation="bicubic")],
    "nearest": [A.RandomResizedCrop(32, interpolation="nearest")],
    "evaluation": [A.Resize(40), A.CenterCrop(32), A.Normalize(MEAN, STD)],
    "far down": [A.Resize((2, 3))],
    "bicubic, far down": [A.Resize((2, 3), "bicubic")],
    "up": [A.Resize((150, 200), "bicubic")],
    "cifar": [A.Resize((32, 32)), A.RandomCrop(32, padding=4, fill=(9, 99, 200))],
    "pad": [A.Pad((1, 2, 3, 4), fill=7), A.RandomHorizontalFlip()],
    "pad, then smaller": [A.Pad(5, fill=99), A.Resize((20, 30))],
    "jitter": [A.RandomResizedCrop(32), A.ColorJitter(0.4, 0.4, 0.4, 0.1)],
    "hue": [A.ColorJitter(hue=0.5)],
    "jitter, all": [A.ColorJitter(0.8, 0.8, 0.8, 0.2), A.Normalize(MEAN, STD)],
    "gray": [A.Grayscale()],
    "rotation": [A.RandomRotation(15, "bilinear"), A.Normalize(MEAN, STD)],
    "rotation, fill": [A.RandomRotation(180, "bilinear", fill=(10, 200, 30))],
    "rotation, bicubic": [A.RandomRotation(180, "bicubic", center=(3, 4))],
    "crop and rotation": [
        A.RandomResizedCrop(40),
        A.RandomRotation(30, "bilinear", fill=8),
        A.RandomHorizontalFlip(),
    ],
    "rotation and crop": [A.RandomRotation(30, "bilinear"), A.RandomResizedCrop(40)],
    "affine": [A.RandomAffine(30, (0.1, 0.2), (1.0, 2.0), 10, "bilinear", fill=99)],
    "affine, smaller": [A.RandomAffine(30, scale=(0.3, 0.8), interpolation="bilinear")],
    "perspective": [A.RandomPerspective(0.6, p=1.0, fill=50)],
    "two turns": [A.RandomRotation(20, "bilinear"), A.RandomAffine(0, shear=20, fill=3)],
    "sharpness": [A.RandomAdjustSharpness(1.9, p=1)],
    "gamma": [A.RandomGamma((0.4, 2.5), p=1)],
    "noise": [A.GaussianNoise(0.05, 0.2)],
    "erasing": [A.RandomErasing(1.0, value=(1, 2, 3)), A.Normalize(MEAN, STD)],
    "erasing, normalized": [A.Normalize(MEAN, STD), A.RandomErasing(1.0, value=0.5)],
    "maybe": [A.RandomApply([A.ColorJitter(0.5), A.RandomRotation(9, "bilinear")], 0.5)],
}
EXACT = {
    "posterize": [A.RandomPosterize(3, 1.0)],
    "solarize": [A.RandomSolarize(100, 1.0), A.RandomInvert(0.5)],
    "equalize": [A.RandomHorizontalFlip(), A.RandomEqualize(1.0)],
    "autocontrast": [A.RandomAutocontrast(1.0)],
    "turned by nearest": [A.RandomRotation(90), A.RandomPosterize(2, 1.0)],
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_chains_are_the_definition(name, level):
    check(SMOOTH[name], PICTURES)


@pytest.mark.parametrize("name", EXACT)
def test_exact_chains_are_the_definition(name, level):
    check(EXACT[name], PICTURES, mean=1e-2 if "turned" in name else 1e-4, most=1e-3)


@pytest.mark.parametrize("name", ["crop", "bicubic", "rotation", "jitter, all", "equalize"])
@pytest.mark.parametrize("form", ["planes", "gray", "gray planes", "strided"])
def test_other_layouts(name, form, level):
    images = PICTURES
    if "gray" in form:
        images = [image[..., :1].contiguous() for image in images]
    if "planes" in form:
        images = [image.permute(2, 0, 1).contiguous() for image in images]
    if form == "strided":
        images = [torch.cat((image, image), 1)[:, : image.shape[1]] for image in images]
    check({**SMOOTH, **EXACT}[name], images)


def test_blur(level):
    check([A.GaussianBlur((5, 3), (0.1, 2.0))], PICTURES[:4])


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_auto_augment(policy, level):
    images = [picture(40, 50, seed=i) for i in range(24)]
    check([A.AutoAugment(policy)], images, mean=0.6, most=255)


@pytest.mark.parametrize(
    "policy",
    [A.RandAugment(2, 9), A.RandAugment(2, 9, interpolation="bilinear"), A.TrivialAugmentWide()],
    ids=str,
)
def test_rand_augment(policy, level):
    """A rounding before equalize may be a level after it: few images, bounded in the mean."""
    images = [picture(40, 50, seed=i) for i in range(24)]
    check([policy], images, mean=0.6, most=255)


def test_aug_mix(level):
    check([A.AugMix()], [picture(40, 50, seed=i) for i in range(8)], mean=0.6, most=255)


@st.composite
def chains(draw):
    geometry = st.sampled_from(
        [
            A.RandomResizedCrop(24),
            A.RandomResizedCrop((30, 19), interpolation="bicubic"),
            A.Resize((21, 34)),
            A.RandomHorizontalFlip(),
            A.RandomVerticalFlip(),
            A.Pad((3, 1), fill=20),
            A.RandomRotation(40, "bilinear", fill=20),
            A.RandomAffine(10, (0.2, 0.1), (1, 1.4), (-9, 9), "bilinear", fill=20),
            A.RandomPerspective(0.3, p=0.7),
        ]
    )
    colors = st.sampled_from(
        [
            A.ColorJitter(0.4, 0.4, 0.4, 0.1),
            A.ColorJitter(contrast=0.3),
            A.RandomGrayscale(0.5),
            A.RandomInvert(0.5),
            A.RandomGamma(),
            A.RandomAdjustSharpness(1.5),
            A.RandomErasing(0.7, value=30),
            A.GaussianNoise(0, 0.02),
        ]
    )
    steps = draw(st.lists(geometry | colors, min_size=1, max_size=5))
    return [*steps, A.Normalize(MEAN, STD)] if draw(st.booleans()) else steps


@settings(max_examples=60, deadline=None, derandomize=True)
@given(chains(), st.integers(0, 2**64 - 1), st.sampled_from(LEVELS))
def test_any_chain_is_the_definition(chain, seed, name):
    before = _native.isa()
    _native.set_isa(name)
    try:
        check(chain, PICTURES[:3], seed, mean=1.0, most=4.0)
    finally:
        _native.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_out_dtypes(dtype, level):
    pipeline = A.Compose([A.RandomResizedCrop((9, 13))])
    exact = pipeline(PICTURES, seed=1)
    out = pipeline(PICTURES, seed=1, out_dtype=dtype)
    expected = (255 * exact).round().to(dtype) if dtype == torch.uint8 else exact.to(dtype)
    if dtype == torch.uint8:  # halves may go either way after a division by 255
        different = out != expected
        assert (out.int() - expected.int()).abs().max() <= 1
        assert different.double().mean() < 0.01
    else:
        assert torch.equal(out, expected)
    again = torch.full_like(out, 77)
    assert pipeline(PICTURES, seed=1, out_dtype=dtype, out=again) is again
    assert torch.equal(again, out)


def test_a_flat_image_stays_flat(level):
    for value in (0, 1, 77, 254, 255):
        image = torch.full((1, 53, 71, 3), value, dtype=torch.uint8)
        for how in ("bilinear", "bicubic"):
            for t in (A.Resize((19, 33), how), A.Resize((90, 99), how), A.RandomResizedCrop(31)):
                out = A.Compose([t])(image, seed=0, out_dtype=torch.uint8)
                assert (out == value).all()
        rotated = A.Compose([A.RandomRotation(9, "bilinear", fill=value)])(image, seed=0)
        torch.testing.assert_close(rotated, torch.full_like(rotated, value / 255))


# --------------------------------------------------------------------------------- parameters


def test_philox_gives_the_published_numbers():
    """The known answers of Random123's kat_vectors."""
    assert [hex(w) for w in philox(0, 0, 0, 0, 0).tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    ones = 0xFFFFFFFF
    assert [hex(w) for w in philox(ones, ones, ones, ones, 2**64 - 1).tolist()] == [
        "0x408f276d",
        "0x41c83b0e",
        "0xa20bc7c6",
        "0x6d5451fd",
    ]


@pytest.mark.parametrize("count", [1, 4, 7, 22])
def test_native_numbers_are_the_definitions(count):
    places = np.asarray([0, 1, 2**32 - 1, 2**32, 2**63], np.uint64)
    for seed in (0, 1, 2**64 - 1):
        native = uniform_numbers(places, seed, 5, count)
        assert np.array_equal(native, uniform_numbers_in_numpy(places, seed, 5, count))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_gamma_numbers_are_of_the_distribution(alpha):
    u = uniform_numbers(np.arange(20000), 3, 0, gamma_uniforms())
    drawn = gamma_numbers(u, alpha)
    assert drawn.mean() == pytest.approx(alpha, rel=0.05)
    assert drawn.var() == pytest.approx(alpha, rel=0.08)


CHAIN = [
    A.RandomResizedCrop(24),
    A.RandomHorizontalFlip(),
    A.RandAugment(2, 9),
    A.ColorJitter(0.4, 0.4, 0.4, 0.1),
    A.RandomErasing(),
    A.GaussianNoise(0, 0.1),
    A.Normalize(MEAN, STD),
]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_result_follows_from_seed_and_place(threads):
    pipeline = A.Compose(CHAIN)
    images = [picture(40 + i, 50, seed=i) for i in range(6)]
    whole = pipeline(images, seed=7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i, image in enumerate(images):
            assert torch.equal(pipeline([image], seed=7, places=[i])[0], whole[i])
        back = pipeline(images[::-1], seed=7, places=range(5, -1, -1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(back.flip(0), whole)
    assert not torch.equal(pipeline(images, seed=8), whole)
    assert not torch.equal(pipeline(images, seed=7, places=range(6, 12)), whole)


def test_a_transform_draws_what_its_number_says():
    """Whatever another transform is set to, and whether it is applied."""
    image = picture(40, 50)[None].expand(32, -1, -1, -1)
    with_jitter = [A.ColorJitter(0.5), A.RandomHorizontalFlip(), A.RandomErasing(0.5)]
    without = [A.ColorJitter(), A.RandomHorizontalFlip(), A.RandomErasing(0.5)]
    erased = [(A.Compose(chain)(image, seed=2) == 0).all(1) for chain in (with_jitter, without)]
    assert torch.equal(*erased)


# ------------------------------------------------------------------------- chains and functions


def test_a_function_splits_the_chain():
    def swap_channels(image):
        assert image.dtype == torch.uint8
        return image.flip(0)

    pipeline = A.Compose([A.Resize((20, 20)), swap_channels, A.Normalize(MEAN, STD)])
    whole = A.Compose([A.Resize((20, 20))])(PICTURES, seed=0, out_dtype=torch.uint8)
    expected = A.Compose([A.Normalize(MEAN, STD)])(whole.flip(1), seed=0)
    assert torch.equal(pipeline(PICTURES, seed=0), expected)
    text = pipeline.explain()
    assert "swap_channels: splits the chain" in text
    assert [line[:6] for line in text.splitlines() if line[:4] == "pass"] == ["pass 1", "pass 2"]


def test_explain_says_what_fuses():
    text = A.Compose(
        [
            A.RandomResizedCrop(224),
            A.RandomHorizontalFlip(),
            A.RandomRotation(15),
            A.ColorJitter(0.4, 0.4, 0.4, 0.1),
            A.Normalize(MEAN, STD),
        ]
    ).explain()
    first = "pass 1: RandomResizedCrop + RandomHorizontalFlip + RandomRotation: one map"
    assert text.startswith(first)
    assert "ColorJitter + Normalize on the rows" in text
    assert "ColorJitter needs a statistic" in text
    assert "pass 2" not in text
    assert A.Compose([]).explain()


def test_nothing_to_do_copies():
    assert torch.equal(
        A.Compose([])(PICTURES[0][None], seed=0, out_dtype=torch.uint8)[0],
        PICTURES[0].permute(2, 0, 1),
    )


def test_sizes_that_differ_give_a_list():
    out = A.Compose([A.Resize(20)])(PICTURES[:3], seed=0)
    assert isinstance(out, list)
    assert [tuple(x.shape) for x in out] == [(3, 20, 26), (3, 31, 20), (3, 20, 27)]


def test_masks_boxes_and_keypoints_follow():
    image = torch.zeros(1, 60, 80, 3, dtype=torch.uint8)
    image[:, 20:30, 40:60] = 255
    mask = (image[..., 0] > 0).to(torch.uint8)
    boxes, points = [torch.tensor([[40.0, 20, 60, 30]])], [torch.tensor([[50.0, 25.0]])]
    moved = [A.RandomHorizontalFlip(0.5), A.RandomRotation(20), A.ColorJitter(0.5)]
    whole = A.Compose([A.Resize((90, 96), "nearest"), *moved])
    cropped = A.Compose([A.RandomResizedCrop(96, (0.3, 1), interpolation="nearest"), *moved])
    for backend in ("cpu", "reference"):
        for seed in range(5):
            for pipeline in (whole, cropped):
                out, found = pipeline(
                    image, seed=seed, masks=mask, boxes=boxes, keypoints=points, backend=backend
                )
                seen = out[0, 0] > 0
                assert torch.equal(found["masks"][0] > 0, seen)
                if not seen.any():
                    continue
                x1, y1, x2, y2 = found["boxes"][0][0].tolist()
                y, x = seen.nonzero(as_tuple=True)
                spare = [x.min() - x1, y.min() - y1, x2 - x.max() - 1, y2 - y.max() - 1]
                assert min(spare) >= -1
                if pipeline is whole:  # then nothing of it is cut off
                    assert max(spare) <= 1.5
                    u, v = found["keypoints"][0][0].tolist()
                    assert seen[int(v), int(u)]


# ------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", [A.MixUp, A.CutMix])
def test_mixing(mix, dtype, level):
    images = torch.randn(6, 3, 19, 23, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    made = mix(alpha=0.8, num_classes=3)
    ours, shares = made(images.clone(), labels, seed=3)
    truth, expected = made(images.double().to(dtype), labels, seed=3, backend="reference")
    torch.testing.assert_close(ours, truth)
    assert torch.equal(shares, expected)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    tail, _ = made(images[4:].clone(), labels[4:], seed=3, places=[4, 5])
    assert torch.equal(tail, ours[4:])
    # What an image shows of itself is what its label says.
    even = (ours.double() == images.double()).flatten(1).double().mean(1)
    if mix is A.CutMix:
        own = shares.gather(1, labels[:, None])[:, 0]
        assert torch.allclose(even[:4], own[:4].double(), atol=1e-6)
    else:
        pair = images.double().view(3, 2, -1)
        keep = shares[0, 0].double()
        mixed = keep * pair[0, 0] + (1 - keep) * pair[0, 1]
        torch.testing.assert_close(ours[0].flatten().double(), mixed, rtol=0.01, atol=0.02)


# ------------------------------------------------------------------------------------- refused


def run(chain, images, **options):
    return A.Compose(chain)(images, **({"seed": 0} | options))


ONE = PICTURES[0][None]
REFUSED = {
    "images must be uint8": lambda: run([], ONE.float()),
    r"image 1 must be uint8": lambda: run([], [PICTURES[0], PICTURES[1].float()]),
    r"must be \(B, H, W, C\)": lambda: run([], PICTURES[0]),
    r"image 0 must be \(H, W, C\)": lambda: run([], [ONE]),
    "drop the alpha channel": lambda: run([], torch.zeros(1, 9, 9, 4, dtype=torch.uint8)),
    "images must have as many channels": lambda: run([], [PICTURES[0][..., :1], PICTURES[1]]),
    "is empty": lambda: run([], torch.zeros(1, 0, 9, 3, dtype=torch.uint8)),
    "empty list": lambda: run([], []),
    "a tensor or a list": lambda: run([], "photo.jpg"),
    "image 4 is 1 x 1 here, smaller than the crop of 3 x 3": lambda: run(
        [A.CenterCrop(3)], [PICTURES[0]] * 4 + [PICTURES[4]]
    ),
    "smaller than the crop of 101": lambda: run([A.RandomCrop(101)], ONE),
    "too small to be mirrored": lambda: run([A.GaussianBlur(5)], PICTURES),
    "shrinks by 300": lambda: run([A.Resize((1, 1))], torch.zeros(1, 300, 9, 3, dtype=torch.uint8)),
    "seed must be": lambda: run([], ONE, seed=-1),
    "places must be 1 whole": lambda: run([], ONE, places=[0, 1]),
    "places must be at least": lambda: run([], ONE, places=[-1]),
    "out_dtype must be": lambda: run([], ONE, out_dtype=torch.float64),
    "cannot hold what Normalize": lambda: run([A.Normalize(0, 1)], ONE, out_dtype=torch.uint8),
    r"out must be \(1, 3, 75, 100\)": lambda: run([], ONE, out=torch.empty(1)),
    "out cannot hold": lambda: run([], PICTURES, out=torch.empty(1)),
    "follows Normalize": lambda: A.Compose([A.Normalize(0, 1), A.RandomHorizontalFlip()]),
    "neither a transform": lambda: A.Compose([3]),
    "p must be a number from 0 to 1, not 1.5": lambda: A.RandomHorizontalFlip(1.5),
    "not nan": lambda: A.ColorJitter(float("nan")),
    "scale must be in order": lambda: A.RandomResizedCrop(9, scale=(1, 0.5)),
    r"scale must be a number of at least 0, not -1": lambda: A.RandomResizedCrop(9, scale=(-1, 1)),
    "size must be a whole number": lambda: A.Resize(0),
    "interpolation must be one of": lambda: A.Resize(9, "lanczos"),
    "antialias must be True": lambda: A.Resize(9, antialias=False),
    "padding_mode must be": lambda: A.Pad(1, padding_mode="reflect"),
    "hue must be a number from -0.5": lambda: A.ColorJitter(hue=0.7),
    "kernel_size must be odd": lambda: A.GaussianBlur(4),
    "std must be above 0": lambda: A.Normalize(0, 0),
    "bits must be": lambda: A.RandomPosterize(9),
    "expand must be False": lambda: A.RandomRotation(9, expand=True),
    "magnitude must be": lambda: A.RandAugment(2, 31),
    "policy must be one of": lambda: A.AutoAugment("mnist"),
    "masks\\[0\\] must be": lambda: run([], ONE, masks=ONE),
    "boxes must be a list of 1": lambda: run([], ONE, boxes=[]),
    "num_classes": lambda: A.MixUp()(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), seed=0),
    "B even": lambda: A.MixUp()(torch.zeros(3, 3, 4, 4), torch.zeros(3, 2), seed=0),
    "labels must be from 0 to 1": lambda: A.CutMix(num_classes=2)(
        torch.zeros(2, 3, 4, 4), torch.tensor([0, 2]), seed=0
    ),
    "places must be pairs": lambda: A.MixUp()(
        torch.zeros(2, 3, 4, 4), torch.zeros(2, 2), seed=0, places=[1, 2]
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        REFUSED[message]()


def test_backends_say_what_they_have():
    assert OP.missing("cpu") is None
    assert "has no cuda" in OP.missing("cuda")
    assert "has no triton" in OP.missing("triton")
    with pytest.raises(RuntimeError, match="has no triton implementation"):
        run([], ONE, backend="triton")


def test_no_images():
    none = torch.zeros(0, 9, 9, 3, dtype=torch.uint8)
    assert len(run([A.RandomHorizontalFlip()], none)) == 0


GUARDED = """
import ctypes, mmap, torch
from gradsmith_kernels import _native, augment as A
libc, PAGE, kept = ctypes.CDLL(None), mmap.PAGESIZE, []

def at_an_edge(image, last):
    # The same image in memory that ends (or begins) at a page which must not be touched.
    pages = -(-image.numel() // PAGE) + 2
    memory = mmap.mmap(-1, pages * PAGE)
    kept.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (base, base + (pages - 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    offset = (pages - 1) * PAGE - image.numel() if last else PAGE
    edge = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=image.numel())
    return edge.view(image.shape).copy_(image)

chains = [
    [A.RandomResizedCrop(33), A.RandomHorizontalFlip()],
    [A.RandomResizedCrop(33, interpolation="bicubic")],
    [A.Resize((90, 70)), A.RandomVerticalFlip()],
    [A.RandomRotation(180, "bilinear")],
    [A.RandomRotation(180), A.RandomEqualize(1.0)],
    [A.RandomAffine(9, scale=(0.3, 0.6), interpolation="bicubic")],
    [A.RandomPerspective(p=1.0), A.RandomAdjustSharpness(2, 1.0), A.GaussianBlur(3)],
]
for level in _native.isa_levels():
    _native.set_isa(level)
    for height, width in ((41, 57), (5, 9), (16, 16), (2, 2), (70, 33)):
        for channels in (3, 1):
            image = torch.randint(256, (height, width, channels), dtype=torch.uint8)
            for last in (True, False):
                for planes in (False, True):
                    x = at_an_edge(image.permute(2, 0, 1) if planes else image, last)
                    for chain in chains:
                        A.Compose(chain)([x] * 3, seed=1)
print("clean")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages")
def test_nothing_is_read_beyond_an_image():
    command = [sys.executable, "-c", GUARDED]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-300:]
    assert result.stdout.strip() == "clean"
