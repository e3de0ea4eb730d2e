"""The `gradsmith` command: a fast start, and exit codes that a script can rely on.

0 done, 1 the run failed, 2 the user's input was wrong, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

from .errors import RunError, UserError

# What the [train] extra brings, by import name.
TRAIN_EXTRA = {
    "datasets", "deepspeed", "peft", "pyarrow", "pydantic", "rich", "safetensors", "tokenizers",
    "transformers", "typer", "yaml",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    code = _run(arguments)
    if "MASTER_ADDR" in os.environ and "gradsmith.training.engine" in sys.modules:
        from .training.engine import end_rank

        end_rank(code)
    return code


def _run(arguments: list[str] | None) -> int:
    _leave_working_directory()
    try:
        _share_cores()
        from .cli import app

        app(arguments, prog_name="gradsmith")
    except SystemExit as end:  # how typer ends, well or with a usage error (2)
        if end.code == 130:
            print("interrupted", file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0
    except UserError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in TRAIN_EXTRA:
            return _fail(f"{error.name} is not installed: pip install 'gradsmith[train]'", 2)
        return _crash(error)
    except Exception as error:
        return _crash(error)
    return 0


def _leave_working_directory() -> None:
    """`python -m` puts the working directory first on the path. In a checkout that would let
    the folder kernels/ pass for the package of that name that transformers looks for."""
    if sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]


def _share_cores() -> None:
    """DeepSpeed's launcher, unlike torchrun, lets every process use all cores of its machine."""
    processes = os.environ.get("LOCAL_SIZE")
    if processes and "OMP_NUM_THREADS" not in os.environ:
        from .launch import physical_cores

        os.environ["OMP_NUM_THREADS"] = str(max(1, physical_cores() // int(processes)))


def _crash(error: Exception) -> int:
    traceback.print_exc()
    return _fail(f"{type(error).__name__}: {error}", 1)


def _fail(message: str, code: int) -> int:
    """Says why the command ends. Under torchrun every rank would say it at once, so there the
    message goes to torchrun, which hands on the first one (see `gradsmith.launch`)."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        told = {"message": message, "timestamp": time.time(), "exit_code": code}
        Path(error_file).write_text(json.dumps(told), encoding="utf-8")
    else:
        print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
