"""The steps between the matrix products as fused.c computes them, against torch's."""

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from llama_mp import fused, kernels, quant
from llama_mp.compiled import library_of
from llama_mp.config import ModelConfig
from llama_mp.cores import cpu_features
from llama_mp.rope import rotate, rotation_table


@pytest.fixture(autouse=True, params=["x86-64", "x86-64-v3", "native"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As built for a machine with neither AVX2 nor AVX-512, for one with AVX2, and for this one."""
    if request.param == "x86-64-v3" and not {"avx2", "fma"} <= cpu_features():
        pytest.skip("this machine has no AVX2")
    monkeypatch.setattr(fused, "NATIVE", f"-march={request.param}")
    fused.load_steps.cache_clear()
    assert fused.load_steps() is library_of(fused.SOURCE, f"-march={request.param}")
    yield
    fused.load_steps.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [2, 16, 70, 576])
def test_norm(dtype: torch.dtype, dim: int) -> None:
    x, weight = torch.randn(3, dim) * 5, torch.randn(dim).to(dtype)
    expected = F.rms_norm(x.double(), (dim,), weight.double(), 1e-5)
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden_dim", [1, 16, 70, 50_000])
def test_swiglu(hidden_dim: int) -> None:
    x = torch.randn(3, 2 * hidden_dim) * 10
    x[0, 0], x[1, 0], x[2, 0] = -200, 200, float("nan")
    gate, up = x.double().chunk(2, dim=-1)
    expected = F.silu(gate) * up
    torch.testing.assert_close(fused.swiglu(x).double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("pack", [torch.Tensor.float, torch.Tensor.bfloat16, lambda w: quant.pack(w, "int4")])
@pytest.mark.parametrize(("num_rows", "hidden_dim"), [(2, 16), (9, 1), (40, 12), (70, 50)])
def test_gated_is_swiglu_of_the_product(
    pack: Callable[[torch.Tensor], torch.Tensor], num_rows: int, hidden_dim: int
) -> None:
    weight, x = pack(torch.randn(2 * hidden_dim, 96)), torch.randn(num_rows, 96)
    for precision in (torch.float32, torch.bfloat16):
        expected = fused.swiglu(kernels.linear(x, weight, precision))
        torch.testing.assert_close(fused.gated(x, weight, precision), expected)


def test_gated_of_many_rows_makes_nothing_twice_as_wide() -> None:
    """Many rows, in one go; without a compiler, or where torch's products are faster, in two."""
    x, weight = torch.randn(30, 64), torch.randn(48, 64).bfloat16()
    with patch.object(fused, "swiglu", side_effect=AssertionError):
        assert fused.gated(x, weight, torch.float32).shape == (30, 24)
    with patch.object(kernels, "load_many_rows", lambda: None), patch.object(kernels, "fast_bf16", lambda: None):
        torch.testing.assert_close(
            fused.gated(x, weight, torch.bfloat16), fused.swiglu(x @ weight.float().T), rtol=1e-5, atol=1e-5
        )


def test_swiglu_takes_views_that_are_not_contiguous() -> None:
    """A copy of 40 MB goes back to the system with its last name: to read it then ends the process."""
    x = torch.randn(2000, 5000).t()
    torch.testing.assert_close(fused.swiglu(x), fused.swiglu(x.contiguous()))


def test_results_are_fp32_whatever_torchs_default_type_is() -> None:
    heads, rotations = torch.ones(1, 3, 4), torch.ones(1, 1, 2, dtype=torch.complex64)
    keys, values = torch.zeros(1, 8, 1, 4), torch.ones(1, 8, 1, 4)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = fused.swiglu(heads[0]), fused.attend(heads, rotations, keys, values, torch.tensor([5]))
    finally:
        torch.set_default_dtype(default)
    assert [y.dtype for y in found] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 64), (9, 3, 6), (8, 1, 128)])
def test_attention_of_rows_at_their_own_positions(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    length, positions = 200, torch.tensor([0, 63, 64, 150])
    keys, values = (torch.randn(6, length, num_kv_heads, head_dim).to(dtype) for _ in "kv")
    heads = torch.randn(4, num_heads + 2 * num_kv_heads, head_dim)
    shape = {"num_layers": 1, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "hidden_dim": 8, "vocab_size": 9}
    config = ModelConfig(name="a", dim=num_heads * head_dim, head_dim=head_dim, **shape)
    rotations = rotation_table(config, length, torch.device("cpu"))[positions].unsqueeze(1)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = by_torch(heads, rotations, expected_keys, expected_values, positions)
    found = fused.attend(heads, rotations, keys[:4], values[:4], positions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(keys, expected_keys, rtol=2**-8, atol=1e-6)  # stored in place, beside nothing else
    assert torch.equal(values, expected_values)
    for row in range(4):  # each row as if it were alone
        one = slice(row, row + 1)
        alone = fused.attend(heads[one], rotations[one], keys[one], values[one], positions[one])
        assert torch.equal(alone, found[one])


def by_torch(
    heads: torch.Tensor, rotations: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    num_kv_heads = keys.shape[2]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k = rotate(q, rotations), rotate(k, rotations)
    found = []
    for row, position in enumerate(positions.tolist()):
        keys[row, position], values[row, position] = k[row], v[row]
        seen = [x[row, : position + 1].float().repeat_interleave(num_heads // num_kv_heads, 1) for x in (keys, values)]
        k_HLD, v_HLD = (x.transpose(0, 1) for x in seen)
        found.append(F.scaled_dot_product_attention(q[row].unsqueeze(1), k_HLD, v_HLD).squeeze(1))
    return torch.stack(found)


@pytest.mark.parametrize("nan", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF])
def test_keys_that_are_not_finite_show(nan: int) -> None:
    keys, values = torch.zeros(1, 8, 1, 4), torch.ones(1, 8, 1, 4)
    keys.view(torch.int32)[0, 2, 0, 1] = nan
    rotations = torch.ones(1, 1, 2, dtype=torch.complex64)
    found = fused.attend(torch.ones(1, 3, 4), rotations, keys, values, torch.tensor([5]))
    assert found.isnan().all()
