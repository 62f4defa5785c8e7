"""What processes of their own compute with Triton's interpreter (ranks.alone). Nothing here may import Triton before
the interpreter is asked for, as transformers does."""

import os
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import jobs
import numpy as np
import torch
import torch.nn.functional as F

from llama_mp import fused
from llama_mp.cache import KVCache
from llama_mp.config import ModelConfig
from llama_mp.memory import run_time_shards
from llama_mp.model import RowLinear, build, fill
from llama_mp.rope import rotate
from llama_mp.runner import Runner

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Queries, KV heads, head size; more columns than a program takes, and heads of which it takes a part.
HEADS = [(4, 4, 8), (3, 1, 64), (6, 2, 80), (5, 5, 100), (32, 8, 128)]
HIDDEN = [1, 70, 2048, 2049]
DIMS = [2, 70, 576, 4096]
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def interpreted(function: Callable[..., Arrays], *arguments: Any) -> Arrays:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        return function(*arguments)


def steps() -> Arrays:
    """What the kernels make, and what torch does in fp32, by name."""
    from llama_mp import cuda_elementwise as kernels

    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, dtype in DTYPES.items():
        for num_heads, num_kv, head_dim in HEADS:
            found |= rotated_and_stored(kernels, name, num_heads, num_kv, head_dim)
        for hidden in HIDDEN:
            x = (torch.randn(3, 2 * hidden) * 10).to(dtype)
            x[0, 0], x[1, 0], x[2, 0] = -200, 200, float("nan")
            gate, up = x.float().chunk(2, dim=-1)
            found[f"swiglu {name} {hidden}"] = kernels.swiglu(x), F.silu(gate) * up
        for dim in DIMS:
            x, delta, weight = (torch.randn(*shape).to(dtype) for shape in ((3, dim), (3, dim), (dim,)))
            found[f"norm {name} {dim}"] = kernels.rms_norm(x, weight, 1e-5), norm(x, weight)
            total, was = x + delta, x.clone()
            found[f"norm-of-sum {name} {dim}"] = kernels.rms_norm(x, weight, 1e-5, delta), norm(total, weight)
            found[f"sum {name} {dim}"] = x, total
            assert not torch.equal(x, was)
    return {name: tuple(x.float().numpy() for x in pair) for name, pair in found.items()}


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), 1e-5)


def rotated_and_stored(kernels, name, num_heads, num_kv, head_dim) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Two rows of three tokens, into slots 1 and 2 of four."""
    dtype, shape = DTYPES[name], f"{name} {num_heads} {num_kv} {head_dim}"
    heads = torch.randn(6, num_heads + 2 * num_kv, head_dim).to(dtype)
    rotations = torch.polar(torch.ones(6, 1, head_dim // 2), torch.randn(6, 1, head_dim // 2))
    positions = torch.tensor([4, 5, 6, 0, 1, 2])
    caches = [torch.randn(4, 9, num_kv, head_dim).to(dtype) for _ in "kv"]
    expected, slots = [cache.clone() for cache in caches], torch.tensor([1, 1, 1, 2, 2, 2])
    turned = rotate(heads, rotations)
    expected[0][slots, positions] = turned[:, num_heads : num_heads + num_kv]
    expected[1][slots, positions] = heads[:, num_heads + num_kv :]
    views = [cache[1:3] for cache in caches]
    queries = kernels.rotate_and_store(heads, rotations, *views, positions, num_heads)
    pairs = zip(("keys", "values"), caches, expected, strict=True)
    return {f"queries {shape}": (queries, turned[:, :num_heads])} | {f"{kind} {shape}": (a, b) for kind, a, b in pairs}


def prompts(configs: Mapping[str, ModelConfig]) -> Arrays:
    """Logits of whole models, by the kernels and by torch, of a prompt in two chunks."""
    world = jobs.connect(jobs.RunConfig(device="cpu"))
    found = {}
    for name, config in configs.items():
        expected = prompt(config, False)
        found |= {name: (prompt(config, True), expected)}
        with patch.object(RowLinear, "adds", lambda *_: False):  # as of packed weights, and over several ranks
            found |= {f"{name}, sums apart": (prompt(config, True), expected)}
    world.close()
    return found


def prompt(config: ModelConfig, by_kernels: bool) -> np.ndarray:
    torch.manual_seed(1)
    model = build(config, 1)
    fill(model, {n: torch.randn(s.shape) / 20 for n, s in run_time_shards(config, 0, 1).items()})
    cache = KVCache.allocate(config, 1, num_slots=2, max_seq_len=16, dtype=torch.float32, device=CPU)
    with patch.object(fused.cuda, "available", lambda _: by_kernels), patch.object(fused, "load_steps", lambda: None):
        runner = Runner(config, model, cache)
        chunks = [runner.prefill([1, 17, 300], slot=1, start=0, all_logits=True)]
        chunks += [runner.prefill([4, 250], slot=1, start=3, all_logits=True)]
        return torch.cat(chunks).numpy()
