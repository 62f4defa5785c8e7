"""What a job's batch script becomes: one step, a process of the verb on each node, and what is done about its end.

`python -m llama_mp.slurm.supervisor [--output FILE] [--max_restarts N] -- COMMAND`

SLURM's signals reach this process, because the script was replaced by it. A preemption, a time limit that is near
(USR1) and a request to end (TERM) end the step and requeue the job; so does a crash, a few times, if prompts were
finished before it. A user's scancel, and what SLURM requeues by itself, are left to SLURM.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal, NamedTuple

from llama_mp import cli
from llama_mp.attempt import ATTEMPT, SHARE, Attempt
from llama_mp.errors import BAD_REQUEST, DONE, NODES, RUN_FAILED, RequestError, RunError, say
from llama_mp.flags import Flags, check_at_least, flag
from llama_mp.parts import Parts
from llama_mp.slurm.own_job import Now, address_of, names_of, now, requeue
from llama_mp.status import counted_anew, read_status, status_path, write_status

STOP_S = 5.0  # for the step to end by itself; requeueing ends it in any case
KILLED_S = 120.0  # for SLURM to end this process, once it has requeued the job
NEAR_S = 300.0  # a signal that comes so near the time limit was sent because of it
POLL_S = 0.1
ENDED_BY_US = 128 + signal.SIGTERM
FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below those that the kernel gives to clients
TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? [\d,\-]+: (Exited with exit code (\d+)|.+)")


@dataclass(frozen=True, kw_only=True)
class SupervisorFlags(Flags):
    output: Path | None = flag(None, "the verb's --output: how far it has come is told beside it")
    max_restarts: int = flag(3, "how often a crashed run is requeued, if it had finished more than before")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, max_restarts=0)


class Job(NamedTuple):
    """This attempt of a job, as SLURM's environment tells of it."""

    id: str  # "12", "12_7": of an array's tasks one has the number of the array, by which scontrol means them all
    number: int  # no other job's, nor another task's
    attempt: str  # "12-0", "12_3-1": the job or the task of an array, and how often it was requeued
    share: str | None  # "3/8": of an array's task
    nodes: list[str]
    cpus: str | None


def job_of(environment: Mapping[str, str], nodes: Sequence[str]) -> Job:
    id, share = environment["SLURM_JOB_ID"], None
    number = int(id)
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, step = (int(environment[f"SLURM_ARRAY_TASK_{word}"]) for word in ("MIN", "STEP"))
        task, num_tasks = int(environment["SLURM_ARRAY_TASK_ID"]), int(environment["SLURM_ARRAY_TASK_COUNT"])
        id, index = f"{environment['SLURM_ARRAY_JOB_ID']}_{task}", (task - first) // step
        if index >= num_tasks:
            raise RequestError(
                "the array has gaps, so that no task would answer a part of the prompts: use --array=0-N"
            )
        share = f"{index}/{num_tasks}"
    attempt = f"{id}-{environment.get('SLURM_RESTART_COUNT', '0')}"
    return Job(id, number, attempt, share, list(nodes), environment.get("SLURM_CPUS_PER_TASK"))


def step_environment(job: Job, address: str) -> dict[str, str]:
    """What the step's processes find beside SLURM's own variables."""
    restarts = Attempt.of(job.attempt, job.share).number
    port = FIRST_PORT + (job.number + 7919 * restarts) % NUM_PORTS  # another one after a restart: it may be taken
    variables = {NODES: ",".join(job.nodes), ATTEMPT: job.attempt}
    variables |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return variables | ({SHARE: job.share} if job.share else {})


def step_command(job: Job, command: Sequence[str]) -> list[str]:
    """srun's: a task on each node; the first that fails ends them all."""
    num_nodes = len(job.nodes)
    options = [f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    # --export: at sites whose jobs inherit nothing (SBATCH_EXPORT=NONE) the step would not learn who it is.
    options += ["--mpi=none", "--input=none", "--export=ALL"]
    options += [f"--cpus-per-task={job.cpus}"] if job.cpus else []  # a step inherits it no more since SLURM 22.05
    return ["srun", *options, *command]


# ---- the step ----------------------------------------------------------------------------------------------------


class Step:
    """The running step. What it says on stderr is passed on, and its first failure noted."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.error: str | None = None  # the first `error: ` line
        self.code: int | None = None  # of the first task that failed
        self.end = "the step failed"  # what srun says of that
        self.process = subprocess.Popen(
            command, env=os.environ | environment, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self.reader = threading.Thread(target=self.read, args=(self.process.stderr,), daemon=True)
        self.reader.start()

    def read(self, lines: IO[str]) -> None:
        for line in lines:
            self.error = self.error or error_in(line)
            if self.code is None and (ended := TASK_ENDED.match(line)):
                self.code, self.end = int(ended[3] or RUN_FAILED), f"node {ended[1]}: {ended[2]}"
            sys.stderr.write(line)
            sys.stderr.flush()

    def wait(self, is_to_stop: Callable[[], bool]) -> int:
        """Its exit code; ended as soon as `is_to_stop`."""
        deadline = None
        while self.process.poll() is None and not (deadline and time.monotonic() > deadline):
            if deadline is None and is_to_stop():
                self.process.terminate()
                deadline = time.monotonic() + STOP_S
            time.sleep(POLL_S)
        if self.process.returncode is None:
            return ENDED_BY_US
        self.reader.join(STOP_S)
        code = self.process.returncode
        return self.code or (code if code >= 0 else 128 - code)


def error_in(line: str) -> str | None:
    """The text of an error that a rank tells, plainly or with --log_json."""
    if line.startswith("error: "):
        return line.removeprefix("error: ").strip()
    if line.startswith('{"time": ') and '"kind": "error"' in line:
        with contextlib.suppress(ValueError):
            return json.loads(line)["text"]
    return None


# ---- what follows ------------------------------------------------------------------------------------------------


class End(NamedTuple):
    """How an attempt ended. `stopped`: how SLURM had it end. `has_grown`: more prompts are done than before."""

    code: int
    stopped: Literal["by preemption", "at the time limit", "by a signal"] | None
    has_grown: bool


class Move(NamedTuple):
    requeues: bool
    restarts: int  # requeues so far of what may fail for ever
    why: str


def next_move(end: End, restarts: int, max_restarts: int) -> Move:
    """What becomes of the job. Counted are crashes, and time limits before which not one prompt was finished: requeued
    without end, neither would ever be done."""
    how = f"ended {end.stopped}" if end.stopped else f"failed with exit code {end.code}"
    if end.code == DONE:
        return Move(False, restarts, "done")
    if end.code == BAD_REQUEST:
        return Move(False, restarts, "the request was wrong")
    if end.stopped and (end.has_grown or end.stopped != "at the time limit"):
        return Move(True, restarts, how)
    if not end.stopped and not end.has_grown:
        return Move(False, restarts, f"{how} before anything was finished: it would fail again")
    if restarts >= max_restarts:
        return Move(False, restarts, f"{how}; --max_restarts {max_restarts} allows no more")
    return Move(True, restarts + 1, how)


class Progress:
    """How far the verb has come, by OUTPUT.status and the parts."""

    def __init__(self, output: Path | None, attempt: Attempt) -> None:
        self.path = output and status_path(output, attempt.share)
        # The last task of an array replaces those of all tasks by one of the whole.
        found = read_status(self.path) or read_status(status_path(output, None)) if output else None
        mine = found is not None and found.get("job") == attempt.job
        known = found if mine else {"job": attempt.job, "done": 0, "all": None}
        # Without an output nothing is kept of how the job was restarted: all count.
        self.restarts = found["restarts"] if mine else 0 if output else attempt.number
        begun = known | {"attempt": attempt.number, "done_before": known["done"]}
        self.status = found if mine and found["attempt"] == attempt.number else begun
        if output:
            self.status = counted_anew(self.status, Parts(output), attempt.name)
        self.has_grown = self.status["done"] > self.status["done_before"]

    def __str__(self) -> str:
        return f"({self.status['done']} of {self.status['all'] or '?'} done)" if self.path else ""

    def save(self, code: int, move: "Move", error: str | None) -> None:
        if self.path:
            told = {"code": None if move.requeues else code, "restarts": move.restarts, "error": error}
            with contextlib.suppress(OSError):  # a full disk, or a folder that is gone: the job's log says it too
                write_status(self.path, self.status | told | {"updated": time.time()})


class Supervisor:
    """One attempt of a job, from its first process to its end or its requeueing."""

    def __init__(self, flags: SupervisorFlags, command: Sequence[str]) -> None:
        self.flags, self.command = flags, command
        self.signals: list[int] = []

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    def run(self) -> int:
        """The job's exit code, unless SLURM ends this process because the job is requeued."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self.note_signal)
        nodes = names_of(os.environ["SLURM_JOB_NODELIST"])
        job = job_of(os.environ, nodes)
        say(f"attempt {job.attempt} on {', '.join(nodes)}: {shlex.join(self.command)}")
        step = Step(step_command(job, self.command), step_environment(job, address_of(nodes[0])))
        code = step.wait(lambda: bool(self.signals))
        attempt = Attempt.of(job.attempt, job.share)
        state = None if code == DONE else now(job.id)  # what is done is done, whether the controller answers or not
        if state and not state.is_of(attempt.number):
            say(f"attempt {job.attempt} was ended by SLURM: {state.state}")
            return code
        stopped = state and self.how_stopped(state)
        if code != DONE and not stopped and step.error is None:  # a process that is killed cannot say so
            step.error = f"{step.end}; nothing there could say why: it ran out of memory, or somebody ended it"
            say(step.error, "error")
        progress = Progress(self.flags.output, attempt)
        move = next_move(End(code, stopped, progress.has_grown), progress.restarts, self.flags.max_restarts)
        progress.save(code, move, step.error)
        say(f"attempt {job.attempt} {move.why} {progress}{': requeued' if move.requeues else ''}".rstrip())
        if move.requeues:
            try:
                self.requeue(job.id)
            except RunError as refusal:
                say(f"attempt {job.attempt} is not requeued after all: {refusal}")
                progress.save(code, move._replace(requeues=False), step.error)
        return code

    def requeue(self, id: str) -> None:
        """Have SLURM start the job again, and wait until it ends this one: to go at its first signal spares the node
        the time until its second. Raises RunError when it will not."""
        num_before = len(self.signals)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # scontrol inherits that: it is to have its answer
        try:
            requeue(id)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        deadline = time.monotonic() + KILLED_S
        while signal.SIGTERM not in self.signals[num_before:] and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def how_stopped(self, state: Now) -> str | None:
        if state.is_preempted:  # said by a signal to us, or, as sites have it, to the step alone
            return "by preemption"
        if not self.signals:
            return None
        return "at the time limit" if state.left_s < NEAR_S else "by a signal"


def main() -> None:
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    command = words[place + 1 :]

    def supervise(flags: SupervisorFlags) -> int:
        if not command or "SLURM_JOB_ID" not in os.environ:
            raise RequestError("this runs inside a job, with the verb's command after --: see launch/submit.py")
        return Supervisor(flags, command).run()

    cli.main(SupervisorFlags, supervise, argv=words[:place], summary=__doc__)


if __name__ == "__main__":
    main()
