"""`gradsmith launch`: one training run on several processes and machines.

The processes are started by engines that exist. torchrun (torch.distributed.run) starts those of
one machine, and of several when `launch` is run on each; DeepSpeed's launcher starts them on all
machines of a hostfile; sbatch starts `launch` on each machine of a Slurm job. `--dry-run` prints
the command or the script.

torchrun is run within this process: so a wrong recipe ends with exit code 2 and its message once,
where the command line tool ends with exit code 1 and a stack trace of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .checks import check_recipe
from .errors import RunError, Stopped, UserError, one_line
from .files import replacing
from .reading import read_text
from .recipe import Recipe, load_recipe
from .run import Run, check_output


@dataclass(frozen=True)
class Job:
    """What the command line of `gradsmith launch` says."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    fresh: str | None = None  # an order to start over, which is carried out once
    nproc: int | None = None
    nnodes: int | None = None
    node_rank: int | None = None
    master: str | None = None
    hostfile: Path | None = None
    slurm: bool = False
    time: str | None = None
    partition: str | None = None
    sbatch: tuple[str, ...] = ()
    submit: bool = False
    engine_options: tuple[str, ...] = ()

    def train_arguments(self) -> list[str]:
        """What follows `gradsmith` in each process."""
        return ["train", *self.recipe_arguments()]

    def recipe_arguments(self) -> list[str]:
        """The recipe and what is said about it."""
        fresh = ["--fresh-once", self.fresh] if self.fresh else []
        path = str(self.recipe)
        return [*fresh, f"./{path}" if path.startswith("-") else path, *self.overrides]


def launch(job: Job, *, dry_run: bool = False) -> int:
    """Starts the job and waits for its end; returns the exit code of the processes.

    Raises:
        UserError: the options do not go together, or the recipe is wrong.
    """
    _check_options(job)
    _check_words(job)
    recipe = load_recipe(job.recipe, job.overrides)
    if job.slurm:
        return _slurm(job, recipe, dry_run)
    if job.hostfile is not None:
        world = sum(read_hostfile(job.hostfile).values())
        command = deepspeed_command(job)
        threads = None
    else:
        nproc = job.nproc or _accelerators() or 1
        world = nproc * (job.nnodes or 1)
        command = torchrun_command(job, nproc)
        threads = str(max(1, physical_cores() // nproc))
    recipe.training.accumulation(world)

    if dry_run:
        setting = f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', threads)} "
        print((setting if threads else "") + shlex.join(command))
        return 0

    if threads is None:
        # DeepSpeed's launcher would let every rank say what is wrong.
        check_recipe(recipe, world, fresh=bool(job.fresh))
        return subprocess.run(command).returncode
    # Without it torchrun gives each process one thread.
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    return _run_torchrun(command[3:])


def _check_options(job: Job) -> None:
    ways = {
        "--hostfile": job.hostfile is not None,
        "--slurm": job.slurm,
        "--node-rank": job.node_rank is not None,
    }
    chosen = [name for name, is_set in ways.items() if is_set]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} are different ways to start; choose one")
    if job.hostfile is not None:
        for name, count in {"--nproc": job.nproc, "--nnodes": job.nnodes}.items():
            if count is not None:
                raise UserError(f"{name} does not go with --hostfile: its slots say how many")
    elif job.slurm:
        if job.nnodes is None or job.nproc is None:
            raise UserError("--slurm needs --nodes and --nproc (processes on each node)")
        if job.master is not None:
            raise UserError("--master does not go with --slurm: the job finds its first node")
    elif job.nnodes is not None and (job.node_rank is None or job.master is None):
        raise UserError(
            "--nnodes needs --node-rank R and --master HOST:PORT, and launch on every machine; "
            "or use --hostfile or --slurm"
        )
    elif job.nnodes is None and (job.node_rank is not None or job.master is not None):
        raise UserError("--node-rank and --master go with --nnodes")
    if job.nnodes is not None and job.node_rank is not None and job.node_rank >= job.nnodes:
        raise UserError(
            f"--node-rank: found {job.node_rank}; with --nnodes {job.nnodes} allowed are "
            f"0 to {job.nnodes - 1}"
        )
    if not job.slurm:
        only_slurm = {
            "--time": job.time,
            "--partition": job.partition,
            "--sbatch": job.sbatch,
            "--submit": job.submit,
        }
        for name, value in only_slurm.items():
            if value:
                raise UserError(f"{name} goes with --slurm")


# What an option's value is made of. Scripts, launchers and ssh are handed nothing else.
HOST = r"[A-Za-z0-9_:][A-Za-z0-9._:-]*"
GRAMMAR = {
    "--master": (rf"{HOST}:\d{{1,5}}", "HOST:PORT, for example node0:29500"),
    "--time": (r"\d+(-\d+)?(:\d+){0,2}|UNLIMITED|INFINITE", "a time, as 12:00:00 or 1-00"),
    "--partition": (r"\w[\w.+-]*(,\w[\w.+-]*)*", "names of letters, digits and ._+-"),
    "--sbatch": (r"(--)?[a-z][a-z0-9-]*(=.+)?", "NAME=VALUE, as gpus-per-node=8, or NAME"),
}
PLAIN = r"[\w@%+=:,./-]+"  # no shell finds anything to do in it


def _check_words(job: Job) -> None:
    """
    Raises:
        UserError: an option's value is not of its form, or something holds a control character.
    """
    values = {
        "--master": [job.master],
        "--time": [job.time],
        "--partition": [job.partition],
        "--sbatch": job.sbatch,
        "recipe": [str(job.recipe)],
        "override": job.overrides,
        "--": job.engine_options,
        "the working directory": [str(Path.cwd())],
    }
    for name, words in values.items():
        pattern, expected = GRAMMAR.get(name, (".*", "one line without control characters"))
        for word in words:
            if word is not None and not (
                word.isprintable() and re.fullmatch(pattern, word, re.ASCII)
            ):
                raise UserError(f"{name}: found {one_line(word, 80)}; expected {expected}")


# ------------------------------------------------------------------------------ one machine, many


def torchrun_command(job: Job, nproc: int) -> list[str]:
    """The processes of this machine, by torchrun."""
    if job.nnodes is None:
        # 127.0.0.1: a laptop's own name often resolves to an address that it has lost.
        where = ["--standalone", "--local-addr", "127.0.0.1"]
    else:
        host, port = _split_master(str(job.master))
        where = ["--nnodes", str(job.nnodes), "--node-rank", str(job.node_rank)]
        where += ["--master-addr", host, "--master-port", port]
    command = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node"]
    return [*command, str(nproc), *job.engine_options, "-m", "gradsmith", *job.train_arguments()]


def _split_master(master: str) -> tuple[str, str]:
    host, _, port = master.rpartition(":")
    if not 0 < int(port) < 65536:
        raise UserError(f"--master: found {master}; expected HOST:PORT, a port up to 65535")
    return host, port


def _run_torchrun(arguments: list[str]) -> int:
    import logging

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what it logs is said below
    # Before torchrun kills them, ranks may save; Slurm gives them two minutes for it.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "110")
    try:
        parsed = torchrun.parse_args(arguments)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and "signals_to_handle" in parsed:
            parsed.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"  # nohup: as it was asked
        torchrun.run(parsed)
    except ChildFailedError as error:
        _explain_failure(error)
    except SignalException as stop:
        raise Stopped("; its ranks were told", int(stop.sigval)) from None
    except SystemExit as end:  # torchrun's argument parser
        if end.code:
            raise UserError("torchrun does not understand the options after --") from None
    return 0


def _explain_failure(error: Any) -> NoReturn:
    """Maps a torchrun ChildFailedError to this command's end: the first reason that a rank gave,
    or the fate of a rank that died without one."""
    told: list[dict[str, Any]] = []
    lost: list[dict[str, Any]] = []
    silent = []
    for rank, failure in sorted(error.failures.items()):
        data = failure.error_file_data
        if "exit_code" in data:  # written by gradsmith.__main__
            # One that only says that another is gone does not know why.
            (lost if data.get("lost") else told).append(data)
        elif failure.exitcode != -signal.SIGTERM:  # by which torchrun ends the others
            silent.append((rank, failure))
    if not silent:
        told = told or lost
    if told:
        # Ranks that fail together fail for one reason, and the lowest of them knows it best.
        first = min(data["timestamp"] for data in told)
        data = next(data for data in told if data["timestamp"] < first + 1)
        # Not the process's own exit code: torchrun may have ended it while it was ending itself.
        code, message = data["exit_code"], data["message"]
        if code > 128:
            raise Stopped(message.partition(signal.Signals(code - 128).name)[2], code - 128)
        raise (UserError if code == 2 else RunError)(message)
    rank, failure = silent[0] if silent else error.get_first_failure()
    if failure.exitcode > 0:
        raise RunError(f"rank {rank} ended with exit code {failure.exitcode}")
    cause = f"rank {rank} was killed by {failure.signal_name()}"
    if -failure.exitcode == signal.SIGKILL:
        cause += " (most often because the machine ran out of memory)"
    raise RunError(cause)


def physical_cores() -> int:
    """Cores that this process may use; two hardware threads of a core count once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    return len(cores)


def _accelerators() -> int:
    import torch

    return torch.cuda.device_count()


# --------------------------------------------------------------------------------- a hostfile


def read_hostfile(path: Path) -> dict[str, int]:
    """Host to processes, from lines such as `worker-0 slots=8`.

    Raises:
        UserError: no such file, a line of another form, or a host twice.
    """
    if not path.is_file():
        raise UserError(f"--hostfile: {path}: no such file; its lines are HOST slots=N")
    slots: dict[str, int] = {}
    for number, line in enumerate(re.split("\r\n|\r|\n", read_text(path)), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(rf"({HOST})[ \t]+slots=([1-9]\d{{0,4}})", line, re.ASCII)
        if not match:
            raise UserError(
                f'{path}:{number}: found "{one_line(line, 80)}"; expected HOST slots=N, where a '
                "host is letters, digits and ._:-"
            )
        if match[1] in slots:
            raise UserError(f"{path}:{number}: the host {match[1]} stands there twice")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"{path}: names no host; its lines are HOST slots=N")
    return slots


def deepspeed_command(job: Job) -> list[str]:
    """All processes on all machines of the hostfile, over ssh, by DeepSpeed's launcher.

    Raises:
        UserError: a word of the command, which DeepSpeed's launcher hands to the other machines'
            shells as it is, holds what a shell would act on.
    """
    words = {
        "the working directory": [str(Path.cwd())],
        "Python's path": [sys.executable],
        "recipe and overrides": job.recipe_arguments(),
        "--": [word for word in job.engine_options if not re.fullmatch(r"[\w@%+=:,./ -]+", word)],
    }
    for name, values in words.items():
        for value in values:
            if not re.fullmatch(PLAIN, value, re.ASCII):
                raise UserError(
                    f"--hostfile: {name}: found {one_line(value, 80)}; DeepSpeed's launcher does "
                    "not quote it for the other machines' shells: allowed are letters, digits "
                    "and @%+=:,./_-; write it into the recipe"
                )
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(job.hostfile)),
        *("--quiet", "--no_local_rank", *job.engine_options),
        *("--module", "gradsmith", *job.train_arguments()),
    ]


# -------------------------------------------------------------------------------------- Slurm


def _slurm(job: Job, recipe: Recipe, dry_run: bool) -> int:
    check_recipe(
        recipe, int(job.nnodes or 1) * int(job.nproc or 1), fresh=bool(job.fresh), here=False
    )
    script = sbatch_script(job, recipe)
    if dry_run:
        print(script, end="")
        return 0
    check_output(recipe)
    run, path = Run(recipe.output), Path(recipe.output) / "launch.sbatch"
    with run.lock("results"):
        run.logs.mkdir(exist_ok=True)
        with replacing(path) as file:
            file.write(script)
    if not job.submit:
        print(f"wrote {path}; submit it with: sbatch {shlex.quote(str(path))}")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(f"--submit: sbatch is not on the PATH; wrote {path}")
    return subprocess.run(["sbatch", str(path)]).returncode


LOG = "/logs/slurm-%j.out"


def sbatch_script(job: Job, recipe: Recipe) -> str:
    """A job that runs `gradsmith launch` once on each of its nodes.

    Raises:
        UserError: a backslash in the path of what the job prints, which sbatch does not keep.
    """
    place = str(Path(recipe.output).absolute())
    if "\\" in place:
        raise UserError(
            f"output: found {one_line(place, 80)}; sbatch takes no path with a \\ in it"
        )
    directives = [
        f"job-name={recipe.name}",
        f"nodes={job.nnodes}",
        "ntasks-per-node=1",
        "exclusive",
        f"chdir={shlex.quote(str(Path.cwd()))}",
        # In the whole path, the working directory's too, sbatch fills in what stands behind a %.
        f"output={shlex.quote(place.replace('%', '%%') + LOG)}",
        "open-mode=append",  # a job that is queued again goes on in its log
        "requeue",
        "signal=B:USR1@120",  # B: to the script's shell alone
    ]
    if job.time:
        directives.append(f"time={job.time}")
    if job.partition:
        directives.append(f"partition={job.partition}")
    for line in job.sbatch:
        name, equals, value = line.removeprefix("--").partition("=")
        directives.append(name + equals + (shlex.quote(value) if equals else ""))
    checkpoints = shlex.quote(recipe.output.rstrip("/") + "/checkpoints")
    recipe_part = shlex.join(job.recipe_arguments())
    engine_part = f" -- {shlex.join(job.engine_options)}" if job.engine_options else ""
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{directive}" for directive in directives),
        "",
        "set -euo pipefail",
        # Not through head: what it hangs up on would die of that, and with pipefail so would we.
        'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "head=${nodes%%$'\\n'*}",
        "port=$((20000 + SLURM_JOB_ID % 20000))",
        "",
        # A cancelled job gets TERM, as each does, so what asks for another turn is another signal.
        "# Two minutes before the time limit Slurm sends USR1: the ranks save and end, and the job",
        "# is queued again if it has got on.",
        f"saved() {{ ls -1 -- {checkpoints} 2>/dev/null || true; }}",
        "before=$(saved) told= status=0",
        """trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' USR1""",
        "",
        "# --cpu-bind=none: the processes of a node share all its cores.",
        "srun --kill-on-bad-exit=1 --cpu-bind=none \\",
        """  bash -c 'exec "$0" -m gradsmith launch --node-rank "$SLURM_NODEID" "$@"' \\""",
        f"  {shlex.quote(sys.executable)} --nnodes {job.nnodes} --nproc {job.nproc} "
        '--master "$head:$port" \\',
        f"  {recipe_part}{engine_part} &",
        "wait $! || status=$?",
        "if [[ $told ]]; then",
        "  status=0; wait $! || status=$?  # the signal ended the first wait",
        '  if ((status > 128)) && [[ "$(saved)" != "$before" ]]; then',
        '    scontrol requeue "$SLURM_JOB_ID" || true',
        "  fi",
        "fi",
        "exit $status",
    ]
    return "\n".join(lines) + "\n"
