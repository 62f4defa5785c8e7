"""The peak of a pass over a prompt on a GPU as planned, against tensors that only pretend to lie on one."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import jobs
import pytest
import torch
from fake_cuda import DEVICE, fake_cuda
from live import Live
from ranks import Ranks

import llama_mp.causal
import llama_mp.model
import llama_mp.runner
from llama_mp import cuda
from llama_mp.activations import prefill_bytes
from llama_mp.cache import KVCache
from llama_mp.config import ModelConfig, load_size
from llama_mp.memory import run_time_shards, sizes_of_rank
from llama_mp.model import build, fill
from llama_mp.quant import empty_packed
from llama_mp.runner import Runner
from llama_mp.workload import Workload

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
NARROW = {"num_layers": 2, "vocab_size": 32000}
MODELS = {
    "7B": replace(load_size("7B"), **NARROW),
    "llama3-8b": replace(load_size("llama3-8b"), **NARROW),
    "heads of 100": replace(load_size("7B"), dim=3200, head_dim=100, hidden_dim=8640, **NARROW),
}
PASSES = ((1500, 1500), (2048, 6144))  # tokens, and the positions up to the last of them


class Nothing:
    """In place of a kernel: its launch."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


def peaks(config: ModelConfig, workload: Workload) -> list[int]:
    """In a rank: those of PASSES."""
    world, kind = jobs.connect(jobs.RunConfig(device="cpu")), DTYPES[workload.dtype]
    with fake_cuda():
        model = build(config, world.size, workload.quant, kind)
        shards = run_time_shards(config, world.rank, world.size, workload.quant)
        shapes = {name: torch.empty(shard.shape, dtype=kind, device=DEVICE) for name, shard in shards.items()}
        packed = {name for name, parameter in model.named_parameters() if not parameter.is_floating_point()}
        fill(model, {n: empty_packed(x, workload.quant) if n in packed else x for n, x in shapes.items()})
        shape = {"num_slots": 1, "max_seq_len": PASSES[-1][1]}
        cache = KVCache.allocate(config, world.size, **shape, dtype=kind, device=DEVICE)
        runner = Runner(config, model, cache)
        known = [*model.parameters(), *cache.keys, *cache.values, runner.rotations]
        found = [peak_of(runner, known, workload, *sizes) for sizes in PASSES]
    world.close()
    return found


def peak_of(runner: Runner, known: list[torch.Tensor], workload: Workload, num_tokens: int, length: int) -> int:
    names = ("rotate_and_store", "swiglu", "norm")
    nothing = {f"{name}_kernel": Nothing() for name in names}
    has_flash = workload.has_kernels and workload.dtype != "fp32"
    with (
        patch.multiple(cuda, available=lambda _: workload.has_kernels, suits=lambda *_: False),
        patch.multiple("llama_mp.cuda_elementwise", **nothing),
        patch.object(llama_mp.causal, "can_use_flash_attention", lambda _: has_flash),
        patch.object(llama_mp.model, "reduce", lambda x: x),
        patch.object(llama_mp.runner, "gather_columns", lambda x: x),
        Live(known) as live,
    ):
        runner.prefill([1] * num_tokens, slot=0, start=length - num_tokens, all_logits=False)
    return live.peak


@pytest.mark.parametrize(
    ("name", "mp", "flags"),
    [
        ("7B", 1, {"dtype": "fp16"}),
        ("7B", 2, {"dtype": "fp16", "quant": "int4"}),
        ("llama3-8b", 2, {"dtype": "fp16"}),
        ("llama3-8b", 1, {"dtype": "fp32"}),
        ("llama3-8b", 1, {"dtype": "fp16", "has_kernels": False}),
        ("heads of 100", 1, {"dtype": "fp16"}),
        ("heads of 100", 1, {"dtype": "fp16", "quant": "int8"}),
        ("heads of 100", 1, {"dtype": "fp32", "has_kernels": False}),
    ],
)
def test_a_prompts_passes_hold_what_is_planned(ranks: Ranks, name: str, mp: int, flags: dict[str, Any]) -> None:
    config, workload = MODELS[name], Workload(**flags)
    sizes = sizes_of_rank(config, mp, workload)
    found = ranks.run(mp, peaks, config=config, workload=workload)[0]
    for peak, (num_tokens, length) in zip(found, PASSES, strict=True):
        late = num_tokens * config.dim * sizes.e if mp > 1 else 0  # this one lets go of its sums at once
        planned = prefill_bytes(sizes, num_tokens, length) - late
        assert planned == pytest.approx(peak, rel=0.001, abs=100_000)
