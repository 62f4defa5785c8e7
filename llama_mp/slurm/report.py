"""What is told of a job after its submission: how far it is, its log, how it ended."""

import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from json import dumps
from pathlib import Path
from typing import Any

from llama_mp.errors import BAD_REQUEST, RequestError, RunError, counted
from llama_mp.parts import Parts
from llama_mp.slurm import cluster
from llama_mp.slurm.cluster import JobRecord
from llama_mp.status import counted_anew, read_status, status_path

SUPERVISOR = " -m llama_mp.slurm.supervisor "
ERROR = re.compile(r"^(?:[0-9]+: )?error: (.*)$", re.MULTILINE)  # srun --label puts the task's number first
TAIL_BYTES = 1 << 18  # of a log: where its last error is looked for
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The --output of a job, and over how many tasks of an array its prompts are split (None: not an array)."""

    output: Path
    num_tasks: int | None

    def status(self, task: str) -> dict[str, Any] | None:
        """How far the job is, or the one task of its array; None while nothing is known of that."""
        if self.num_tasks is not None and not task.isdigit():
            return None
        share = None if self.num_tasks is None else (int(task), self.num_tasks)
        found = read_status(status_path(self.output, share))
        if found is None:
            return None
        job = found["job"] if share is None else f"{found['job']}_{task}"
        return counted_anew(found, Parts(self.output), f"{job}-{found['attempt']}")

    def total(self) -> str:
        """How many prompts are finished, over all tasks; empty while nothing is known of that."""
        tasks = [""] if self.num_tasks is None else map(str, range(self.num_tasks))
        known = [status for task in tasks if (status := self.status(task))]
        if known:
            done, of = (sum(status[key] or 0 for status in known) for key in ("done", "all"))
            missing = "" if len(known) == (self.num_tasks or 1) else " of the tasks that have begun"
            return f"{done} of {of or '?'} prompts{missing}"
        if self.num_tasks is not None and self.output.is_file():  # all tasks are merged, and their own files gone
            with open(self.output, "rb") as lines:
                return f"all {sum(1 for _ in lines)} prompts"
        return ""


def answers_of(job: JobRecord) -> Answers | None:
    """Where `job` writes answers, from the script it was submitted with; None for one without, or not shown to us."""
    try:
        script = cluster.script_of(job.id)
    except RequestError:
        return None
    try:
        words = shlex.split(script.partition(SUPERVISOR)[2])
    except ValueError:  # not a script of ours
        return None
    own = words[: words.index("--")] if "--" in words else []
    given = [
        word.partition("=")[2] or own[place + 1] for place, word in enumerate(own) if re.match("--output(=|$)", word)
    ]
    if not given:
        return None
    array = re.search(r"^#SBATCH --array=0-([0-9]+)", script, re.MULTILINE)
    return Answers(output=Path(job.folder, given[0]), num_tasks=int(array[1]) + 1 if array else None)


# ---- status --------------------------------------------------------------------------------------------------------


def status(id: str, *, json: bool = False) -> None:
    """Print how far job `id` is, a line for each task of an array and one for all of it.

    `json`: for programs, a list of the records, each with what its task's .status file holds as `answers`."""
    jobs = cluster.jobs_of(id)
    answers = answers_of(jobs[0])
    if json:
        print(dumps([asdict(job) | {"answers": answers and answers.status(job.task)} for job in jobs]))
        return
    for job in jobs:
        print(line(job, answers and answers.status(job.task)))
    if answers and len(jobs) > 1 and (total := answers.total()):
        print(f"{id}  {total}")


def line(job: JobRecord, answers: dict[str, Any] | None = None) -> str:
    """`12_3  RUNNING on n[1-2], 1 restart, 17 of 40 prompts, 30.5 tokens/s, ends about 2026-11-23 14:05`"""
    parts = [job.state + (f" ({reason(job)})" if reason(job) else "") + (f" on {job.nodes}" if job.nodes else "")]
    if job.restarts:
        parts.append(counted(job.restarts, "restart"))
    if answers:
        parts.append(f"{answers['done']} of {answers['all'] or '?'} prompts")
        if job.state == "RUNNING" and answers["code"] is None and answers["job"] == job.id.split("_")[0]:
            parts += rate(answers)
    if job.state == "PENDING" and job.start:
        parts.append(f"starts about {job.start[:16].replace('T', ' ')}")
    if job.is_over and (job.code or job.signal):
        parts.append(f"signal {job.signal}" if job.signal else f"exit code {job.code}")
    return f"{job.id}  {', '.join(parts)}"


def reason(job: JobRecord) -> str:
    """Why a job waits or has ended, in SLURM's word, or in ours where that says little."""
    if job.reason == "DependencyNeverSatisfied":
        return f"job {parent(job)}, which it waited for, failed"
    return job.reason if job.reason not in (job.state, "NonZeroExitCode") else ""


def parent(job: JobRecord) -> str:
    return ", ".join(re.findall(r"afterok:([0-9_*]+)", job.dependency)) or "?"


def rate(answers: dict[str, Any]) -> Iterator[str]:
    """The speed of a running attempt, and when it would be done if it went on like that; both once it has begun."""
    if answers.get("tokens_per_s"):
        yield f"{answers['tokens_per_s']:.1f} tokens/s"
    finished = answers["done"] - answers["done_before"]
    if finished > 0 and answers["all"]:
        elapsed_s = answers["updated"] - answers["started"]
        end = answers["updated"] + (answers["all"] - answers["done"]) * elapsed_s / finished
        yield f"ends about {datetime.fromtimestamp(end):%Y-%m-%d %H:%M}"


# ---- logs, cancel --------------------------------------------------------------------------------------------------


def logs(id: str) -> None:
    """Print the log of job `id`, of each task of an array, and on stderr where it lies."""
    jobs = cluster.jobs_of(id)
    written = [job for job in jobs if job.log and Path(job.log).is_file()]
    if not written:
        raise RequestError(
            f"job {line(jobs[0])}: it has written no log {jobs[0].log or 'that SLURM knows of'}; "
            "one that has not begun writes none, and one that has keeps it in --log_dir"
        )
    for job in written:
        print(job.log, file=sys.stderr)
        with open(job.log, encoding="utf-8", errors="replace") as log:
            shutil.copyfileobj(log, sys.stdout)
            sys.stdout.flush()


def cancel(id: str) -> None:
    """Cancel job `id`, and print what was cancelled and what is kept of its work."""
    jobs = cluster.jobs_of(id)
    living = [job for job in jobs if not job.is_over]
    if not living:
        print(f"job {id} has ended already: {', '.join(sorted({job.state for job in jobs}))}")
        return
    answers = answers_of(living[0])
    cluster.cancel(id)
    for job in living:
        print(f"cancelled {line(job, answers and answers.status(job.task))}")
    if answers and (total := answers.total()):
        print(f"{total} are kept for {answers.output}: the same request submitted again goes on there")


# ---- wait ----------------------------------------------------------------------------------------------------------


def wait(id: str) -> None:
    """Return when job `id`, with all tasks of an array, has done its work; a requeued one goes on.

    Changes are told on stderr. Of a job that failed this raises the error that its log ends with, so that the exit code
    is the verb's: RequestError for code 2, else RunError. Ctrl-C ends the waiting, not the job."""
    told: dict[str, str] = {}
    pause_s = FIRST_WAIT_S
    try:
        while True:
            jobs = cluster.patiently(lambda: cluster.jobs_of(id))
            tell(jobs, told)
            if all(job.is_over or job.never_starts for job in jobs):
                break
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LONGEST_WAIT_S)
    except KeyboardInterrupt:
        print(f"job {id} goes on; submit.py status {id} tells how far it is, cancel {id} ends it", file=sys.stderr)
        raise
    if failed := [job for job in jobs if job.state != "COMPLETED"]:
        kind = RequestError if failed[0].code == BAD_REQUEST else RunError
        raise kind(cause(failed[0]))


def tell(jobs: Sequence[JobRecord], told: dict[str, str]) -> None:
    """Print the lines of `jobs` that are not in `told`, and note them there."""
    for job in jobs:
        if told.get(job.id) != (text := line(job)):
            print(text, file=sys.stderr, flush=True)
            told[job.id] = text


def cause(job: JobRecord) -> str:
    """Why `job` did not do its work, as one line."""
    if job.reason == "DependencyNeverSatisfied":
        see = f"see `submit.py logs {parent(job)}`, and submit both again"
        return f"job {job.id} did not run: {reason(job)}; {see}"
    if job.state == "FAILED" and (said := last_error(Path(job.log))):
        return f"job {job.id}: {said}"
    if job.reason == "JobLaunchFailure" and not Path(job.log).is_file():
        return f"job {job.id} could not be started on {job.nodes}: see whether {job.log} can be written there"
    log = f"its log is {job.log}" if job.log else "SLURM does not say where its log is"
    ended = {
        "CANCELLED": "was cancelled: submit it again, and it goes on where it stopped",
        "TIMEOUT": f"reached its time limit of {job.time_limit}: submit it again with more --time, and it goes on",
        "OUT_OF_MEMORY": "took more memory than it was given: submit it again with more --mem_gib, and it goes on",
    }
    how = f"signal {job.signal}" if job.signal else f"exit code {job.code}"
    return f"job {job.id} {ended.get(job.state, f'ended as {job.state} ({how}): see what it wrote')}; {log}"


def last_error(log: Path) -> str:
    """The text of the last `error: ` line of a log; empty where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            found = ERROR.findall(file.read().decode(errors="replace"))
    except OSError:
        return ""
    return found[-1].strip() if found else ""
