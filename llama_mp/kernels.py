"""Matrix products with weights of any type: on a CPU by our own kernels.c, of few rows, and many_rows.c; on a GPU, of
few rows, by cuda.py; else by torch.

On a CPU activations are fp32 whatever the weights are: nothing is rounded between products, nor before ranks add up.
benchmarks/linear.py measures ours beside torch's: of one row, where nothing counts but how fast weights are read, and
of many, where arithmetic does.
"""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F

from llama_mp import cuda, quant
from llama_mp.chunks import PRODUCT_BYTES, PRODUCT_ROWS
from llama_mp.compiled import NATIVE, load_library
from llama_mp.cores import fast_bf16
from llama_mp.layout import Span, row_chunks

SOURCE, MANY_ROWS = (Path(__file__).with_name(name) for name in ("kernels.c", "many_rows.c"))
KINDS = {torch.bfloat16: 0, torch.int8: 1, torch.uint8: 2}  # of weights, in kernels.c
INT4_PAIRS = 3  # there: int4, with x rounded to bf16 where the machine multiplies that
KINDS_OF_MANY = KINDS | {torch.float32: 3}  # in many_rows.c
UNPACKED = (torch.float32, torch.bfloat16)  # types that they make of packed weights
MAX_ROWS = 8  # few, of which each is to the bit what it would be alone; above, arithmetic counts
MAX_EXACT_ROWS = 3  # the same where more are rounded to bf16, which is faster from here on


def activation_dtype(weight: torch.Tensor) -> torch.dtype:
    """The type to compute in, for a model whose embeddings are `weight`."""
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


def linear(x: torch.Tensor, weight: torch.Tensor, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """x [N, in] times the transpose of `weight` [out, in], which may be packed (quant.py), in the type of x.

    Where `precision`, the run's, is bf16, the factors of many rows may be rounded to it; sums are fp32 in any case.
    On a GPU the type of x is what those of several rows are rounded to, but for the codes of int8, which are exact."""
    if cuda.suits(x, weight):
        return cuda.product(x, weight)
    if takes_many(x, weight, precision) and (y := linear_of_many(x, weight, precision)) is not None:
        return y
    if takes_few(x, weight, precision):
        return linear_of_few(x, weight, precision)
    return F.linear(x, weight) if x.dtype is weight.dtype else linear_by_torch(x, weight, precision)


def takes_many(x: torch.Tensor, weight: torch.Tensor, precision: torch.dtype) -> bool:
    """Whether x has so many rows, on a CPU, and both are of such types, as `linear_of_many` is for."""
    is_ours = x.device.type == "cpu" and x.dtype is torch.float32 and weight.dtype in KINDS_OF_MANY
    return is_ours and len(x) > few_rows(weight.dtype, precision)


def takes_few(x: torch.Tensor, weight: torch.Tensor, precision: torch.dtype) -> bool:
    """The same for `linear_of_few`, where there is a compiler."""
    is_ours = x.device.type == "cpu" and x.dtype is torch.float32 and weight.dtype in KINDS
    return is_ours and len(x) <= few_rows(weight.dtype, precision) and load_kernels() is not None


def few_rows(dtype: torch.dtype, precision: torch.dtype) -> int:
    """The most rows that `linear_of_few` multiplies with weights of type `dtype` on a CPU."""
    if fast_bf16() == "pairs" and precision is torch.bfloat16 and dtype in (torch.bfloat16, torch.int8):
        return MAX_EXACT_ROWS
    return MAX_ROWS


def linear_of_few(x: torch.Tensor, weight: torch.Tensor, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """`linear` by the compiled kernels: x in fp32 on the CPU."""
    x = x.contiguous()
    (num_rows, num_cols), num_out = x.shape, weight.shape[0]
    y = x.new_empty(num_rows, num_out)  # whatever torch's default type is
    addresses = weight.data_ptr(), x.data_ptr(), y.data_ptr()
    sizes = num_rows, num_out, num_cols, row_bytes(weight)
    if load_kernels().linear(kind_of(weight.dtype, precision), *addresses, *sizes):
        raise MemoryError("no memory for a copy of the activations")
    return y


def kind_of(dtype: torch.dtype, precision: torch.dtype) -> int:
    """How kernels.c is to multiply few rows with weights of type `dtype`, in a run in `precision`."""
    return INT4_PAIRS if dtype is torch.uint8 and precision is torch.bfloat16 else KINDS[dtype]


def linear_of_many(
    x: torch.Tensor, weight: torch.Tensor, precision: torch.dtype, *, is_gated: bool = False
) -> torch.Tensor | None:
    """`linear` of x in fp32 on a CPU by the compiled kernels. `is_gated`: silu(gate) * up of what `weight`, a gate and
    behind it an up projection, makes. None where torch's products are faster, or all that there is."""
    in_pairs, library = rounds(x, weight, precision), load_many_rows()
    if not library or (in_pairs and (fast_bf16() != "pairs" or not library.multiplies_pairs())):
        return None
    x = x.contiguous()
    (num_rows, num_cols), num_out = x.shape, len(weight) // 2 if is_gated else len(weight)
    turned = x.new_empty(library.turned_bytes(in_pairs, num_rows, num_cols), dtype=torch.uint8)
    y = x.new_empty(num_rows, num_out)
    addresses = weight.data_ptr(), x.data_ptr(), y.data_ptr(), turned.data_ptr()
    sizes = num_rows, num_out, num_cols, row_bytes(weight)
    if library.linear_of_many(KINDS_OF_MANY[weight.dtype], in_pairs, is_gated, *addresses, *sizes):
        raise MemoryError("no memory for some rows of the weights")
    return y


def rounds(x: torch.Tensor, weight: torch.Tensor, precision: torch.dtype) -> bool:
    """Whether factors of many rows are rounded to bf16, in a run in `precision`."""
    may_round = precision is torch.bfloat16 and weight.dtype is not torch.float32
    return may_round and x.device.type == "cpu" and fast_bf16() is not None


def linear_by_torch(x: torch.Tensor, weight: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """`linear` by torch's products, for which some of the weight's rows at a time are made the type of the others."""
    dtype = precision if rounds(x, weight, precision) else x.dtype
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
    if weight.device.type != "cpu" or dtype not in UNPACKED or not (library := load_many_rows()):
        return quant.dequantize(weight, num_cols, dtype)
    matrix = weight.new_empty(len(weight), num_cols, dtype=dtype)
    addresses = weight.data_ptr(), matrix.data_ptr()
    library.unpack(KINDS[weight.dtype], *addresses, dtype is torch.bfloat16, *matrix.shape, row_bytes(weight))
    return matrix


def row_bytes(weight: torch.Tensor) -> int:
    """From one row to the next. The columns of a row are neighbours: kernels are not told otherwise."""
    assert weight.stride(1) == 1 or weight.shape[1] == 1, "a weight whose columns lie apart"
    return weight.stride(0) * weight.element_size()


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """The compiled products of few rows, if this machine can build them."""
    library = load_library(SOURCE, NATIVE)
    if library is not None:
        library.linear.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 3 + [ctypes.c_long] * 4
    return library


@functools.cache
def load_many_rows() -> ctypes.CDLL | None:
    """The compiled products of many rows, if this machine can build them."""
    library = load_library(MANY_ROWS, NATIVE)
    if library is not None:
        library.turned_bytes.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long]
        library.turned_bytes.restype = ctypes.c_long
        library.linear_of_many.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 4 + [ctypes.c_long] * 4
        library.unpack.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int] + [ctypes.c_long] * 3
    return library
