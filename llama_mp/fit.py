"""Whether a run fits the memory that is free, found out before any weight is read.

Refused is only what cannot run: weights and cache, which are known to the byte, must fit. What passes beside them hangs
on the prompts, and what the kernel can make room for it does not say.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llama_mp.advice import Device, Option, advice
from llama_mp.config import ModelConfig
from llama_mp.errors import RequestError, counted
from llama_mp.memory import RankMemory, Workload, rank_memory

MEMINFO, CGROUPS, OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
RECLAIMED = ("inactive_file", "active_file", "slab_reclaimable")  # of memory.stat: given back when memory is short
# What a plan calls otherwise than infer and chat do.
FLAGS = {"--batch_size": "--max_batch_size", "--seq_len": "--max_seq_len"}
GB = 1e9


class Room(NamedTuple):
    """Free bytes for each rank of a machine, and where they are: "on cuda:0"."""

    free_bytes: int
    where: str
    is_shared: bool  # by the ranks, so that more of them do not help


def check_fits(config: ModelConfig, mp: int, workload: Workload, room: Room, *, has_weights: bool = False) -> None:
    """Raise RequestError unless weights (those that are not there already) and cache of a rank fit into `room`."""
    memory = rank_memory(config, mp, workload)
    needed = memory.kv_cache_bytes + (0 if has_weights else memory.weights_bytes)
    if needed <= room.free_bytes:
        return
    parts = [] if has_weights else [f"{memory.weights_bytes / GB:.2f} GB of weights"]
    rows = f"{workload.batch_size} x {workload.seq_len} tokens"
    kind = workload.dtype + ("" if workload.quant == "none" else f" with weights in {workload.quant}")
    parts.append(f"{memory.kv_cache_bytes / GB:.2f} GB of cache for {rows}")
    raise RequestError(
        f"{config.name} over {counted(mp, 'rank')} in {kind} does not fit: a rank needs "
        f"{' and '.join(parts)}, and {room.free_bytes / GB:.2f} GB are free {room.where}; "
        f"{remedy(config, mp, workload, room, memory, has_weights=has_weights)}"
    )


def remedy(
    config: ModelConfig, mp: int, workload: Workload, room: Room, memory: RankMemory, *, has_weights: bool
) -> str:
    """The plan's best advice of what this version can do."""
    there = memory.runtime_bytes + (memory.weights_bytes if has_weights else 0)
    device = Device(room.free_bytes + there, None, workload.dtype == "bf16", more_ranks_help=not room.is_shared)
    options = advice(config, mp, workload, device)
    ways = " or ".join(as_flags(option) for option in options[:2])
    return f"give {ways}, or --force to try" if ways else "free some memory, or give --force to try"


def as_flags(option: Option) -> str:
    return " ".join(FLAGS.get(word, word) for word in option.flags.split())


def free_host_bytes() -> int:
    """Main memory that processes here can still get: what the kernel calls available, page cache and free swap among
    it, within the limits of the control groups (containers) around this process."""
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in MEMINFO.read_text().splitlines()}
    return min([fields["MemAvailable"], *cgroup_rooms()]) + fields["SwapFree"]


def cgroup_rooms() -> Iterator[int]:
    """Bytes left under each memory.max from this process's control group upwards (version 2)."""
    own = [line for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::/")]
    below = CGROUPS / own[0].removeprefix("0::/") if own else CGROUPS
    for folder in (below, *below.parents):
        limit = folder / "memory.max"
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - sum(int(stat.get(name, 0)) for name in RECLAIMED)
            yield max(0, int(text) - used)
        if folder == CGROUPS:
            return
