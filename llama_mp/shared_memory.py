"""A backend of torch.distributed for CPU ranks on one machine: they reduce through memory that all have mapped.

gloo takes 0.5 to 1.5 ms to sum a few kilobytes over two ranks; each token of each layer needs two such sums. The memory
has no name, so that nothing is left of it when its processes are gone, however they end.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_mp.compiled import load_library

NAME = "shared_memory"
SOURCE = Path(__file__).with_name("shared_memory.c")
LINE_BYTES = 64  # a member's line in shared_memory.c
SLOT_BYTES = 1 << 20  # of one rank, twice; what is longer goes in parts
KINDS = {torch.float32: 0, torch.bfloat16: 1}


class Group(ctypes.Structure):
    """`group` in shared_memory.c."""

    _fields_ = (
        ("region", ctypes.c_void_p),
        ("rank", ctypes.c_long),
        ("size", ctypes.c_long),
        ("slot_bytes", ctypes.c_long),
        ("barriers", ctypes.c_ulong),
        ("turn", ctypes.c_ulong),
        ("timeout_s", ctypes.c_double),
    )


class SharedMemory(dist.ProcessGroup):
    """The collectives that the model needs: sums everywhere, rows gathered at one rank. Results are there on return."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.library = load_library(SOURCE)
        assert self.library is not None, "is_available() tells beforehand"
        for function in (self.library.all_reduce, self.library.gather):
            function.restype = ctypes.c_long
        self.memory = shared_region(store, rank, size, size * LINE_BYTES + 2 * (size + 1) * SLOT_BYTES)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        ctypes.c_long.from_buffer(self.memory, rank * LINE_BYTES + 8).value = os.getpid()
        self.group = Group(start, rank, size, SLOT_BYTES, 0, 0, timeout.total_seconds())
        store.set(f"attached/{rank}", "")
        store.wait([f"attached/{other}" for other in range(size)], timeout)

    def getBackendName(self) -> str:
        return NAME

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a rank waits in a collective for the others."""
        self.group.timeout_s = timeout.total_seconds()

    def allreduce(self, tensors: Sequence[torch.Tensor], options: Any = None) -> "Done":
        """Each tensor becomes its sum over the ranks, in fp32 and in their order."""
        for tensor in tensors:
            kind = KINDS.get(tensor.dtype)
            x = tensor if kind is not None and tensor.is_contiguous() else tensor.float().contiguous()
            address = ctypes.c_void_p(x.data_ptr())
            self.check(self.library.all_reduce(ctypes.byref(self.group), address, ctypes.c_long(x.numel()), kind or 0))
            if x is not tensor:
                tensor.copy_(x)
        return Done()

    def gather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], options: Any = None
    ) -> "Done":
        """The root's `outputs` become the ranks' `inputs`."""
        [x], root = inputs, options.rootRank
        x = x.contiguous()
        is_root = self.rank() == root
        parts = torch.empty(self.size() if is_root else 0, *x.shape, dtype=x.dtype)
        addresses = [ctypes.c_void_p(t.data_ptr()) for t in (x, parts)]
        num_bytes = ctypes.c_long(x.numel() * x.element_size())
        self.check(self.library.gather(ctypes.byref(self.group), addresses[0], num_bytes, addresses[1], root))
        if is_root:
            for output, part in zip(outputs[0], parts, strict=True):
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


def is_available() -> bool:
    """Whether this machine can compile the backend."""
    return load_library(SOURCE) is not None


def shared_region(store: dist.Store, rank: int, size: int, num_bytes: int) -> mmap.mmap:
    """Zeroed memory that all ranks have mapped: rank 0 makes it, the others open it by way of rank 0's process."""
    if rank == 0:
        file = os.memfd_create("llama-mp", os.MFD_CLOEXEC)
        os.ftruncate(file, num_bytes)
        store.set("memory", f"/proc/{os.getpid()}/fd/{file}")
    else:
        file = os.open(store.get("memory"), os.O_RDWR | os.O_CLOEXEC)
    memory = mmap.mmap(file, num_bytes)
    store.set(f"mapped/{rank}", "")
    store.wait([f"mapped/{other}" for other in range(size)])  # rank 0's descriptor must last until then
    os.close(file)
    return memory


dist.Backend.register_backend(NAME, SharedMemory, devices=["cpu"])
