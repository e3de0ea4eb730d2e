"""The results as text."""

from __future__ import annotations

from typing import Any


def show(machine: dict[str, Any], rates: dict[str, float], rows: list[dict[str, Any]]) -> str:
    name = machine.get("gpu", machine["cpu"])
    bf16, fp32 = (rates[f"matmul_{dtype}_flops"] / 1e12 for dtype in ("bf16", "fp32"))
    lines = [
        f"{name}, {machine['isa']}, {machine['threads']} threads, load {machine['load']:.1f}, "
        f"torch {machine['versions']['torch']}, commit {(machine['commit'] or 'unknown')[:9]}",
        f"measured: matrix products {bf16:.3g} TFLOP/s bf16, {fp32:.3g} fp32; "
        f"copy {rates['copy_bytes'] / 1e9:.3g} GB/s",
        "",
    ]
    width = max(len(row["key"]) for row in rows)
    for row in rows:
        if "peak_bytes" in row:  # of memory, not of time
            values = {name: f"{peak / 2**20:8,.0f} MB" for name, peak in row["peak_bytes"].items()}
            ours, gain = "gradsmith", "ours is 1/{:.1f}"
        else:
            seconds = {name: times["median"] for name, times in row["times"].items()}
            values = {name: _time(median) for name, median in seconds.items()}
            ours, gain = _share(row, seconds["gradsmith"], rates), "ours is {:.2f}x"
        lines.append(f"{row['key']:{width}}  {values['gradsmith']}  {ours}")
        lines += [
            f"{'':{width}}  {values[peer]}  {peer}: {gain.format(ratio)}"
            for peer, ratio in row["ratios"].items()
        ]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    scale, unit = next(
        (s, u) for s, u in ((1, "s "), (1e3, "ms"), (1e6, "us")) if seconds * s >= 1 or u == "us"
    )
    return f"{seconds * scale:8.2f} {unit}"


def _share(row: dict[str, Any], seconds: float, rates: dict[str, float]) -> str:
    """What ours achieves, and as a share of what the machine was measured to do."""
    parts = ["gradsmith"]
    if "tokens" in row:
        parts.append(f"{row['tokens'] / seconds:,.0f} tokens/s")
    if row.get("bytes"):
        rate = row["bytes"] / seconds
        parts.append(f"{rate / 1e9:.1f} GB/s ({rate / rates['copy_bytes']:.0%} of copy)")
    # What moves a byte for every ten operations or more is limited by them.
    if row["flops"] > 10 * row.get("bytes", 0):
        # Where torch multiplies bf16 in a slow loop, float32's rate is the one to reach.
        faster = max(("bf16", "fp32"), key=lambda name: rates[f"matmul_{name}_flops"])
        dtype = "fp32" if row["key"].endswith(("float32", "fp32")) else faster
        rate = row["flops"] / seconds
        share = rate / rates[f"matmul_{dtype}_flops"]
        parts.append(f"{rate / 1e9:.0f} GFLOP/s ({share:.0%} of torch's {dtype} rate)")
    return ", ".join(parts)
