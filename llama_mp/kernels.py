"""Matrix products of a few rows on a CPU: our own kernels.c, built once with the machine's compiler, else torch's.

torch 2.13 streams bf16 weights at 11 to 25 GB/s on two cores that read memory at 45 (benchmarks/linear.py measures
both); decoding is nothing but that stream.
"""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F

from llama_mp.compiled import REORDERED, load_library

SOURCE = Path(__file__).with_name("kernels.c")
MAX_ROWS = 3  # from here on arithmetic counts, which torch's blocked kernels do better


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, weight)` for x [N, in] and weight [out, in]."""
    suits = x.dtype is torch.bfloat16 and len(x) < MAX_ROWS and x.device.type == "cpu" and weight.shape[1] % 2 == 0
    return linear_bf16(x, weight) if suits and load_kernels() else F.linear(x, weight)


def linear_bf16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear` by the compiled kernel: bf16 on the CPU, `weight` contiguous with an even number of columns."""
    x = x.contiguous()
    y = torch.empty(len(x), len(weight), dtype=torch.bfloat16)
    if load_kernels().linear_bf16(weight.data_ptr(), x.data_ptr(), y.data_ptr(), len(x), *weight.shape):
        raise MemoryError("no memory for a copy of the activations")
    return y


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """The compiled kernels, if this machine has them."""
    library = load_library(SOURCE, *REORDERED)
    if library is not None:
        library.linear_bf16.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3
    return library
