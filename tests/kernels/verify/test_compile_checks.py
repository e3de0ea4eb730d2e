"""Every Triton kernel compiles for every chip within its committed budget, without a GPU."""

import pytest

from gradsmith_kernels.verify import compile_checks
from gradsmith_kernels.verify.spec import CompileCase, all_specs

triton = pytest.importorskip("triton")
tl = triton.language


def test_kernels_stay_within_their_budgets():
    specs = all_specs("triton")
    measured = compile_checks.measure_all(specs)
    for spec in specs:
        assert set(measured[spec.op.name]) == set(compile_checks.CHIPS)
        assert compile_checks.check(spec, measured[spec.op.name]) == []


def test_budgets_have_no_spills_and_wide_loads():
    for spec in all_specs("triton"):
        _, budgets = compile_checks.read_budgets(spec)
        for chip, kernels in budgets.items():
            # Not of each: sums over a few numbers, and columns, have nothing wide to load. Nor on
            # gfx942: of the same tile its waves of 64 lanes may load half as much a lane.
            wide = any(resources["loads_128"] > 0 for resources in kernels.values())
            assert wide or chip == "gfx942"
            for resources in kernels.values():
                assert resources["spill_loads"] == resources["spill_stores"] == 0


def test_budgets_are_a_line_a_kernel_and_written_as_they_are_read(tmp_path, monkeypatch):
    paths = [compile_checks.budgets_path(spec) for spec in all_specs("triton")]
    monkeypatch.setattr(compile_checks, "budgets_path", lambda _: tmp_path / "budgets.json")
    for path in paths:
        text = path.read_text()
        (tmp_path / "budgets.json").write_text(text)
        version, chips = compile_checks.read_budgets(None)
        compile_checks.write_budgets(None, version, chips)
        assert (tmp_path / "budgets.json").read_text() == text
        kernels = sum(len(kernels) for kernels in chips.values())
        assert len(text.splitlines()) == kernels + 2 * len(chips) + 6


@pytest.mark.parametrize(
    ("resource", "now", "worse"),
    [
        ("registers", 33, True),
        ("registers", 31, False),
        ("spill_loads", 1, True),
        ("loads_128", 3, True),
        ("loads_128", 5, False),
    ],
)
def test_compare_says_what_moved(resource, now, worse):
    budget = {"registers": 32, "stack": 0, "spill_loads": 0, "spill_stores": 0, "loads_128": 4}
    messages = compile_checks.compare("sm_90", "kernel", budget | {resource: now}, budget)
    assert messages == ([f"kernel on sm_90: {resource} {budget[resource]} -> {now}"] * worse)


def test_without_a_budget_only_spills_count():
    measured = {"registers": 99, "stack": 8, "spill_loads": 2, "spill_stores": 0, "loads_128": 0}
    assert compile_checks.compare("sm_90", "kernel", measured, None) == [
        "kernel on sm_90: stack 0 -> 8",
        "kernel on sm_90: spill_loads 0 -> 2",
    ]


@triton.jit
def copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    at = row * BLOCK + column
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(c_ptr + at, product)


def test_the_reader_sees_narrow_loads_spills_and_tensor_cores():
    types = dict.fromkeys(("x_ptr", "y_ptr"), "*fp32")

    def case(aligned):
        return CompileCase("copy", copy_kernel, types, {"BLOCK": 1024}, aligned, 4)

    wide = compile_checks.compile_case(case(("x_ptr", "y_ptr")), "sm_90")
    narrow = compile_checks.compile_case(case(()), "sm_90")
    assert wide.loads_128 == 2
    assert narrow.loads_128 == 0

    pointers = {"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32"}
    big = CompileCase("matmul", matmul_kernel, pointers, {"BLOCK": 256}, tuple(pointers), 4)
    resources = compile_checks.compile_case(big, "sm_90")
    assert resources.tensor_core > 0
    assert resources.spill_loads > 0
    assert resources.stack > 0
