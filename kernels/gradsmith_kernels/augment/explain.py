"""What of a chain fuses with what, in words: the rule that every backend follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradsmith_kernels.augment.transform import Transform

_WHY = {
    "statistic": "needs a statistic of the whole image, so the image waits as floats in the cache",
    "neighbourhood": "reads each pixel's neighbours, so the image waits as floats in the cache",
    "mixed": "goes through several chains, image by image",
}


def explain(transforms: Sequence[Any]) -> str:
    """Lines "pass 1: ...", "pass 2: ..."; a pass reads its input once and writes once."""
    lines: list[str] = []
    geometry: list[str] = []
    colors: list[str] = []
    notes: list[str] = []

    def close() -> None:
        if not geometry and not colors:
            return
        number = sum(line.startswith("pass") for line in lines) + 1
        parts = []
        if geometry:
            parts.append(
                " + ".join(geometry)
                + (": one map, each pixel sampled once" if len(geometry) > 1 else ": sampled once")
            )
        if colors:
            parts.append(" + ".join(colors) + " on the rows while they are in registers")
        lines.append(f"pass {number}: " + "; ".join(parts))
        lines.extend(notes)
        geometry.clear()
        colors.clear()
        notes.clear()

    for t in transforms:
        name = type(t).__name__ if isinstance(t, Transform) else ""
        if not isinstance(t, Transform):
            close()
            function = getattr(t, "__qualname__", None) or type(t).__name__
            lines.append(f"function {function}: splits the chain; takes and gives uint8 images")
        elif t.kind == "geometry":
            if colors:
                close()
            geometry.append(name)
        else:
            colors.append(name)
            if t.kind in _WHY:
                notes.append(f"  {name} {_WHY[t.kind]}")
    close()
    if sum(line.startswith("pass") for line in lines) and any(
        isinstance(t, Transform) and t.kind == "geometry" for t in transforms
    ):
        lines.append(
            "where an image both shrinks and turns, it shrinks first, in a pass of its own"
        )
    return "\n".join(lines) if lines else "nothing to do: the images are copied"
