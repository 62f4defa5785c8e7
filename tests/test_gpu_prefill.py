"""A prompt's passes where there is a CUDA device: what test_cuda_elementwise.py and test_causal.py play elsewhere."""

from dataclasses import replace

import pytest
import torch
from interpreted_rows import steps
from test_causal import heads_of, plain
from test_cuda_elementwise import check

from llama_mp import cuda
from llama_mp.activations import causal_bytes, sizes_of
from llama_mp.causal import attend_causally
from llama_mp.chunks import PREFILL_CHUNK
from llama_mp.config import load_size
from llama_mp.dtypes import DTYPE_NAMES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device answers"),
]
WHOLE = PREFILL_CHUNK["cuda"]
ROUNDING = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@torch.inference_mode()
def test_steps_are_torchs() -> None:
    if not cuda.available(torch.device("cuda", 0)):
        pytest.skip("this card runs none of our kernels")
    torch.manual_seed(0)
    exact = {f"{step} {dtype}" for step in ("values", "sum") for dtype in ("fp32", "fp16", "bf16")}
    check(steps("cuda"), exact)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("head_dim", [64, 80, 100, 128, 256])
@pytest.mark.parametrize(("num_tokens", "length"), [(5, 5), (130, 1000), (WHOLE, WHOLE)])
def test_attention_of_the_last_tokens(dtype: torch.dtype, head_dim: int, num_tokens: int, length: int) -> None:
    if dtype is torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card computes no bf16")
    torch.manual_seed(0)
    heads = [x.cuda() for x in heads_of(dtype, 6, 2, head_dim, num_tokens, length)]
    expected = plain(*(x.double() for x in heads), head_dim**-0.5)
    found = attend_causally(*heads)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [128, 100])
def test_attention_holds_what_is_planned(dtype: torch.dtype, head_dim: int) -> None:
    """32 heads' scores of 2048 tokens over 8192 positions would be 1 GiB in fp16."""
    config = replace(load_size("llama3-8b"), head_dim=head_dim)
    heads = [x.cuda() for x in heads_of(dtype, 32, 8, head_dim, WHOLE, 4 * WHOLE)]
    has_kernels = torch.cuda.get_device_capability() >= cuda.MIN_CAPABILITY
    planned = causal_bytes(sizes_of(config, 1, DTYPE_NAMES[dtype], has_kernels=has_kernels), WHOLE, 4 * WHOLE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend_causally(*heads)
    assert torch.cuda.max_memory_allocated() - before <= 1.02 * planned + 2**21
