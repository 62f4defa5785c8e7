"""Which cores each of the ranks of one machine computes on, so that none is moved away from its caches and memory."""

import os
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from llama_mp import cores

CPUS = Path("/sys/devices/system/cpu")


class Place(NamedTuple):
    """Where a CPU, as the kernel counts them, is: on a NUMA node, in a core that may have several."""

    node: int
    core: int  # the lowest CPU of the core


def shares(
    masks: Sequence[Collection[int]], places: Mapping[int, Place], *, num_cores: int, num_threads: int
) -> list[list[int]] | None:
    """The CPUs of each of a machine's ranks, which may run on `masks` so far; None: leave them where they are.

    They are left when somebody chose already (their masks differ), when `num_cores`, what a container's quota allows,
    is less than the mask, when ranks outnumber the cores, and when a rank's `num_threads` outnumber its share. Shares
    are neighbours: whole cores where there are enough, on one NUMA node where they fit."""
    mask = set(masks[0])
    if any(set(other) != mask for other in masks) or num_cores < len(mask) or len(masks) > len(mask):
        return None
    by_place = sorted(mask, key=lambda cpu: (places[cpu], cpu))
    whole = [list(cpus) for _, cpus in groupby(by_place, key=places.__getitem__)]
    units = whole if len(whole) >= len(masks) else [[cpu] for cpu in by_place]
    bounds = [rank * len(units) // len(masks) for rank in range(len(masks) + 1)]
    found = [[cpu for unit in units[start:end] for cpu in unit] for start, end in pairwise(bounds)]
    return found if num_threads <= min(map(len, found)) else None


def read_places(cpus: Collection[int], root: Path = CPUS) -> dict[int, Place]:
    """As the kernel describes them; one that it does not is a core by itself, on node 0."""
    return {cpu: Place(node_of(root / f"cpu{cpu}"), first_sibling(root / f"cpu{cpu}", cpu)) for cpu in cpus}


def node_of(folder: Path) -> int:
    return next((int(link.name.removeprefix("node")) for link in folder.glob("node[0-9]*")), 0)


def first_sibling(folder: Path, cpu: int) -> int:
    """The lowest CPU of a core, of a list such as `0-1` or `0,64`."""
    siblings = folder / "topology" / "thread_siblings_list"
    if not siblings.is_file():
        return cpu
    return min(int(part.split("-")[0]) for part in siblings.read_text().split(","))


def pin(cpus: Collection[int]) -> None:
    """Let this process run on `cpus` alone, until `unpin`."""
    cores.unpinned = os.sched_getaffinity(0)
    move_threads(cpus)


def unpin() -> None:
    """Undo `pin`, if it was done."""
    if cores.unpinned is not None:
        move_threads(cores.unpinned)
        cores.unpinned = None


def move_threads(cpus: Collection[int]) -> None:
    """Let every thread of this process, and those that they start, run on `cpus` alone."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cpus)
        except ProcessLookupError:
            continue  # it has ended since
