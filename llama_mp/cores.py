"""How many cores a process may compute with."""

import functools
import math
import os
from pathlib import Path

from llama_mp.errors import RequestError

MAX_THREADS = 8
CPUINFO = Path("/proc/cpuinfo")
unpinned: set[int] | None = None  # what this process may run on, while it keeps to a share of it (pinning.py)


@functools.cache
def cpu_features() -> frozenset[str]:
    """What the kernel says that the cores of this machine can do: `avx2`, `asimd`."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    return frozenset(word for line in lines if line.startswith(("flags", "Features")) for word in line.split()[2:])


def fast_bf16() -> str | None:
    """By whom products of many rows are faster in bf16 than in fp32: by "torch" where the cores multiply tiles, by
    many_rows.c where they multiply "pairs"; None where they do not multiply bf16."""
    features = cpu_features()
    return "torch" if "amx_bf16" in features else "pairs" if "avx512_bf16" in features else None


def threads_asked() -> int | None:
    """LLAMA_MP_THREADS: how many threads a rank computes with; None when it is not set."""
    given = os.environ.get("LLAMA_MP_THREADS")
    if given and not (given.isdecimal() and int(given) > 0):
        raise RequestError(f"LLAMA_MP_THREADS is {given!r}, but must be a whole number above 0")
    return int(given) if given else None


def num_threads() -> int:
    """How many threads share the tensors or files of a checkpoint: no more than a disk serves well."""
    return threads_asked() or min(MAX_THREADS, cores_at_hand())


def cores_at_hand() -> int:
    """Cores that this process may run on, the CPU quota of its control group (containers) included; its ranks share
    them."""
    cores = len(unpinned or os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or "200000 100000": microseconds per period
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, math.ceil(int(limit) / int(period)))
    return cores
