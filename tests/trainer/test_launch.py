"""`gradsmith launch`: which options go together, the commands it makes, and real processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import start, write_project

from gradsmith.__main__ import main
from gradsmith.errors import UserError
from gradsmith.launch import physical_cores, read_hostfile


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write_project(tmp_path, "tiny.yaml", **{"data.split.test": 0.0})
    (tmp_path / "hosts").write_text("# two machines\nnode0 slots=1\n\nnode1 slots=1\n")
    return tmp_path


# -------------------------------------------------------------------------- options and commands


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--hostfile hosts --nnodes 2", "--nnodes does not go with --hostfile"),
        ("--hostfile hosts --nproc 2", "--nproc does not go with --hostfile"),
        ("--hostfile hosts --slurm", "--hostfile and --slurm are different ways to start"),
        ("--slurm --nodes 2 --nproc 1 --node-rank 0", "--slurm and --node-rank are different"),
        ("--hostfile nowhere", "--hostfile: nowhere: no such file"),
        ("--nnodes 2", "--nnodes needs --node-rank R and --master HOST:PORT"),
        ("--nnodes 2 --node-rank 2 --master a:1", "with --nnodes 2 allowed are 0 to 1"),
        ("--nnodes 2 --node-rank 0 --master a", "--master: found a; expected HOST:PORT"),
        ("--nnodes 2 --node-rank 0 --master a:99999", "expected HOST:PORT"),
        ("--node-rank 0", "--node-rank and --master go with --nnodes"),
        ("--slurm --nodes 2", "--slurm needs --nodes and --nproc"),
        ("--slurm --nodes 2 --nproc 1 --master a:1", "--master does not go with --slurm"),
        ("--submit", "--submit goes with --slurm"),
        ("--time 1:00:00", "--time goes with --slurm"),
        ("--nproc 3", "4 sequences do not divide over 3 ranks"),
    ],
)
def test_options_that_do_not_go_together(
    options: str, said: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *options.split(), "tiny.yaml", "--dry-run"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node0 slots=0\n", r':1: found "node0 slots=0"; expected HOST slots=N'),
        ("node0 slots=2\nnode1\n", r':2: found "node1"'),
        ("node0 slots=1\nnode0 slots=1\n", ":2: the host node0 stands there twice"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_bad_hostfile(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=said):
        read_hostfile(tmp_path / "hosts")


TRAIN = ["-m", "gradsmith", "train"]
RUN = ["-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--nproc 2 tiny.yaml",
            [*RUN, "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", *TRAIN,
             "tiny.yaml"],
        ),
        (
            "--nproc 1 --nnodes 2 --node-rank 1 --master n0:29500 --fresh-once 0a1b tiny.yaml",
            [*RUN, "--nnodes", "2", "--node-rank", "1", "--master-addr", "n0", "--master-port",
             "29500", "--nproc-per-node", "1", *TRAIN, "--fresh-once", "0a1b", "tiny.yaml"],
        ),
        (
            "--nproc 2 tiny.yaml 'data.sources.0.path=a b' -- --max-restarts 1",
            [*RUN, "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2",
             "--max-restarts", "1", *TRAIN, "tiny.yaml", "data.sources.0.path=a b"],
        ),
        (
            "--hostfile hosts tiny.yaml -- --launcher openmpi",
            ["-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--quiet",
             "--no_local_rank", "--launcher", "openmpi", "--module", *TRAIN[1:], "tiny.yaml"],
        ),
    ],
)  # fmt: skip
def test_dry_run_prints_the_command(
    arguments: str, expected: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command, *engine = arguments.split(" -- ")
    assert (
        main(["launch", "--dry-run", *shlex.split(command), *("-- ".join(["", *engine]).split())])
        == 0
    )
    words = shlex.split(capfd.readouterr().out)
    if words[0].startswith("OMP_NUM_THREADS="):
        assert int(words.pop(0).partition("=")[2]) >= 1
    assert words == [sys.executable, *expected]
    assert not (here / "run").exists()


def test_threads_are_shared_out_unless_the_user_says(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gradsmith.launch.physical_cores", lambda: 8)
    for nproc, threads in (("1", 8), ("2", 4)):
        assert main(["launch", "--dry-run", "--nproc", nproc, "tiny.yaml"]) == 0
        assert capfd.readouterr().out.startswith(f"OMP_NUM_THREADS={threads} ")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["launch", "--dry-run", "--nproc", "2", "tiny.yaml"]) == 0
    assert capfd.readouterr().out.startswith("OMP_NUM_THREADS=3 ")


# --------------------------------------------------------------------------------------- Slurm


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


SLURM = ["launch", "--slurm", "--nodes", "2", "--nproc", "1", "--time", "1:00:00"]
SLURM += ["--partition", "gpu", "--sbatch", "gpus-per-node=1", "tiny.yaml", "name=a b"]


def test_the_sbatch_script_starts_launch_on_each_node(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "texts").rename(here / "a b")
    job = [*SLURM[:-1], "data.sources.0.path=a b", "--", "--max-restarts", "1"]
    assert main(job) == 0
    assert "submit it with: sbatch run/launch.sbatch" in capfd.readouterr().out
    script = (here / "run" / "launch.sbatch").read_text()
    directives = re.findall(r"^#SBATCH --(.*)$", script, flags=re.MULTILINE)
    assert {"job-name=tiny", "nodes=2", "ntasks-per-node=1", "time=1:00:00"} <= set(directives)
    assert {"partition=gpu", "gpus-per-node=1", f"chdir={here}"} <= set(directives)
    assert f"output={here}/run/logs/slurm-%j.out" in directives
    assert (here / "run" / "logs").is_dir()  # sbatch does not make it

    # Run it with stand-ins for Slurm's programs: this srun shows what node 1 would be told.
    program(here / "bin", "scontrol", "echo node0; sleep 0.2; echo node1")
    program(
        here / "bin",
        "srun",
        'while [[ "$1" == --* ]]; do shift; done\n'
        '[[ "$1 $2" == "bash -c" ]] || exit 9\n'
        'show=\'for word in "$@"; do echo "$word"; done\'\n'
        'SLURM_NODEID=1 bash -c "${3/exec/set --}; $show" "${@:4}"',
    )
    environment = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "40123"}
    environment |= {"PATH": f"{here / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "run/launch.sbatch"], env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert words[:4] == [sys.executable, "-m", "gradsmith", "launch"]
    assert words[4:12] == ["--node-rank", "1", "--nnodes", "2", "--nproc", "1", "--master",
                           "node0:20123"]  # fmt: skip
    assert words[12:] == ["tiny.yaml", "data.sources.0.path=a b", "--", "--max-restarts", "1"]
    assert main(["launch", "--dry-run", *words[4:]]) == 0  # and launch takes it
    assert "--node-rank 1 --master-addr node0 --master-port 20123" in capfd.readouterr().out


def test_submit_hands_the_script_to_sbatch(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = [*SLURM[:-1], "--submit"]
    monkeypatch.setenv("PATH", str(here / "bin"))
    assert main(job) == 2
    assert "sbatch is not on the PATH; wrote run/launch.sbatch" in capfd.readouterr().err
    program(here / "bin", "sbatch", 'echo "submitted $*"; exit 3')
    monkeypatch.setenv("PATH", f"{here / 'bin'}:/usr/bin:/bin")
    assert main(job) == 3
    assert capfd.readouterr().out == "submitted run/launch.sbatch\n"


def test_slurm_dry_run_prints_the_script_and_writes_nothing(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*SLURM[:-1], "--dry-run"]) == 0
    assert capfd.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n")
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("gets_on", "code", "queued"), [(True, 143, True), (False, 143, False), (True, 1, False)]
)
def test_near_the_time_limit_a_job_saves_and_is_queued_again(
    gets_on: bool, code: int, queued: bool, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*SLURM[:-1], "--dry-run"]) == 0
    script = capfd.readouterr().out
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@120"} <= set(script.splitlines())
    # A srun whose ranks save when they are told, as `scancel` tells them.
    save = "mkdir -p run/checkpoints/step-000007; " if gets_on else ""
    srun = f"trap '{save}exit {code}' TERM; echo $$ > srun.pid; while :; do sleep 0.05; done"
    program(here / "bin", "srun", srun)
    program(here / "bin", "scancel", 'echo "$@" >> told; kill -TERM "$(cat srun.pid)"')
    program(here / "bin", "scontrol", 'case $1 in show) echo node0;; *) echo "$@" >> told;; esac')
    environment = {"SLURM_JOB_NODELIST": "node0", "SLURM_JOB_ID": "77"}
    environment |= {"PATH": f"{here / 'bin'}:/usr/bin:/bin"}
    shell = subprocess.Popen(["bash", "-c", script], env=environment)
    while not (here / "srun.pid").is_file() or not (here / "srun.pid").read_text().strip():
        assert shell.poll() is None
        time.sleep(0.02)
    shell.send_signal(signal.SIGUSR1)
    assert shell.wait(timeout=60) == code
    told = (here / "told").read_text().splitlines()
    assert told == ["--signal=TERM 77.0", *(["requeue 77"] if queued else [])]


# --------------------------------------------------------------------------- what a shell would do

PAYLOADS = ["; touch pwned", "$(touch pwned)", "`touch pwned`", "'; touch pwned; '", "a b#c%j",
            "\\", '"', "${HOME}", "| touch pwned", "> pwned", "-oProxyCommand=touch", "*", "~",
            "--fresh", "-x"]  # fmt: skip
LINE_BREAKS = ["a\ntouch pwned\n#", "a\r#", "a\0", "a\x1b[2J", "a\u2028b"]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_script_hands_on_every_word_as_it_was(
    payload: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = here / f"{payload} here"
    place.mkdir()
    recipe = Path(f"{payload}.yaml")
    (here / "tiny.yaml").rename(here / recipe)
    # a path takes two of them for the home, and sbatch drops a backslash
    output = "run" if payload in ("~", "${HOME}", "\\") else payload
    overrides = [f"data.chat.system={json.dumps(payload)}", f"output={json.dumps(output)}"]
    job = ["launch", "--slurm", "--nodes", "2", "--nproc", "1", "--sbatch", f"comment={payload}",
           "--dry-run", f"./{recipe}", *overrides, "--", payload]  # fmt: skip
    assert main(job) == 0
    script = capfd.readouterr().out
    directives = [
        shlex.split(line.removeprefix("#SBATCH "), comments=True)  # as sbatch reads them
        for line in script.splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert [f"--comment={payload}"] in directives
    path = f"{here}/{output}".replace("%", "%%")
    assert [f"--output={path}/logs/slurm-%j.out"] in directives
    assert [f"--chdir={here}"] in directives
    assert all(len(words) == 1 for words in directives)

    program(here / "bin", "scontrol", "echo node0")
    program(here / "bin", "srun", "printf '%s\\0' \"$@\"")
    done = subprocess.run(
        ["bash", "-c", script],
        env={
            "SLURM_JOB_NODELIST": "a",
            "SLURM_JOB_ID": "1",
            "PATH": f"{here / 'bin'}:/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split("\0")[:-1]
    path = f"./{recipe}" if payload.startswith("-") else str(recipe)
    assert words[-5:] == [path, *overrides, "--", payload]
    assert not list(here.rglob("pwned"))


@pytest.mark.parametrize("payload", LINE_BREAKS)
@pytest.mark.parametrize(
    "words",
    [
        ["--sbatch=comment=RAW", "tiny.yaml"],
        ["--time=RAW", "tiny.yaml"],
        ["--partition=RAW", "tiny.yaml"],
        ["tiny.yaml", "output=QUOTED"],
        ["tiny.yaml", "name=QUOTED"],
        ["tiny.yaml", "data.chat.system=RAW"],
        ["tiny.yaml", "--", "RAW"],
    ],
)
def test_nothing_with_a_line_break_gets_into_a_script(
    words: list[str], payload: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [w.replace("RAW", payload).replace("QUOTED", json.dumps(payload)) for w in words]
    assert main(["launch", "--slurm", "--nodes", "2", "--nproc", "1", "--dry-run", *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("place", ["a\\b", "w%j"])
def test_what_sbatch_does_with_paths(
    place: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / place).mkdir()
    monkeypatch.chdir(here / place)
    texts = "data.sources.0.path=../texts"
    code = main(["launch", "--slurm", "--nodes", "2", "--nproc", "1", "../tiny.yaml", texts])
    if "%" in place:  # in --output it fills in what stands behind one, in --chdir it does not
        script = Path("run/launch.sbatch").read_text()
        assert f"#SBATCH --chdir={here}/{place}\n" in script
        assert f"#SBATCH --output={here}/w%%j/run/logs/slurm-%j.out\n" in script
    else:
        assert code == 2
        assert "sbatch takes no path with a \\ in it" in capfd.readouterr().err
        assert not Path("run").exists()


@pytest.mark.parametrize(
    "option", ["--sbatch=; rm -rf /", "--sbatch=", "--sbatch=A=b", "--time=1h", "--time=1:00:00 x",
               "--partition=a b", "--partition=-a", "--partition=a;b"]
)  # fmt: skip
def test_sbatchs_values_have_a_form(
    option: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--slurm", "--nodes", "2", "--nproc", "1", option, "tiny.yaml"]) == 2
    assert f"{option.partition('=')[0]}: found" in capfd.readouterr().err
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    "host",
    ["-oProxyCommand=touch${IFS}pwned", "a;b", "$(a)", "a'b", "a,b", "a/b", "user@-x", "\u00e4"],
)
def test_a_host_is_a_name(host: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for text in (f"{host} slots=1\nb slots=1\n", f"b slots=1 # x\r{host} slots=1\n"):
        (here / "hosts").write_text(text, newline="")
        assert main(["launch", "--hostfile", "hosts", "tiny.yaml", "--dry-run"]) == 2
        assert "expected HOST slots=N" in capfd.readouterr().err
    assert main(["launch", "--nnodes", "2", "--node-rank", "0", "--master", f"{host}:29500",
                 "--dry-run", "tiny.yaml"]) == 2  # fmt: skip
    assert "--master: found" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny.yaml", "data.chat.system=$(touch pwned)"], "recipe and overrides: found"),
        (["tiny.yaml", "data.chat.system=a b"], "recipe and overrides: found"),
        (["tiny.yaml", "--", "--venv_script", "a;touch pwned"], "--: found a;touch pwned"),
        (["a b.yaml"], "recipe and overrides: found a b.yaml"),
    ],
)
def test_what_deepspeeds_launcher_would_not_quote_is_refused(
    words: list[str], said: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "a b.yaml").write_text((here / "tiny.yaml").read_text())
    assert main(["launch", "--hostfile", "hosts", "--dry-run", *words]) == 2
    assert said in capfd.readouterr().err


def test_a_working_directory_with_a_space_is_no_place_for_a_hostfile(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "a;b").mkdir()
    monkeypatch.chdir(here / "a;b")
    assert main(["launch", "--hostfile", "../hosts", "--dry-run", "../tiny.yaml",
                 "data.sources.0.path=../texts"]) == 2  # fmt: skip
    assert "the working directory: found" in capfd.readouterr().err


# ------------------------------------------------------------------------------ real processes


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def world(run: Path) -> int:
    return int(json.loads((run / "provenance.json").read_text())["world"])


def test_two_ranks_and_two_nodes_train_alike(here: Path) -> None:
    code, _, err = finish(start("launch", "--nproc", "2", "tiny.yaml", "output=one-node"))
    assert code == 0, err

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes", "2", "--nproc", "1", "--master", f"127.0.0.1:{port}"]
    nodes = [
        start("launch", *where, "--node-rank", rank, "tiny.yaml", "output=two-nodes")
        for rank in ("0", "1")
    ]
    for code, _, err in map(finish, nodes):
        assert code == 0, err
    assert world(here / "one-node") == world(here / "two-nodes") == 2
    assert len(losses(here / "one-node")) == 2
    assert losses(here / "two-nodes") == pytest.approx(losses(here / "one-node"), rel=1e-5)


def test_deepspeeds_launcher_trains_on_a_hostfile(here: Path) -> None:
    (here / "hosts").write_text("localhost slots=2\n")
    alone = ["--no_ssh_check", "--master_addr", "127.0.0.1"]  # this machine may have no ssh
    code, _, err = finish(start("launch", "--hostfile", "hosts", "tiny.yaml", "--", *alone))
    assert code == 0, err
    provenance = json.loads((here / "run" / "provenance.json").read_text())
    assert provenance["threads"] == max(1, physical_cores() // 2)
    assert world(here / "run") == 2
    assert len(losses(here / "run")) == 2


def test_a_wrong_recipe_ends_with_2_and_its_message_once(here: Path) -> None:
    code, out, err = finish(
        start("launch", "--nproc", "2", "tiny.yaml", "model.config.hidden_sise=8")
    )
    assert code == 2, err
    assert out == ""
    assert err.count('hidden_sise: llama has none. Did you mean "hidden_size"?') == 1
    assert "Traceback" not in err
    assert "torch.distributed" not in err


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("os.kill(os.getpid(), 9)", 1, "error: rank 1 was killed by SIGKILL (most often because"),
        ("sys.exit(7)", 1, "error: rank 1 ended with exit code 7"),
        ("sys.exit(fail('no room', 1))", 1, "error: no room"),
        ("sys.exit(fail('a: wrong', 2))", 2, "error: a: wrong"),
    ],
)
def test_how_a_rank_dies_is_told_without_a_stack_dump(
    script: str, code: int, said: str, tmp_path: Path
) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, sys, time\nfrom gradsmith.__main__ import _fail as fail\n"
        f"if os.environ['RANK'] == '1':\n    {script}\ntime.sleep(60)\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys\nimport gradsmith.launch as launch, gradsmith.__main__ as entry\n"
            "launch.launch = lambda job, dry_run: launch._run_torchrun(sys.argv[2:])\n"
            "sys.exit(entry.main(['launch', sys.argv[1]]))",
            *("recipe.yaml", "--standalone", "--local-addr", "127.0.0.1"),
            *("--nproc-per-node", "2", str(rank)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(said)


def test_an_option_that_torchrun_does_not_know(here: Path) -> None:
    code, _, err = finish(start("launch", "--nproc", "1", "tiny.yaml", "--", "--bogus"))
    assert code == 2, err
    assert "torchrun does not understand the options after --" in err
