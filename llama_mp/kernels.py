"""Matrix products with weights of any type: of a few rows on a CPU by our own kernels.c, else by torch.

On a CPU activations are fp32 whatever the weights are: nothing is rounded between products, nor before ranks add up.
torch 2.13 streams bf16 weights at 11 to 25 GB/s on two cores that read memory at 45 (benchmarks/linear.py measures
both); decoding is nothing but that stream.
"""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F

from llama_mp.compiled import NATIVE, load_library

SOURCE = Path(__file__).with_name("kernels.c")
KINDS = {torch.bfloat16: 0, torch.int8: 1, torch.uint8: 2}  # of weights, in kernels.c
MAX_ROWS = 8  # from here on arithmetic counts, which torch's blocked kernels do better
UPCAST_BYTES = 8 << 20  # of a weight at a time: it stays in the cache until the product has read it


def activation_dtype(weight: torch.Tensor) -> torch.dtype:
    """The type to compute in, for a model whose embeddings are `weight`."""
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [N, in] times the transpose of `weight` [out, in], in the type of x."""
    if x.dtype is weight.dtype:
        return F.linear(x, weight)
    few = len(x) <= MAX_ROWS and weight.dtype in KINDS and x.shape[1] % 2 == 0
    return linear_of_few(x, weight) if few and load_kernels() else linear_of_many(x, weight)


def linear_of_few(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear` by the compiled kernels: x in fp32 on the CPU with an even number of columns, `weight` contiguous."""
    x = x.contiguous()
    (num_rows, num_cols), num_out = x.shape, len(weight)
    y = torch.empty(num_rows, num_out)
    row_bytes = weight.stride(0) * weight.element_size()
    addresses = weight.data_ptr(), x.data_ptr(), y.data_ptr()
    if load_kernels().linear(KINDS[weight.dtype], *addresses, num_rows, num_out, num_cols, row_bytes):
        raise MemoryError("no memory for a copy of the activations")
    return y


def linear_of_many(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear` by torch's products in the type of x, of which the weight's rows are made some at a time."""
    y = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    step = max(1, UPCAST_BYTES // (x.shape[1] * x.element_size()))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        torch.mm(x, weight[rows].to(x.dtype).T, out=y[:, rows])
    return y


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """The compiled matrix products, if this machine can build them."""
    library = load_library(SOURCE, NATIVE)
    if library is not None:
        library.linear.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 3 + [ctypes.c_long] * 4
    return library
