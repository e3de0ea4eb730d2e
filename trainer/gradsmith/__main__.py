"""The `gradsmith` command: a fast start, and exit codes that a script can rely on.

0 done, 1 the run failed, 2 the user's input was wrong, 128 + N stopped by signal N: 130 by Ctrl-C,
143 by SIGTERM, 129 by SIGHUP.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

from .errors import RunError, Stopped, UserError, is_out_of_memory, one_line, system_error

# What the [train] extra brings, by import name.
TRAIN_EXTRA = {
    "datasets", "deepspeed", "peft", "pyarrow", "pydantic", "rich", "safetensors", "tokenizers",
    "transformers", "typer", "yaml",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    _open_standard_streams()
    code = _run(arguments)
    try:
        sys.stdout.flush()
    except OSError as error:  # a full disk behind `> file`
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)  # or the interpreter would try again, and complain
        code = _fail(f"standard output: {error.strerror}", 1)
    if "MASTER_ADDR" in os.environ and "gradsmith.ranks" in sys.modules:
        from .ranks import end_rank

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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        return _fail(str(error), 2)
    except Stopped as stop:
        return _fail(str(stop), 128 + stop.number, aloud=True)
    except RunError as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in TRAIN_EXTRA:
            return _fail(f"{error.name} is not installed: pip install 'gradsmith[train]'", 2)
        return _crash(error)
    except OSError as error:
        if error.errno is None:
            return _crash(error)
        return _fail(system_error(error), 1)
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(f"out of memory: {one_line(error)}", 1)
        return _crash(error)
    return 0


def _open_standard_streams() -> None:
    """A command that was started with one of them closed (`>&-`) reads nothing and writes to
    nowhere; else the first file that is opened would get its number, and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            stream = os.fdopen(number, "r" if number == 0 else "w", closefd=False)
            setattr(sys, name, stream)


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
    lost = "MASTER_ADDR" in os.environ and _lost_a_rank(error)
    if not lost:
        traceback.print_exc()
    return _fail(f"{type(error).__name__}: {error}", 1, lost=lost)


def _lost_a_rank(error: Exception) -> bool:
    """Whether it only says that another rank is gone, which has a reason of its own."""
    words = r"[Gg]loo|NCCL|Connection (reset|closed|refused)|Broken pipe|TCPStore"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


def _fail(message: str, code: int, *, aloud: bool = False, lost: bool = False) -> int:
    """Says why the command ends. Under torchrun every rank would say it at once, so there the
    message goes to torchrun, which hands on the first one (see `gradsmith.launch`), but not when
    it was told to end: then rank 0 says it itself (`aloud`)."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        told = {"message": message, "timestamp": time.time(), "exit_code": code, "lost": lost}
        Path(error_file).write_text(json.dumps(told), encoding="utf-8")
    if not error_file or (aloud and os.environ.get("RANK") == "0"):
        with contextlib.suppress(OSError):  # the code says it, where nothing can be written
            print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
