"""Matrix products with weights of any type: of a few rows by our own kernels.c or, on a GPU, cuda.py; else by torch.

On a CPU activations are fp32 whatever the weights are: nothing is rounded between products, nor before ranks add up.
torch 2.13 streams bf16 weights at 11 to 25 GB/s on two cores that read memory at 45 (benchmarks/linear.py measures
both); decoding is nothing but that stream.
"""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F

from llama_mp import cuda, quant
from llama_mp.chunks import PRODUCT_BYTES, PRODUCT_ROWS
from llama_mp.compiled import NATIVE, load_library
from llama_mp.cores import has_fast_bf16
from llama_mp.layout import Span, row_chunks

SOURCE = Path(__file__).with_name("kernels.c")
KINDS = {torch.bfloat16: 0, torch.int8: 1, torch.uint8: 2}  # of weights, in kernels.c
UNPACKED = (torch.float32, torch.bfloat16)  # types that they make of packed weights
MAX_ROWS = 8  # from here on arithmetic counts, which torch's blocked kernels do better


def activation_dtype(weight: torch.Tensor) -> torch.dtype:
    """The type to compute in, for a model whose embeddings are `weight`."""
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


def linear(x: torch.Tensor, weight: torch.Tensor, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """x [N, in] times the transpose of `weight` [out, in], which may be packed (quant.py), in the type of x.

    Where `precision`, the run's, is bf16, the factors of many rows may be rounded to it; sums are fp32 in any case.
    On a GPU the type of x is what those of several rows are rounded to, but for the codes of int8, which are exact."""
    if cuda.suits(x, weight):
        return cuda.product(x, weight)
    if x.dtype is weight.dtype:
        return F.linear(x, weight)
    num_rows, num_cols = x.shape
    on_cpu = x.device.type == "cpu" and x.dtype is torch.float32
    few = on_cpu and num_rows <= MAX_ROWS and weight.dtype in KINDS and num_cols % 2 == 0
    return linear_of_few(x, weight) if few and load_kernels() else linear_of_many(x, weight, precision)


def linear_of_few(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear` by the compiled kernels: x in fp32 on the CPU with an even number of columns, `weight` contiguous."""
    x = x.contiguous()
    (num_rows, num_cols), num_out = x.shape, weight.shape[0]
    y = x.new_empty(num_rows, num_out)  # whatever torch's default type is
    addresses = weight.data_ptr(), x.data_ptr(), y.data_ptr()
    if load_kernels().linear(KINDS[weight.dtype], *addresses, num_rows, num_out, num_cols, row_bytes(weight)):
        raise MemoryError("no memory for a copy of the activations")
    return y


def linear_of_many(x: torch.Tensor, weight: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """`linear` by torch's products, for which some of the weight's rows at a time are made the type of the others."""
    dtype = precision if precision is torch.bfloat16 and x.device.type == "cpu" and has_fast_bf16() else x.dtype
    if weight.dtype is dtype:
        return F.linear(x.to(dtype), weight).to(x.dtype)
    factor, y = x.to(dtype), x.new_empty(len(x), len(weight))
    num_elements, unit = PRODUCT_BYTES[x.device.type] // dtype.itemsize, PRODUCT_ROWS[x.device.type]
    for start, stop in row_chunks(Span(0, len(weight)), x.shape[1], num_elements, unit=unit):
        multiply_into(y[:, start:stop], factor, unpacked(weight[start:stop], x.shape[1], dtype))
    return y


def multiply_into(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """F.linear whose result takes the place of y, some columns of a matrix."""
    if y.device.type == "cuda":
        torch.mm(x, weight.t(), out=y)  # cuBLAS writes rows that stand apart
    else:
        y[:] = F.linear(x, weight)


def unpacked(weight: torch.Tensor, num_cols: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, num_cols] that `weight` is, or is packed from, in `dtype`."""
    if weight.is_floating_point():
        return weight.to(dtype)
    if weight.device.type != "cpu" or dtype not in UNPACKED or not (library := load_kernels()):
        return quant.dequantize(weight, num_cols, dtype)
    matrix = torch.empty(len(weight), num_cols, dtype=dtype)
    addresses = weight.data_ptr(), matrix.data_ptr()
    library.unpack(KINDS[weight.dtype], *addresses, dtype is torch.bfloat16, *matrix.shape, row_bytes(weight))
    return matrix


def row_bytes(weight: torch.Tensor) -> int:
    return weight.stride(0) * weight.element_size()


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """The compiled matrix products, if this machine can build them."""
    library = load_library(SOURCE, NATIVE)
    if library is not None:
        library.linear.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 3 + [ctypes.c_long] * 4
        library.unpack.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int] + [ctypes.c_long] * 3
    return library
