"""What the processes of a launch are, and do together. Alone, a process is rank 0 of 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .errors import RunError, UserError, one_line, system_error


def init_distributed() -> None:
    """Joins the process group: nccl on GPUs, gloo on CPUs, a group of one without a launcher.

    Safe to call more than once.
    """
    if not dist.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if gpu else "gloo"
        if launched():
            store, *_ = next(dist.rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                # torchrun keeps one store over its restarts. In it stand the addresses of the
                # ranks that died, and gloo would connect to those. (Several machines need not
                # have counted the same restarts.)
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"attempt-{attempt}", store)
            dist.init_process_group(backend, store=store, rank=rank(), world_size=world())
        else:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed reads them
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed

    if not deepspeed.comm.is_initialized():
        # Its shared-memory collectives serve inference only, and would be compiled here and now.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)


def end_rank(code: int) -> NoReturn:
    """Ends this process of a launch without taking the interpreter down.

    A rank that has done all its work would now and then (1 in 12 with gloo) end in std::terminate
    there, on a thread that DeepSpeed's references to the process group keep alive; the launcher
    would take it for a failed run.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launched() -> bool:
    """Whether a launcher (torchrun, DeepSpeed's, srun around one) started this process."""
    return "MASTER_ADDR" in os.environ


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def first(work: Callable[[], Any]) -> Any:
    """Runs `work` on rank 0 while the others wait; what it complains of ends all ranks alike."""
    result, complaint = None, ""
    if rank() == 0:
        try:
            result = work()
        except UserError as error:
            complaint = f"2{error}"
        except RunError as error:
            complaint = f"1{error}"
        except OSError as error:
            complaint = f"1{system_error(error)}"
    if complaint := _said(complaint, 0):
        raise (UserError if complaint[0] == "2" else RunError)(complaint[1:])
    return result


def _said(text: str, source: int) -> str:
    """What rank `source` says, on every rank."""
    told = list(text.encode(errors="replace"))
    letters = torch.tensor(told, dtype=torch.uint8, device=device())
    size = torch.tensor([len(letters)], device=device())
    dist.broadcast(size, source)
    if not (count := int(size.item())):
        return ""
    heard = letters if rank() == source else letters.new_empty(count)
    dist.broadcast(heard, source)
    return bytes(heard.tolist()).decode()


def agree(value: float) -> float:
    """Rank 0's value, on every rank: ranks that disagree on the end would wait for each other."""
    told = torch.tensor([value], dtype=torch.float64, device=device())
    dist.broadcast(told, 0)
    return float(told)


def add(values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, on the CPU; alone, what it is."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values.cpu()
    total = values.to(device())
    dist.all_reduce(total)
    return total.cpu()


def together(work: Callable[[], Any], what: str) -> None:
    """Runs `work` on all ranks; if it fails on one, it fails on all, with that one's reason.

    Args:
        work: of this rank.
        what: for the message, as "the checkpoint could not be written".
    """
    error: Exception | None = None
    reason = ""
    try:
        work()
    except Exception as caught:  # whatever it is, the other ranks wait for this one
        error = caught
        reason = system_error(error) if isinstance(error, OSError) else one_line(error)
    failed = torch.tensor([world() if error is None else rank()], device=device())
    dist.all_reduce(failed, dist.ReduceOp.MIN)
    if (who := int(failed.item())) < world():
        by = f" by rank {who}" if world() > 1 else ""
        raise RunError(f"{what}{by}: {_said(reason, who)}") from error
