"""`pytest benchmarks`: collects the rows of all benchmarks, prints them, writes the results file.

--quick tries the benchmarks themselves: few rounds, small cases, and nothing is written.
"""

from __future__ import annotations

from typing import Any

import pytest

from .machine import ROOT, cpu_clock, describe, measure_rates, write_results
from .table import show

ROWS: list[dict[str, Any]] = []
MACHINE: dict[str, Any] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a trial: few rounds, nothing written")


def pytest_sessionstart() -> None:
    MACHINE.update(describe("cpu"))  # now, so that the load is that of others


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    return ROWS


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not ROWS:
        return
    rates = measure_rates("cpu", cpu_clock)
    terminalreporter.write_line("")
    terminalreporter.write_line(show(MACHINE, rates, ROWS))
    if not config.getoption("--quick"):
        path = write_results(MACHINE, rates, ROWS)
        terminalreporter.write_line(f"written to {path.relative_to(ROOT.parent)}")
