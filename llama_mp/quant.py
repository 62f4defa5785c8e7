"""Weights in fewer bits: how a matrix [out, in] is packed into one contiguous tensor, whose type says how.

int8: torch.int8 [out, padded(in + 4, 16)]. A row is its codes, zeros, and in its last 4 bytes an fp32 scale:
    weight = scale * code, scale = max|row| / 127.
int4: torch.uint8 [out, padded(groups * 20, 16)], groups of 32 weights of a row. A row is 16 bytes of codes for each
    group, then for each an fp16 scale and an fp16 offset, then zeros: weight = scale * code + offset, code 0 .. 15.
    Byte j of a group holds element j in its low half and element j + 16 in its high one. The last group counts as
    filled up with zeros.

memory.py has the sizes. Both ways go through a few rows at a time, in fp32.
"""

import math
from collections.abc import Iterator

import torch

from llama_mp.chunks import QUANTIZE_ELEMENTS
from llama_mp.layout import Span, row_chunks
from llama_mp.memory import INT4_GROUP, INT4_GROUP_BYTES, INT8_SCALE_BYTES, packed_row_bytes

DTYPES = {"int8": torch.int8, "int4": torch.uint8}
INT8_MOST, INT4_MOST = 127, 15
CODE_BYTES = INT4_GROUP // 2  # of a group of int4


def pack(matrix: torch.Tensor, quant: str, row_maxima: torch.Tensor | None = None) -> torch.Tensor:
    """`matrix` in the bits of `quant`. int8: `row_maxima` [out] are the largest magnitudes of the rows where `matrix`
    is not all of them."""
    packed = empty_packed(matrix, quant)
    if quant == "int8":
        pack_int8(matrix, largest_of_rows(matrix) if row_maxima is None else row_maxima, packed)
    else:
        for rows in chunks(matrix, matrix.shape[1]):
            pack_int4(matrix[rows], packed[rows])
    return packed


def largest_weight(quant: str) -> float:
    """The largest magnitude that `quant` can hold: int4's offsets are fp16."""
    return torch.finfo(torch.float16).max if quant == "int4" else math.inf


def empty_packed(matrix: torch.Tensor, quant: str) -> torch.Tensor:
    """What `matrix` is packed into, its values not set."""
    rows, cols = matrix.shape
    return torch.empty(rows, packed_row_bytes(cols, quant), dtype=DTYPES[quant], device=matrix.device)


def dequantize(packed: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in_features] in `dtype`, rounded once from fp32."""
    unpack = unpack_int8 if packed.dtype is torch.int8 else unpack_int4
    return unpack(packed, in_features, dtype)


def chunks(matrix: torch.Tensor, num_cols: int) -> Iterator[slice]:
    """The rows of `matrix`, those of one chunk at a time where each has `num_cols` elements."""
    for rows in row_chunks(Span(0, len(matrix)), num_cols, QUANTIZE_ELEMENTS[matrix.device.type]):
        yield slice(*rows)


def as_divisor(number: int, of: torch.Tensor) -> torch.Tensor:
    """CUDA divides by a tensor; with a number's reciprocal it multiplies, and codes would depend on the device."""
    return torch.tensor(float(number), device=of.device)


# ---- int8 ------------------------------------------------------------------------------------------------------


def largest_of_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, fp32; NaN where there is one. (aminmax takes three times as long.)"""
    return torch.maximum(matrix.amax(dim=1), -matrix.amin(dim=1)).float()


def pack_int8(matrix: torch.Tensor, row_maxima: torch.Tensor, packed: torch.Tensor) -> None:
    scales = (row_maxima / as_divisor(INT8_MOST, row_maxima)).unsqueeze(1)
    divisors = scales.where(scales != 0, 1)  # rows of zeros stay zeros
    packed[:, matrix.shape[1] :] = 0
    packed[:, -INT8_SCALE_BYTES:].view(torch.float32).copy_(scales)
    for rows in chunks(matrix, matrix.shape[1]):
        codes = (matrix[rows] / divisors[rows]).round_().clamp_(-INT8_MOST, INT8_MOST)
        packed[rows, : matrix.shape[1]] = codes


def unpack_int8(packed: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    matrix = torch.empty(len(packed), in_features, dtype=dtype, device=packed.device)
    scales = packed[:, -INT8_SCALE_BYTES:].view(torch.float32)
    return torch.mul(packed[:, :in_features], scales, out=matrix)


# ---- int4 ------------------------------------------------------------------------------------------------------


def pack_int4(matrix: torch.Tensor, packed: torch.Tensor) -> None:
    """Scale and offset as fp16 rounds them count when the codes are chosen."""
    rows, cols = matrix.shape
    groups = packed.shape[1] // INT4_GROUP_BYTES
    values = torch.zeros(rows, groups * INT4_GROUP, device=matrix.device)
    values[:, :cols] = matrix
    values = values.view(rows, groups, INT4_GROUP)
    least, most = values.amin(dim=2, keepdim=True), values.amax(dim=2, keepdim=True)
    ranges = torch.cat([(most - least) / as_divisor(INT4_MOST, values), least], dim=2).half()
    packed[:, groups * INT4_GROUP_BYTES :] = 0
    packed[:, groups * CODE_BYTES : groups * INT4_GROUP_BYTES].view(torch.float16).copy_(ranges.flatten(1))
    scales, offsets = ranges.float().split(1, dim=2)
    codes = values.sub_(offsets).div_(scales.where(scales != 0, 1)).round_().clamp_(0, INT4_MOST).to(torch.uint8)
    low, high = codes.split(CODE_BYTES, dim=2)
    packed[:, : groups * CODE_BYTES] = (high << 4).bitwise_or_(low).flatten(1)


def unpack_int4(packed: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    rows, groups = len(packed), packed.shape[1] // INT4_GROUP_BYTES
    codes = packed[:, : groups * CODE_BYTES].unflatten(1, (groups, CODE_BYTES))
    ranges = packed[:, groups * CODE_BYTES : groups * INT4_GROUP_BYTES].view(torch.float16)
    ranges = ranges.unflatten(1, (groups, 2)).float()
    scales, offsets = ranges.split(1, dim=2)
    matrix = torch.empty(rows, groups, 2, CODE_BYTES, dtype=dtype, device=packed.device)
    torch.addcmul(offsets, codes & INT4_MOST, scales, out=matrix[:, :, 0])
    torch.addcmul(offsets, codes >> 4, scales, out=matrix[:, :, 1])
    return matrix.flatten(1)[:, :in_features]
