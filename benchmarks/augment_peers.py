"""What users run today for the chains of test_augment.py, for each library that is installed.

A peer is (images) -> None over a list of HWC uint8 arrays, image by image as a DataLoader's worker
does it; each gets its images in the layout that it is fastest with, and hands over a float32 tensor
or array (C, H, W) an image. What costs no arithmetic (collating) is left out of their time, though
ours includes it.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

Peer = Callable[[Sequence[Any]], None]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def of(case: str, images: Sequence[Any]) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """The peers of a case, ready to be called, and the names of libraries that are missing."""
    found, missing = {}, []
    for library, make in (
        ("kornia", _kornia),  # first: its float copies leave nothing else in the caches
        ("torchvision v2", _torchvision),
        ("albumentations", _albumentations),
        ("OpenCV by hand", _opencv),
    ):
        try:
            peer = make(case)
        except ImportError:
            missing.append(library)
            continue
        if peer is not None:
            layout = _channels_last_planes(images) if library == "torchvision v2" else images
            found[library] = partial(peer, layout)
    return found, missing


def mixers(classes: int) -> tuple[dict[str, Callable[[Any, Any], Any]], list[str]]:
    """MixUp, then CutMix, of a batch."""
    found: dict[str, Callable[[Any, Any], Any]] = {}
    missing = []
    try:
        v2 = _v2()
        mix, cut = v2.MixUp(num_classes=classes), v2.CutMix(num_classes=classes)
        found["torchvision v2"] = lambda images, labels: (mix(images, labels), cut(images, labels))
    except ImportError:
        missing.append("torchvision v2")
    try:
        import kornia.augmentation as K

        kmix, kcut = K.RandomMixUpV2(p=1.0), K.RandomCutMixV2(p=1.0)
        found["kornia"] = lambda images, labels: (kmix(images, labels), kcut(images, labels))
    except ImportError:
        missing.append("kornia")
    return found, missing


def _channels_last_planes(images: Sequence[Any]) -> list[Any]:
    return [torch.from_numpy(image).permute(2, 0, 1) for image in images]


_LIBRARY: list[Any] = []


def _v2() -> Any:
    if not _LIBRARY:  # a wheel for another build of torch lacks its C++ ops
        _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        with contextlib.suppress(RuntimeError):
            for name in ("nms", "qnms"):
                _LIBRARY[0].define(
                    name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
    from torchvision.transforms import v2

    return v2


def _torchvision(case: str) -> Peer | None:
    v2 = _v2()
    crop = [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()]
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    chains = {
        "crop": [*crop, *last],
        "jitter": [*crop, v2.ColorJitter(0.4, 0.4, 0.4, 0.1), *last],
        "rotate": [v2.RandomRotation(15, v2.InterpolationMode.BILINEAR), *last],
        "randaugment": [*crop, v2.RandAugment(2, 9), *last],
    }
    chain = v2.Compose(chains[case])

    def run(images: Sequence[Any]) -> None:
        for image in images:
            chain(image)

    return run


def _albumentations(case: str) -> Peer | None:
    import os

    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations as A
    from albumentations.pytorch import ToTensorV2

    crop = [A.RandomResizedCrop((224, 224)), A.HorizontalFlip()]
    last = [A.Normalize(MEAN, STD), ToTensorV2()]
    chains = {
        "crop": [*crop, *last],
        "jitter": [*crop, A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1), *last],
        "rotate": [A.Rotate(15, border_mode=0, p=1), *last],
    }
    if case not in chains:
        return None  # it has no RandAugment
    chain = A.Compose(chains[case])

    def run(images: Sequence[Any]) -> None:
        for image in images:
            chain(image=image)["image"]

    return run


def _opencv(case: str) -> Peer | None:
    """As one writes it for speed: no antialiasing, colours by tables where that is possible."""
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    levels = np.arange(256, dtype=np.float32)
    normal = np.stack([(levels / 255 - m) / s for m, s in zip(MEAN, STD, strict=True)], -1)[None]

    def planes(image: Any) -> Any:
        pixels = cv2.LUT(image, normal)
        out = np.empty((3, *image.shape[:2]), np.float32)
        for c in range(3):
            cv2.extractChannel(pixels, c, out[c])
        return out

    def crop(image: Any) -> Any:
        h, w = image.shape[:2]
        for _ in range(10):
            area = h * w * random.uniform(0.08, 1)
            aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            cw, ch = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if cw <= w and ch <= h:
                break
        cw, ch = min(cw, w), min(ch, h)
        y, x = random.randint(0, h - ch), random.randint(0, w - cw)
        out = cv2.resize(image[y : y + ch, x : x + cw], (224, 224))
        return cv2.flip(out, 1) if random.random() < 0.5 else out

    def jitter(image: Any) -> Any:
        steps = [0, 1, 2, 3]
        random.shuffle(steps)
        for step in steps:
            f = random.uniform(0.6, 1.4)
            if step == 0:
                image = cv2.LUT(image, (levels * f).clip(0, 255).astype(np.uint8))
            elif step == 1:
                mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
                image = cv2.LUT(image, (levels * f + (1 - f) * mean).clip(0, 255).astype(np.uint8))
            elif step == 2:
                gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
                image = cv2.addWeighted(image, f, gray, 1 - f, 0)
            else:
                hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
                hue = (np.arange(256) + 180 * random.uniform(-0.1, 0.1)) % 180
                hsv[..., 0] = cv2.LUT(hsv[..., 0], hue.astype(np.uint8))
                image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        return image

    def rotate(image: Any) -> Any:
        h, w = image.shape[:2]
        m = cv2.getRotationMatrix2D((w / 2 - 0.5, h / 2 - 0.5), random.uniform(-15, 15), 1)
        return cv2.warpAffine(image, m, (w, h))

    chains = {"crop": [crop], "jitter": [crop, jitter], "rotate": [rotate]}
    if case not in chains:
        return None

    def run(images: Sequence[Any]) -> None:
        for image in images:
            for step in chains[case]:
                image = step(image)
            planes(image)

    return run


def _kornia(case: str) -> Peer | None:
    import kornia.augmentation as K
    from kornia.augmentation.auto import RandAugment

    crop = [K.RandomResizedCrop((224, 224)), K.RandomHorizontalFlip()]
    last = [K.Normalize(MEAN, STD)]
    chains = {
        "crop": [*crop, *last],
        "jitter": [*crop, K.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=1.0), *last],
        "rotate": [K.RandomRotation(15.0, p=1.0), *last],
        "randaugment": [*crop, RandAugment(2, 9), *last],
    }
    chain = K.AugmentationSequential(*chains[case], data_keys=["input"])

    def run(images: Sequence[Any]) -> None:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        chain(batch)

    return run
