"""What a running job asks the controller about itself, and has it do.

Hours of work may hang on an answer, so a controller that gives none for a while is asked again.
"""

import re
import time
from typing import NamedTuple

from llama_mp.errors import RequestError, RunError
from llama_mp.slurm.cluster import call, patiently

ALIVE = ("RUNNING", "SIGNALING")  # the second while a signal is on its way


class Now(NamedTuple):
    """The state of the job at a moment."""

    state: str
    restarts: int
    is_preempted: bool
    left_s: float  # until its time limit, or the end of its grace

    def is_of(self, attempt: int) -> bool:
        """Whether the job runs, and is that attempt; else it was cancelled, or requeued already, or this node was
        thought lost and the job runs again without it."""
        return self.state in ALIVE and self.restarts == attempt


def scontrol(*words: str) -> str:
    """What the command prints. Raises RunError when it fails."""
    try:
        return patiently(lambda: call("scontrol", *words))
    except RequestError as error:
        raise RunError(str(error)) from error


def names_of(node_list: str) -> list[str]:
    """The nodes in SLURM's short form, n[1-2,7]."""
    return scontrol("show", "hostnames", node_list).split()


def address_of(node: str) -> str:
    """Where the node is reached, as SLURM itself does. Raises RunError: each node by itself would be no answer."""
    found = re.search(r"\bNodeAddr=(\S+)", scontrol("show", "node", "-o", node))
    if not found:
        raise RunError(f"SLURM knows no address of node {node}: see scontrol show node {node}")
    return found[1]


def now(id: str) -> Now:
    told = dict(re.findall(r"\b(JobState|Restarts|PreemptTime|EndTime)=(\S+)", scontrol("show", "job", "-o", id)))
    try:
        left_s = time.mktime(time.strptime(told.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S")) - time.time()
    except ValueError:  # Unknown: no limit
        left_s = float("inf")
    return Now(told["JobState"], int(told["Restarts"]), told.get("PreemptTime", "None") != "None", left_s)


def requeue(id: str) -> None:
    """Have SLURM end the job's processes, this one among them, and start it again. Raises RunError when it will not.

    `incomplete`: a job that was cancelled a moment ago stays so; without that word it would be revived."""
    scontrol("requeue", "incomplete", id)
