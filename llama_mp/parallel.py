"""Ranks: who they are, where they compute, and how they speak to each other.

Two channels: the default process group is gloo and carries control messages; fairscale's model-parallel group
carries tensors, over NCCL between GPUs. A one-rank world needs neither network nor port.
"""

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups

from llama_mp import errors
from llama_mp.config import RunConfig
from llama_mp.errors import LostContact, RequestError, RunError

# A rank waits this long for the others while they load: a checkpoint may come from a slow network disk.
SETUP_TIMEOUT = timedelta(hours=12)
CONTACT = re.compile("gloo|NCCL|Connection (closed|reset)|Broken pipe|timed out", re.IGNORECASE)
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Alone(dist.ProcessGroup):
    """The group of one rank: no collective is ever called on it, so it has none. gloo would listen on four ports."""

    def getBackendName(self) -> str:
        return "alone"


dist.Backend.register_backend("alone", lambda store, rank, size, timeout: Alone(rank, size), devices=["cpu", "cuda"])


@dataclass(kw_only=True)
class World:
    """The ranks of one run; this process is `rank` of `size` and computes on `device`."""

    rank: int
    size: int
    local_size: int
    device: torch.device
    store: dist.Store
    num_messages: int = 0  # set-up messages so far; every rank counts alike

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def tell(self, message: Any) -> Any:
        """Rank 0's JSON `message`, on every rank. Waits as long as rank 0 takes."""
        key = self.next_key()
        if self.is_leader:
            self.store.set(key, json.dumps(message))
            return message
        self.store.wait([key], SETUP_TIMEOUT)
        return json.loads(self.store.get(key))

    def gather(self, message: Any) -> list[Any]:
        """Every rank's JSON `message`, on every rank, in rank order. Waits for the slowest."""
        key = self.next_key()
        self.store.set(f"{key}/{self.rank}", json.dumps(message))
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        self.store.wait(keys, SETUP_TIMEOUT)
        return [json.loads(self.store.get(k)) for k in keys]

    def next_key(self) -> str:
        self.num_messages += 1
        return f"llama_mp/{self.num_messages}"

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A step that either all ranks finish, or that fails on all with the first failing rank's error."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        told = None if failure is None else [errors.one_line(failure), isinstance(failure, RequestError)]
        failed = [(rank, said) for rank, said in enumerate(self.gather(told)) if said]
        if failed and self.size == 1:
            raise failure
        if failed:
            rank, (text, was_request) = failed[0]
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
        fairscale_groups.destroy_model_parallel()
        dist.destroy_process_group()


def connect(run: RunConfig) -> World:
    """Join the world that torchrun describes, or make one of a single rank.

    Raises RequestError when this machine lacks the devices that the request needs."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads_per_rank(local_size))
    timeout = timedelta(seconds=run.step_timeout)
    store = dist.HashStore() if size == 1 else next(dist.rendezvous("env://"))[0]
    groups_store = dist.PrefixStore("groups", store)
    control = "alone" if size == 1 else "gloo"
    dist.init_process_group(control, store=groups_store, rank=rank, world_size=size, timeout=timeout)
    world = World(rank=rank, size=size, local_size=local_size, device=torch.device("cpu"), store=store)
    if size > 1:
        errors.set_speaker(lambda: store.add("llama_mp/speaker", 1) == 1)
    with world.together():
        world.device = choose_device(run.device, local_rank, local_size)
    form_model_parallel_group(size, "nccl" if size > 1 and world.device.type == "cuda" else control)
    return world


def form_model_parallel_group(size: int, backend: str) -> None:
    """fairscale's groups over all ranks; what it prints is not for the user."""
    with contextlib.redirect_stdout(io.StringIO()):
        fairscale_groups.initialize_model_parallel(size, model_parallel_backend=backend)


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


# ---- this machine ----------------------------------------------------------------------------------------------


def choose_device(wanted: str, local_rank: int, local_size: int) -> torch.device:
    """`cuda:LOCAL_RANK` where there is CUDA, unless the CPU is wanted."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        build = f"this torch {torch.__version__} is a CPU build" if torch.version.cuda is None else "no driver answers"
        raise RequestError(f"--device cuda, but no CUDA device can be used ({build}): install one, or --device cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_size > count:
        raise RequestError(
            f"{local_size} ranks on this machine, but {count} CUDA devices: start {count} ranks, or --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_dtype(wanted: str, precision: str, device: torch.device) -> torch.dtype:
    """The type to compute in. auto: a GPU computes in the checkpoint's `precision`; a CPU in bf16 unless the checkpoint
    is fp32: decoding is bound by memory, and bf16 halves the bytes where fp16 arithmetic is emulated."""
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "auto":
        wanted = precision if on_gpu or precision == "fp32" else "bf16"
        wanted = "fp16" if wanted == "bf16" and not has_bf16 else wanted
    if wanted == "bf16" and not has_bf16:
        raise RequestError(f"--dtype bf16, but {torch.cuda.get_device_name(device)} computes no bf16: use --dtype fp16")
    if wanted == "tf32" and not on_gpu:
        raise RequestError("--dtype tf32 is a mode of NVIDIA GPUs, and this run is on the CPU: use --dtype fp32")
    torch.backends.cuda.matmul.allow_tf32 = wanted == "tf32"
    return DTYPES[wanted]


def threads_per_rank(local_size: int) -> int:
    """LLAMA_MP_THREADS, else the cores at hand shared among this machine's ranks."""
    given = os.environ.get("LLAMA_MP_THREADS")
    if given is None:
        return max(1, cores_at_hand() // local_size)
    if not given.isdecimal() or int(given) < 1:
        raise RequestError(f"LLAMA_MP_THREADS is {given!r}, but must be a whole number above 0")
    return int(given)


def cores_at_hand() -> int:
    """Cores that this process may run on, the CPU quota of its control group (containers) included."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or "200000 100000": microseconds per period
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, math.ceil(int(limit) / int(period)))
    return cores


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes held at most so far: allocated on a GPU; on a CPU private memory now, mapped checkpoint pages aside."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
