"""Sums of fp32 over the ranks of one machine: through shared memory beside gloo, in microseconds, for each size.

The same processes do both, in turn, block by block: `--rounds` blocks of 20 sums each, so that what else the machine
does strikes both alike. Medians of single sums, as rank 0 sees them. The last line is JSON; `--save` keeps it in
benchmarks/results/.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from machine import environment, keep

from llama_mp import cli, shared_memory
from llama_mp.config import RunConfig
from llama_mp.errors import RunError
from llama_mp.flags import Flags, check_at_least, flag
from llama_mp.parallel import connect

BLOCK = 20  # sums
Times = dict[str, list[float]]  # seconds of each sum, by backend


@dataclass(frozen=True, kw_only=True)
class BenchFlags(Flags):
    ranks: tuple[str, ...] = flag(("2", "4"), "ranks that sum; may repeat")
    kib: tuple[str, ...] = flag(("8", "16", "32", "64", "1024"), "KiB that each rank has; may repeat")
    rounds: int = flag(20, "blocks of sums by each")
    save: bool = flag(False, "keep the result in benchmarks/results/all_reduce.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, rounds=1)


def main(flags: BenchFlags) -> None:
    found = {}
    for num_ranks in map(int, flags.ranks):
        print(f"{num_ranks} ranks on {len(os.sched_getaffinity(0))} cores")
        found[num_ranks] = {}
        for kib, times in measured(num_ranks, flags).items():
            found[num_ranks][kib] = shown = figures(times)
            line = "{:>6} KiB: gloo {gloo_us:9.1f} us, shared memory {shared_memory_us:7.1f} us: {ratio:.0f} x"
            print(line.format(kib, **shown))
    result = environment() | {"rounds": flags.rounds, "ranks": found}
    if flags.save:
        keep("all_reduce", result)
    print(json.dumps(result))


def figures(times: Times) -> dict[str, float]:
    medians = {f"{name}_us": round(1e6 * statistics.median(each), 1) for name, each in times.items()}
    return medians | {"ratio": round(medians["gloo_us"] / medians[f"{shared_memory.NAME}_us"], 1)}


def measured(num_ranks: int, flags: BenchFlags) -> dict[str, Times]:
    """By KiB, what rank 0 of `num_ranks` new processes measures."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(run_rank, (num_ranks, store.port, flags), nprocs=num_ranks)
    return json.loads(store.get("times"))


def run_rank(rank: int, num_ranks: int, port: int, flags: BenchFlags) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    world = connect(RunConfig(device="cpu"))
    if dist.get_backend(get_model_parallel_group()) != shared_memory.NAME:
        raise RunError("there is nothing to compare: see above")
    times = {kib: times_of(int(kib) * 256, flags.rounds) for kib in flags.kib}
    if world.is_leader:
        dist.TCPStore("127.0.0.1", port).set("times", json.dumps(times))
    world.close()


def times_of(num_elements: int, rounds: int) -> Times:
    groups: dict[str, Any] = {"gloo": dist.group.WORLD, shared_memory.NAME: get_model_parallel_group()}
    x, times = torch.zeros(num_elements), {name: [] for name in groups}
    for _ in range(rounds + 1):
        for name, group in groups.items():
            times[name] += [seconds_of(x, group) for _ in range(BLOCK)]
    return {name: each[BLOCK:] for name, each in times.items()}  # the first round is the warm-up


def seconds_of(x: torch.Tensor, group: dist.ProcessGroup) -> float:
    start = time.perf_counter()
    dist.all_reduce(x, group=group)
    return time.perf_counter() - start


if __name__ == "__main__":
    cli.main(BenchFlags, main, summary=__doc__)
