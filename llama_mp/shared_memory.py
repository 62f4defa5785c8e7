"""A backend of torch.distributed for CPU ranks on one machine: they reduce through memory that all have mapped.

gloo takes 0.2 to 1.5 ms to sum a few kilobytes over two ranks; each token of each layer needs two such sums. The memory
has no name, so that nothing is left of it when its processes are gone, however they end.
"""

import ctypes
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_mp.compiled import NATIVE, library_of
from llama_mp.cores import cores_at_hand

NAME = "shared_memory"
SOURCE = Path(__file__).with_name("shared_memory.c")
LINE_BYTES = 64  # a member's line in shared_memory.c
SLOT_BYTES = 1 << 20  # of one rank, twice; what is longer goes in parts
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OPERATIONS = {dist.ReduceOp.RedOpType.SUM: 0, dist.ReduceOp.RedOpType.MAX: 1}
SPINS = 1000  # some 30 us: longer than ranks that run at the same time are apart


class Group(ctypes.Structure):
    """`group` in shared_memory.c."""

    _fields_ = (
        ("region", ctypes.c_void_p),
        ("rank", ctypes.c_long),
        ("size", ctypes.c_long),
        ("slot_bytes", ctypes.c_long),
        ("spins", ctypes.c_long),
        ("barriers", ctypes.c_uint),
        ("turn", ctypes.c_uint),
        ("file", ctypes.c_int),
        ("timeout_s", ctypes.c_double),
    )


class Region:
    """Zeroed memory that the ranks have in common: a file without a name. A rank that has joined holds a lock on the
    byte of its number, which goes when its process does: so the others know."""

    def __init__(self, file: int) -> None:
        self.file = file
        weakref.finalize(self, os.close, file)

    @classmethod
    def make(cls, size: int) -> "Region":
        """Raises OSError where there is no memory for it, and beyond a limit of file sizes (`ulimit -f`)."""
        file = library_of(SOURCE, NATIVE).new_file()  # os.memfd_create is missing from Pythons built for old systems
        if file < 0:
            raise OSError(-file, os.strerror(-file))
        region = cls(file)
        os.fchmod(file, 0o600)
        os.ftruncate(file, num_bytes(size))
        return region

    @classmethod
    def find(cls, path: str, *identity: int) -> "Region":
        """Another rank's. Raises OSError when it cannot be seen from here, as from a container of one's own."""
        region = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        if region.identity() != identity:
            raise OSError(f"{path} is of another process here: the ranks are in containers of their own")
        return region

    def whereabouts(self) -> list[Any]:
        """The arguments of `find`."""
        return [f"/proc/{os.getpid()}/fd/{self.file}", *self.identity()]

    def identity(self) -> tuple[int, ...]:
        status = os.fstat(self.file)
        return status.st_dev, status.st_ino

    def join(self, rank: int, size: int) -> "Region":
        self.memory = mmap.mmap(self.file, num_bytes(size))
        fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        return self

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class SharedMemory(dist.ProcessGroup):
    """The collectives that the model needs, over the region that `prepare` has joined. Results are there on return."""

    def __init__(self, rank: int, size: int, region: Region, timeout: timedelta) -> None:
        super().__init__(rank, size)
        library = library_of(SOURCE, NATIVE)
        self.reduce_in_c, self.gather_in_c = library.all_reduce, library.gather
        self.reduce_in_c.restype = self.gather_in_c.restype = ctypes.c_long
        self.reduce_in_c.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_long] * 3]
        self.gather_in_c.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_long]
        self.region = region
        spins = SPINS if size <= cores_at_hand() else 0  # the rank that is waited for needs this core
        self.group = Group(region.address, rank, size, SLOT_BYTES, spins, 0, 0, region.file)
        self.group_address = ctypes.addressof(self.group)
        self.set_timeout(timeout)

    def getBackendName(self) -> str:
        return NAME

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a rank waits in a collective for the others."""
        self.group.timeout_s = timeout.total_seconds()

    def allreduce(self, tensors: Sequence[torch.Tensor], options: Any = None) -> "Done":
        """Each tensor becomes its sum over the ranks, or its maximum, taken in fp32 and in their order."""
        operation = dist.ReduceOp.RedOpType.SUM if options is None else options.reduceOp.op
        for tensor in tensors:
            if tensor.dtype not in KINDS or operation not in OPERATIONS:
                raise NotImplementedError(f"{NAME} has sums and maxima of floats, not {operation} of {tensor.dtype}")
            x = tensor.contiguous()
            kind = KINDS[tensor.dtype]
            self.check(self.reduce_in_c(self.group_address, x.data_ptr(), x.numel(), kind, OPERATIONS[operation]))
            if x is not tensor:
                tensor.copy_(x)
        return Done()

    def allgather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], options: Any = None
    ) -> "Done":
        """Each rank's `outputs` become the ranks' `inputs`."""
        return self.gather_to(self.rank(), outputs, inputs)

    def gather(self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], options: Any) -> "Done":
        """The root's `outputs` become the ranks' `inputs`."""
        return self.gather_to(options.rootRank, outputs, inputs)

    def gather_to(self, root: int, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]) -> "Done":
        """`gather`, of which each rank may think itself the root: in C it only says who copies the parts."""
        [x] = inputs
        x = x.contiguous()
        wanted = outputs[0] if self.rank() == root else []
        parts = [output.contiguous() for output in wanted]
        assert all(part.shape == x.shape and part.dtype is x.dtype for part in parts), "parts are alike"
        targets = (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts))
        num_bytes = x.numel() * x.element_size()
        self.check(self.gather_in_c(self.group_address, x.data_ptr(), num_bytes, targets, root))
        for output, part in zip(wanted, parts, strict=True):
            if part is not output:
                output.copy_(part)
        return Done()

    def check(self, missing: int) -> None:
        """Raise the error that gloo would, when a rank is late or gone."""
        if missing > 0:
            raise dist.DistBackendError(f"timed out: rank {missing - 1} did not come for {self.group.timeout_s:.0f} s")
        if missing < 0:
            raise dist.DistBackendError(f"Connection closed: the process of rank {-missing - 1} is gone")


class Done(dist.Work):
    """What a collective that is over returns."""

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True


_joined: list[Region] = []  # and not in use: fairscale makes a group by the name of its backend alone


def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> SharedMemory:
    return SharedMemory(rank, size, _joined.pop(), timeout)


dist.Backend.register_backend(NAME, create, devices=["cpu"])


def prepare(rank: int, size: int, gather: Callable[[Any], list[Any]]) -> str | None:
    """Join the memory for a group of all ranks, which are on one machine. Returns None, or why there is no such memory,
    the same on every rank. `gather` gives every rank the JSON messages of all."""
    region = obstacle = None
    try:
        library_of(SOURCE, NATIVE)
        region = Region.make(size).join(rank, size) if rank == 0 else None
    except OSError as error:
        obstacle = f"rank {rank}: {text_of(error)}"
    told = gather([obstacle, region and region.whereabouts()])
    obstacle = next((said for said, _ in told if said), None)
    if rank > 0 and not obstacle:
        try:
            region = Region.find(*told[0][1]).join(rank, size)
        except OSError as error:
            obstacle = f"rank {rank}: {text_of(error)}"
    obstacle = next(filter(None, gather(obstacle)), None)
    _joined[:] = [region] if region and not obstacle else []
    return obstacle


def num_bytes(size: int) -> int:
    return size * LINE_BYTES + 2 * (size + 1) * SLOT_BYTES


def text_of(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return where + (error.strerror or str(error))
