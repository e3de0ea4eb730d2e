"""Augmentation of images in one pass.

>>> from gradsmith_kernels import augment
>>> pipeline = augment.Compose([
...     augment.RandomResizedCrop(224), augment.RandomHorizontalFlip(),
...     augment.ColorJitter(0.4, 0.4, 0.4, 0.1), augment.Normalize(mean, std)])
>>> out = pipeline(images, seed=0, out_dtype=torch.bfloat16)      # (B, 3, 224, 224)

Names, arguments and ranges are those of torchvision.transforms.v2. Images are uint8, of any sizes.
docs/augmentation.md has the semantics, and what differs from torchvision.
"""

from gradsmith_kernels.augment.color import (
    ColorJitter,
    GaussianBlur,
    GaussianNoise,
    Grayscale,
    Normalize,
    RandomAdjustSharpness,
    RandomAutocontrast,
    RandomEqualize,
    RandomErasing,
    RandomGamma,
    RandomGrayscale,
    RandomInvert,
    RandomPosterize,
    RandomSolarize,
)
from gradsmith_kernels.augment.geometry import (
    CenterCrop,
    Pad,
    RandomAffine,
    RandomCrop,
    RandomHorizontalFlip,
    RandomPerspective,
    RandomResizedCrop,
    RandomRotation,
    RandomVerticalFlip,
    Resize,
)
from gradsmith_kernels.augment.mixing import CutMix, MixUp
from gradsmith_kernels.augment.pipeline import Compose, RandomApply
from gradsmith_kernels.augment.policies import AugMix, AutoAugment, RandAugment, TrivialAugmentWide

__all__ = [
    "AugMix",
    "AutoAugment",
    "CenterCrop",
    "ColorJitter",
    "Compose",
    "CutMix",
    "GaussianBlur",
    "GaussianNoise",
    "Grayscale",
    "MixUp",
    "Normalize",
    "Pad",
    "RandAugment",
    "RandomAdjustSharpness",
    "RandomAffine",
    "RandomApply",
    "RandomAutocontrast",
    "RandomCrop",
    "RandomEqualize",
    "RandomErasing",
    "RandomGamma",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomInvert",
    "RandomPerspective",
    "RandomPosterize",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomSolarize",
    "RandomVerticalFlip",
    "Resize",
    "TrivialAugmentWide",
]
