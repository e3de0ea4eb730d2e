"""Compiles every Triton kernel for the chips that users have, without a GPU, and reads the result.

    python -m gradsmith_kernels.verify.compile_checks           # compare with the committed budgets
    python -m gradsmith_kernels.verify.compile_checks --write   # new budgets, after a meant change

The resources of each kernel on each chip are read from the machine code, with the tools that are in
triton's wheel, and compared with `<op>/budgets.json`. More registers, stack, spills or shared
memory than the budget, or fewer 128-bit loads or tensor-core instructions, fail, and the message
says what moved. Budgets belong to one version of Triton; with another one only spills fail.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gradsmith_kernels import backends
from gradsmith_kernels.verify.spec import CompileCase, Spec, all_specs

CHIPS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one chip.

    registers: a thread's (vector registers on AMD). stack: bytes of a thread's local memory.
    spill_loads, spill_stores: instructions that reach it (on AMD: spilled registers, no stores).
    shared: bytes of a block's shared memory. loads_128: 128-bit loads from global memory in the
    code, to registers or to shared memory, and loads of whole tiles by TMA (UTMALDG).
    tensor_core: matrix instructions (MMA, HGMMA, UTCMMA, MFMA).
    """

    registers: int
    stack: int
    spill_loads: int
    spill_stores: int
    shared: int
    loads_128: int
    tensor_core: int


Chips = dict[str, dict[str, dict[str, int]]]  # chip -> kernel -> resource -> how much of it

MORE_IS_BETTER = ("loads_128", "tensor_core")


def compile_case(case: CompileCase, chip: str) -> Resources:
    """Compiles one kernel for one chip."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    source = ASTSource(
        case.kernel,
        {name: "constexpr" if name in case.constants else case.types[name] for name in names},
        {(names.index(name),): value for name, value in case.constants.items()},
        # Without this, loads degrade to one element each.
        {(names.index(n),): [["tt.divisibility", 16]] for n in names if n in case.aligned},
    )
    options: dict[str, Any] = {"num_warps": case.num_warps, "enable_fp_fusion": True}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    kernel = triton.compile(source, target=GPUTarget(*CHIPS[chip]), options=options)
    read = _read_cubin if CHIPS[chip][0] == "cuda" else _read_amdgcn
    return read(kernel)


def _read_cubin(kernel: Any) -> Resources:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def run(tool: str, *arguments: str) -> str:
            command = [str(tools / tool), *arguments, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = run("cuobjdump", "--dump-resource-usage")
        code = run("nvdisasm", "-c")
    return Resources(
        registers=_only(r"\bREG:(\d+)", usage),
        stack=_only(r"\bSTACK:(\d+)", usage),
        spill_loads=_count(r"\bLDL\b", code),
        spill_stores=_count(r"\bSTL\b", code),
        shared=kernel.metadata.shared,
        loads_128=_count(r"\b(LDG|LDGSTS)\.E[.\w]*\.128\b|\bUTMALDG\b", code),
        tensor_core=_count(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA|UTC\w*MMA)\b", code),
    )


def _read_amdgcn(kernel: Any) -> Resources:
    code = kernel.asm["amdgcn"]
    return Resources(
        registers=_only(r"\.vgpr_count:\s*(\d+)", code),
        stack=_only(r"\.private_segment_fixed_size:\s*(\d+)", code),
        spill_loads=_only(r"\.vgpr_spill_count:\s*(\d+)", code),
        spill_stores=0,
        shared=kernel.metadata.shared,
        loads_128=_count(r"\b(global|buffer)_load_dwordx4\b", code),
        tensor_core=_count(r"\bv_mfma_\w+", code),
    )


def _only(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise RuntimeError(f"expected {pattern!r} once in the compiler's output, found {found}")
    return int(found[0])


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def budgets_path(spec: Spec) -> Path:
    return Path(__file__).parents[1] / "ops" / spec.op.name / "budgets.json"


def read_budgets(spec: Spec) -> tuple[str, Chips]:
    """The version of Triton that an op's budgets are of, and they: chip -> kernel -> resources."""
    content = json.loads(budgets_path(spec).read_text())
    chips = {
        chip: {
            name: dict(zip(content["columns"], row, strict=True)) for name, row in kernels.items()
        }
        for chip, kernels in content["chips"].items()
    }
    return content["triton"], chips


def write_budgets(spec: Spec, version: str, chips: Chips) -> None:
    """Writes an op's budgets, a line a kernel under the names of the columns."""
    columns = [field.name for field in fields(Resources)]
    blocks = []
    for chip, kernels in chips.items():
        rows = [
            f"   {json.dumps(name)}: {json.dumps([used[column] for column in columns])}"
            for name, used in kernels.items()
        ]
        blocks.append(f"  {json.dumps(chip)}: {{\n" + ",\n".join(rows) + "\n  }")
    head = f' "triton": {json.dumps(version)},\n "columns": {json.dumps(columns)},\n "chips": {{\n'
    budgets_path(spec).write_text("{\n" + head + ",\n".join(blocks) + "\n }\n}\n")


def measure(op_name: str, chip: str) -> dict[str, dict[str, int]]:
    """Kernel name -> resources, for every kernel of an op on one chip."""
    spec = next(spec for spec in all_specs() if spec.op.name == op_name)
    cases = [case for case in spec.compile_cases() if chip in (case.chips or CHIPS)]
    return {case.name: asdict(compile_case(case, chip)) for case in cases}


def measure_all(specs: list[Spec]) -> dict[str, Chips]:
    """Op -> chip -> kernel -> resources; as many compilers at a time as there are cores."""
    jobs = [
        (spec.op.name, chip)
        for spec in specs
        if "triton" in spec.op.implementations
        for chip in CHIPS
    ]
    results: dict[str, Chips] = {}
    with ProcessPoolExecutor(mp_context=_spawn()) as pool:
        for (op, chip), kernels in zip(
            jobs, pool.map(measure, *zip(*jobs, strict=True)), strict=True
        ):
            results.setdefault(op, {})[chip] = kernels
    return results


def _spawn() -> Any:
    import multiprocessing

    return multiprocessing.get_context("spawn")  # torch's threads do not survive a fork


def compare(
    chip: str, kernel: str, measured: dict[str, int], budget: dict[str, int] | None
) -> list[str]:
    """What is worse than the budget, in words. Without a budget, spills are."""
    if budget is None:
        budget = measured | {"stack": 0, "spill_loads": 0, "spill_stores": 0}
    worse = []
    for resource, now in measured.items():
        before = budget[resource]
        if now < before if resource in MORE_IS_BETTER else now > before:
            worse.append(f"{kernel} on {chip}: {resource} {before} -> {now}")
    return worse


def check(spec: Spec, measured: Chips) -> list[str]:
    """Compares an op's resources (chip -> kernel -> resources) with its committed budgets."""
    import triton

    version, budgets = read_budgets(spec)
    same_version = version == triton.__version__
    messages = []
    for chip, kernels in measured.items():
        known = budgets.get(chip, {}) if same_version else None
        for kernel, resources in kernels.items():
            if known is not None and kernel not in known:
                messages.append(f"{kernel} on {chip}: not in {budgets_path(spec).name}")
                continue
            messages += compare(chip, kernel, resources, known[kernel] if known else None)
        for kernel in sorted(set(known or ()) - set(kernels)):
            messages.append(f"{kernel} on {chip}: in {budgets_path(spec).name}, but not compiled")
    return messages


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        print("usage: python -m gradsmith_kernels.verify.compile_checks [--write]", file=sys.stderr)
        return 2
    if backends.interpreting():
        print("compile_checks: TRITON_INTERPRET=1 is set; unset it to compile", file=sys.stderr)
        return 2
    import triton

    specs = all_specs("triton")
    failed = False
    for op, chips in measure_all(specs).items():
        spec = next(spec for spec in specs if spec.op.name == op)
        if arguments:
            write_budgets(spec, triton.__version__, chips)
            print(f"{op}: wrote {budgets_path(spec)}")
            continue
        messages = check(spec, chips)
        failed |= bool(messages)
        kernels = len(next(iter(chips.values())))
        state = "OVER" if messages else "within"
        print(f"{op}: {kernels} kernels on {', '.join(chips)}: {state} budget")
        for message in messages:
            print(f"  {message}")
    if failed:
        print("if the change is meant: python -m gradsmith_kernels.verify.compile_checks --write")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
