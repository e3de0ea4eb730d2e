"""The kernels' tests with other versions of Python and torch: `make test-matrix`.

    python scripts/test_matrix.py [--only 3.12/2.11] [PYTEST ARGUMENTS]

Each pair gets an environment of its own in build/matrix, which stays for the next time: torch as
the package index has it (it brings the Triton that it was made with), the rest as constraints.txt
has it, or, under `newest`, the newest of all. The library is built with that Python and tested as
it is installed. What cannot be had is in the table too, with the reason; exit code 1 then, and
where a test fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from install import settings_of_pip

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
PAIRS = ("3.11/2.11", "3.12/2.11", "3.12/2.13", "3.13/newest")
TESTS = ["pytest", "pytest-xdist", "hypothesis", "transformers", "peft", "scikit-learn"]
TESTS += ["pybind11", "setuptools", "wheel"]
# Torch decides about these; it wants an older setuptools than the rest has.
TORCHS = ("torch", "triton", "setuptools")
# Machine code and sanitizers: they do not see Python or torch.
LEFT_OUT = "--ignore=tests/kernels/csrc"
VERSIONS = (
    "import sys, torch, triton, transformers as t;"
    "print(sys.version.split()[0], torch.__version__, triton.__version__, t.__version__)"
)


class MissingError(Exception):
    """What cannot be had here, and why."""


def call(*command: str | Path, failure: str = "", **environment: str) -> str:
    """Runs a command; with `failure`, one that fails raises MissingError, with its last line."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if failure and done.returncode:
        told = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
        raise MissingError(f"{failure}: {told[-1].strip()}")
    return done.stdout


def find_python(version: str) -> Path:
    """The command of a version, or pyenv's."""
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for command in (f"python{version}", *sorted(folder.glob(f"{version}.*/bin/python"))):
        try:
            found = call(command, "-c", "import sys, ensurepip; print(sys.executable)", failure="-")
            return Path(found.splitlines()[-1])
        except (MissingError, OSError):
            continue
    raise MissingError(f"no Python {version} with venv here")


def make(pair: str) -> Path:
    """The Python of a pair's environment, with what the tests import and the library itself."""
    version, torch = pair.split("/")
    folder = FOLDER / pair.replace("/", "-torch-")
    python = folder / "bin" / "python"
    constraints = FOLDER / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in (*TORCHS, "numpy")]
    # Triton 3.6, which comes with torch 2.11, interprets with no newer one.
    kept += ["numpy<2.4"] if torch == "2.11" else [x for x in lines if x.startswith("numpy==")]
    FOLDER.mkdir(parents=True, exist_ok=True)
    constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
    if not python.exists():
        call(find_python(version), "-m", "venv", folder, failure="no environment")
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    call(*pip, "-c", constraints, "uv", failure="no uv")
    install = (folder / "bin" / "uv", "pip", "install", "--quiet", "--python", python)
    wanted = ["torch", "triton"] if torch == "newest" else [f"torch=={torch}.*", "triton"]
    pins = () if torch == "newest" else ("-c", constraints)
    settings = settings_of_pip()
    call(*install, *pins, *wanted, "numpy", *TESTS, failure="not to be installed", **settings)
    shutil.rmtree(wheels := folder / "wheels", ignore_errors=True)
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", wheels)
    call(python, "-m", "pip", "wheel", *options, ".", failure="the library was not built")
    reinstall = ("--no-deps", "--no-index", "--force-reinstall")
    call(*pip, *reinstall, *wheels.glob("*.whl"), failure="its wheel was not installed")
    return python


def measure(pair: str, arguments: list[str]) -> tuple[bool, str]:
    """Whether all tests passed, and the table's row."""
    begin = time.monotonic()
    try:
        python = make(pair)
        versions = call(python, "-c", VERSIONS, failure="it does not import").splitlines()[-1]
    except MissingError as missing:
        return False, f"{pair:12}  not to be had: {missing}"
    log = FOLDER / f"{pair.replace('/', '-torch-')}.log"
    log.write_text(
        # -P: not from this folder, but as it was installed
        call(python, "-P", "-m", "pytest", "tests/kernels", "-n2", LEFT_OUT, *arguments),
        encoding="utf-8",
    )
    lines = log.read_text(encoding="utf-8").splitlines() or ["no output"]
    end = next((line for line in reversed(lines) if " in " in line and "passed" in line), lines[-1])
    good = "passed" in end and "failed" not in end and "error" not in end
    minutes = (time.monotonic() - begin) / 60
    told = f"{pair:12}  {versions:42}  {end.strip('= ')}; {minutes:.0f} min in all"
    return good, told if good else f"{told}; see {log.relative_to(ROOT)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PAIRS, help="one pair of Python and torch")
    options, arguments = parser.parse_known_args()
    rows = []
    for pair in [options.only] if options.only else PAIRS:
        print(f"{pair} ...", flush=True)
        rows.append(measure(pair, arguments))
        print(rows[-1][1], flush=True)
    print(f"\n{'asked for':12}  Python, torch, Triton, transformers")
    print("\n".join(row for _, row in rows))
    return int(not all(good for good, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
