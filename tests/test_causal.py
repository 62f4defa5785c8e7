"""How a GPU's attention of many tokens is asked for. torch's kernels for it run nowhere else: plain attention stands in
for them here, and checks that it is given what they take."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from llama_mp import causal
from llama_mp.chunks import PREFILL_CHUNK


def plain(q_BHTD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, scale: float) -> torch.Tensor:
    """The last T tokens of L, each with itself and those before it."""
    num_tokens, length = q_BHTD.shape[2], k_BKLD.shape[2]
    mask = torch.ones(num_tokens, length, dtype=torch.bool).tril(length - num_tokens)
    return F.scaled_dot_product_attention(q_BHTD, k_BKLD, v_BKLD, attn_mask=mask, scale=scale, enable_gqa=True)


def heads_of(dtype: torch.dtype, num_heads: int, num_kv: int, head_dim: int, num_tokens: int, length: int):
    """q, k, v as the model has them: q in the product of q, k and v, keys and values in the cache."""
    q_NHD = torch.randn(num_tokens, num_heads + 2 * num_kv, head_dim)[:, :num_heads].to(dtype)
    keys, values = (torch.randn(1, length + 3, num_kv, head_dim)[:, :length].to(dtype) for _ in "kv")
    return q_NHD.transpose(0, 1)[None], keys.transpose(1, 2), values.transpose(1, 2)


@pytest.mark.parametrize("is_flash", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_kv"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("head_dim", [80, 100, 6])
@pytest.mark.parametrize(("num_tokens", "length"), [(5, 5), (5, 11), (2, 11)])
def test_attention_of_the_last_tokens(
    is_flash: bool, dtype: torch.dtype, num_heads: int, num_kv: int, head_dim: int, num_tokens: int, length: int
) -> None:
    q, k, v = heads_of(dtype, num_heads, num_kv, head_dim, num_tokens, length)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
        assert q.shape[-1] * q.element_size() % causal.ALIGNMENT == 0 and q.stride(-1) == k.stride(-1) == 1
        assert is_flash or k.shape[1] == v.shape[1] == num_heads
        return plain(q, k, v, scale)

    kernels = {"by_flash": kernel if is_flash else None, "by_blocks": None if is_flash else kernel}
    with patch.multiple(causal, can_use_flash_attention=lambda _: is_flash, **kernels):
        found = causal.attend_causally(q, k, v)
    expected = plain(q.double(), k.double(), v.double(), head_dim**-0.5)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["by_flash", "by_blocks"])
def test_torchs_operators_take_what_they_are_given(name: str) -> None:
    """By their schemas, and the shapes that they say they give."""
    from fake_cuda import DEVICE, fake_cuda

    with fake_cuda():
        num_kv = 2 if name == "by_flash" else 6
        q, k = (torch.empty(1, heads, n, 64, dtype=torch.half, device=DEVICE) for heads, n in ((6, 5), (num_kv, 11)))
        assert getattr(causal, name)(q, k, k, scale=0.1).shape == q.shape


@pytest.mark.parametrize("is_flash", [False, True])
def test_whole_chunks_are_left_to_torch(is_flash: bool) -> None:
    """Where that ends in a kernel that makes no scores: not in fp32."""
    size = PREFILL_CHUNK["cuda"]
    q = torch.zeros(1, 2, size, 8, device="meta")
    names = ("by_blocks", "by_flash") if is_flash else ("by_flash",)
    never = dict.fromkeys(names)
    asked = []
    with (
        patch.multiple(causal, can_use_flash_attention=lambda _: is_flash, **never),
        patch.object(causal.F, "scaled_dot_product_attention", lambda q, *_, **flags: asked.append(flags) or q),
    ):
        causal.attend_causally(q, q[:, :1], q[:, :1])
    assert asked == ([{"is_causal": True, "enable_gqa": True}] if is_flash else [])
