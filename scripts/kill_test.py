"""Kills a real 2-rank `gradsmith launch` at random moments, and looks at what is left.

    python scripts/kill_test.py --kills 20 --seed 1

A run is trained once undisturbed. A second one, of the same recipe, is killed by SIGKILL, one rank
or all of its processes, while it prepares its data, builds the model, makes steps, writes a
checkpoint and is evaluated; after each kill the same command is given again. In the end its
losses, gradient norms and validations must be the first one's bit by bit, what `evaluate` finds
too, every file of the user's must be there unchanged, and nothing half-written may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RECIPE = """
name: victim
output: runs/victim
data:
  sources: [{kind: text, path: .}]
  split: {validation: 0.1, test: 0.1}
  tokenizer: {train: {vocab_size: 2000}}
  sequence_length: 64
model:
  architecture: llama
  config: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}
training:
  steps: 100
  global_batch: 16
  micro_batch: 2
  precision: fp32
  validate: {every: 20, sequences: 16}
  checkpoint: {every: 4, keep: 2}
evaluation: {generation: {count: 1, max_new_tokens: 8}}
"""
PHASES = ("prepare", "build", "steps", "checkpoint", "evaluation")
LONGEST = 240  # seconds that one attempt may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        test = KillTest(folder, random.Random(options.seed))
        test.run(options.kills)


class KillTest:
    def __init__(self, folder: Path, chance: random.Random):
        self.folder, self.chance = folder, chance
        self.victim = folder / "runs" / "victim"

    def run(self, kills: int) -> None:
        self.make_user_files()
        before = self.user_files()
        self.finish("reference")
        expected = self.results("reference")
        done: list[str] = []
        # Data are prepared once and a run ends once, so those kills come first and last.
        plan = sorted((PHASES[i % len(PHASES)] for i in range(kills)), key=self.order)
        middle = [p for p in plan if p not in ("prepare", "evaluation")]
        self.chance.shuffle(middle)
        first, last = plan.count("prepare"), plan.count("evaluation")
        for phase in ["prepare"] * first + middle + ["evaluation"] * last:
            if phase == "evaluation" and "evaluation" not in done:
                self.finish("victim", evaluate=False)
            done.append(phase)
            self.kill_once(phase, len(done), kills)
            assert self.user_files() == before, "a file of the user's is not as it was"
        self.finish("victim")
        found = self.results("victim")
        for what, values in expected.items():
            assert found[what] == values, f"{what} differ:\n{values}\n{found[what]}"
        assert self.user_files() == before, "a file of the user's is not as it was"
        left = [str(p) for p in self.folder.rglob("*gradsmith-tmp*")]
        assert not left, f"half-written: {left}"
        counts = ", ".join(f"{done.count(phase)} in {phase}" for phase in PHASES)
        print(
            f"{len(done)} kills ({counts}): {len(expected['steps'])} losses and gradient norms, "
            f"{len(expected['validations'])} validations and the evaluation are bit-equal, and "
            f"all {len(before)} of the user's files are as they were"
        )

    @staticmethod
    def order(phase: str) -> int:
        return PHASES.index(phase)

    # ------------------------------------------------------------------------------ the user's

    def make_user_files(self) -> None:
        words = [f"word{i}" for i in range(3000)]
        chance = random.Random(7)
        (self.folder / "texts").mkdir(parents=True)
        for number in range(300):
            text = " ".join(chance.choices(words, k=900))
            (self.folder / "texts" / f"{number}.txt").write_text(text)
        for name in ("notes.txt", "runs/mine.txt", "runs/victim/.mine.txt", "runs/data/mine.txt",
                     "runs/.victim.tmp"):  # fmt: skip
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(f"{name} is mine.")
        self.recipe = self.folder.parent / f"{self.folder.name}.yaml"
        self.recipe.write_text(RECIPE)

    def user_files(self) -> dict[str, bytes]:
        paths = [p for p in self.folder.rglob("*") if p.is_file()]
        mine = [p for p in paths if p.name.endswith((".txt", ".tmp"))]
        found = {str(p.relative_to(self.folder)): p.read_bytes() for p in mine}
        # tokenizers and bases keep no .txt here; what a run writes is not the user's
        return {name: data for name, data in found.items() if "checkpoints" not in name}

    # ----------------------------------------------------------------------------- the commands

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.folder.parent / f"{self.folder.name}.log").open("ab")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "gradsmith", *command],
            cwd=self.folder, env=environment, stdout=log, stderr=log,
        )  # fmt: skip

    def train(self, name: str) -> subprocess.Popen[bytes]:
        return self.start("launch", "--nproc", "2", str(self.recipe), f"output=runs/{name}")

    def finish(self, name: str, evaluate: bool = True) -> None:
        assert self.train(name).wait(LONGEST) == 0, f"{name} did not train; see {self.folder}.log"
        if evaluate:
            assert self.start("evaluate", f"runs/{name}").wait(LONGEST) == 0, "no evaluation"

    def results(self, name: str) -> dict[str, list[object]]:
        run = self.folder / "runs" / name
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [r for r in rows if r["kind"] == "train"]
        validations = [r for r in rows if r["kind"] == "validation"]
        evaluation = json.loads((run / "evaluation.json").read_text())
        return {
            "steps": [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in steps],
            "validations": [(r["step"], r["loss"]) for r in validations],
            "evaluation": [evaluation["step"], evaluation["metrics"], evaluation["blocks"]],
        }

    # --------------------------------------------------------------------------------- the kill

    def kill_once(self, phase: str, number: int, kills: int) -> None:
        evaluating = phase == "evaluation"
        process = self.start("evaluate", "runs/victim") if evaluating else self.train("victim")
        before = self.logged()
        aim = before + self.chance.randint(1, 8)
        reached: dict[str, Callable[[], bool]] = {
            "prepare": lambda: (
                self.there(".data.gradsmith-tmp/train/spool.jsonl") or reached["build"]()
            ),
            "build": lambda: self.there("data/manifest.json") and self.ranks(process.pid) >= 2,
            "steps": lambda: self.logged() >= aim,
            "checkpoint": lambda: self.there("checkpoints/.step-*.gradsmith-tmp"),
            "evaluation": lambda: self.there("results.lock"),
        }
        longest_delay = {"prepare": 1.0, "build": 8.0, "evaluation": 8.0, "checkpoint": 0.05}
        deadline = time.monotonic() + LONGEST
        while not reached[phase]() and process.poll() is None:
            assert time.monotonic() < deadline, f"{phase} was not reached"
            time.sleep(0.002)
        time.sleep(self.chance.uniform(0, longest_delay.get(phase, 0.05)))
        tree = descendants(process.pid)
        ranks = [pid for pid in tree if b"\0train\0" in command_of(pid)]
        doomed = [self.chance.choice(ranks)] if ranks and self.chance.random() < 0.5 else tree
        alive = process.poll() is None
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code = process.wait(LONGEST)
        for pid in tree:  # a rank whose launcher is gone may take a moment to see it
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        who = "one rank" if len(doomed) == 1 and ranks else "all processes"
        print(
            f"{number}/{kills}: {phase}: killed {who} at step {self.logged()}, exit code {code}"
            + ("" if alive else " (it had ended already)"),
            flush=True,
        )
        assert not alive or code != 0, "killed, and yet it ended well"

    def there(self, pattern: str) -> bool:
        return any(self.victim.glob(pattern))

    def logged(self) -> int:
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError, KeyError):
            return int(
                json.loads((self.victim / "metrics.jsonl").read_text().splitlines()[-1])["step"]
            )
        return 0

    @staticmethod
    def ranks(launcher: int) -> int:
        return sum(b"\0train\0" in command_of(pid) for pid in descendants(launcher))


def descendants(root: int) -> list[int]:
    """A process and all that it has started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


if __name__ == "__main__":
    main()
