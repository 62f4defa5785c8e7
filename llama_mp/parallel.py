"""The groups of ranks: who is in them, what they compute on, and what carries their sums.

Two channels: the default process group is gloo and carries control messages; fairscale's model-parallel group
carries tensors, over NCCL between GPUs and through shared memory between the processes of one machine. A one-rank
world needs neither network nor port.
"""

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups

from llama_mp import errors, shared_memory
from llama_mp.config import RunConfig
from llama_mp.cores import cores_at_hand
from llama_mp.errors import LostContact, RequestError
from llama_mp.liveness import MEETING_S, Pulse, collective, here
from llama_mp.machine import choose_device, return_freed_memory, threads_per_rank, unused_gpu
from llama_mp.pinning import pin, read_places, shares
from llama_mp.world import SETUP_TIMEOUT, World, is_first_to_speak

NCCL_LATER_S = 10.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Alone(dist.ProcessGroup):
    """The group of one rank: no collective is ever called on it, so it has none. gloo would listen on four ports."""

    def getBackendName(self) -> str:
        return "alone"


dist.Backend.register_backend("alone", lambda store, rank, size, timeout: Alone(rank, size), devices=["cpu", "cuda"])


def connect(run: RunConfig) -> World:
    """Join the world that torchrun describes, or make one of a single rank.

    Raises RequestError when this machine lacks the devices that the request needs."""
    if dist.is_initialized():
        raise RequestError("this process has a model open already: close it first, or use it as a context manager")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads_per_rank(local_size))
    return_freed_memory()
    store = dist.HashStore() if size == 1 else next(dist.rendezvous("env://"))[0]
    # torchrun's store outlives this world: the next one of the same ranks must not read what this one said.
    store = dist.PrefixStore(f"llama_mp/{store.add(f'llama_mp/worlds_of/{rank}', 1)}", store)
    world = World(rank=rank, size=size, device=torch.device("cpu"), store=store, local_size=local_size)
    if size > 1:
        errors.set_speaker(lambda: is_first_to_speak(store, rank))
        world.pulse = start_pulse(store, rank, size, run.step_timeout)
    form_control_group(world, timedelta(seconds=max(run.step_timeout, MEETING_S)))
    with world.together():
        world.device = choose_device(run.device, local_rank, local_size)
    if world.is_leader and (note := unused_gpu(run.device)):
        errors.say(note)
    world.agree("device", world.device.type, "give --device cpu, or start ranks on machines with GPUs alone")
    form_model_parallel_group(world, run.step_timeout)
    if world.pulse:
        world.pulse.meeting_is_over()
    return world


def start_pulse(store: dist.Store, rank: int, size: int, limit_s: float) -> Pulse:
    pulse = Pulse(store, rank, size, limit_s)
    if "TORCHELASTIC_RUN_ID" in os.environ and threading.current_thread() is threading.main_thread():
        pulse.hear_signals()  # which Python allows to the main thread alone
    pulse.start()
    return pulse


def form_control_group(world: World, patience: timedelta) -> None:
    """The default group, for messages. They wait for rank 0, which may wait for a person or a full pipe; only the first
    has to come soon."""
    backend, groups = "alone" if world.size == 1 else "gloo", dist.PrefixStore("groups", world.store)
    told = world.gather([here.host, here.pid, here.born])  # all have started: what one may wait for now is the network
    if world.pulse:
        world.pulse.meet(told)
    with in_reach(backend):
        dist.init_process_group(backend, store=groups, rank=world.rank, world_size=world.size, timeout=patience)
        prove(dist.group.WORLD, world.device)
    set_timeout(SETUP_TIMEOUT, dist.group.WORLD)


def form_model_parallel_group(world: World, step_timeout: float) -> None:
    """fairscale's groups over all ranks; what it prints is not for the user, and it passes no timeout on."""
    if world.size == 1:
        backend = "alone"
    else:
        backend = "nccl" if world.device.type == "cuda" else cpu_backend(world)
    with contextlib.redirect_stdout(io.StringIO()):
        fairscale_groups.initialize_model_parallel(world.size, model_parallel_backend=backend)
    group = fairscale_groups.get_model_parallel_group()
    # NCCL ends the process, without a word that helps: it is to come last.
    set_timeout(timedelta(seconds=step_timeout + (NCCL_LATER_S if backend == "nccl" else 0)), group)
    with in_reach(backend):
        prove(group, world.device)


def set_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    if isinstance(group, shared_memory.SharedMemory):
        group.set_timeout(timeout)
    elif group.size() > 1:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


@contextlib.contextmanager
def in_reach(backend: str) -> Iterator[None]:
    """The first meeting of the ranks. Raises LostContact, with what to check, when some do not reach each other."""
    try:
        yield
    except RuntimeError as error:
        raise LostContact(
            f"the ranks do not reach each other over {backend} ({error}): launch/doctor.py finds out which, and why; "
            f"check the network, its firewall, and the interface in "
            f"{'NCCL' if backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME"
        ) from error


def prove(group: dist.ProcessGroup, device: torch.device) -> None:
    """One small sum over several ranks, before anything depends on it."""
    if group.size() > 1:
        ones = torch.ones(1, device=device)
        dist.all_reduce(ones, group=group)
        if ones.item() != group.size():
            raise RuntimeError(f"{group.size()} ranks sum to {ones.item():g}")


class Neighbour(NamedTuple):
    """A rank on the machine of this one: what it may run on, what is allowed of it, and how many threads it has."""

    cpus: list[int]
    num_cores: int
    num_threads: int


def neighbours(world: World) -> dict[int, Neighbour]:
    """The ranks on this machine, this one among them, by their numbers."""
    cpus = sorted(os.sched_getaffinity(0))
    found = world.gather([machine_id(), Neighbour(cpus, cores_at_hand(), torch.get_num_threads())])
    return {rank: Neighbour(*told) for rank, (machine, told) in enumerate(found) if machine == found[world.rank][0]}


def machine_id() -> str:
    """The same in all containers of a machine, but not on two nodes of SLURM that one machine plays."""
    machine = BOOT_ID.read_text() if BOOT_ID.is_file() else os.uname().nodename
    return machine + os.environ.get("SLURMD_NODENAME", "")


def pin_beside(here: dict[int, Neighbour], rank: int) -> None:
    """Let this rank compute on its share of the machine's cores, where they can be shared."""
    masks = [neighbour.cpus for neighbour in here.values()]
    num_cores, num_threads = min(n.num_cores for n in here.values()), max(n.num_threads for n in here.values())
    found = shares(masks, read_places(masks[0]), num_cores=num_cores, num_threads=num_threads)
    if found is not None:
        pin(found[list(here).index(rank)])


def cpu_backend(world: World) -> str:
    """What ranks on CPUs sum with: shared memory on one machine, gloo between several."""
    here = neighbours(world)
    pin_beside(here, world.rank)
    if len(here) < world.size:
        return "gloo"
    obstacle = shared_memory.prepare(world.rank, world.size, world.gather)
    if obstacle and world.is_leader:
        errors.say(f"the ranks sum over gloo, not through shared memory ({obstacle}): slower")
    return "gloo" if obstacle else shared_memory.NAME


def reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over the model-parallel ranks, in place."""
    group = fairscale_groups.get_model_parallel_group()
    if group.size() > 1:
        with collective("all-reduce"):
            dist.all_reduce(x, group=group)
    return x


def share(tokens_N: torch.Tensor) -> torch.Tensor:
    """Rank 0's `tokens_N`, in place. Between CPUs they have come with the message of the step."""
    group = fairscale_groups.get_model_parallel_group()
    if group.size() > 1 and tokens_N.device.type == "cuda":
        with collective("broadcast"):
            dist.broadcast(tokens_N, src=0, group=group)
    return tokens_N


def all_gather(x: torch.Tensor) -> list[torch.Tensor]:
    """`x` of each model-parallel rank, in their order, on all of them."""
    group = fairscale_groups.get_model_parallel_group()
    if group.size() == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def gather_columns(x_NV: torch.Tensor) -> torch.Tensor | None:
    """Rank 0: the ranks' parts of each row side by side, [N, V x mp]. The others: None."""
    group = fairscale_groups.get_model_parallel_group()
    if group.size() == 1:
        return x_NV
    x_NV = x_NV.contiguous()
    parts = [torch.empty_like(x_NV) for _ in range(group.size())] if group.rank() == 0 else None
    with collective("gather"):
        dist.gather(x_NV, parts, group=group, group_dst=0)
    return torch.cat(parts, dim=-1) if parts else None
