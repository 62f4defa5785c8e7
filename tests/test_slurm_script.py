"""A job as text: whole files, what bash makes of them, and what sbatch does."""

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, run

from llama_mp.cli import parse
from llama_mp.errors import RequestError
from llama_mp.slurm.flags import JOBS
from llama_mp.slurm.request import job_of
from llama_mp.slurm.script import Job, duration, render, shell

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
HOSTILE = [
    "a b",
    'a"b',
    "a'b",
    "'; echo x; '",
    "$HOME",
    "`id`",
    "a#b",
    "#",
    "100%",
    "%j",
    "-x",
    "*",
    "é",
    "a;b&c",
    "!x",
]
BACKSLASHES = ["a\\b", "\\", 'a\\"', "a\\\\"]
CONTROLS = ["a\nb", "\t", "a\r\n#SBATCH --nodes=9", "\x1b[0m", "it's\n\\n"]

JOB = Job(
    source=("launch/submit.py", "infer", "--size", "65B", "--prompt", "it's"),
    name="infer-65B",
    nodes=2,
    gpus_per_node=4,
    cpus_per_node=16,
    mem_mib=6436,
    time_s=129600,
    log_dir=Path("logs of 100%"),
    python="/opt/my python",
    verb=("launch/infer.py", "--size", "65B", "--prompt", "it's"),
    output=Path("-out.jsonl"),
    max_restarts=1,
    array=4,
    after="12_3",
    partition="gpu",
    account="abc",
    gpu_flag="gres",
    options=("--qos=high", "--exclusive", "--comment=for #1"),
    interface="ib0",
    setup=("module load cuda/12.4", 'source "$HOME/venv/bin/activate"'),
)
TEXT = """\
#!/bin/bash
# python launch/submit.py infer --size 65B --prompt 'it'"'"'s'
#SBATCH --job-name=infer-65B
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=16
#SBATCH --mem=6436M
#SBATCH --time=1-12:00:00
#SBATCH --partition=gpu
#SBATCH --account=abc
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output="logs of 100%%/%x-%A_%a.out"
#SBATCH --array=0-3
#SBATCH --dependency=afterok:12_3
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --qos=high
#SBATCH --exclusive
#SBATCH --comment="for #1"

set -eo pipefail  # without -u: modules and activation scripts read unset variables
trap '' USR1  # until the supervisor listens: a script that dies of a preemption's signal is not requeued
module load cuda/12.4
source "$HOME/venv/bin/activate"
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
exec '/opt/my python' -m llama_mp.slurm.supervisor --output=-out.jsonl --max_restarts 1 -- '/opt/my python' \
launch/infer.py --size 65B --prompt 'it'"'"'s'
"""


def job(**changes: Any) -> Job:
    """A small job that waits for nothing."""
    plain = replace(JOB, log_dir=Path("."), array=None, after=None, options=(), setup=(), interface=None, output=None)
    plain = replace(plain, nodes=1, gpus_per_node=0, cpus_per_node=1, mem_mib=100, time_s=60)
    return replace(plain, **{"partition": None, "account": None} | changes)


# ---- whole files ---------------------------------------------------------------------------------------------------


def test_a_job_with_everything() -> None:
    assert render(JOB) == TEXT


def test_a_job_on_cpus_asks_for_no_gpu_and_has_half_of_a_short_time_to_end_in() -> None:
    lines = render(job()).splitlines()
    assert not [line for line in lines if "gpu" in line or "array" in line or "dependency" in line]
    assert "#SBATCH --time=00:01:00" in lines and "#SBATCH --signal=B:USR1@30" in lines
    assert "#SBATCH --output=%x-%j.out" in lines
    assert lines[-1].startswith("exec '/opt/my python' -m llama_mp.slurm.supervisor --max_restarts 1 -- ")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_of_the_folder_is_what_its_second_line_prints(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LLAMA_MP_HOME", raising=False)
    python, program, verb, *words = shlex.split(path.read_text().splitlines()[1].removeprefix("# "))
    assert python == "python" and "--dry_run" not in words
    flags = parse(JOBS[verb], [*words, "--dry_run"])
    assert render(job_of(verb, flags, program)[0]) == path.read_text()
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_each_verb_has_a_script_and_one_is_over_two_nodes() -> None:
    nodes = {path.stem: re.findall("--nodes=(.*)", path.read_text()) for path in SCRIPTS}
    assert nodes == {"bench": ["1"], "infer": ["1"], "infer-2-nodes": ["2"], "reshard": ["1"]}


def test_submit_prints_the_script_alone(tmp_path: Path) -> None:
    program = str(ROOT / "launch" / "submit.py")
    flags = ["--size", "7B", "--random_weights", "--gpus_per_node", "2", "--dry_run"]
    done = run(sys.executable, program, "bench", *flags, HOME=str(tmp_path))
    assert done.code == 0 and done.stdout.startswith("#!/bin/bash\n")
    assert done.stdout.splitlines()[1] == f"# {shell(['python', program, 'bench', *flags[:-1]])}"
    verb = ["--size", "7B", "--device", "cuda", "--random_weights", "--mp", "2"]
    assert done.stdout.endswith(f" -- {sys.executable} {ROOT / 'launch' / 'bench.py'} {shell(verb)}\n")


# ---- quoting -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """An interpreter whose path is none of the easiest, and which prints its arguments."""
    path = tmp_path / "it's my $python"
    path.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    path.chmod(0o755)
    return path


def test_bash_reads_every_word_as_it_was_meant(stub: Path, tmp_path: Path) -> None:
    words = ("launch/infer.py", *HOSTILE, *BACKSLASHES, *CONTROLS, "")
    text = render(job(python=str(stub), verb=words, source=words, output=Path("o 'f'.jsonl")))
    assert [line for line in text.splitlines() if not line.startswith("#")][-1].startswith("exec ")
    (tmp_path / "job.sh").write_text(text)
    printed = subprocess.run(["bash", tmp_path / "job.sh"], capture_output=True, text=True, check=True).stdout
    supervisor = ["-m", "llama_mp.slurm.supervisor", "--output", "o 'f'.jsonl", "--max_restarts", "1"]
    assert json.loads(printed) == [*supervisor, "--", str(stub), *words]


def test_a_signal_that_comes_while_the_set_up_lines_run_does_not_end_the_script(stub: Path, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(render(job(python=str(stub), setup=("kill -USR1 $$", "kill -USR1 $$"))))
    assert subprocess.run(["bash", tmp_path / "job.sh"], capture_output=True).returncode == 0


def test_no_word_begins_a_line_of_its_own() -> None:
    text = render(job(verb=("x", *CONTROLS), source=("x", *CONTROLS)))
    assert len(text.splitlines()) == len(render(job()).splitlines())


@pytest.mark.parametrize("control", CONTROLS[:4])
@pytest.mark.parametrize("name", ["name", "partition", "account"])
def test_a_control_character_in_a_directive_is_refused(name: str, control: str) -> None:
    with pytest.raises(RequestError, match="cannot hold"):
        render(job(**{name: control}))
    with pytest.raises(RequestError, match="cannot hold"):
        render(job(log_dir=Path(control)))
    with pytest.raises(RequestError, match="cannot hold"):
        render(job(options=(f"--comment={control}",)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"log_dir": Path("a\\b")}, "SLURM writes no log to a backslash"),
        ({"name": "a\\b"}, "SLURM writes no log to a backslash"),
        ({"name": "a/b"}, "--job_name a/b: it is in the name of the log"),
        ({"options": ("--mem=1G",)}, "--mem comes from the plan and the flags: leave it out"),
        ({"options": ("--time=1", "--qos=a")}, "--time comes from the plan"),
        ({"options": ("qos=high",)}, "'qos=high' is none; write them as --qos=high"),
        ({"options": ("--qos high",)}, "'--qos high' is none"),
        ({"options": ("-N2",)}, "'-N2' is none"),
        ({"verb": ("launch/infer.py", "--prompts_file", "a\udcff.txt")}, r"a\udcff is not UTF-8"),
    ],
)
def test_what_no_script_can_say(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(job(**changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"), [(60, "00:01:00"), (5400, "01:30:00"), (86400, "1-00:00:00"), (90061, "1-01:01:01")]
)
def test_durations(seconds: int, text: str) -> None:
    assert duration(seconds) == text


# ---- sbatch --------------------------------------------------------------------------------------------------------


@pytest.mark.slurm
def test_sbatch_reads_every_value_as_it_was_meant(slurm_cluster: Any, tmp_path: Path) -> None:
    for index, value in enumerate([*HOSTILE, *BACKSLASHES, "a=b,c:d@e+f^g"]):
        file = tmp_path / f"{index}.sbatch"
        file.write_text(render(job(options=("--hold", f"--comment={value}"))))
        id = slurm_cluster.sh(f"sbatch --parsable {shlex.quote(str(file))}").strip()
        shown = slurm_cluster.sh(f"scontrol show job {id}")
        slurm_cluster.sh(f"scancel {id}")
        assert re.search(r"^\s*Comment=(.*?) ?$", shown, re.MULTILINE)[1] == value


@pytest.mark.slurm
@pytest.mark.parametrize("gpu_flag", ["gpus-per-node", "gres"])
def test_a_job_asks_for_what_it_was_meant_to(gpu_flag: str, slurm_cluster: Any, tmp_path: Path) -> None:
    wide = {"nodes": 2, "gpus_per_node": 3, "cpus_per_node": 4, "mem_mib": 1000, "time_s": 3000, "gpu_flag": gpu_flag}
    (tmp_path / "parent").write_text(render(job(options=("--hold",))))
    parent = slurm_cluster.sh(f"sbatch --parsable {tmp_path / 'parent'}").strip()
    (tmp_path / "child").write_text(render(job(**wide, after=parent, partition="main", account="a", array=1)))
    child = slurm_cluster.sh(f"sbatch --parsable {tmp_path / 'child'}").strip()
    shown = slurm_cluster.sh(f"scontrol show job {child}")
    script = slurm_cluster.sh(f"scontrol write batch_script {child} -")
    slurm_cluster.sh(f"scancel {parent} {child}")
    for said in (
        *("NumNodes=2", "CPUs/Task=4", "MinMemoryNode=1000M", "TresPerNode=gres:gpu:3", "TimeLimit=00:50:00"),
        *("Requeue=1", "KillOInInvalidDependent=Yes", f"Dependency=afterok:{parent}", "Partition=main", "Account=a"),
        "ArrayTaskId=0",
    ):
        assert said in shown
    assert script.strip() == (tmp_path / "child").read_text().strip()


@pytest.mark.slurm
def test_a_log_is_where_it_was_meant(slurm_cluster: Any, tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    logs = []
    for index, name in enumerate(HOSTILE):
        (tmp_path / name).mkdir()
        file = tmp_path / f"{index}.sbatch"
        file.write_text(render(job(log_dir=tmp_path / name, name=name, python="/bin/true")))
        id = slurm_cluster.sh(f"cd {shlex.quote(str(tmp_path))} && sbatch --parsable {file.name}").strip()
        logs.append(tmp_path / name / f"{name}-{id}.out")
    deadline = time.monotonic() + 60
    while (missing := [log for log in logs if not log.is_file()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert missing == []
