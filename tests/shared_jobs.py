"""What the ranks of the pool run to try the sums through shared memory, and the cores that they keep to."""

import contextlib
import ctypes
import functools
import io
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group

from llama_mp import compiled, parallel, shared_memory
from llama_mp.config import RunConfig
from llama_mp.machine import DTYPES
from llama_mp.parallel import all_gather, connect, reduce


def sums(dtype: str, counts: Sequence[int]) -> list[tuple[bool, bool, bool]]:
    """For each count of elements, whether these are right to the last bit: the sum over the ranks, in their order and
    in fp32; the maximum; every rank's part at the last rank."""
    world = connect(RunConfig(device="cpu"))
    group = get_model_parallel_group()
    seeds = [torch.Generator().manual_seed(rank) for rank in range(world.size)]
    results = []
    for count in counts:
        parts = [(100 * torch.randn(count, generator=seed)).to(DTYPES[dtype]) for seed in seeds]
        total = functools.reduce(torch.add, [part.float() for part in parts]).to(DTYPES[dtype])
        summed, largest = parts[world.rank].clone(), parts[world.rank].clone()
        dist.all_reduce(summed, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        root = world.size - 1
        gathered = [torch.empty_like(total) for _ in parts] if world.rank == root else None
        dist.gather(parts[world.rank], gathered, group=group, group_dst=root)
        all_there = gathered is None or all(map(torch.equal, gathered, parts))
        all_there &= all(map(torch.equal, all_gather(parts[world.rank]), parts))
        results.append((torch.equal(summed, total), torch.equal(largest, torch.stack(parts).amax(0)), all_there))
    world.close()
    return results


def added(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the ranks' parts."""
    world = connect(RunConfig(device="cpu"))
    total = reduce(parts[world.rank])
    world.close()
    return total


def views() -> list[bool]:
    """Whether sums and gathers are right into and out of every second column, whose neighbours stay as they were."""
    world = connect(RunConfig(device="cpu"))
    group, correct = get_model_parallel_group(), []
    for dtype in shared_memory.KINDS:
        table = torch.arange(60, dtype=dtype).view(6, 10)
        before = table.clone()
        reduce(table[:, ::2])
        correct.append(torch.equal(table[:, ::2], world.size * before[:, ::2]))
        correct.append(torch.equal(table[:, 1::2], before[:, 1::2]))
        tables = [torch.zeros(6, 10, dtype=dtype) for _ in range(world.size)] if world.is_leader else []
        dist.gather(before[:, ::2], [each[:, ::2] for each in tables] or None, group=group, group_dst=0)
        correct += [torch.equal(each[:, ::2], before[:, ::2]) and not each[:, 1::2].any() for each in tables]
    world.close()
    return correct


def refusals() -> list[str]:
    """What is said of an operation and of a type that there are not; and that the ranks are in step afterwards."""
    world = connect(RunConfig(device="cpu"))
    group, said = get_model_parallel_group(), []
    for x, operation in ((torch.ones(3), dist.ReduceOp.PRODUCT), (torch.ones(3, dtype=torch.int64), dist.ReduceOp.SUM)):
        try:
            dist.all_reduce(x, op=operation, group=group)
        except NotImplementedError as error:
            said.append(str(error))
    said.append(str(reduce(torch.ones(1)).item()))
    world.close()
    return said


def sums_after(arrivals: int, num_sums: int) -> list[float]:
    """Sums of ones when each rank has come to `arrivals` barriers, where counts of 32 bits begin anew."""
    world = connect(RunConfig(device="cpu"))
    group = get_model_parallel_group()
    world.gather("nobody is in the first sum any more")
    group.group.barriers = arrivals
    ctypes.c_uint.from_buffer(group.region.memory, world.rank * shared_memory.LINE_BYTES).value = arrivals
    world.gather(None)
    found = [reduce(torch.ones(20_000))[-1].item() for _ in range(num_sums)]
    world.close()
    return found


def left_alone(timeout_s: float) -> str:
    """What rank 0 says when rank 1 does not come to a sum."""
    world = connect(RunConfig(device="cpu", step_timeout=timeout_s))
    try:
        if world.is_leader:
            reduce(torch.ones(5))
    except dist.DistError as error:
        return str(error)
    finally:
        world.gather("both are here again")
        world.close()
    return ""


def loses(killed: int) -> tuple[str, float]:
    """One rank is killed while the others wait for it in a sum: what they see, and after how many seconds."""
    world = connect(RunConfig(device="cpu"))
    reduce(torch.ones(5))
    if world.rank == killed:
        time.sleep(0.5)  # the others sleep by now
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        with world.in_step():
            reduce(torch.ones(5))
    except Exception as error:
        return f"{type(error).__name__}: {error.__cause__}", time.monotonic() - begun
    return "no error", 0.0


def region_of_a_world() -> dict[str, Any]:
    """The file that the ranks' memory is, as this rank sees it."""
    world = connect(RunConfig(device="cpu"))
    status = os.fstat(get_model_parallel_group().region.file)
    world.close()
    return {"inode": status.st_ino, "mode": status.st_mode & 0o777, "names": status.st_nlink}


@contextlib.contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextlib.contextmanager
def file_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def no_compiler() -> Iterator[None]:
    compiled.library_of.cache_clear()
    with replaced(os, "environ", os.environ | {"CC": "no-such-compiler"}):
        yield


OBSTACLES: dict[str, Callable[[], Any]] = {
    "no compiler": no_compiler,
    "file limit": file_limit,
    "container": lambda: replaced(shared_memory.Region, "identity", lambda region: (0, region.file)),
    "machine": lambda: replaced(parallel, "machine_id", lambda: "another"),
}


def with_obstacle(obstacle: str, at: int) -> tuple[str, str, float]:
    """The backend when one rank has an obstacle, what is said of it, and a sum over the ranks."""
    rank = int(os.environ["RANK"])
    with contextlib.redirect_stderr(io.StringIO()) as said:
        with OBSTACLES[obstacle]() if rank == at else contextlib.nullcontext():
            world = connect(RunConfig(device="cpu"))
        backend = dist.get_backend(get_model_parallel_group())
        total = reduce(torch.ones(3)).sum().item()
        world.close()
    return backend, said.getvalue(), total


def cpus() -> tuple[list[list[int]], list[list[int]], int]:
    """What each thread of this rank may run on within a world and after it; the cores that it knows of."""
    world = connect(RunConfig(device="cpu"))
    torch.ones(1000, 1000).sum()  # starts torch's threads
    within, known = cpus_of_threads(), parallel.cores_at_hand()
    world.close()
    return within, cpus_of_threads(), known


def cpus_of_threads() -> list[list[int]]:
    return [sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]
