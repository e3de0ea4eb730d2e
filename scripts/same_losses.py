"""Whether a change moves a single bit: tiny runs of a commit and of the working tree, compared.

    python scripts/same_losses.py BASE                     # all cases, against that commit
    python scripts/same_losses.py BASE --only packed,chat

Both sides train the same tiny recipes with one thread, at the same time. BASE runs its own Python,
with the native module that is built here where csrc/ is the same, else with its own. Compared are
every number of metrics.jsonl but times, and what evaluation.json has on both sides, as `float.hex`;
weights and prepared data as bytes (of data/manifest.json what both have). Bits depend on the
machine, so none are committed: BASE's runs are kept in a temporary folder, and the next time only
the working tree is trained. Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT = Path(tempfile.gettempdir()) / f"gradsmith-same-losses-{os.getuid()}"
BUILT = ("csrc", "setup.py")  # what the native module follows from
TIMES = {"time", "tokens_per_second", "rows_per_second", "pairs_per_second"}

TREE: dict[str, Any] = {
    "seed": 7,
    "data": {
        "sources": [{"kind": "text", "path": "corpus"}],
        "split": {"validation": 0.15, "test": 0.1},
        "tokenizer": {"train": {"vocab_size": 320}},
        "sequence_length": 48,
    },
    "model": {
        "architecture": "llama",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    },
    "training": {
        "steps": 4,
        "global_batch": 8,
        "micro_batch": 2,
        "optimizer": {"lr": 3e-3},
        "precision": "fp32",
        "validate": {"every": 2, "sequences": 4},
    },
    "evaluation": {"generation": {"count": 1, "max_new_tokens": 4}},
}
CHAT = {
    "data.task": "chat",
    "data.sources": [{"kind": "jsonl", "path": "chat.jsonl", "prompt": "q", "response": "a"}],
}
CLASSES = {
    "data.task": "text_classification",
    "data.sources": [{"kind": "jsonl", "path": "classes.jsonl"}],
    "evaluation": None,
    "objective": {"class_weights": "balanced", "label_smoothing": 0.1},
    "model.architecture": "bert",
}
PAIRS = {
    "data.task": "preference",
    "data.sources": [{"kind": "jsonl", "path": "pairs.jsonl"}],
    "evaluation": None,
}
BF16 = {"training.precision": "bf16"}
TUNED = {"model": {"from": "runs/packed"}, "data.tokenizer": None}
RESUMED = {"steps": [2, 4]}  # trained to step 2, then by another command to step 4


def optimizer(name: str, lr: float, **more: Any) -> dict[str, Any]:
    return {"training.optimizer": {"name": name, "lr": lr, **more}}


# A case: what it changes in TREE. `ranks`, `steps` (see RESUMED) and `evaluate` are for here.
CASES: dict[str, dict[str, Any]] = {
    "packed": {"evaluate": True},
    "bf16": BF16,
    "unpacked": {"data.packing": False},
    "chat": {**CHAT, "evaluate": True},
    "chat-unpacked": {**CHAT, **BF16, "data.packing": False},
    "tuned": {**TUNED, **BF16},
    "lora": {
        **TUNED,
        **CHAT,
        "model.adapter": {"method": "lora", "rank": 2, "dropout": 0.1},
        "evaluate": True,
    },
    "classes": {**CLASSES, "evaluate": True},
    "pairs": {**TUNED, **PAIRS, "evaluate": True},
    "pairs-kto": {**TUNED, **PAIRS, "objective": {"name": "kto"}},
    "zero0": {**BF16, "training.zero.stage": 0},
    "zero0-fp32": {"training.zero.stage": 0},
    "zero2": {**BF16, "training.zero.stage": 2},
    "zero3": {**BF16, "training.zero.stage": 3},
    "offload": {**BF16, "training.zero": {"stage": 2, "offload": "optimizer"}},
    "offload-all": {"training.zero": {"stage": 3, "offload": "all"}},
    "muon": {**BF16, **optimizer("muon", 1e-2)},
    "adamw8bit": {**BF16, **optimizer("adamw8bit", 3e-3)},
    "schedule_free": {**optimizer("schedule_free", 1e-2), "training.schedule.name": "constant"},
    "adafactor": {**optimizer("adafactor", 0.1), "training.zero.stage": 0},
    "lion-states": {**optimizer("lion", 1e-3, states="bf16", l1=1e-3), "training.clip": 0.05},
    "dropout": {"model.kernels": False, "model.config.attention_dropout": 0.3},
    "recomputed": {**BF16, "training.activation_checkpointing": True},
    "epochs": {"training.steps": None, "training.epochs": 0.2, "training.schedule.name": "linear"},
    "resumed": {**BF16, "training.zero.stage": 2, **RESUMED},
    "two-ranks": {**BF16, "training.zero.stage": 2, **RESUMED, "ranks": 2},
    "two-ranks-muon": {**optimizer("muon", 1e-2), "training.zero.stage": 1, "ranks": 2},
    "two-ranks-chat": {**CHAT, "data.packing": False, "training.zero.stage": 3, "ranks": 2},
}
NEEDS = dict.fromkeys(("tuned", "lora", "pairs", "pairs-kto"), "packed")
HERE = ("ranks", "steps", "evaluate")


# ----------------------------------------------------------------------- one side, in its process


def train_cases(names: list[str]) -> None:
    """Trains the cases one after the other in this process, in the working directory."""
    from gradsmith.cli import app

    ranked = "RANK" in os.environ
    for name in names:
        case, began = CASES[name], time.monotonic()
        for place, steps in enumerate(case.get("steps", [None])):
            path = Path(f"{name}-{place}.json")  # JSON is YAML
            if os.environ.get("RANK", "0") == "0":
                path.write_text(json.dumps(recipe(name, steps)), encoding="utf-8")
            if ranked:
                wait_for(path)
            try:
                app(["train", str(path)], standalone_mode=False)
            except Exception as error:
                if ranked:  # the others wait for this one
                    raise
                traceback.print_exc()
                Path(f"{name}.failed").write_text(f"{type(error).__name__}: {error}")
                break
        else:
            if case.get("evaluate"):
                app(["evaluate", f"runs/{name}", "--split", "validation"], standalone_mode=False)
            Path(f"{name}.done").touch()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    sys.stdout.flush()
    os._exit(0)  # a rank that takes its interpreter down may end in std::terminate


def wait_for(path: Path) -> None:
    while True:
        with contextlib.suppress(OSError, ValueError):
            json.loads(path.read_text(encoding="utf-8"))
            return
        time.sleep(0.05)


def recipe(name: str, steps: int | None) -> dict[str, Any]:
    tree = {"name": name, "output": f"runs/{name}", **json.loads(json.dumps(TREE))}
    for key, value in CASES[name].items():
        if key in HERE:
            continue
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    if steps is not None:
        tree["training"]["steps"] = steps
    return tree


def write_corpus(folder: Path) -> None:
    """Some of Python's own modules, and questions about what their names are."""
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    library = Path(json.__file__).parent.parent
    paths = [p for m in ("json", "html", "urllib", "logging") for p in (library / m).glob("*.py")]
    rows, classes = [], []
    for path in sorted(paths):
        shutil.copy(path, folder / "corpus" / f"{path.parent.name}_{path.name}")
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith("def ") and len(line) < 90:
                said = line.strip().removeprefix("def ")
                rows.append({"q": f"What does {said} take?", "a": said.partition("(")[2]})
                classes.append({"text": said, "label": path.parent.name})
    pairs = [
        {"prompt": row["q"], "chosen": row["a"], "rejected": said["text"]}
        for row, said in zip(rows, classes, strict=True)
    ]
    for name, kind in (("chat", rows), ("classes", classes), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in kind)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------- both, from outside


class Side:
    """A checkout and the folder that its runs are in."""

    def __init__(self, name: str, code: Path, folder: Path):
        self.name, self.code, self.folder = name, code, folder
        self.failed = ""

    def train(self, names: list[str]) -> None:
        todo = [name for name in names if not (self.folder / f"{name}.done").exists()]
        if todo and not (self.folder / "corpus").exists():
            write_corpus(self.folder)
        for name in todo:
            (self.folder / f"{name}.failed").unlink(missing_ok=True)
            shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)
        for ranks in sorted({CASES[name].get("ranks", 1) for name in todo}):
            self._start([n for n in todo if CASES[n].get("ranks", 1) == ranks], ranks)

    def _start(self, names: list[str], ranks: int) -> None:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        command = [sys.executable, *(launcher if ranks > 1 else [])]
        command += [str(Path(__file__).resolve()), "--train", ",".join(names)]
        path = f"{self.code / 'kernels'}:{self.code / 'trainer'}"
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment["OMP_WAIT_POLICY"] = "passive"
        log = self.folder / f"{ranks}-ranks.log"
        with log.open("w") as file:
            code = subprocess.run(
                command, cwd=self.folder, env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
        if code:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            self.failed += f"{self.name} ended with exit code {code}:\n{last}\n"


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def library(code: Path) -> Path | None:
    return next((code / "kernels" / "gradsmith_kernels").glob("_native*.so"), None)


def check_out(commit: str, code: Path) -> None:
    """The commit's files, with a native module."""
    if library(code):
        return
    shutil.rmtree(code, ignore_errors=True)
    code.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(code)], input=archive, check=True)
    ours = library(ROOT)
    if ours is None:
        sys.exit("the native module is not built here: python setup.py build_ext --inplace")
    changed = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", *BUILT])
    if changed.returncode == 0:
        shutil.copy(ours, code / "kernels" / "gradsmith_kernels")
        return
    print(f"csrc/ differs from {commit[:9]}: building its own", flush=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    cached = {"CXX": "ccache g++", "CCACHE_BASEDIR": str(code), "CCACHE_NOHASHDIR": "1"}
    more = cached if shutil.which("ccache") else {}
    subprocess.run(command, cwd=code, env={**more, **os.environ}, check=True)


def kept_folder(commit: str) -> Path:
    """Where BASE's runs are kept: what they depend on is in the name."""
    versions = [metadata.version(name) for name in ("torch", "deepspeed", "transformers", "peft")]
    levels = {key: value for key, value in os.environ.items() if "ISA" in key or "CPU_CAP" in key}
    script = Path(__file__).read_bytes().hex()
    about = [script, platform.python_version(), *versions, sorted(levels.items())]
    return KEPT / commit[:12] / f"runs-{hashlib.sha256(repr(about).encode()).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------ comparing


def bits(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that stands in plain data."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, bits(value)


def rows(folder: Path) -> Iterator[tuple[str, Any]]:
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key not in TIMES and key not in ("kind", "step"):
                yield f"{row['kind']} step {row['step']} {key}", bits(value)


def files(folder: Path, pattern: str) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.glob(pattern)):
        if path.is_file() and path.name != "manifest.json":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            yield str(path.relative_to(folder)), content


def read_json(path: Path) -> dict[str, Any]:
    return dict(leaves(json.loads(path.read_text()))) if path.is_file() else {}


def differences(base: Path, ours: Path) -> Iterator[str]:
    """What is not the same of two runs; and, in brackets, what only one of them has."""
    strict = [
        (dict(rows(base)), dict(rows(ours))),
        *(
            (dict(files(base, pattern)), dict(files(ours, pattern)))
            for pattern in ("checkpoints/*/model/*.safetensors", "data/**/*")
        ),
    ]
    for before, now in strict:
        for key, value in before.items():
            if key not in now:
                yield f"{key}: {value} before, missing now"
            elif now[key] != value:
                yield f"{key}: {value} before, {now[key]} now"
        if new := [key for key in now if key not in before]:
            yield f"(new: {', '.join(new[:4])}{', ...' if len(new) > 4 else ''})"
    for name in ("evaluation.json", "data/manifest.json"):
        before, now = read_json(base / name), read_json(ours / name)
        for key in before.keys() & now.keys():
            if before[key] != now[key]:
                yield f"{name} {key}: {before[key]} before, {now[key]} now"
        if alone := sorted(before.keys() ^ now.keys()):
            yield f"({name}: only on one side: {len(alone)} keys, as {alone[0]})"
        if before and not before.keys() & now.keys():
            yield f"{name}: nothing in common"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", nargs="?", help="a commit")
    parser.add_argument("--only", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--train", help=argparse.SUPPRESS)  # what a side's process is told
    options = parser.parse_args()
    if options.train:
        train_cases(options.train.split(","))
    if not options.base:
        parser.error("the commit to compare with is missing")
    names = options.only.split(",") if options.only else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--only {','.join(unknown)}: no such case; there are {', '.join(CASES)}")
    needed = [NEEDS[name] for name in names if name in NEEDS and NEEDS[name] not in names]
    commit = git("rev-parse", "--verify", f"{options.base}^{{commit}}")
    base = kept_folder(commit)
    base.mkdir(parents=True, exist_ok=True)
    code = base.parent / "code"
    with tempfile.TemporaryDirectory() as temporary, (base.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another gate may be training BASE
        check_out(commit, code)
        sides = [
            Side(commit[:9], code, base),
            Side("the working tree", ROOT, Path(temporary)),
        ]
        threads = [
            threading.Thread(target=side.train, args=([*dict.fromkeys(needed), *names],))
            for side in sides
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed := "".join(side.failed for side in sides):
            sys.exit(failed)
        sys.exit(verdict(names, base, Path(temporary)))


def verdict(names: list[str], base: Path, ours: Path) -> int:
    """Says of each case whether it is the same; 1 if one is not."""
    different = new = 0
    for name in names:
        failed = [side / f"{name}.failed" for side in (base, ours)]
        if failed[0].exists():  # a task that BASE does not know
            found = [f"(not to be had before: {' '.join(failed[0].read_text().split())[:150]})"]
            new += 1
        elif failed[1].exists():
            found = [f"fails now: {failed[1].read_text()}"]
        else:
            found = list(differences(base / "runs" / name, ours / "runs" / name))
        real = [line for line in found if not line.startswith("(")]
        same = "new" if failed[0].exists() else "the same"
        told = f"DIFFERENT\n    {real[0]}" if real else same
        if len(real) > 1:
            told += f"\n    and {len(real) - 1} more"
        for note in found:
            told += f"\n    {note}" if note.startswith("(") else ""
        print(f"{name:15} {told}")
        different += bool(real)
    print(f"{len(names) - different - new} of {len(names) - new} cases are the same, bit by bit")
    return int(different > 0)


if __name__ == "__main__":
    main()
