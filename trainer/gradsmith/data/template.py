"""Chat templates are programs that strangers write. They run in transformers' Jinja sandbox, which
keeps them from files and from Python; here they are given so much time and memory and no more."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import UserError, one_line
from .example import Messages

SECONDS = 5  # of this process's computing; templates take microseconds
BYTES = 1 << 30
CHARACTERS = 1 << 26


def apply_template(
    tokenizer: Any, messages: Messages, where: str, *, add_generation_prompt: bool = False
) -> str:
    """A conversation, rendered by the tokenizer's chat template.

    Raises:
        UserError: in one line, whatever goes wrong in the template.
    """
    try:
        with _bounded():
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        if len(rendered) > CHARACTERS:
            raise ValueError(f"it makes {len(rendered):,} characters; allowed are {CHARACTERS:,}")
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        told = one_line(error)
        if isinstance(error, MemoryError):
            told = f"it takes more than {BYTES >> 20:,} MiB of memory"
        raise UserError(
            f"{where}: the chat template refuses a conversation of {one_line(roles, 80)}: {told}"
        ) from None
    return str(rendered)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raises TimeoutError after `SECONDS` of computing, MemoryError at `BYTES` more than before.

    Signals reach the main thread only: elsewhere the time is not bounded.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    timed = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, _out_of_time) if timed else None
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"it does not end within {SECONDS} seconds")
