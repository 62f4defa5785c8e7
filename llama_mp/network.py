"""What is between the ranks: ports, messages of each pair, sums over all."""

import itertools
import statistics
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from llama_mp.doctor import Fault, Findings, Pair, Sum, carrier_advice, connections_advice
from llama_mp.errors import RunError
from llama_mp.parallel import cpu_backend, set_timeout
from llama_mp.ports import Ear, unreached
from llama_mp.ward import Told, Ward, cause
from llama_mp.world import SETUP_TIMEOUT, World

MAX_DEAD_PAIRS = 3  # each costs the limit
SMALL_BYTES, LARGE_BYTES = 1 << 10, 4 << 20
SUM_BYTES = (8 << 10, 64 << 10, 1 << 20, 8 << 20)  # a token's sum in 7B and larger ones, and a prompt's
NUM_SMALL, NUM_LARGE = 20, 5


def look_at_ports(ward: Ward, found: Findings) -> None:
    ears: list[Ear] = []

    def listen() -> tuple[str, int]:
        ears.append(Ear())
        return ears[0].host, ears[0].port

    told = ward.together("the ranks' listening", listen)
    found.addresses = [result and f"{result[0]}:{result[1]}" for result, *_ in told.values()]
    found.unreached = [(rank, rank, one.trouble) for rank, one in told.items() if one.trouble]
    listening = [(rank, tuple(one.result)) for rank, one in told.items() if one.result]

    def reach() -> list[tuple[int, str]]:
        missed = unreached([place for _, place in listening], ward.limit_s / 2)
        return [(listening[number][0], why) for number, why in missed.items()]

    for rank, (result, trouble, _) in ward.together("the ranks' reaching each other", reach).items():
        found.unreached += [(rank, other, why) for other, why in result or []]
        if trouble:
            what = f"{found.rank(rank)} cannot try the others' ports: {trouble}"
            found.troubles.append(Fault(what, connections_advice(found.is_one_host(range(ward.world.size)))))
    for ear in ears:
        ear.close()


def measure_network(ward: Ward, found: Findings) -> None:
    world, groups = ward.world, dist.PrefixStore("groups", ward.world.store)
    patience = timedelta(seconds=ward.limit_s)

    def connect() -> str:
        dist.init_process_group("gloo", store=groups, rank=world.rank, world_size=world.size, timeout=patience)
        set_timeout(SETUP_TIMEOUT, dist.group.WORLD)  # a wait of gloo that times out closes all its connections
        return "nccl" if world.device.type == "cuda" else cpu_backend(world)

    told = ward.together("the connections over gloo", connect)
    if has_failed(told, "the ranks do not connect over gloo", found):
        return
    found.backend = told[0].result
    carriers: list[dist.ProcessGroup] = []
    told = ward.together(
        f"the group over {found.backend}",
        lambda: carriers.append(dist.new_group(backend=found.backend, timeout=SETUP_TIMEOUT)),
    )
    if not has_failed(told, f"there is no group over {found.backend}", found):
        measure_pairs(ward, found, carriers[0] if found.backend == "nccl" else dist.group.WORLD)
        measure_sums(ward, found, carriers[0])


def has_failed(told: Mapping[int, Told], what: str, found: Findings) -> bool:
    first = cause(told)
    if first:
        advice = carrier_advice(found, range(len(found.places)))
        found.troubles.append(Fault(f"{what}; {found.rank(first[0])}: {first[1]}", advice))
        found.left_out = "messages and sums, until all ranks connect"
    return first is not None


def measure_pairs(ward: Ward, found: Findings, group: dist.ProcessGroup) -> None:
    """One after the other, so that they do not disturb each other."""
    own = ward.world.rank
    for pair in itertools.combinations(range(ward.world.size), 2):
        other = sum(pair) - own

        def measure(pair: tuple[int, int] = pair, other: int = other) -> tuple[float, float] | None:
            if own not in pair:
                return None
            latency_s = exchange(ward.world.device, group, own, other, SMALL_BYTES, NUM_SMALL)
            return latency_s, LARGE_BYTES / exchange(ward.world.device, group, own, other, LARGE_BYTES, NUM_LARGE)

        told = ward.together(f"messages between ranks {pair[0]} and {pair[1]}", measure)
        dead = cause({rank: told[rank] for rank in pair})
        found.pairs.append(Pair(pair, trouble=dead[1]) if dead else Pair(pair, *told[pair[0]].result))
        if sum(bool(pair.trouble) for pair in found.pairs) == MAX_DEAD_PAIRS:
            found.left_out = f"further pairs, after {MAX_DEAD_PAIRS} dead ones"
            return


def exchange(
    device: torch.device, group: dist.ProcessGroup, own: int, other: int, num_bytes: int, repetitions: int
) -> float:
    """Half the seconds of a message's way there and back, the median after a first one. Raises RunError when it comes
    back as something else."""
    sent = torch.arange(num_bytes // 4, dtype=torch.int32, device=device)
    taken = torch.zeros_like(sent)
    times, is_whole = [], True
    for _ in range(1 + repetitions):
        taken.zero_()
        start = time.perf_counter()
        if own < other:
            dist.send(sent, other, group)
            dist.recv(taken, other, group)
        else:
            dist.recv(taken, other, group)
            dist.send(taken, other, group)
        finish(device)
        times.append(time.perf_counter() - start)
        is_whole &= torch.equal(sent, taken)
    if not is_whole:
        raise RunError(f"{num_bytes} bytes arrive changed")
    return statistics.median(times[1:]) / 2


def measure_sums(ward: Ward, found: Findings, group: dist.ProcessGroup) -> None:
    for num_bytes in SUM_BYTES:
        told = ward.together(
            f"the all-reduce of {num_bytes} bytes",
            lambda num_bytes=num_bytes: all_reduce(ward.world, group, num_bytes, NUM_LARGE),
        )
        if failed := cause(told):
            found.sums.append(Sum(num_bytes, trouble=f"{found.rank(failed[0])}: {failed[1]}"))
            return
        found.sums.append(Sum(num_bytes, max(one.result for one in told.values())))


def all_reduce(world: World, group: dist.ProcessGroup, num_bytes: int, repetitions: int) -> float:
    """Seconds, the median after a first one. Raises RunError for a wrong sum."""
    times, wanted, is_right = [], world.size * (world.size + 1) // 2, True
    for _ in range(1 + repetitions):
        x = torch.full((num_bytes // 4,), world.rank + 1.0, device=world.device)
        finish(world.device)
        start = time.perf_counter()
        dist.all_reduce(x, group=group)
        finish(world.device)
        times.append(time.perf_counter() - start)
        is_right &= bool((x == wanted).all())
    if not is_right:
        raise RunError(f"the sum is wrong, {x.min().item():g} to {x.max().item():g} where it is {wanted}")
    return statistics.median(times[1:])


def finish(device: torch.device) -> None:
    """Wait for what this thread has given the device to do."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
