"""How fast the devices of a run read memory: what no decode step can beat, since each reads every weight once.

On a CPU a matrix-vector product may read faster than torch sums, so the best of both is the ceiling there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llama_mp.kernels import linear_of_few, load_kernels
from llama_mp.world import World

CPU_BYTES, GPU_BYTES = 2**30, 2**31  # of all ranks on a CPU, of each GPU: more than any cache holds
LEAST_BYTES = 2**26  # of one rank
COLUMNS = 4096
# Passes on end, so that ranks which begin at slightly different times overlap; a GPU reads its block in a millisecond,
# and beside three of those the start of the first and the wait for the last would count. The best round.
PASSES, ROUNDS = {"cpu": 3, "cuda": 20}, 4


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Bytes per second, of all ranks together."""

    stream_rate: float
    product_rate: float | None  # on a CPU
    product: str | None

    @property
    def rate(self) -> float:
        return max(self.stream_rate, self.product_rate or 0.0)


def measure_ceiling(world: World) -> Ceiling:
    """Every rank calls it; they read at the same time. Holds a GiB or two, which is given back."""
    with world.together():
        block = make_block(world.device, world.size)
    stream_rate = together(world, block, block.sum)
    if world.device.type == "cuda":
        del block
        torch.cuda.empty_cache()  # the check against free memory comes next
        return Ceiling(stream_rate=stream_rate, product_rate=None, product=None)
    rates = {name: together(world, block, product) for name, product in products(block).items()}
    best = max(rates, key=rates.__getitem__)
    return Ceiling(stream_rate=stream_rate, product_rate=rates[best], product=best)


def make_block(device: torch.device, num_ranks: int) -> torch.Tensor:
    num_bytes = GPU_BYTES if device.type == "cuda" else max(LEAST_BYTES, CPU_BYTES // num_ranks)
    return torch.ones(num_bytes // (4 * COLUMNS), COLUMNS, device=device)


def products(block: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """The matrix-vector products at hand, each over the whole block as its matrix."""
    halves = block.view(torch.bfloat16).view(-1, COLUMNS)
    x = torch.ones(1, COLUMNS)
    found: dict[str, Callable[[], torch.Tensor]] = {
        "torch fp32": lambda: F.linear(x, block),
        "torch bf16": lambda: F.linear(x.bfloat16(), halves),
    }
    if load_kernels():
        found["kernels.c bf16"] = lambda: linear_of_few(x, halves)
    return found


def together(world: World, block: torch.Tensor, read: Callable[[], torch.Tensor]) -> float:
    """Bytes per second of all ranks in the best round."""
    best = 0.0
    read()  # warm-up
    for _ in range(ROUNDS):
        world.gather(None)
        done = world.gather([block.nbytes * PASSES[block.device.type], *seconds_of(read, block.device)])
        best = max(best, sum(num_bytes for num_bytes, *_ in done) / duration(done, world.device))
    return best


def duration(done: list[list[float]], device: torch.device) -> float:
    """Seconds of a round, of (bytes, start, end) by rank. A GPU has its memory to itself: that of the slowest. On a CPU
    from the first start to the last end, because ranks that read in turn would each have the whole memory."""
    starts, ends = zip(*((start, end) for _, start, end in done), strict=True)
    if device.type == "cuda":
        return max(end - start for start, end in zip(starts, ends, strict=True))
    return max(ends) - min(starts)


def seconds_of(read: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, float]:
    """Start and end of the passes, on the clock that all processes of a machine share."""
    synchronize(device)
    start = time.time()
    for _ in range(PASSES[device.type]):
        read()
    synchronize(device)
    return start, time.time()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
