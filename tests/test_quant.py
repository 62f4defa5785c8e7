"""Packed matrices: the bytes that are agreed on, read here by numpy alone, and how near they come."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_activations import allocated

from llama_mp import kernels, quant
from llama_mp.kernels import linear, linear_by_torch
from llama_mp.memory import QUANTIZING_BYTES, packed_row_bytes
from llama_mp.quant import dequantize, pack

SHAPES = [(1, 1), (3, 7), (5, 32), (4, 33), (130, 90), (2, 320)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_matrix(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).to(dtype)


def read_int8(row: bytes, cols: int) -> np.ndarray:
    codes = np.frombuffer(row, np.int8)
    assert len(row) % 16 == 0 and cols + 4 <= len(row) < cols + 20 and not codes[cols:-4].any()
    return codes[:cols].astype(np.float32) * np.frombuffer(row[-4:], np.float32)


def read_int4(row: bytes, cols: int) -> np.ndarray:
    groups = -(-cols // 32)
    assert len(row) % 16 == 0 and len(row) - 20 * groups in range(16) and not any(row[20 * groups :])
    ranges = np.frombuffer(row[16 * groups : 20 * groups], np.float16).astype(np.float32).reshape(groups, 2)
    codes = np.frombuffer(row[: 16 * groups], np.uint8).reshape(groups, 16)
    values = ranges[:, :1] * np.hstack([codes & 15, codes >> 4]) + ranges[:, 1:]
    return values.reshape(-1)[:cols]


READERS = {"int8": read_int8, "int4": read_int4}
STEPS = {"int8": 127, "int4": 15 / 2}  # of half a step, in the range of a row or group, about zero


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", READERS)
def test_rows_hold_what_is_agreed_on(kind: str, shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape)
    packed = pack(matrix, kind)
    assert packed.shape == (shape[0], packed_row_bytes(shape[1], kind)) and packed.is_contiguous()
    assert packed.dtype is {"int8": torch.int8, "int4": torch.uint8}[kind]
    read = np.stack([READERS[kind](row.numpy().tobytes(), shape[1]) for row in packed])
    np.testing.assert_array_equal(dequantize(packed, shape[1], torch.float32).numpy(), read)
    # no weight is further away than half a step, and what fp16 rounds of scale and offset
    most = matrix.abs().amax(dim=1, keepdim=True).numpy()
    assert (np.abs(read - matrix.numpy()) <= most / STEPS[kind] / 2 * 1.0001 + most * 2**-9 * (kind == "int4")).all()


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.010), ("int4", 0.09)])
def test_the_error_of_normal_weights(kind: str, bound: float) -> None:
    """Root mean square, relative. 0.0084 and 0.08 are what scales of 4096 and of 32 weights can do."""
    matrix = random_matrix(256, 4096, torch.bfloat16)
    found = dequantize(pack(matrix, kind), 4096, torch.float32) - matrix.float()
    assert 0.5 * bound <= found.norm() / matrix.float().norm() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", READERS)
def test_codes_are_those_of_fp32_and_unpacking_rounds_once(kind: str, dtype: torch.dtype) -> None:
    matrix = random_matrix(50, 90, dtype)
    packed = pack(matrix, kind)
    assert torch.equal(packed, pack(matrix.float(), kind))
    assert torch.equal(dequantize(packed, 90, dtype), dequantize(packed, 90, torch.float32).to(dtype))


@pytest.mark.parametrize("kind", READERS)
def test_zeros_stay_zeros_and_equal_weights_themselves(kind: str) -> None:
    matrix = torch.zeros(3, 64)
    matrix[1] = 0.75  # which fp16 holds
    matrix[2, :32] = 1e-30
    found = dequantize(pack(matrix, kind), 64, torch.float32)
    assert torch.equal(found[0], matrix[0])
    assert torch.allclose(found[1], matrix[1], rtol=1e-6)
    assert torch.allclose(found[2], matrix[2], atol=1e-30)


def test_maxima_of_the_whole_row_make_the_codes_of_the_whole_row() -> None:
    matrix = random_matrix(20, 64)
    whole, maxima = pack(matrix, "int8"), quant.largest_of_rows(matrix)
    for cols in (slice(0, 24), slice(24, 64)):
        part = pack(matrix[:, cols], "int8", maxima)
        num_codes = cols.stop - cols.start
        assert torch.equal(part[:, :num_codes], whole[:, cols]) and torch.equal(part[:, -4:], whole[:, -4:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("kind", READERS)
def test_products_are_those_of_the_matrix(kind: str, num_rows: int, dtype: torch.dtype) -> None:
    packed, x = pack(random_matrix(70, 90), kind), random_matrix(num_rows, 90, dtype)
    y = linear(x, packed)
    expected = F.linear(x.double(), dequantize(packed, 90, torch.float32).double())
    assert y.dtype is dtype and y.shape == (num_rows, 70)
    assert (y - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max() + 1e-5


@pytest.mark.parametrize("kind", READERS)
def test_chunks_of_any_size_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = random_matrix(50, 90), random_matrix(2, 90)
    packed = pack(matrix, kind)
    y = linear_by_torch(x, packed, torch.float32)
    for num_elements in (1, 100, 1000):
        monkeypatch.setattr(quant, "QUANTIZE_ELEMENTS", {"cpu": num_elements})
        monkeypatch.setattr(kernels, "PRODUCT_BYTES", {"cpu": 4 * num_elements})
        assert torch.equal(pack(matrix, kind), packed)
        assert torch.allclose(linear_by_torch(x, packed, torch.float32), y, atol=1e-5)


@pytest.mark.parametrize("kind", READERS)
def test_little_is_held_beside_the_matrices(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_elements, matrix = 1 << 17, random_matrix(512, 1024, torch.bfloat16)
    monkeypatch.setattr(quant, "QUANTIZE_ELEMENTS", {"cpu": num_elements})
    monkeypatch.setattr(kernels, "PRODUCT_BYTES", {"cpu": 4 * num_elements})
    packing, packed = allocated(lambda: pack(matrix, kind))
    multiplying, y = allocated(lambda: linear_by_torch(matrix[:1], packed, torch.float32))
    small = 16 * len(matrix)  # maxima and scales of the rows
    assert packing - packed.nbytes <= QUANTIZING_BYTES * num_elements + small
    assert multiplying - y.nbytes <= QUANTIZING_BYTES * num_elements + small


def test_what_int4_cannot_hold_is_said() -> None:
    most = quant.largest_weight("int4")
    assert dequantize(pack(torch.tensor([[-most, most]]), "int4"), 2, torch.float32).isfinite().all()
    assert not dequantize(pack(torch.tensor([[-2 * most, most]]), "int4"), 2, torch.float32).isfinite().all()
    assert quant.largest_weight("int8") == float("inf")
