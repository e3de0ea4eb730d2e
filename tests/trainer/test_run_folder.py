"""What a hostile or clumsy user finds: nothing of theirs is lost, nothing held out is trained on,
and what was trained is gone on from, measured and exported as it was, or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_recipes import tokenizer_of

from gradsmith import checkpoints
from gradsmith.__main__ import main
from gradsmith.data.prepared import PreparedData
from gradsmith.files import MARKER
from gradsmith.run import Run

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "output": "runs/x",
    "data": {
        "sources": [{"kind": "text", "path": "texts"}],
        "split": {"validation": 0.1, "test": 0.2},
        "tokenizer": {"train": {"vocab_size": 300}},
        "sequence_length": 32,
    },
    "model": {
        "architecture": "llama",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "training": {
        "steps": 6,
        "global_batch": 4,
        "micro_batch": 4,
        "precision": "fp32",
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "constant"},
        "checkpoint": {"every": 2, "keep": 3},
    },
    "evaluation": {"yardsticks": [], "generation": {"count": 1, "max_new_tokens": 4}},
}
LORA = {
    **RECIPE,
    "name": "lora",
    "output": "runs/lora",
    "data": {k: v for k, v in RECIPE["data"].items() if k != "tokenizer"},
    "model": {"from": "runs/x", "adapter": {"rank": 2}},
}


LOCKS = ("lock", "results.lock")


def write_texts(folder: Path, count: int = 60) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        text = f"Text number {number} of many. " + f"It says {number * number} again. " * 8
        (folder / f"{number}.txt").write_text(text)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content; but for the locks', which say who held them."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in LOCKS]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, recipes, a run of 6 steps, and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    write_texts(folder / "texts")
    (folder / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "lora.yaml").write_text(yaml.safe_dump(LORA))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "r.yaml"]) == 0
        assert main(["train", "lora.yaml"]) == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts and a recipe, nothing trained; the working directory."""
    folder = tmp_path / "project"
    write_texts(folder / "texts")
    (folder / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(folder)
    return folder


def losses(run: str) -> list[float]:
    rows = [row for row in Run(run).read_metrics() if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def steps(run: str) -> list[int]:
    return sorted(step for step, _ in Run(run).steps())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


WEIGHTS = "model/model.safetensors"
COMMANDS = (["prepare"], ["train"], ["train", "--fresh"], ["launch", "--slurm", "--nodes", "1",
            "--nproc", "1"])  # fmt: skip

# -------------------------------------------------------------------------------------- files


def test_a_folder_of_the_users_is_refused_and_left_as_it_is(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Red team A1: `output: .` emptied data/, data.old/, data.tmp/ and wrote over recipe.yaml."""
    mine = project / "mine"
    for name in ("data/labels.csv", "data.old/a", "data.tmp/a", "recipe.yaml", "metrics.jsonl",
                 "checkpoints/best.pt"):  # fmt: skip
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(f"# {name}, precious")
    before = tree(project)
    for command in COMMANDS:
        assert main([*command, "r.yaml", "output=mine"]) == 2
        err = capfd.readouterr().err
        assert "did not make" in err
        for found in ("data/ (with labels.csv)", "recipe.yaml", "metrics.jsonl"):
            assert found in err
        assert tree(project) == before


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (".", "holds the recipe"),
        ("texts/..", "holds the recipe"),
        ("texts", "data.sources.0.path: texts lies in"),
        ("''", "the path is empty"),
        ("/", "holds the recipe"),
        ("~", "found nothing"),
        ("~/", "holds nothing else"),
        ("$HOME/..", "holds nothing else"),
        ("$NO_SUCH_NAME/x", "$NO_SUCH_NAME in"),
    ],
)
def test_an_output_that_holds_more_than_a_run_is_refused(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    output: str,
    said: str,
) -> None:
    home = tmp_path / "users" / "ann"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    before = tree(tmp_path)
    for command in (*COMMANDS, ["validate"]):
        assert main([*command, "r.yaml", f"output={output}"]) == 2
        assert said in capfd.readouterr().err
    assert tree(tmp_path) == before


def test_fresh_deletes_what_was_trained_and_nothing_else(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    best = here / "runs" / "x" / "checkpoints" / "best" / "weights.pt"
    best.parent.mkdir()
    best.touch()
    (here / "runs" / "x" / "notes.txt").write_text("mine")
    before = tree(here / "runs")
    assert main(["train", "--fresh", "r.yaml"]) == 2
    assert "checkpoints/best: gradsmith did not make this folder" in capfd.readouterr().err
    after = tree(here / "runs")
    assert {k: v for k, v in after.items() if "logs" not in k} == {
        k: v for k, v in before.items() if "logs" not in k
    }
    shutil.rmtree(best.parent)
    assert main(["train", "--fresh", "r.yaml", "training.steps=1"]) == 0
    assert steps("runs/x") == [1]
    assert (here / "runs" / "x" / "notes.txt").read_text() == "mine"


def test_tilde_and_variables_mean_the_same_in_every_path(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red team B5: `output: ~/x` made a folder named ~ in the working directory."""
    home = tmp_path / "home"
    write_texts(home / "texts")
    monkeypatch.setenv("HOME", str(home))
    overrides = ["output=~/runs/x", "data.sources.0.path=$HOME/texts"]
    assert main(["validate", "r.yaml", *overrides]) == 0
    assert main(["prepare", "r.yaml", *overrides]) == 0
    assert (home / "runs" / "x" / "data" / "manifest.json").is_file()
    assert sorted(p.name for p in project.iterdir()) == ["r.yaml", "texts"]


def test_export_leaves_its_neighbours_and_runs_alone(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Red team A13, C12."""
    for name in ("b.tmp", ".b.tmp"):
        (here / name).mkdir()
        (here / name / "precious.txt").touch()
    assert main(["export", "runs/x", "b"]) == 0
    assert (here / "b.tmp" / "precious.txt").is_file()
    assert (here / ".b.tmp" / "precious.txt").is_file()
    assert sorted(p.name for p in here.iterdir()) == [
        ".b.tmp", "b", "b.tmp", "lora.yaml", "r.yaml", "runs", "texts",
    ]  # fmt: skip
    assert main(["export", "runs/x", "runs/x/checkpoints/step-000100"]) == 2
    assert "which is gradsmith's own" in capfd.readouterr().err


def test_a_run_of_an_older_version_is_known_by_what_it_wrote(here: Path) -> None:
    for marker in (here / "runs").rglob(MARKER):
        marker.unlink()
    shutil.rmtree(here / "runs" / "x" / "data" / "validation")  # damaged, so it is made again
    assert main(["train", "r.yaml", "training.steps=7"]) == 0
    assert len(losses("runs/x")) == 7
    assert (here / "runs" / "x" / MARKER).is_file()


# ------------------------------------------------------------------------------------ leakage


@pytest.mark.parametrize("layout", ["around", "glob", "link", "jsonl"])
def test_no_held_out_text_is_trained_on_whatever_the_layout(
    project: Path, layout: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Red team A2: a source around the run's folder read its own spool."""
    kind, path = "text", "."
    if layout == "glob":
        path = "'**/*.*'"
    elif layout == "link":
        path = "texts"
        (project / "runs" / "x" / "data" / "train").mkdir(parents=True)
        for part in ("train", "test"):
            target = project / "runs" / "x" / "data" / part / "documents.jsonl"
            (project / "texts" / f"{part}.txt").symlink_to(target)
        shutil.rmtree(project / "runs")
    elif layout == "jsonl":
        kind, path = "jsonl", "."
        rows = [{"text": p.read_text()} for p in sorted(Path("texts").glob("*.txt"))]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data.sources.0.path={path}", f"data.sources.0.kind={kind}"]
    if layout in ("around", "glob"):
        Path("r.yaml").rename("../r.yaml")
    recipe = "../r.yaml" if layout in ("around", "glob") else "r.yaml"
    for share in (0.2, 0.3):  # the second time the first one's data are there
        assert main(["prepare", recipe, *overrides, f"data.split.test={share}"]) == 0
        prepared = PreparedData.open("runs/x/data")
        tokens, tokenizer = prepared.split("train").tokens, tokenizer_of(prepared)
        text = tokenizer.decode(tokens.astype(int))
        held_out = [row["text"] for row in prepared.held_out("test")]
        assert len(held_out) > 5
        assert not [t for t in held_out if t[:60] in text or t.encode()[:60] in text.encode()]
        documents = sum(split["documents"] for split in prepared.manifest["splits"].values())
        assert documents == 60
    assert ("left out, since gradsmith wrote it" in capfd.readouterr().out) or layout == "link"


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "text", "path": "runs/x"},
        {"kind": "jsonl", "path": "runs/x/data/test/documents.jsonl"},
        {"kind": "jsonl", "path": "runs/x/data/*/documents.jsonl"},
        {"kind": "hf_dataset", "path": "runs/x/data/test"},
        {"kind": "hf_dataset", "path": "runs"},
    ],
)
def test_a_source_within_a_run_is_refused_by_name(
    here: Path, source: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    sources = json.dumps([source])
    assert main(["prepare", "r.yaml", "output=runs/y", f"data.sources={sources}"]) == 2
    err = capfd.readouterr().err
    assert "data.sources.0.path: runs" in err
    assert "which gradsmith wrote: held-out text of a run is in it" in err


# -------------------------------------------------------------------------------------- locks


def test_everything_that_writes_takes_the_lock(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Red team A3: `prepare` exchanged data and tokenizer under a run that trained."""
    before = tree(here / "runs" / "x" / "data")
    with Run("runs/x").lock():
        for command in (["prepare"], ["train"], ["train", "--fresh"]):
            assert main([*command, "r.yaml"]) == 2
            assert "in use by process" in capfd.readouterr().err
        assert main(["evaluate", "runs/x"]) == 0  # of a run that trains
        assert main(["report", "runs/x"]) == 0
    with Run("runs/x").lock("results"):
        for command in (["evaluate", "runs/x"], ["report", "runs/x"]):
            capfd.readouterr()
            assert main(command) == 2
            assert "in use by process" in capfd.readouterr().err
    assert tree(here / "runs" / "x" / "data") == before


def test_prepare_does_not_exchange_the_data_of_a_trained_run(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(here / "runs")
    assert main(["prepare", "r.yaml", "data.tokenizer.train.vocab_size=280"]) == 2
    assert "vocab_size: 300 before, 280 now" in capfd.readouterr().err
    assert tree(here / "runs") == before


def test_data_that_the_checkpoint_does_not_name_is_not_measured_on(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "r.yaml", "output=runs/y", "data.split.test=0.3"]) == 0
    shutil.rmtree("runs/x/data")
    shutil.copytree("runs/y/data", "runs/x/data")
    assert main(["evaluate", "runs/x"]) == 2
    assert "is not the data that" in capfd.readouterr().err
    assert main(["train", "r.yaml", "training.steps=7"]) == 0  # which makes the old data again
    assert main(["evaluate", "runs/x"]) == 0


def test_a_checkpoint_that_is_read_is_not_deleted(here: Path) -> None:
    run = Run("runs/x")
    with checkpoints.reading(run.checkpoints / "step-000002"):
        checkpoints.keep_newest(run, 1)
        assert steps("runs/x") == [2, 6]
    checkpoints.keep_newest(run, 1)
    assert steps("runs/x") == [6]


# -------------------------------------------------------------------------------- checkpoints


def test_a_damaged_checkpoint_never_costs_a_good_one(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Red team A4: with keep 1 only the damaged one was left."""
    flip(Path("runs/x/checkpoints/step-000006", WEIGHTS))
    overrides = ["training.steps=5", "training.checkpoint.keep=1"]
    assert main(["train", "r.yaml", *overrides]) == 0
    out = capfd.readouterr().out
    assert "not used: runs/x/checkpoints/step-000006: model/model.safetensors is not what" in out
    assert steps("runs/x") == [5, 6]
    assert main(["train", "r.yaml", *overrides]) == 0
    assert "going on from runs/x/checkpoints/step-000005" in capfd.readouterr().out
    newest, _ = checkpoints.newest(Run("runs/x"))
    assert newest == Path("runs/x/checkpoints/step-000005")


def damage_format(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


def damage_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"format": 1, "files": {}}')


def damage_step(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("step-000002"), checkpoint)


def damage_by_more(checkpoint: Path) -> None:
    shutil.copy(checkpoint / WEIGHTS, checkpoint / "model" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "damage", [damage_format, damage_manifest, damage_step, damage_by_more, shutil.rmtree]
)
def test_what_is_no_whole_checkpoint_of_its_step_is_not_used(
    here: Path, damage: Callable[[Path], None]
) -> None:
    """Red team B8."""
    run = Run("runs/x")
    damage(run.checkpoints / "step-000006")
    assert checkpoints.newest(run)[0] == run.checkpoints / "step-000004"
    checkpoints.keep_newest(run, 2)
    assert {2, 4} <= set(steps("runs/x"))


def test_where_every_checkpoint_is_damaged_the_run_stops_and_says_so(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6):
        flip(Path(f"runs/x/checkpoints/step-{step:06}", WEIGHTS))
    before = tree(here / "runs" / "x" / "checkpoints")
    metrics = Path("runs/x/metrics.jsonl").read_bytes()
    for _ in range(2):
        assert main(["train", "r.yaml", "training.steps=8"]) == 2
        assert "every checkpoint is damaged" in capfd.readouterr().err
    assert tree(here / "runs" / "x" / "checkpoints") == before
    assert Path("runs/x/metrics.jsonl").read_bytes() == metrics


def test_what_loads_a_model_verifies_it_and_says_which_it_took(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Red team A6: a flipped byte was measured without a word, and export fell back silently."""
    commands = (
        ["evaluate", "runs/x", "--json"],
        ["generate", "runs/x", "--prompt", "Text", "--max-new-tokens", "2"],
        ["export", "runs/x", "out"],
    )
    for command in commands[:2]:
        assert main(command) == 0
        assert "runs/x: step-000006" in capfd.readouterr().err
    flip(Path("runs/x/checkpoints/step-000006", WEIGHTS))
    for command in commands:
        assert main(command) == 0
        out, err = capfd.readouterr()
        assert "not used: runs/x/checkpoints/step-000006" in err
        assert "runs/x: step-000004" in err
        assert "step-" not in out
    assert Run("runs/x").folder.joinpath("evaluation.json").read_text().count('"step": 4') == 1
    for path in ("runs/x/checkpoints/step-000006", "runs/x/checkpoints/step-000006/model"):
        assert main(["generate", path, "--prompt", "Text"]) == 2
        assert "is not what was written" in capfd.readouterr().err
    overrides = ["output=runs/y", "training.steps=1"]
    assert main(["train", "lora.yaml", *overrides]) == 0
    assert "runs/x: step-000004" in capfd.readouterr().out
    assert json.loads(Path("runs/y/base/manifest.json").read_text())["step"] == 4


def test_a_base_that_is_trained_on_or_deleted_is_kept(here: Path) -> None:
    """Red team A5: the base's checkpoint was rotated out, and another base came in its place."""
    generate = ["generate", "runs/lora", "--prompt", "Text", "--temperature", "0"]
    assert main(["train", "lora.yaml", "output=runs/whole", "training.steps=8"]) == 0
    assert main(["train", "r.yaml", "training.steps=9", "training.checkpoint.keep=1"]) == 0
    assert steps("runs/x") == [9]
    assert main(["train", "lora.yaml", "training.steps=8"]) == 0
    assert losses("runs/lora")[:6] == losses("runs/whole")[:6]
    shutil.rmtree("runs/x")
    assert main(["train", "lora.yaml", "training.steps=9"]) == 0
    assert len(losses("runs/lora")) == 9
    Path("runs/lora").rename("moved")
    generate[1] = "moved"
    assert main(generate) == 0
    assert main(["evaluate", "moved"]) == 0
    assert main(["export", "moved", "adapter"]) == 0
    base = json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).resolve() == here / "moved" / "base"


def test_another_base_is_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = Path("runs/lora/base/model.safetensors")
    content = base.read_bytes()
    base.unlink()
    base.write_bytes(content)
    flip(base)
    for command in (
        ["train", "lora.yaml", "training.steps=8"],
        ["generate", "runs/lora", "--prompt", "Text"],
        ["evaluate", "runs/lora"],
        ["export", "runs/lora", "out", "--form", "merged"],
    ):
        capfd.readouterr()
        assert main(command) == 2
        assert "this is not the base that the run began with" in capfd.readouterr().err
    assert not Path("out").exists()


# ------------------------------------------------------------------------ divergence and resume


def test_a_diverged_run_ends_with_exit_1_however_often_it_is_started(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Red team A7."""
    wild = ["training.optimizer.lr=1000000.0", "training.optimizer.eps=1e-30", "training.clip=null"]
    for length in (6, 6, 40):
        assert main(["train", "r.yaml", *wild, f"training.steps={length}"]) == 1
        assert "the run has diverged" in capfd.readouterr().err
    rows = [row for row in Run("runs/x").read_metrics() if row["kind"] == "train"]
    skipped = {row["step"] for row in rows if row.get("skipped")}
    assert skipped
    assert not skipped & set(steps("runs/x"))


def test_skipped_steps_cost_no_checkpoint(here: Path) -> None:
    """V3: a good run that goes on at a rate that is too high kept only what came after."""
    Path("runs/x/recipe.yaml").unlink()
    overrides = ["training.steps=60", "training.optimizer.lr=1.0e+9", "training.clip=null"]
    for _ in range(2):
        assert main(["train", "r.yaml", *overrides]) == 1
    found = Run("runs/x").steps()
    assert len(found) >= 3
    first_bad = min(row["step"] for row in Run("runs/x").read_metrics() if row.get("skipped"))
    assert [step for step, _ in found if step <= 6][:2] == [6, 4]
    assert all(step < first_bad for step, _ in found)
    assert math.isfinite(losses("runs/x")[5])


def test_an_order_to_start_over_is_carried_out_once(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Red team A10: a requeued job, or torchrun's restart, gives the same command again."""
    command = ["train", "--fresh-once", "0123abcd", "r.yaml"]
    assert main([*command, "training.steps=2"]) == 0
    assert steps("runs/x") == [2]
    assert main([*command, "training.steps=4"]) == 0
    assert "going on from runs/x/checkpoints/step-000002" in capfd.readouterr().out
    assert steps("runs/x") == [2, 4]
    launch = ["launch", "--slurm", "--nodes", "1", "--nproc", "1", "--fresh", "--dry-run", "r.yaml"]
    scripts = []
    for _ in range(2):
        assert main(launch) == 0
        scripts.append(capfd.readouterr().out)
    orders = [text.partition("--fresh-once ")[2].split()[0] for text in scripts]
    assert len(set(orders)) == 2  # each is an order of its own
    assert not any("--fresh " in text for text in scripts)


def test_changed_sources_are_refused_before_anything_is_prepared(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Red team A11: the data were prepared anew first, and the old ones were gone."""
    before = tree(here / "runs" / "x" / "data")
    Path("texts/new.txt").write_text("Something else, which was not there before.")
    for command in (["train", "r.yaml", "training.steps=8"], ["prepare", "r.yaml"]):
        assert main(command) == 2
        err = capfd.readouterr().err
        assert "the sources are not what this run was trained on" in err
        assert "data.sources.0: 60 files" in err
        assert "61 of" in err
    assert tree(here / "runs" / "x" / "data") == before
    flip(Path("runs/x/data/train/tokens.bin"))  # must be made again, and cannot be
    assert main(["train", "r.yaml", "training.steps=8"]) == 2
    assert Path("runs/x/data/test/documents.jsonl").read_bytes() == before["test/documents.jsonl"]
    Path("texts/new.txt").unlink()
    assert main(["train", "r.yaml", "training.steps=8"]) == 0
    assert tree(here / "runs" / "x" / "data") == before


def test_sources_that_are_gone_are_no_obstacle(here: Path) -> None:
    """Red team B4, C9."""
    shutil.rmtree("texts")
    assert main(["validate", "r.yaml"]) == 0
    assert main(["train", "r.yaml", "training.steps=7"]) == 0
    assert len(losses("runs/x")) == 7
    assert main(["train", "--fresh", "r.yaml"]) == 2
    assert len(losses("runs/x")) == 7


def test_fewer_steps_than_are_done_is_said(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "r.yaml", "training.steps=3"]) == 0
    assert "6 steps are done and the recipe asks for 3" in capfd.readouterr().out


def test_a_prepared_folder_is_a_run_without_a_checkpoint(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "r.yaml"]) == 0
    assert main(["evaluate", "runs/x"]) == 2
    assert "this run has no checkpoint yet" in capfd.readouterr().err
