"""The commands. Each one parses, calls one function, and shows what came back.

Modules that take long to import (torch, transformers, deepspeed) are imported inside the
commands, so that `gradsmith --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from .recipe import Recipe
    from .run import Run

app = typer.Typer(
    help="From raw data to a trained, measured and explained model, from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides, for example training.steps=50 data.sources.0.path=other.txt",
        show_default=False,
    ),
]
# What `launch --fresh` writes into the commands that it makes: they may be repeated.
FreshOnce = Annotated[str | None, typer.Option("--fresh-once", metavar="ORDER", hidden=True)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"gradsmith {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
) -> None:
    """Pretrain, fine-tune, evaluate and report on this machine: the tour, in minutes.

    Overrides apply to both of its recipes. Run it again to go on where it stopped.
    """
    from .quickstart import quickstart

    quickstart(fresh=fresh, overrides=overrides or ())


@app.command()
def prepare(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would become of each row; keep nothing.")
    ] = False,
) -> None:
    """Read, clean, split and encode the data of a recipe."""
    from .data.prepare import prepare, preview
    from .recipe import load_recipe

    (preview if dry_run else prepare)(load_recipe(recipe, overrides or ()))


@app.command()
def profile(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE|RECIPE", help="A table, a glob of them, or a recipe.")
    ],
    overrides: Overrides = None,
    target: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="What is to be predicted.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The page to write; default: SOURCE.profile.html in this folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at a table before anything is trained: a page, and a recipe for it."""
    from .console import show
    from .profile.build import profile, write
    from .profile.draw import terminal

    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way is no result
        found = profile(source, overrides or (), target)
        page = None if as_json and output is None else write(found, source, output)
    if as_json:
        print(json.dumps(found, allow_nan=False))
    else:
        show(terminal(found))
        print(page)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of resuming from the run's folder.")
    ] = False,
    fresh_once: FreshOnce = None,
) -> None:
    """Pretrain or fine-tune, as the recipe says; goes on where the run stopped."""
    from .recipe import load_recipe
    from .training.loop import train

    train(load_recipe(recipe, overrides or ()), fresh=fresh_once or fresh)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its recipe.")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    as_json: Json = False,
) -> None:
    """Measure a trained run on held-out data."""
    from .console import show
    from .evaluation.evaluate import evaluate
    from .report.terminal import format_evaluation

    trained = _find_run(run, overrides or ())
    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way is no result
        found = evaluate(trained, split=split)
    if as_json:
        told = ("task", "split", "step", "metrics", "results")
        print(json.dumps({key: found[key] for key in told}))
    else:
        show(format_evaluation(found))


def _find_run(path: Path, overrides: list[str] | tuple[()]) -> Run:
    """The run in a folder, or the one that a recipe writes to."""
    from .errors import UserError
    from .recipe import load_recipe
    from .run import Run

    if path.is_file():
        recipe: Recipe = load_recipe(path, overrides)
        if not Run(recipe.output).recipe_path.is_file():
            raise UserError(
                f"{path}: its run {recipe.output} does not exist yet; gradsmith train {path}"
            )
        return Run.open(recipe.output)
    if overrides:
        raise UserError(f"{path}: overrides go with a recipe file; this is a run's folder")
    return Run.open(path)


@app.command()
def generate(
    path: Annotated[
        Path, typer.Argument(help="A run, a checkpoint, a Hugging Face or an adapter folder.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to go on from; may be given again. Without it: standard input."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt through the chat template; without either, as it was trained.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Let a trained model write."""
    from .errors import UserError
    from .evaluation.generate import generate

    try:
        prompts = prompt or [sys.stdin.buffer.read().decode()]
        "".join(prompts).encode()
    except UnicodeError as error:
        raise UserError(f"the prompt is not UTF-8 text: {error}") from None
    if not all(prompts):
        raise UserError("the prompt is empty; give --prompt TEXT or text on standard input")
    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way is no result
        texts = generate(
            str(path),
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            chat=chat,
        )
    for text in texts:
        print(text)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    form: Annotated[
        Literal["model", "adapter", "merged"] | None,
        typer.Option(
            help="model: a Hugging Face folder. adapter: a peft folder. merged: the adapter "
            "folded into its base. By default what the run trained: model or adapter.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a trained run as a folder that other programs load, and check that it is the same."""
    from .models.export import export
    from .run import Run

    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way is no result
        folder, difference = export(Run.open(run), out, form=form)
    print(f"{folder}: read back, its logits differ from the run's by {difference:.1e} (relative)")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One or more runs' folders.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write; for one run its report.html.", show_default=False),
    ] = None,
) -> None:
    """Write the report: one HTML file that holds all it shows."""
    from .errors import UserError
    from .report.build import build_report
    from .run import Run

    opened = [Run.open(run) for run in runs]
    if out is None and len(opened) > 1:
        raise UserError("a report of several runs needs --out FILE")
    print(build_report(opened, out or opened[0].report_path))


class _LaunchCommand(TyperCommand):
    """Keeps what stands after `--` apart: it is for the engine's launcher."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- ENGINE OPTIONS]"]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else len(args)
        ctx.obj = args[cut + 1 :]
        return super().parse_args(ctx, args[:cut])


@app.command(cls=_LaunchCommand)
def launch(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on each machine; by default its GPUs, else 1."),
    ] = None,
    nnodes: Annotated[
        int | None, typer.Option("--nnodes", "--nodes", min=1, help="How many machines.")
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="Which of the machines this is, from 0.")
    ] = None,
    master: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the machine of rank 0 listens.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Start on all its machines with DeepSpeed's launcher.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write an sbatch script.")] = False,
    time: Annotated[str | None, typer.Option(help="Slurm: the time limit.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: the partition.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Slurm: a further line for sbatch, as gpus-per-node=8; may be given again.",
        ),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Slurm: submit the script.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
    fresh_once: FreshOnce = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command or script and stop.")
    ] = False,
) -> None:
    """Train on several processes or machines.

    One machine: --nproc 2. Several, once on each: --nnodes 2 --node-rank 0 --master host:29500.
    Several, from here: --hostfile FILE. A cluster: --slurm --nodes 2 --nproc 8 --submit.
    """
    from .launch import Job, launch

    job = Job(
        recipe=recipe,
        overrides=tuple(overrides or ()),
        fresh=fresh_once or (secrets.token_hex(8) if fresh else None),
        nproc=nproc,
        nnodes=nnodes,
        node_rank=node_rank,
        master=master,
        hostfile=hostfile,
        slurm=slurm,
        time=time,
        partition=partition,
        sbatch=tuple(sbatch or ()),
        submit=submit,
        engine_options=tuple(context.obj),
    )
    raise typer.Exit(launch(job, dry_run=dry_run))


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check all of a recipe that can be checked without training."""
    from .checks import check_recipe
    from .recipe import load_recipe

    summary = check_recipe(load_recipe(recipe, overrides or ()))
    print(json.dumps(summary.as_dict()) if as_json else summary)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from .recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show the machine, the versions, which op runs on which backend, and what is missing."""
    from .doctor import examine, show

    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
