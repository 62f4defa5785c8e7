"""Ranks: who they are, where they compute, and how they speak to each other.

Two channels: the default process group is gloo and carries control messages; fairscale's model-parallel group
carries tensors, over NCCL between GPUs. A one-rank world needs neither network nor port.
"""

import contextlib
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups

from llama_mp import errors
from llama_mp.config import RunConfig
from llama_mp.errors import LostContact, RequestError, RunError
from llama_mp.machine import choose_device, return_freed_memory, threads_per_rank, unused_gpu

# A rank waits this long for the others while they load: a checkpoint may come from a slow network disk.
SETUP_TIMEOUT = timedelta(hours=12)
HEARTBEAT_S = 1.0
LONGEST_POLL_S = 0.05
LEAST_PATIENCE_S = 30.0  # a machine that is short of memory may let rank 0 sleep for many seconds
CONTACT = re.compile("gloo|NCCL|Connection (closed|reset)|Broken pipe|timed out", re.IGNORECASE)


class Alone(dist.ProcessGroup):
    """The group of one rank: no collective is ever called on it, so it has none. gloo would listen on four ports."""

    def getBackendName(self) -> str:
        return "alone"


dist.Backend.register_backend("alone", lambda store, rank, size, timeout: Alone(rank, size), devices=["cpu", "cuda"])


class Heartbeat(threading.Thread):
    """Counts up a key of the store until `stop`, so that those who wait for this process know that it lives.

    A store serves one call of a process at a time: while another thread waits in it, the heart stands still."""

    KEY = "heartbeat"

    def __init__(self, store: dist.Store) -> None:
        super().__init__(daemon=True)
        self.store, self.stopped = store, threading.Event()

    def run(self) -> None:
        with contextlib.suppress(dist.DistError):  # without the store there is nobody left to tell
            while not self.stopped.wait(HEARTBEAT_S):
                self.store.add(self.KEY, 1)

    def stop(self) -> None:
        self.stopped.set()
        self.join()


@dataclass(kw_only=True)
class World:
    """The ranks of one run; this process is `rank` of `size` and computes on `device`."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    local_size: int = 1  # ranks on this machine
    patience_s: float = LEAST_PATIENCE_S  # for which rank 0's heart may stand still while the others wait for it
    heartbeat: Heartbeat | None = None  # of rank 0, where there are others
    num_messages: int = 0  # set-up messages so far; every rank counts alike
    read_keys: list[str] = field(default_factory=list)  # of messages that may be deleted at the next `gather`

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def tell(self, message: Any) -> Any:
        """Rank 0's JSON `message`, on every rank. Waits as long as rank 0 takes, and lives."""
        if self.size == 1:
            return message
        key = self.next_key()
        if self.is_leader:
            self.store.set(key, json.dumps(message))
            self.read_keys.append(key)
            return message
        self.wait_for_leader(key)
        return json.loads(self.store.get(key))

    def wait_for_leader(self, key: str) -> None:
        """Return when rank 0 has set `key`. Raises LostContact when its heart stands still."""
        beats, beaten, pause = -1, time.monotonic(), 0.001
        while not self.store.check([key]):  # polled: torch would print a warning for each `wait` that times out
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_S)
            if (count := self.store.add(Heartbeat.KEY, 0)) != beats:
                beats, beaten = count, time.monotonic()
            elif (silence := time.monotonic() - beaten) > self.patience_s:
                raise LostContact(f"rank {self.rank} has heard nothing of rank 0 for {silence:.0f} s: start again")

    def gather(self, message: Any) -> list[Any]:
        """Every rank's JSON `message`, on every rank, in rank order. Waits for the slowest."""
        if self.size == 1:
            return [message]
        key = self.next_key()
        self.store.set(f"{key}/{self.rank}", json.dumps(message))
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        self.store.wait(keys, SETUP_TIMEOUT)
        if self.is_leader:  # all have come here, so what was said before has been read
            for old in self.read_keys:
                self.store.delete_key(old)
            self.read_keys = keys
        return [json.loads(self.store.get(k)) for k in keys]

    def next_key(self) -> str:
        self.num_messages += 1
        return f"message/{self.num_messages}"

    def agree(self, name: str, value: Any, remedy: str) -> None:
        """Raise RequestError unless every rank has the same `value`."""
        values = self.gather(value)
        if len(set(values)) > 1:
            found = ", ".join(f"rank {rank} {v}" for rank, v in enumerate(values))
            raise RequestError(f"the ranks differ in {name} ({found}): {remedy}")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A step that either all ranks finish, or that fails on all with the first failing rank's error."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        kinds = [isinstance(failure, kind) for kind in (RequestError, LostContact)]
        told = None if failure is None else [errors.one_line(failure), *kinds]
        failed = [(rank, said) for rank, said in enumerate(self.gather(told)) if said]
        failed.sort(key=lambda one: one[1][2])  # who lost contact did so because of another
        if failed and self.size == 1:
            raise failure
        if failed:
            rank, (text, was_request, _) = failed[0]
            kind = RequestError if was_request else RunError
            raise kind(text if rank == 0 else f"rank {rank}: {text}") from failure

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Steps that the ranks take at once. What breaks because another rank is gone raises LostContact."""
        try:
            yield
        except RuntimeError as error:
            about_peers = isinstance(error, dist.DistError) or CONTACT.search(str(error))
            if self.size == 1 or not about_peers:
                raise
            raise LostContact(
                f"rank {self.rank} lost contact with another rank, which died or was silent for longer than "
                "--step_timeout; the first failure says why"
            ) from error

    def close(self) -> None:
        """Leave the groups. A world that failed is not closed: its peers may be gone."""
        if self.heartbeat:
            self.heartbeat.stop()
        fairscale_groups.destroy_model_parallel()
        dist.destroy_process_group()


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
    if size > 1:
        errors.set_speaker(lambda: is_first_to_speak(store, rank))
    control = "alone" if size == 1 else "gloo"
    groups = dist.PrefixStore("groups", store)
    # Control messages wait for rank 0, which may wait for a person or a full pipe; tensors wait --step_timeout alone.
    dist.init_process_group(control, store=groups, rank=rank, world_size=size, timeout=SETUP_TIMEOUT)
    world = World(rank=rank, size=size, device=torch.device("cpu"), store=store, local_size=local_size)
    with world.together():
        world.device = choose_device(run.device, local_rank, local_size)
    if world.is_leader and (note := unused_gpu(run.device)):
        print(note, file=sys.stderr, flush=True)
    world.agree("device", world.device.type, "give --device cpu, or start ranks on machines with GPUs alone")
    backend = "nccl" if size > 1 and world.device.type == "cuda" else control
    form_model_parallel_group(size, backend, timedelta(seconds=run.step_timeout))
    world.patience_s = max(run.step_timeout, LEAST_PATIENCE_S)
    if size > 1 and world.is_leader:
        world.heartbeat = Heartbeat(store)
        world.heartbeat.start()
    return world


def is_first_to_speak(store: dist.Store, rank: int) -> bool:
    """Whether no other rank has reported an error yet. Without the store, whose host may be gone, rank 0 speaks."""
    try:
        return store.add("speaker", 1) == 1
    except dist.DistError:
        return rank == 0


def form_model_parallel_group(size: int, backend: str, timeout: timedelta) -> None:
    """fairscale's groups over all ranks; what it prints is not for the user, and it passes no timeout on."""
    with contextlib.redirect_stdout(io.StringIO()):
        fairscale_groups.initialize_model_parallel(size, model_parallel_backend=backend)
    if size > 1:
        dist.distributed_c10d._set_pg_timeout(timeout, fairscale_groups.get_model_parallel_group())


def reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over the model-parallel ranks, in place."""
    group = fairscale_groups.get_model_parallel_group()
    if group.size() > 1:
        dist.all_reduce(x, group=group)
    return x


def gather_columns(x_NV: torch.Tensor) -> torch.Tensor | None:
    """Rank 0: the ranks' parts of each row side by side, [N, V x mp]. The others: None."""
    group = fairscale_groups.get_model_parallel_group()
    if group.size() == 1:
        return x_NV
    x_NV = x_NV.contiguous()
    parts = [torch.empty_like(x_NV) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(x_NV, parts, group=group, group_dst=0)
    return torch.cat(parts, dim=-1) if parts else None
