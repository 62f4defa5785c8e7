"""What is known of a process by its host, its number and its birth; and what the kernel tells of one that is gone or
does not move: whether it was out of memory, stopped, or waits."""

import os
import socket
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
STATES = {  # proc(5), the third field of stat
    "T": "it is stopped (SIGSTOP); SIGCONT would have let it go on",
    "t": "a debugger holds it",
    "D": "it waits for a disk or a network file system that does not answer",
}


def num_oom_kills() -> int:
    """Processes that the kernel has killed because memory ran out, in the control group around this one and on the
    machine: a number to compare with a later one."""
    own = [line[4:] for line in (PROC / "self" / "cgroup").read_text().splitlines() if line.startswith("0::/")]
    files = [CGROUPS / folder / "memory.events" for folder in ["", *own]] + [PROC / "vmstat"]
    fields = [line.split() for file in files if file.is_file() for line in file.read_text().splitlines()]
    return sum(int(words[1]) for words in fields if words[0] == "oom_kill")


def own_host() -> str:
    """What this host is called among those of a run: SLURM's name of the node, where one machine may play several."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def born(pid: int) -> str:
    """When the process began, in ticks since the machine did: no two of one number share it. Empty: there is none, or
    only what its parent has not fetched yet."""
    fields = stat_of(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def why_still(pid: int) -> str:
    """Why a process that lives does not answer, as far as the kernel knows."""
    fields = stat_of(pid)
    return STATES.get(fields[0], "it hangs") if fields else "it is gone"


def stat_of(pid: int) -> list[str]:
    """The fields of proc(5)'s stat from the state on; none where there is no such process."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_here(pid: int, when_born: str) -> bool:
    """Whether the process that was `born` then is alive."""
    return born(pid) == when_born != ""


def end(pid: int, when_born: str, signal: int) -> None:
    """Send `signal` to that process and to no later one of its number."""
    if is_here(pid, when_born):
        os.kill(pid, signal)
