"""A chain of transforms over a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradsmith_kernels.augment import reference, targets
from gradsmith_kernels.augment.color import Normalize, RandomErasing
from gradsmith_kernels.augment.explain import explain
from gradsmith_kernels.augment.steps import AFFINE, GEOMETRY, Floats, Program
from gradsmith_kernels.augment.transform import Transform, probability
from gradsmith_kernels.backends import Implementation, Op

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
OP = Op(
    "augment",
    {
        "reference": Implementation("gradsmith_kernels.augment.reference", (torch.uint8,)),
        "cpu": Implementation("gradsmith_kernels.augment.cpu", (torch.uint8,)),
    },
)

Images = Tensor | Sequence[Any]
Function = Callable[[Tensor], Tensor]
_MOST_BYTES = 1 << 31  # of one image: offsets within it are 32 bits wide
_MOST_SHRINK = 250  # along an axis: taps of the filter


class Compose:
    """Transforms in a row.

    ::

        pipeline = Compose([RandomResizedCrop(224), RandomHorizontalFlip(), Normalize(mean, std)])
        out = pipeline(images, seed=0, out_dtype=torch.bfloat16)     # (B, 3, 224, 224)

    Args:
        transforms: of this package; a function among them takes and gives one image, uint8
            (C, H, W), and splits the chain in two.

    Raises:
        TypeError, ValueError: what is not a transform; what follows Normalize and may not.
    """

    def __init__(self, transforms: Iterable[Transform | Function]) -> None:
        self.transforms = list(transforms)
        normalized = None
        for t in self.transforms:
            if not isinstance(t, Transform) and not callable(t):
                raise TypeError(f"Compose: {t!r} is neither a transform nor a function")
            if normalized and not isinstance(t, RandomErasing):
                raise ValueError(
                    f"Compose: {_name(t)} follows Normalize, which only RandomErasing may"
                )
            normalized = normalized or isinstance(t, Normalize)
        self.normalized = bool(normalized)

    def __call__(
        self,
        images: Images,
        *,
        seed: int,
        places: Any = None,
        out_dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        backend: str | None = None,
        masks: Any = None,
        boxes: Any = None,
        keypoints: Any = None,
    ) -> Any:
        """Augments a batch.

        Args:
            images: uint8 (B, H, W, C) or (B, C, H, W), or a list of (H, W, C) or (C, H, W) of any
                sizes, tensors or numpy arrays; C is 1 or 3, the same for all. Where both
                ends could be C: three rather than one, then last rather than first.
            seed: of the run, 0 to 2^64 - 1.
            places: (B,) whole numbers: where in the run each image stands. What is drawn for it
                follows from (seed, place, transform's number) alone. Default: 0, 1, 2, ...
            out_dtype: float32, bfloat16, float16, or uint8 (not after Normalize). Floats without
                Normalize are 0 to 1.
            out: (B, C, H, W) of that dtype to write to, contiguous: memory that has been used
                before is faster than fresh memory.
            backend: "cpu" or "reference"; None is the one for the images' device.
            masks: uint8 (B, H, W), or a list of (H, W), of the images' sizes: moved like them,
                nearest, 0 outside.
            boxes: a list of (N, 4) an image, x1 y1 x2 y2 in pixels: around their moved corners, cut
                off at the image's edge. A pixel covers [i, i + 1).
            keypoints: a list of (N, 2), x y.

        Returns:
            (B, C, H, W); a list of (C, H, W) if the sizes differ. With masks, boxes or keypoints:
            that, and a dict of those that were given.

        Raises:
            TypeError, ValueError: images, places, out or out_dtype that are not as said, and an
                image that a transform cannot take; each names it.
            BackendError: the backend cannot run here.
        """
        batch = _checked(images)
        if out_dtype not in OUT_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in OUT_DTYPES)
            raise ValueError(f"augment: out_dtype must be one of {allowed}, not {out_dtype}")
        if self.normalized and out_dtype == torch.uint8:
            raise ValueError("augment: out_dtype uint8 cannot hold what Normalize makes")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise ValueError(f"augment: seed must be a whole number below 2^64, not {seed!r}")
        at = _checked_places(places, len(batch))
        if not len(batch):
            return torch.empty((0, *batch.shape[1:]), dtype=out_dtype) if out is None else out
        name = OP.resolve(backend, batch[0].device.type, torch.uint8)

        followers: dict[str, Any] = {}
        if masks is not None:
            followers["masks"] = _checked_masks(masks, batch)
        if boxes is not None:
            followers["boxes"] = targets.checked("boxes", boxes, len(batch), 4)
        if keypoints is not None:
            followers["keypoints"] = targets.checked("keypoints", keypoints, len(batch), 2)

        segments = self._segments()
        stream = -1
        for k, (transforms, function) in enumerate(segments):
            program = _program(batch, seed, at)
            program.stream = stream
            for t in transforms:
                t.add_to(program)
            stream = program.stream + 1  # a function has a number too
            last = k == len(segments) - 1
            dtype = out_dtype if last else torch.uint8
            if last and not self.normalized and dtype != torch.uint8:
                program.add(AFFINE, *[1 / 255] * 3, 0, 0, 0, 0)
            result = _run(batch, program, dtype, name, out if last else None)
            _follow(followers, program, name)
            if last:
                return (result, followers) if followers else result
            assert function is not None
            batch = _checked([function(image) for image in result], _name(function))
            if followers and any(
                new.shape[:2] != old.shape[1:] for new, old in zip(batch, result, strict=True)
            ):
                raise ValueError(
                    f"augment: {_name(function)} changed an image's size, which masks, boxes and "
                    "keypoints cannot follow"
                )
        raise AssertionError("a chain has at least one segment")

    def _segments(self) -> list[tuple[list[Transform], Function | None]]:
        """The transforms up to each function, and after the last one."""
        segments: list[tuple[list[Transform], Function | None]] = []
        current: list[Transform] = []
        for t in self.transforms:
            if isinstance(t, Transform):
                current.append(t)
            else:
                segments.append((current, t))
                current = []
        return [*segments, (current, None)]

    def explain(self) -> str:
        """What fuses with what, in words."""
        return explain(self.transforms)

    def __repr__(self) -> str:
        return "Compose([" + ", ".join(_name(t, True) for t in self.transforms) + "])"


class RandomApply(Transform):
    """All of `transforms`, or none, with probability p. They must leave the size as it is."""

    def __init__(self, transforms: Sequence[Transform], p: float = 0.5) -> None:
        self.transforms, self.p = list(transforms), probability("RandomApply", p)
        for t in self.transforms:
            if not isinstance(t, Transform) or isinstance(t, Normalize):
                raise TypeError(f"RandomApply: {_name(t)} cannot be in it")

    @property
    def kind(self) -> str:  # type: ignore[override]
        kinds = {t.kind for t in self.transforms}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def add_to(self, program: Program) -> None:
        where = program.uniform(1)[:, 0] < self.p
        with program.only(where):
            for t in self.transforms:
                t.add_to(program)

    def __repr__(self) -> str:
        return f"RandomApply({self.transforms}, p={self.p})"


def _name(t: Any, settings: bool = False) -> str:
    if isinstance(t, Transform):
        return repr(t) if settings else type(t).__name__
    return str(getattr(t, "__qualname__", None) or type(t).__name__)


def _checked(images: Images, giver: str | None = None) -> Any:
    """The images as (H, W, C) views: a tensor (B, H, W, C), or a list."""
    owner = "augment" if giver is None else f"augment: what {giver} gave"
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise ValueError(
                f"{owner}: images must be (B, H, W, C) or (B, C, H, W), not {_shape(images)}"
            )
        if not len(images):
            if images.dtype != torch.uint8:
                raise ValueError(f"{owner}: images must be uint8, not {images.dtype}")
            return images
        _check_image(images[0], f"{owner}: images")
        last = _channels_last([images[0]], f"{owner}: images")
        return images if last else images.permute(0, 2, 3, 1)
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise TypeError(f"{owner}: images must be a tensor or a list, not {type(images).__name__}")
    if not images:
        raise ValueError(f"{owner}: an empty list of images has no channels: pass a tensor")
    tensors: list[Tensor] = []
    for i, image in enumerate(images):
        who = f"{owner}: image {i}"
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image)
        if not isinstance(image, Tensor):
            raise TypeError(f"{who} must be a tensor or an array, not {type(image).__name__}")
        if image.dim() != 3:
            raise ValueError(f"{who} must be (H, W, C) or (C, H, W), not {_shape(image)}")
        _check_image(image, who)
        if tensors and image.device != tensors[0].device:
            raise ValueError(f"{who} is on {image.device}, the first one on {tensors[0].device}")
        tensors.append(image)
    last = _channels_last(tensors, f"{owner}: image")
    return tensors if last else [image.permute(1, 2, 0) for image in tensors]


def _check_image(image: Tensor, who: str) -> None:
    if image.dtype != torch.uint8:
        raise ValueError(f"{who} must be uint8, not {str(image.dtype).removeprefix('torch.')}")
    if not image.numel():
        raise ValueError(f"{who} is empty: {_shape(image)}")
    if image.numel() >= _MOST_BYTES:
        raise ValueError(f"{who} is too large: {_shape(image)} is more than 2 GiB")


def _channels_last(images: Sequence[Tensor], who: str) -> bool:
    """Whether the channels come last: three are more likely than one, then last than first."""
    for channels in (3, 1):
        for end in (2, 0):
            if all(image.shape[end] == channels for image in images):
                return end == 2
    for i, image in enumerate(images):
        number = f"{who} {i}" if len(images) > 1 else who
        if not {image.shape[0], image.shape[2]} & {1, 3}:
            alpha = {image.shape[0], image.shape[2]} & {2, 4}
            raise ValueError(
                f"{number} must have 1 or 3 channels, first or last, not {_shape(image)}"
                + (": drop the alpha channel" if alpha else "")
            )
    raise ValueError(
        f"{who}s must have as many channels, at the same end, as the first one, "
        f"{_shape(images[0])}; they are {', '.join(_shape(image) for image in images[1:4])}"
    )


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _checked_places(places: Any, images: int) -> npt.NDArray[np.uint64]:
    if places is None:
        return np.arange(images, dtype=np.uint64)
    at = np.asarray(places)
    if at.shape != (images,) or (images and at.dtype.kind not in "iu"):
        raise ValueError(
            f"augment: places must be {images} whole numbers, one an image, not "
            f"{at.dtype} of shape {at.shape}"
        )
    if images and at.min() < 0:
        raise ValueError(f"augment: places must be at least 0, not {at.min()}")
    return np.ascontiguousarray(at, np.uint64)


def _program(batch: Any, seed: int, places: Any) -> Program:
    if isinstance(batch, Tensor):
        n, h, w, channels = batch.shape
        return Program(np.full(n, h), np.full(n, w), channels, seed, places)
    sizes = np.asarray([image.shape[:2] for image in batch], np.int64)
    return Program(sizes[:, 0], sizes[:, 1], batch[0].shape[2], seed, places)


def _run(
    batch: Any,
    program: Program,
    dtype: torch.dtype,
    backend: str,
    out: Tensor | None,
    steps: Any = None,
) -> Tensor | list[Tensor]:
    """`steps`: others than the program's."""
    ops, parameters = steps or program.arrays()
    _check_shrink(ops, parameters)
    channels = batch[0].shape[2]
    sizes = {*zip(program.height.tolist(), program.width.tolist(), strict=True)}
    result: Any
    if len(sizes) == 1:
        shape = (len(batch), channels, *sizes.pop())
        result = _checked_out(out, shape, dtype) if out is not None else None
        if result is None:
            result = torch.empty(shape, dtype=dtype)
    elif out is not None:
        raise ValueError(f"augment: out cannot hold images of {len(sizes)} sizes")
    else:
        pairs = zip(program.height.tolist(), program.width.tolist(), strict=True)
        result = [torch.empty((channels, h, w), dtype=dtype) for h, w in pairs]
    if backend == "cpu":
        from gradsmith_kernels.augment import cpu

        cpu.run(batch, ops, parameters, result, program.seed, program.places)
        return result  # type: ignore[no-any-return]
    for i, image in enumerate(batch):
        place = int(program.places[i])
        array = image.cpu().numpy()
        pixels = reference.run(array, ops[i], parameters[i], program.seed, place)
        pixels = pixels.round().clip(0, 255) if dtype == torch.uint8 else pixels
        result[i].copy_(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
    return result  # type: ignore[no-any-return]


def _checked_masks(masks: Any, batch: Any) -> list[Tensor]:
    if not isinstance(masks, (Tensor, Sequence)) or len(masks) != len(batch):
        raise ValueError(f"augment: masks must be {len(batch)} masks, one an image")
    for i, (mask, image) in enumerate(zip(masks, batch, strict=True)):
        fits = isinstance(mask, Tensor) and mask.dtype == torch.uint8
        if not fits or mask.shape != image.shape[:2]:
            found = _shape(mask) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"augment: masks[{i}] must be uint8 of shape {tuple(image.shape[:2])}, not {found}"
            )
    return [mask[..., None] for mask in masks]


def _follow(followers: dict[str, Any], program: Program, backend: str) -> None:
    """Moves what follows the images as the program moves them."""
    if not followers:
        return
    ops, parameters = program.arrays()
    maps = targets.forward_maps(ops, parameters)
    if "masks" in followers:
        masks = _run(
            followers["masks"],
            program,
            torch.uint8,
            backend,
            None,
            targets.geometry_only(ops, parameters),
        )
        followers["masks"] = [m[0] for m in masks]
        if isinstance(masks, Tensor):
            followers["masks"] = masks[:, 0]
    if "boxes" in followers:
        followers["boxes"] = targets.moved_boxes(
            followers["boxes"], maps, program.height, program.width
        )
    if "keypoints" in followers:
        followers["keypoints"] = targets.moved_points(followers["keypoints"], maps)


def _check_shrink(ops: Any, parameters: Floats) -> None:
    p = parameters[ops == GEOMETRY]
    if len(p) and (most := float(abs(p[:, [0, 4]]).max())) > _MOST_SHRINK:
        raise ValueError(
            f"augment: a resize shrinks by {most:.0f}, at most {_MOST_SHRINK} is possible: "
            "resize in two steps"
        )


def _checked_out(out: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not isinstance(out, Tensor):
        raise TypeError(f"augment: out must be a tensor, not {type(out).__name__}")
    if out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        kind = "" if out.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"augment: out must be {shape} of {dtype}, contiguous; it is {_shape(out)} of "
            f"{out.dtype}{kind}"
        )
    return out
