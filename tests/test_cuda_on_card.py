"""The kernels for GPUs on a card, beside torch: `pytest -m gpu`."""

from collections.abc import Iterator

import interpreted
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device answers"),
]


@pytest.fixture(autouse=True)
def on_card() -> Iterator[None]:
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_products(kind: str) -> None:
    for rows, cols in ((21, 576), (4096, 4096), (64, 11008)):
        for normed, gated, added in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1)):
            assert interpreted.product(kind, rows, cols, normed=normed, gated=gated, added=added) <= 1e-5


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_products_of_several_rows(kind: str) -> None:
    for dtype, bound in (("fp32", 1e-5), ("fp16", 2e-3), ("bf16", 2e-2)):
        for num_tokens, rows, cols in ((2, 21, 576), (16, 4096, 4096), (64, 70, 1376)):
            assert interpreted.product_of_several(kind, dtype, num_tokens, rows, cols) <= bound


@pytest.mark.parametrize(("group", "head_dim"), [(1, 128), (3, 64), (8, 80)])
def test_attention(group: int, head_dim: int) -> None:
    for dtype, bound in (("fp32", 1e-5), ("fp16", 2e-3), ("bf16", 2e-2)):
        for length, positions in ((100, [0, 99, 64]), (4096, [4095]), (400, list(range(0, 400, 7)))):
            assert interpreted.attention(group, head_dim, length, positions, dtype) <= bound
