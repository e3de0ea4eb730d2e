"""`gradsmith quickstart`: the tour, through the same functions as every other command.

Two recipes, `pretrain.yaml` and `finetune.yaml`; each stage skips or resumes what is done already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .console import say, show
from .errors import UserError
from .recipe import Recipe, load_recipe
from .run import Run


def recipes_folder() -> Path:
    """The quickstart's recipes: the checkout's, else those that the installed package carries."""
    package = Path(__file__).resolve().parent
    candidates = (package.parents[1] / "recipes" / "quickstart", package / "recipes" / "quickstart")
    for folder in candidates:
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise UserError(f"no quickstart recipes in {' or '.join(map(str, candidates))}")


def quickstart(fresh: bool = False, overrides: Sequence[str] = ()) -> Path:
    """Pretrains, fine-tunes, evaluates and reports; returns the report.

    Args:
        fresh: start the training over instead of going on.
        overrides: for both recipes. `output=FOLDER` is where both runs and the report go.

    Raises:
        UserError: an override does not fit.
    """
    from .data.prepare import prepare
    from .evaluation.evaluate import evaluate
    from .report.build import build_report
    from .report.terminal import format_evaluation
    from .training.loop import train

    pretrain, finetune = _recipes(overrides)
    report = Path(pretrain.output).parent / "report.html"

    _stage(1, "prepare", "Reads the source of this Python's standard library, trains a tokenizer",
           "on it and writes the tokens.")  # fmt: skip
    prepare(pretrain, fresh=fresh, log=say)
    _stage(2, "pretrain", "Trains a small Llama from nothing to predict the next token of that",
           "source, on gradsmith's kernels under DeepSpeed ZeRO.")  # fmt: skip
    train(pretrain)
    _stage(3, "fine-tune", "Teaches it by LoRA to write a function's docstring; only the answers",
           "count in the loss.")  # fmt: skip
    prepare(finetune, fresh=fresh, log=say)
    train(finetune)
    _stage(4, "evaluate", "Measures both on text that neither has seen, beside compressors that",
           "saw the same bytes.")  # fmt: skip
    runs = [Run.open(pretrain.output), Run.open(finetune.output)]
    for run in runs:
        show(format_evaluation(evaluate(run)))
    _stage(5, "report", "Puts curves, data, results and samples into one page.")
    build_report(runs, report, title="gradsmith quickstart")
    say(f"Open {report} in a browser. Try the models yourself:")
    say(f"  gradsmith generate {pretrain.output} --prompt 'def read_lines(path):'")
    say(f"  gradsmith generate {finetune.output} --prompt 'def add(a, b):\n    return a + b'")
    return report


def _recipes(overrides: Sequence[str]) -> tuple[Recipe, Recipe]:
    folder = recipes_folder()
    outputs = [o.partition("=")[2] for o in overrides if o.partition("=")[0].strip() == "output"]
    rest = [o for o in overrides if o.partition("=")[0].strip() != "output"]
    place: dict[str, list[str]] = {"pretrain": [], "finetune": []}
    if outputs:
        base = outputs[-1].rstrip("/")
        place["pretrain"] = [f"output={base}/pretrain"]
        place["finetune"] = [f"output={base}/finetune", f"model.from={base}/pretrain"]
    # Overrides of the model that is pretrained do not fit the one that is taken from it.
    to_finetune = [o for o in rest if not o.startswith(("model.config", "data.tokenizer"))]
    return (
        load_recipe(folder / "pretrain.yaml", [*rest, *place["pretrain"]]),
        load_recipe(folder / "finetune.yaml", [*to_finetune, *place["finetune"]]),
    )


def _stage(number: int, name: str, *lines: str) -> None:
    from rich.text import Text

    if number > 1:
        say("")
    show(Text(f"{number}/5 {name}", "bold" if sys.stdout.isatty() else ""))
    for line in lines:
        say(f"    {line}")
