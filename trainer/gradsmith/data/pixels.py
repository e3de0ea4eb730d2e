"""Encoded pictures -> pixels, by Pillow, and back.

Whatever a picture is made of, it becomes uint8 RGB as a person sees it: turned as its EXIF says,
its transparent parts white, 16 bits cut to 8, of an animation the first frame. A file that is cut
off, damaged or out of proportion is `Unreadable`, with the reason.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from ..errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MOST_PIXELS = 100_000_000  # of a picture: its header is believed up to here, so memory is bounded
MOST_SHRINK = 200  # edge over edge; the resize's filter has so many taps


class Unreadable(Exception):  # noqa: N818
    """Why a file is no picture that can be trained on."""


def check_pillow(where: str) -> None:
    """
    Raises:
        UserError: Pillow, which decodes, is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise UserError(
            f"{where}: pictures are decoded by Pillow, which is not installed: "
            "pip install 'gradsmith[images]'"
        ) from None


def decode(data: bytes, smallest: int | None = None) -> np.ndarray:
    """The whole picture, uint8 (H, W, 3).

    Args:
        data: a file: PNG, JPEG, WebP, BMP or GIF.
        smallest: to which edge it will be resized, where that is to be checked.

    Raises:
        Unreadable: it is not one of these, damaged, cut off, or too large.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of what is refused below
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                _check_size(*file.size, smallest)
                file.load()
                picture = ImageOps.exif_transpose(file)
            return _as_rgb(picture)
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        what = "empty" if not data else f"not a picture in {', '.join(FORMATS)}"
        raise Unreadable(what) from None
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ...
        raise Unreadable(f"damaged: {' '.join(str(error).split())[:80]}") from None


def _check_size(width: int, height: int, smallest: int | None) -> None:
    if width * height > MOST_PIXELS:
        raise Unreadable(f"more than {MOST_PIXELS:,} pixels ({width} x {height})")
    shorter = min(width, height)
    if max(width, height) > MOST_SHRINK * min(shorter, smallest or shorter):
        raise Unreadable(
            f"{width} x {height}: an edge of more than {MOST_SHRINK} times the shorter one or "
            "data.image.size"
        )


def _as_rgb(picture: Any) -> np.ndarray:
    """uint8 (H, W, 3) of a decoded picture in any of Pillow's modes."""
    from PIL import Image

    mode = picture.mode
    if mode.startswith("I") or mode == "F":  # 16-bit greys: the upper eight bits count
        grey = np.asarray(picture, np.int64)
        return np.repeat((grey >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"), np.uint8)


@cache
def pool() -> ThreadPoolExecutor:
    """The threads that decode; Pillow lets other threads run meanwhile."""
    return ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))), "decode")


def decode_all(files: Iterable[bytes], smallest: int) -> list[np.ndarray | Unreadable]:
    """Each file's pixels, or why there are none."""

    def one(data: bytes) -> np.ndarray | Unreadable:
        try:
            return decode(data, smallest)
        except Unreadable as reason:
            return reason

    return list(pool().map(one, files))


def png(pixels: np.ndarray, at_least: int = 0) -> bytes:
    """A PNG file of uint8 (H, W) or (H, W, 3), enlarged by a whole factor to `at_least` wide."""
    from PIL import Image

    factor = -(-at_least // pixels.shape[1]) if at_least else 1
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1)).save(file, "PNG")
    return file.getvalue()


def as_text(data: bytes) -> str:
    """base64, as examples and requests carry a file."""
    return base64.b64encode(data).decode("ascii")


def from_text(text: Any) -> bytes:
    """The file that `as_text` wrote; of what is no base64 an empty one."""
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        return b""
