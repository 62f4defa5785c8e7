"""A job as the text of its batch script: a pure function. What the job does is in the supervisor, not in bash.

How sbatch reads an #SBATCH line (its opt.c, and tried on 22.05): blanks end a value and # begins a comment, unless
quotes stand around them; a backslash, inside either kind of quotes too, is taken off and the character after it kept.
In the name of a log, %x is replaced and %% stands for %, but any backslash left in it turns both off.
"""

import re
import shlex
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_mp.errors import RequestError
from llama_mp.flags import flag_words

LONGEST_NOTICE_S = 120  # before the time limit, for the run to end by itself and to be requeued
SUPERVISOR = "llama_mp.slurm.supervisor"
PLAIN_VALUE = re.compile(r"[\w./:,@%+=^-]+", re.ASCII)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of SLURM, and what is to run: `verb` holds the words after the interpreter's."""

    source: tuple[str, ...]  # the command that makes this job
    name: str
    nodes: int
    gpus_per_node: int  # 0: a job that computes on CPUs
    cpus_per_node: int
    mem_mib: int  # of each node
    time_s: int
    log_dir: Path
    python: str
    verb: tuple[str, ...]
    output: Path | None = None  # of infer: the supervisor tells beside it how far it has come
    max_restarts: int = 3
    array: int | None = None
    after: str | None = None
    partition: str | None = None
    account: str | None = None
    gpu_flag: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    options: tuple[str, ...] = ()
    interface: str | None = None
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert min(self.nodes, self.cpus_per_node, self.mem_mib, self.time_s) > 0 <= self.gpus_per_node, self


def render(job: Job) -> str:
    """The batch script. Raises RequestError for a value that no #SBATCH line can hold, or that is not UTF-8."""
    own = dict(resources(job)) | dict(conduct(job))
    lines = ["#!/bin/bash", f"# {shell(['python', *job.source])}"]
    lines += [directive(name, value) for name, value in own.items()]
    lines += [further(option, own) for option in job.options]
    lines += ["", "set -eo pipefail  # without -u: modules and activation scripts read unset variables"]
    lines += [
        "trap '' USR1  # until the supervisor listens: a script that dies of a preemption's signal is not requeued",
        *job.setup,
    ]
    if job.interface is not None:
        name = shlex.quote(job.interface)
        lines.append(f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}")
    text = "\n".join([*lines, f"exec {shell(supervised(job))}", ""])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = text[: error.end].split()[-1].encode(errors="backslashreplace").decode()
        raise RequestError(f"{wrong} is not UTF-8, and no batch script can hold it: rename the file") from error
    return text


def resources(job: Job) -> Iterator[tuple[str, str | None]]:
    """The options of sbatch that say what is asked for, and of whom."""
    yield "job-name", job.name
    yield "nodes", str(job.nodes)
    yield "ntasks-per-node", "1"  # the launcher in it starts a rank for each GPU
    if job.gpus_per_node:
        yield job.gpu_flag, f"gpu:{job.gpus_per_node}" if job.gpu_flag == "gres" else str(job.gpus_per_node)
    yield "cpus-per-task", str(job.cpus_per_node)
    yield "mem", f"{job.mem_mib}M"
    yield "time", duration(job.time_s)
    if job.partition is not None:
        yield "partition", job.partition
    if job.account is not None:
        yield "account", job.account


def conduct(job: Job) -> Iterator[tuple[str, str | None]]:
    """The options that say what becomes of the job in time."""
    yield "requeue", None
    yield "open-mode", "append"
    yield "signal", f"B:USR1@{min(LONGEST_NOTICE_S, job.time_s // 2)}"
    yield "output", log_pattern(job)
    if job.array is not None:
        yield "array", f"0-{job.array - 1}"
    if job.after is not None:
        yield "dependency", f"afterok:{job.after}"
        yield "kill-on-invalid-dep", "yes"


def log_pattern(job: Job) -> str:
    if "\\" in f"{job.name}{job.log_dir}":
        raise RequestError(f"--log_dir {job.log_dir}, --job_name {job.name}: SLURM writes no log to a backslash")
    if "/" in job.name:
        raise RequestError(f"--job_name {job.name}: it is in the name of the log, and / is for folders; leave it out")
    folder = str(job.log_dir).replace("%", "%%")
    return str(Path(folder) / ("%x-%j.out" if job.array is None else "%x-%A_%a.out"))


def supervised(job: Job) -> list[str]:
    """The words that take the place of the script's shell."""
    output = [] if job.output is None else flag_words("output", str(job.output))
    restarts = flag_words("max_restarts", str(job.max_restarts))
    return [job.python, "-m", SUPERVISOR, *output, *restarts, "--", job.python, *job.verb]


def duration(seconds: int) -> str:
    """As sbatch takes a time: [D-]HH:MM:SS."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}-' if days else ''}{hour:02}:{minute:02}:{second:02}"


# ---- quoting -------------------------------------------------------------------------------------------------------


def directive(name: str, value: str | None) -> str:
    """An #SBATCH line. Raises RequestError for a value with a control character: a newline would begin another one."""
    if value is None:
        return f"#SBATCH --{name}"
    if found := CONTROL.search(value):
        raise RequestError(f"--{name} is {value!r}: an #SBATCH line cannot hold {found[0]!r}; give it another name")
    if not PLAIN_VALUE.fullmatch(value):
        value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return f"#SBATCH --{name}={value}"


def further(option: str, own: Container[str]) -> str:
    """An option of the site file. Raises RequestError for what is none, and for what the job itself says."""
    found = re.fullmatch(r"--([a-z][a-z-]*)(?:=(.*))?", option, re.DOTALL)
    if found is None:
        raise RequestError(f"options of the site file: {option!r} is none; write them as --qos=high or --exclusive")
    if found[1] in own:
        raise RequestError(
            f"options of the site file: {option!r}, but --{found[1]} comes from the plan and the flags: leave it out"
        )
    return directive(found[1], found[2])


def shell(words: Sequence[str]) -> str:
    """`words` as bash reads them, on one line."""
    return " ".join(map(shell_word, words))


def shell_word(word: str) -> str:
    if not CONTROL.search(word):
        return shlex.quote(word)
    escaped = re.sub(r"(['\\])", r"\\\1", word)
    return "$'" + CONTROL.sub(lambda found: f"\\{ord(found[0]):03o}", escaped) + "'"
