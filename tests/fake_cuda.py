"""A CUDA device that is not there: its tensors have shapes and no data, and what would need them on the host raises.

torch's FakeTensorMode refuses values that leave the device (`item`, boolean masks) and most operations on tensors of
two devices. `Watch` refuses the copies that make the host wait.
"""

import contextlib
import ctypes
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_mp import cuda

DEVICE = torch.device("cuda", 0)
OLD_CARD = (7, 5)  # its compute capability: torch's operations run on it, our own kernels do not
# Who sets the current device, by type of device: an array of addresses, null for CUDA in a torch built without it.
GUARDS, NUM_TYPES, CUDA, META = "_ZN3c104impl26device_guard_impl_registryE", 15, 1, 14
MAKE_TENSOR = torch.tensor
COPIES, LIKE = ("copy_", "to", "_to_copy"), ("empty_like", "new_empty", "new_zeros", "zeros_like")


class Waits(Exception):
    """The host would wait for the device."""


class Watch(TorchDispatchMode):
    """Refuses copies between main memory and the device that are not queued, or not from or to pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: dict[int, torch.UntypedStorage] = {}  # held, so that no other gets its address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, torch.Tensor) and x.dim() > 0]
        on_host = [x for x in tensors if x.device.type == "cpu"]
        name = func.overloadpacket.__name__
        if kwargs.get("pin_memory") or (name in COPIES[1:] and self.is_queued(func, args, kwargs)):
            self.pinned |= {x.untyped_storage()._cdata: x.untyped_storage() for x in on_host if x is made}
        if 0 < len(on_host) < len(tensors) and name not in LIKE:
            if name not in COPIES:
                raise Waits(f"{func} of tensors in main memory and on the device")
            if not self.is_queued(func, args, kwargs):
                raise Waits(f"{func} between main memory and the device")
            if not all(x.untyped_storage()._cdata in self.pinned for x in on_host):
                raise Waits(f"{func} from or to main memory that is not pinned")
        return made

    def is_queued(self, func, args, kwargs) -> bool:
        place = [argument.name for argument in func._schema.arguments].index("non_blocking")
        return bool(kwargs.get("non_blocking", args[place] if place < len(args) else False))


class Event:
    """Of torch.cuda: what is recorded never happens."""

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        raise Waits("for an event")


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Within it, tensors are made on DEVICE, and computed with, by a torch of any build."""
    patches = (
        patch.object(torch, "tensor", make_tensor),
        patch.object(torch.Tensor, "pin_memory", pinned),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: OLD_CARD),
        patch.object(torch.cuda, "current_stream", lambda device=None: None),
        patch.object(torch.cuda, "Event", Event),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_guard())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("error", "Accessing the data pointer of FakeTensor")  # for a kernel of a CPU
        for one in patches:
            stack.enter_context(one)
        stack.enter_context(FakeTensorMode())
        yield


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def make_tensor(data, dtype=None, device=None, pin_memory=False) -> torch.Tensor:
    """`torch.tensor`, which makes it on the device below what a mode sees."""
    made = MAKE_TENSOR(data, dtype=dtype)
    return made.pin_memory() if pin_memory else made.to(device or made.device)


@contextlib.contextmanager
def no_guard() -> Iterator[None]:
    """Python's indexing sets the current device around it, which for CUDA a torch without it cannot: let that of the
    meta device do it, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * NUM_TYPES).in_dll(library, GUARDS)
    before, guards[CUDA] = guards[CUDA], guards[CUDA] or guards[META]
    try:
        yield
    finally:
        guards[CUDA] = before


class Kernel:
    """Of Triton's: what it is launched with lies on the device, and how often hangs on shapes alone."""

    def __init__(self, name: str, launched: Counter[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(type(size) is int and size > 0 for size in grid), f"{self.name} over {grid}"
        return self.launch

    def launch(self, *args: object, **named: object) -> None:
        tensors = [x for x in (*args, *named.values()) if isinstance(x, torch.Tensor)]
        assert {x.device for x in tensors} == {DEVICE}, self.name
        self.launched[self.name] += 1


@contextlib.contextmanager
def our_kernels() -> Iterator[Counter[str]]:
    """DEVICE runs our own kernels, which do nothing here: how often each was launched. For a process that has not
    imported them yet."""
    launched: Counter[str] = Counter()
    language = SimpleNamespace(constexpr=int)

    def jit(function: Callable | None = None, **options: object) -> Callable:
        return Kernel(function.__name__, launched) if function else jit

    triton = SimpleNamespace(jit=jit, cdiv=lambda a, b: -(-a // b), language=language)
    with (
        patch.dict(sys.modules, {"triton": triton, "triton.language": language}),
        patch.object(cuda, "available", lambda device: device.type == "cuda"),
        patch.object(cuda, "num_processors", lambda device: 132),
        patch.object(torch.Tensor, "data_ptr", lambda self: 512),  # to which torch aligns tensors on a GPU
    ):
        yield launched


def fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Give `model`, built on the meta device, weights on DEVICE, those that are not packed in `dtype`."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            held = torch.empty(parameter.shape, dtype=kind, device=DEVICE)
            setattr(module, name, nn.Parameter(held, requires_grad=False))
