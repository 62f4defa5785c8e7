"""SLURM's own commands: a script submitted, what is known of a job, a job cancelled. Each failure is one line.

`scontrol show job -o` is what is read: the same fields from old releases to new ones, unlike squeue's JSON. It forgets
an ended job after MinJobAge (five minutes by default); what accounting keeps, where there is any, is less.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llama_mp.errors import RequestError

OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
# Why a waiting job would wait for ever, where a site lets such a job in (EnforcePartLimits=NO). PartitionConfig is what
# a job above the partition's limits shows at first; a partition or nodes that are down, or reserved, show something
# else and may come back.
NEVER = re.compile(
    "PartitionConfig|Partition(Node|Time)Limit|BadConstraints|DependencyNeverSatisfied|InvalidAccount|InvalidQOS|"
    "AccountNotAllowed|QOSNotAllowed|Job's_(account|QOS)_not_.*|(Assoc|QOS)\\w*PerJob(Limit)?"
)
PATIENCE_S, RETRY_S = 900.0, 5.0  # with a controller that is being restarted
JUDGED_S = 1.0  # how long a scheduler is given to look at a new job
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # which cluster, and who asks
OPTIONS = {"TIMELIMIT": "time", "NO_REQUEUE": "requeue", "ARRAY_INX": "array", "MEM_PER_NODE": "mem"}  # SBATCH_*
CONFUSED = "Unable to contact|Could not establish|communication|[Tt]imed out|Zero Bytes|Connection refused"
UNKNOWN = "Invalid job id|Job \\S+ not found"
# For what sbatch says, or the reason of a job that would never start: which flag of ours is meant.
REMEDIES = {
    CONFUSED: "run it on a node of the cluster, a login node for one, and see whether `scontrol ping` answers",
    "presently disabled": "leave --no-requeue out of the site file, and see JobRequeue in `scontrol show config`",
    "policy": "a limit of yours stands against it: `sacctmgr show assoc user=$USER` and `sacctmgr show qos` list them",
    "time ?limit|WallDuration": "lower --time, or give a --partition that allows it: `sinfo -o '%P %l'` shows limits",
    "partition name|partition specified|partition not": "give one of these as --partition: {partitions}",
    "[Aa]ccount|QOS": "give an --account that you may use there; `sacctmgr show user $USER withassoc` lists yours",
    "dependency": "give --after the id of a job that is known here",
    "array": "lower --array; `scontrol show config | grep MaxArraySize` shows the limit",
    "(generic resource|feature|license|reservation|option)": "check gpu_flag and options of the site file",
    ".*": "lower --nodes, --gpus_per_node, --cpus_per_node, --mem_gib or --time, or give another --partition: "
    "`sinfo -o '%P %D %c %m %G %l'` shows what there is",
}

T = TypeVar("T")


class Unreachable(RequestError):
    """The controller does not answer, now."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job, or a task of an array, as SLURM knows it; texts are empty where it says nothing.

    `id` is what scancel takes: 12, 12_3, and 12_[4-7] for tasks that wait together. Times are as SLURM writes them,
    2026-11-23T11:28:39, in the cluster's time zone."""

    id: str
    task: str
    state: str
    reason: str
    nodes: str
    restarts: int
    start: str
    end: str
    time_limit: str
    code: int
    signal: int
    log: str
    folder: str
    command: str
    dependency: str

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def never_starts(self) -> bool:
        return self.state == "PENDING" and NEVER.fullmatch(self.reason) is not None


def submit(text: str) -> str:
    """Hand the script `text` to sbatch, in this folder. Returns the job's id.

    Raises RequestError for what sbatch refuses, for a job that would wait for ever (it is cancelled again), and for one
    that is to come after a job that failed or is not known: SLURM drops such a condition without a word."""
    for parent in re.findall(r"^#SBATCH --dependency=afterok:([0-9_]+)", text, re.MULTILINE):
        check_parent(parent)
    id = call("sbatch", "--parsable", text=text).strip().split(";")[0]
    check_can_start(id)
    return id


def check_parent(id: str) -> None:
    """Raise RequestError unless job `id` is known and has not failed."""
    try:
        jobs = jobs_of(id)
    except RequestError as error:
        raise RequestError(f"--after {id}: {error}") from error
    for job in jobs:
        if job.never_starts or (job.is_over and job.state != "COMPLETED"):
            fate = f"will never start ({job.reason})" if job.never_starts else f"has failed ({job.state})"
            raise RequestError(
                f"--after {id}: job {job.id} {fate}, so this one would never run; submit that one again first, or "
                "leave --after out if what it was to do is done"
            )


def check_can_start(id: str) -> None:
    """Cancel a new job that would wait for ever, and raise RequestError."""
    jobs: Sequence[JobRecord] = ()
    end = time.monotonic() + JUDGED_S
    while time.monotonic() < end and all(job.state == "PENDING" and not job.reason for job in jobs):
        try:
            jobs = jobs_of(id)
        except RequestError:
            return  # it was taken, and its id is not lost for want of an answer now
        time.sleep(0.1)
    for job in jobs:
        if job.never_starts:
            cancel(id)
            raise RequestError(
                f"SLURM would never start this job ({job.reason}), so it was cancelled: {remedy(job.reason)}"
            )


def jobs_of(id: str) -> list[JobRecord]:
    """Job `id`, or each task of that array. Raises RequestError for an id that is none, or that nobody remembers."""
    if not re.fullmatch("[0-9]+(_[0-9]+)?", id):
        raise RequestError(f"{id!r} is no job's id: give a number such as 12, or 12_3 for a task of an array")
    try:
        jobs = [parse(line) for line in call("scontrol", "show", "job", "-o", id).splitlines() if line.strip()]
        return sorted(jobs, key=lambda job: int(re.match("[0-9]*", job.task)[0] or 0))
    except RequestError as error:
        if not re.search(UNKNOWN, str(error)):
            raise
        if jobs := accounted(id):
            return jobs
        raise RequestError(
            f"SLURM knows no job {id} (it forgets ended ones after a while, and no accounts of it were found): check "
            "the number, or see the job's log, and the .status file beside its --output"
        ) from None


def parse(line: str) -> JobRecord:
    """The record in one line of `scontrol show job -o`, in which names and paths stand unquoted, blanks and all."""
    head, _, rest = line.partition(" JobName=")
    _, _, rest = rest.partition(" UserId=")  # whatever the name holds, the user's id follows
    words, _, paths = rest.partition(" Command=")
    fields = dict(re.findall(r"(\S+?)=(\S*)", f"{head} UserId={words}"))
    known = {name: "" if value in ("(null)", "None", "Unknown") else value for name, value in fields.items()}
    command, folder, log = re.fullmatch(
        r"(.*?)(?: WorkDir=(.*?))?(?: (?:Admin|System)?Comment=.*?)?(?: StdErr=.*?)?(?: StdIn=.*?)?"
        r"(?: StdOut=(.*?))?(?: (?:Power|Mail\w*|Tres\w+|Cpus\w+|Mem\w+|Kill\w+|OOM\w+)=.*)?\s*",
        paths,
    ).groups("")
    task = known.get("ArrayTaskId", "").split("%")[0]
    code, signal = map(int, known["ExitCode"].split(":"))
    waiting_task = task and not task.isdigit()
    return JobRecord(
        id=array_id(known["ArrayJobId"], task) if task else known["JobId"],
        task=task,
        state=known["JobState"],
        reason=known["Reason"],
        nodes=known.get("NodeList", ""),
        restarts=int(known.get("Restarts", 0)),
        start=known.get("StartTime", ""),
        end=known.get("EndTime", ""),
        time_limit=known.get("TimeLimit", ""),
        code=code,
        signal=signal,
        # scontrol fills in what stands for names and numbers, for waiting tasks 4294967294, but leaves %% as it is.
        log="" if waiting_task else log.replace("%%", "%"),
        folder=folder,
        command=command.removesuffix("(null)"),
        dependency=known.get("Dependency", ""),
    )


def array_id(array: str, task: str) -> str:
    return f"{array}_{task}" if task.isdigit() else f"{array}_[{task}]"


def accounted(id: str) -> list[JobRecord]:
    """What accounting has kept of job `id`: nothing of its log and its restarts. Empty where it keeps nothing."""
    columns = "JobID,State,Reason,NodeList,Start,End,Timelimit,ExitCode,WorkDir"
    try:
        lines = call("sacct", "-nXP", "--delimiter=\x1f", f"--jobs={id}", f"--format={columns}").splitlines()
    except RequestError:
        return []
    jobs = []
    for line in lines:
        name, state, reason, nodes, start, end, time_limit, exit_code, folder = line.split("\x1f")
        code, signal = map(int, exit_code.split(":"))
        jobs.append(
            JobRecord(
                id=name,
                task=name.partition("_")[2].strip("[]").split("%")[0],
                state=state.split()[0],  # CANCELLED by 1000
                reason="" if reason == "None" else reason,
                nodes="" if nodes == "None assigned" else nodes,
                restarts=0,
                start=start.replace("Unknown", ""),
                end=end.replace("Unknown", ""),
                time_limit=time_limit,
                code=code,
                signal=signal,
                log="",
                folder=folder,
                command="",
                dependency="",
            )
        )
    return jobs


def script_of(id: str) -> str:
    """The script that job `id` was submitted with. Raises RequestError where SLURM does not show it, as to others."""
    return call("scontrol", "write", "batch_script", id.split("_")[0], "-")


def cancel(id: str) -> None:
    """Cancel job `id`, all tasks of an array; nothing happens to one that is over."""
    call("scancel", id)


def call(*command: str, text: str = "") -> str:
    """The stdout of one of SLURM's commands. Raises RequestError with what it said, and the remedy.

    What it says besides (a site's own advice) goes to stderr. It does not see the variables of a job in which we may be
    running: sbatch would hand them on, and SLURM_TIME_FORMAT would change what is read. Nor does it see a user's own
    defaults (SBATCH_PARTITION) for what the script in `text` says: to sbatch they would count for more."""
    options = set(re.findall("^#SBATCH --([a-z-]+)", text, re.MULTILINE))
    env = {name: value for name, value in os.environ.items() if is_for_us(name, options)}
    try:
        done = subprocess.run(command, input=text, capture_output=True, env=env, encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise RequestError(
            f"{command[0]} is not on this machine: run this on a node of a SLURM cluster, a login node for one; "
            "`submit.py VERB --dry_run` prints a script anywhere"
        ) from error
    if done.returncode:
        said = spoken(done.stderr or done.stdout) or f"exit code {done.returncode}"
        kind = Unreachable if re.search(CONFUSED, said) else RequestError
        raise kind(f"{command[0]}: {said}; {remedy(said)}")
    print(done.stderr, end="", file=sys.stderr)
    return done.stdout


def is_for_us(name: str, options: Container[str]) -> bool:
    """Whether a command is to see the variable `name`, when its script gives `options`."""
    kind, _, word = name.partition("_")
    if kind == "SBATCH":
        return OPTIONS.get(word, word.lower().replace("_", "-")) not in options
    return kind != "SLURM" or name in KEPT


def patiently(ask: Callable[[], T]) -> T:
    """What `ask` returns, asked again while the controller does not answer. Raises what else `ask` raises."""
    end, told = time.monotonic() + PATIENCE_S, False
    while True:
        try:
            return ask()
        except Unreachable as error:
            if time.monotonic() > end:
                raise
            if not told:
                print(f"{error}; asking again for {PATIENCE_S / 60:.0f} minutes", file=sys.stderr, flush=True)
            told = True
            time.sleep(RETRY_S)


def spoken(stderr: str) -> str:
    """What a command of SLURM said, without its prefixes, as one line."""
    lines = [
        re.sub(r"^\w+: ((error|fatal): )?(Batch job submission failed: )?", "", line) for line in stderr.splitlines()
    ]
    return ", ".join(dict.fromkeys(line.strip() for line in lines if line.strip()))


def remedy(cause: str) -> str:
    """What to do about `cause`, in words of our flags."""
    text = next(text for pattern, text in REMEDIES.items() if re.search(pattern, cause))
    if "{partitions}" not in text:
        return text
    return text.format(partitions=", ".join(dict.fromkeys(call("sinfo", "--noheader", "--format=%R").split())))
