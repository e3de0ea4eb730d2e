"""The parity certificate: proves the kernels' numbers on the machine it runs on.

    python -m gradsmith_kernels.certify [OP ...] [--json FILE]

For every op, on every backend that is there, per dtype and output or gradient: the error against
float64 beside the error of the naive PyTorch computation in the same dtype and the bound that
follows from it (`gradsmith_kernels.verify.testing`), whether a second run gave the same bits, and
the resources of each Triton kernel on each chip it was compiled for. Without a GPU, Triton's
kernels run in its interpreter, in float32 and float16.

Exit code 0: everything within its bound; 1: something is not; 2: unknown op or option.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gradsmith_kernels import backends
from gradsmith_kernels.backends import BACKENDS, op_names
from gradsmith_kernels.verify import compile_checks

Row = dict[str, Any]


def parity_rows(op: str, only: tuple[str, ...]) -> list[Row]:
    """One row per backend, dtype and output: the sample whose error is nearest to its bound."""
    from gradsmith_kernels.verify.spec import all_specs
    from gradsmith_kernels.verify.testing import backends_of, device_of, parity

    spec = next(spec for spec in all_specs() if spec.op.name == op)
    worst: dict[tuple[str, str, str], Row] = {}
    for sample in spec.samples():
        for backend in backends_of(spec, sample):
            if backend not in only:
                continue
            for verdict in parity(spec, sample, backend, device_of(backend)):
                dtype = str(verdict.dtype).removeprefix("torch.")
                key = (backend, dtype, verdict.output)
                row = worst.setdefault(
                    key,
                    {"op": op, "backend": backend, "dtype": dtype, "output": verdict.output}
                    | {"samples": 0, "share": -1.0, "repeats": True, "passed": True},
                )
                row["samples"] += 1
                row["repeats"] &= verdict.repeats
                row["passed"] &= verdict.passed
                share = verdict.error / verdict.bound
                if share > row["share"]:
                    row |= {"share": share, "error": verdict.error, "bound": verdict.bound}
                    row |= {"naive_error": verdict.naive_error, "worst_sample": verdict.sample}
    return list(worst.values())


def interpreted_rows(op: str) -> list[Row]:
    """The triton backend's rows from a process whose Triton interprets.

    TRITON_INTERPRET must be set before triton is imported, and nothing can be compiled after that.
    """
    code = (
        "import json, sys\n"
        "from gradsmith_kernels.certify import parity_rows\n"
        "print(json.dumps(parity_rows(sys.argv[1], ('triton',))))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code, op]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    rows: list[Row] = json.loads(output.splitlines()[-1])
    for row in rows:
        row["backend"] = "triton (interpreter)"
    return rows


def certify(ops: list[str]) -> dict[str, Any]:
    """The certificate of these ops, as `--json` writes it."""
    from gradsmith_kernels.verify.spec import all_specs

    without = {
        backend: reason for backend in BACKENDS if (reason := backends.missing(backend)) is not None
    }
    has_triton = _importable("triton") and not backends.interpreting()
    interpreted = has_triton and "triton" in without
    certificate: dict[str, Any] = {"machine": machine(), "missing": without}
    certificate["parity"] = [row for op in ops for row in parity_rows(op, BACKENDS)]
    if interpreted:
        kernels = {spec.op.name for spec in all_specs("triton")}
        certificate["parity"] += [
            row for op in ops if op in kernels for row in interpreted_rows(op)
        ]
    certificate["parity"].sort(key=lambda row: row["op"])  # stable: backends stay in order
    certificate["compiled"], certificate["over_budget"] = {}, []
    if has_triton:
        specs = [spec for spec in all_specs("triton") if spec.op.name in ops]
        certificate["compiled"] = compile_checks.measure_all(specs)
        for spec in specs:
            measured = certificate["compiled"].get(spec.op.name, {})
            certificate["over_budget"] += compile_checks.check(spec, measured)
    certificate["passed"] = (
        all(row["passed"] for row in certificate["parity"]) and not certificate["over_budget"]
    )
    return certificate


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def machine() -> dict[str, Any]:
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if _importable("triton"):
        facts["triton"] = sys.modules["triton"].__version__
    if native := backends.native():
        facts["cpu instruction set"] = native["isa"]
        facts["threads"] = f"{torch.get_num_threads()} ({native['threading']})"
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
             for row in [header, ["-" * w for w in widths], *rows]]  # fmt: skip
    return "\n".join(lines)


def as_text(certificate: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in certificate["machine"].items())
    parts = [f"Parity certificate: {facts}"]
    parts += [f"not here: {backend}: {why}" for backend, why in certificate["missing"].items()]
    rows = [
        [
            row["op"],
            row["backend"],
            row["dtype"],
            row["output"],
            f"{row['error']:.2e}",
            f"{row['naive_error']:.2e}",
            f"{row['bound']:.2e}",
            "equal" if row["repeats"] else "DIFFER",
            str(row["samples"]),
            "ok" if row["passed"] else f"FAILED: {row['worst_sample']}",
        ]
        for row in certificate["parity"]
    ]
    header = ["op", "backend", "dtype", "output", "error", "naive", "bound"]
    parts.append(
        "Error against float64, of the sample nearest to its bound\n\n"
        + table([*header, "bits again", "samples", ""], rows)
    )
    resources = [
        [kernel, chip, *(str(used[name]) for name in used)]
        for chips in certificate["compiled"].values()
        for chip, kernels in chips.items()
        for kernel, used in kernels.items()
    ]
    if resources:
        header = ["kernel", "chip", "registers", "stack", "spill loads", "spill stores"]
        header += ["shared", "128-bit loads", "tensor core"]
        parts.append("Compiled without a GPU\n\n" + table(header, sorted(resources)))
    parts += [f"over budget: {message}" for message in certificate["over_budget"]]
    parts.append("PASSED" if certificate["passed"] else "FAILED")
    return "\n\n".join(parts)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gradsmith_kernels.certify",
        description="Proves the kernels' numbers on this machine.",
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to certify (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the certificate here")
    options = parser.parse_args(arguments)
    known = op_names()
    for op in options.ops:
        if op not in known:
            nearest = difflib.get_close_matches(op, known, 1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            print(f"certify: unknown op {op!r}{hint} (ops: {', '.join(known)})", file=sys.stderr)
            return 2
    certificate = certify(options.ops or known)
    if options.json:
        options.json.write_text(json.dumps(certificate, indent=1) + "\n")
    print(as_text(certificate))
    return 0 if certificate["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
