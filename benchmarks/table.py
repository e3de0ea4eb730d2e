"""The results as text, and as the page of all machines: `python -m benchmarks.table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
PAGE = ROOT.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `python -m benchmarks.table` from the latest results of each machine in
`benchmarks/results/`; `make bench` measures the machine that it runs on, `make gpu` a GPU.

A figure is a peer's median time over ours in one run: above 1, ours is faster; of memory, a peer's
peak over ours. A kernel is timed only after its parity check has passed, contenders take turns, and
outputs are fresh memory unless said otherwise. A machine has a column once it was measured; a dash
stands where a row was not. What `make bench-check` does not let fall: `benchmarks/floors.toml`.
"""


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


# ------------------------------------------------------------------------------------ the page


def page(results: Path = ROOT / "results") -> str:
    """docs/benchmarks.md: a column for each machine and instruction set that was measured."""
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in latest(results)]
    lines = [HEAD, _row("", "threads", "torch's products, bf16; fp32", "copy", "when"), _rule(5)]
    for one in measured:
        machine, rates = one["machine"], one["rates"]
        bf16, fp32 = (rates[f"matmul_{dtype}_flops"] / 1e9 for dtype in ("bf16", "fp32"))
        lines.append(
            _row(
                name_of(machine),
                str(machine["threads"]),
                f"{bf16:.3g}; {fp32:.3g} GFLOP/s",
                f"{rates['copy_bytes'] / 1e9:.3g} GB/s",
                f"{machine['date'][:10]}, commit {(machine['commit'] or 'unknown')[:9]}, "
                f"torch {machine['versions']['torch']}",
            )
        )
    sections: dict[str, dict[tuple[str, str], None]] = {}
    for one in measured:
        for row in one["rows"]:
            rows = sections.setdefault(row["key"].split()[0].rstrip(","), {})
            rows.update(dict.fromkeys((row["key"], peer) for peer in row["ratios"]))
    for subject, rows in sections.items():
        lines += ["", f"## {subject}", ""]
        lines += [_row("", "peer", *(name_of(one["machine"]) for one in measured))]
        lines += [_rule(2 + len(measured))]
        for key, peer in rows:
            figures = [_ratio(one["rows"], key, peer) for one in measured]
            lines.append(_row(key.removeprefix(subject).strip(" ,"), peer, *figures))
    return "\n".join(lines) + "\n"


def latest(results: Path) -> list[Path]:
    """The newest file of each machine and instruction set: FOLDER/DATE-KIND.json."""
    newest = {(path.parent.name, path.stem[11:]): path for path in sorted(results.glob("*/*.json"))}
    return list(newest.values())


def name_of(machine: dict[str, Any]) -> str:
    return str(machine.get("gpu") or f"{machine['cpu']}, {machine['isa'].upper()}")


def _ratio(rows: list[dict[str, Any]], key: str, peer: str) -> str:
    found = [row["ratios"][peer] for row in rows if row["key"] == key and peer in row["ratios"]]
    return f"{found[0]:.2f}" if found else "-"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
