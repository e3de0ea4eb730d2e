"""The definitions against torchvision.transforms.v2, where it is installed: on uint8 images, whose
pixels torchvision rounds or cuts off after every transform."""

import numpy as np
import pytest
import torch
from test_augment import picture

from gradsmith_kernels import augment as A
from gradsmith_kernels.augment.steps import Program


def load_torchvision():
    # A wheel for another build of torch lacks its C++ ops; those used here are Python.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    module = pytest.importorskip("torchvision")
    load_torchvision.library = library  # it undoes its definitions when it goes
    return module


load_torchvision()
from torchvision.transforms import v2  # noqa: E402
from torchvision.transforms.v2 import functional as F  # noqa: E402

IMAGE = picture(75, 100, seed=5)
PLANES = IMAGE.permute(2, 0, 1).contiguous()


def compare(ours, theirs, where=None, mean=1.0, most=2.0):
    """Bounds in 255ths: of the mean, and of the 99.9th percentile."""
    assert ours.shape == theirs.shape
    error = (ours.double() * 255 - theirs.double()).abs()
    error = error if where is None else error[:, where]
    assert error.mean() <= mean
    assert error.flatten().quantile(0.999) <= most


def ours(transform, backend="reference"):
    return A.Compose([transform])(IMAGE[None], seed=0, backend=backend)[0]


SAME = {
    "Resize": ("Resize", (40,), {}),
    "Resize, both": ("Resize", ((31, 120),), {}),
    "Resize, bicubic": ("Resize", (40,), {"interpolation": "bicubic"}),
    "CenterCrop": ("CenterCrop", (33,), {}),
    "Pad": ("Pad", ((1, 2, 3, 4),), {"fill": 9}),
    "flip": ("RandomHorizontalFlip", (1.0,), {}),
    "flip down": ("RandomVerticalFlip", (1.0,), {}),
    "RandomRotation": ("RandomRotation", ((17, 17),), {"interpolation": "bilinear"}),
    "RandomRotation, fill": (
        "RandomRotation",
        ((-130, -130),),
        {"interpolation": "bilinear", "fill": 77, "center": (20, 30)},
    ),
    "RandomRotation, nearest": ("RandomRotation", ((33, 33),), {}),
    "RandomAffine": (
        "RandomAffine",
        ((25, 25),),
        {"scale": (1.3, 1.3), "shear": (10, 10), "interpolation": "bilinear"},
    ),
    "RandomAffine, sheared down": (
        "RandomAffine",
        ((0, 0),),
        {"shear": (0, 0, 15, 15), "interpolation": "bilinear", "fill": 5},
    ),
    "brightness": ("ColorJitter", (), {"brightness": (1.3, 1.3)}),
    "contrast": ("ColorJitter", (), {"contrast": (1.6, 1.6)}),
    "saturation": ("ColorJitter", (), {"saturation": (0.3, 0.3)}),
    "hue": ("ColorJitter", (), {"hue": (0.2, 0.2)}),
    "hue, back": ("ColorJitter", (), {"hue": (-0.4, -0.4)}),
    "Grayscale": ("Grayscale", (3,), {}),
    "RandomInvert": ("RandomInvert", (1.0,), {}),
    "RandomPosterize": ("RandomPosterize", (3, 1.0), {}),
    "RandomSolarize": ("RandomSolarize", (100, 1.0), {}),
    "RandomAutocontrast": ("RandomAutocontrast", (1.0,), {}),
    "RandomEqualize": ("RandomEqualize", (1.0,), {}),
    "RandomAdjustSharpness": ("RandomAdjustSharpness", (1.9, 1.0), {}),
    "GaussianBlur": ("GaussianBlur", ((5, 3), (1.1, 1.1)), {}),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_transforms(name, backend):
    cls, args, options = SAME[name]
    made = getattr(A, cls)(*args, **options)
    interpolation = options.get("interpolation")
    if interpolation:
        options = options | {"interpolation": v2.InterpolationMode(interpolation)}
    theirs = getattr(v2, cls)(*args, **options)(PLANES)
    out = ours(made, backend)
    compare(out, theirs, whole_pixels(made) if interpolation == "bilinear" else None)


def whole_pixels(transform):
    """Where a pixel is all inside or all outside of the image: the edges between are soft in both,
    but torchvision multiplies what is inside by its share twice."""
    white = torch.full_like(IMAGE, 255)
    transform.fill = (0.0, 0.0, 0.0)
    share = A.Compose([transform])(white[None], seed=0, backend="reference")[0, 0]
    return (share == 0) | (share > 0.999999)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_resized_crops(backend, how):
    crop = A.RandomResizedCrop(48, interpolation=how)
    # Bicubic overshoots: what is cut off at 0 and 255 between the directions differs, as they come
    # in the other order.
    image = IMAGE if how == "bilinear" else IMAGE // 2 + 64
    planes = image.permute(2, 0, 1).contiguous()
    for seed in range(8):
        program = Program(np.asarray([75]), np.asarray([100]), 3, seed, np.zeros(1, np.uint64))
        crop.add_to(program)
        box = program.arrays()[1][0, 0]
        out = A.Compose([crop])(image[None], seed=seed, backend=backend)[0]
        top, left, height, width = (int(box[k]) for k in (5, 2, 9, 10))
        mode = v2.InterpolationMode(how)
        compare(out, F.resized_crop(planes, top, left, height, width, [48, 48], mode))


def test_perspective():
    from gradsmith_kernels.augment.geometry import corners_to_matrix

    # It enlarges: where it shrinks, theirs aliases.
    start = [[11, 7], [90, 3], [83, 70], [4, 66]]
    end = [[1, 0], [99, 2], [99, 74], [0, 74]]
    as_arrays = [[(np.asarray([x]), np.asarray([y])) for x, y in p] for p in (end, start)]
    matrix = corners_to_matrix(*as_arrays, np.ones(1, bool))

    class Fixed(A.RandomPerspective):
        def add_to(self, program):
            program.add_map(matrix, beyond=2, interpolation=1, fill=self.fill)

    theirs = F.perspective(PLANES, start, end, fill=5)
    for backend in ("reference", "cpu"):
        out = ours(Fixed(fill=5), backend)
        compare(out, theirs, whole_pixels(Fixed()))


@pytest.mark.parametrize("gamma", [0.5, 2.2])
def test_gamma(gamma):
    for backend in ("reference", "cpu"):
        out = ours(A.RandomGamma((gamma, gamma), p=1), backend)
        compare(out, F.adjust_gamma(PLANES, gamma))


NAMES = list(A.AutoAugment._SPACE)


@pytest.mark.parametrize("name", [*NAMES, "Identity"])
@pytest.mark.parametrize("policy", [A.RandAugment(), A.TrivialAugmentWide()], ids=str)
def test_operations_of_the_policies(name, policy):
    space = dict(A.AutoAugment._SPACE) | dict(policy._SPACE)
    theirs_of = (v2.RandAugment if isinstance(policy, A.RandAugment) else v2.TrivialAugmentWide)()
    table, signed = (theirs_of._AUGMENTATION_SPACE | {"Invert": (lambda *_: None, False)})[name]
    magnitudes = table(31, 75, 100)

    class Fixed(type(policy)):
        def add_to(self, program):
            self._apply(program, space, [list(space).index(name)], np.asarray([9 / 30]), sign)

    for sign in (np.asarray([0.2]), np.asarray([0.8])) if signed else (np.asarray([0.8]),):
        magnitude = float(magnitudes[9]) if magnitudes is not None else 0.0
        theirs = theirs_of._apply_image_or_video_transform(
            PLANES,
            name,
            -magnitude if sign[0] < 0.5 else magnitude,
            interpolation=v2.InterpolationMode.NEAREST,
            fill={},
        )
        for backend in ("reference", "cpu"):
            # Nearest: where a centre lies just between two pixels, theirs may be the other one.
            turned = name in ("ShearX", "ShearY", "Rotate")
            out = A.Compose([Fixed()])(IMAGE[None], seed=0, backend=backend)[0]
            different = ((out * 255 - theirs).abs() > 2).any(0).double().mean()
            assert different <= (0.01 if turned else 0)


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_auto_augment_has_their_pairs(policy):
    from gradsmith_kernels.augment.autoaugment_policies import POLICIES

    theirs = v2.AutoAugment(v2.AutoAugmentPolicy(policy))._policies
    as_ours = [tuple((name, p, level or 0) for name, p, level in pair) for pair in theirs]
    assert POLICIES[policy] == as_ours
