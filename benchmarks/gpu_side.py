"""What benchmarks/gpu.py asks of the device beside whole runs, each in a process of its own; the answer is JSON.

    python benchmarks/gpu_side.py ceiling|products|share|layers|kernels '{"size": "7B", "device": "cuda", ...}'

ceiling: how fast the device reads its memory, by the faster of two ways.
products: the matrices of a prompt's pass, multiplied by torch alone.
share: decode steps of one rank of several, its peers pretended.
layers: the parallel layers at MP 1 beside torch's Linear with the same weights.
kernels: where the time of a decode step goes.
"""

import contextlib
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from pretended import pretend
from torch import nn
from torch.distributed import HashStore
from torch.profiler import ProfilerActivity, profile

from llama_mp.bench import BenchFlags
from llama_mp.ceiling import COLUMNS, make_block, synchronize, together
from llama_mp.config import ModelConfig, RunConfig, SamplingConfig, load_size
from llama_mp.graphs import Recorder
from llama_mp.kernels import activation_dtype
from llama_mp.layout import heads_per_rank
from llama_mp.llm import LLM
from llama_mp.locate import random_checkpoint
from llama_mp.machine import choose_device
from llama_mp.measure import device_memory_bytes, device_name, median_of, repeat
from llama_mp.model import ColumnLinear, RowLinear
from llama_mp.parallel import connect
from llama_mp.request import Request
from llama_mp.world import World

BESIDE = ("triton", "transformers")  # packages whose versions matter beside torch's
PROFILED_STEPS = 32
STACK = 4  # blocks whose matrices are measured: more than any cache holds, little beside the memory
ROUNDS, SHORTEST_S = 7, 0.05  # a round of each way lasts at least as long


def ceiling(device: torch.device) -> dict[str, Any]:
    """The fastest way to read a block; a copy's bytes, of which half are written, stand beside it."""
    world = World(rank=0, size=1, device=device, store=HashStore())
    block = make_block(device, 1)
    target, halves = torch.empty_like(block), block.view(torch.bfloat16).view(-1, COLUMNS)
    x = torch.ones(1, COLUMNS, dtype=torch.bfloat16, device=device)
    reads = {
        "sum": together(world, block, block.sum),
        "product": together(world, block, lambda: F.linear(x, halves)),
    }
    copied = 2 * together(world, block, lambda: target.copy_(block))
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": device_name(device),
        "device_memory_bytes": device_memory_bytes(device),
        "multiprocessors": properties and properties.multi_processor_count,
        "versions": {"cuda": torch.version.cuda} | {name: version(name) for name in BESIDE if find_spec(name)},
        "read_gb_per_s": max(reads.values()) / 1e9,
        "gb_per_s": {way: round(rate / 1e9, 1) for way, rate in (reads | {"copy": copied}).items()},
    }


def products(device: torch.device, size: str, num_tokens: int) -> dict[str, float]:
    """Seconds of all products of one pass over `num_tokens` in bf16, that of the output aside, which has one row."""
    config = load_size(size)
    shapes = matrix_shapes(config)
    stack = min(STACK, config.num_layers)
    weights = [[random(rows, cols, device) for rows, cols in shapes] for _ in range(stack)]
    inputs = [random(num_tokens, cols, device) for _, cols in shapes]

    def one_pass() -> None:
        for layer in range(config.num_layers):
            for x, weight in zip(inputs, weights[layer % stack], strict=True):
                F.linear(x, weight)

    one_pass()  # warm-up
    taken = statistics.median(seconds_of(one_pass, device) for _ in range(ROUNDS))
    operations = 2 * num_tokens * config.num_layers * sum(rows * cols for rows, cols in shapes)
    return {"products_s": taken, "products_tflops": operations / taken / 1e12}


def matrix_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Of a block's matrices as a run holds them: wqkv, wo, w13, w2."""
    num_kv, num_heads = heads_per_rank(config, 1)
    width = num_heads * config.head_dim
    fused = (num_heads + 2 * num_kv) * config.head_dim
    return [
        (fused, config.dim),
        (config.dim, width),
        (2 * config.hidden_dim, config.dim),
        (config.dim, config.hidden_dim),
    ]


def random(rows: int, cols: int, device: torch.device) -> torch.Tensor:
    """Numbers, not zeros: a card that multiplies zeros takes less power, and is faster."""
    return torch.randn(rows, cols, device=device, dtype=torch.bfloat16).mul_(cols**-0.5)


def share(device: torch.device, mp: int, **flags: Any) -> dict[str, float]:
    """Rates of rank 0 of `mp` as launch/bench.py measures those of a run; `flags` are its."""
    asked = BenchFlags(random_weights=True, device=device.type, **flags)
    checkpoint = random_checkpoint(asked)
    run = asked.completed(checkpoint.config)
    with (
        contextlib.redirect_stdout(io.StringIO()),  # fairscale's remarks
        LLM.of_checkpoint(run, checkpoint, pretend(mp, device), codec=None) as llm,
    ):
        return median_of(repeat(llm, run))


def layers(device: torch.device, size: str, rows: list[int]) -> dict[str, float]:
    """Seconds of our layers to those of Linear, for each number of `rows` of the batch."""
    run = RunConfig(size=size, device=device.type, dtype="bf16", max_seq_len=2, max_batch_size=1)
    checkpoint = random_checkpoint(run)
    config = replace(checkpoint.config, num_layers=min(STACK, checkpoint.config.num_layers))
    with LLM.of_checkpoint(run, replace(checkpoint, config=config), connect(run), codec=None) as llm:
        ours = [module for module in llm.model.layers.modules() if isinstance(module, ColumnLinear | RowLinear)]
        return {f"{count}_rows": compared(ours, count, device) for count in rows}


@torch.inference_mode()
def compared(ours: list[nn.Module], num_rows: int, device: torch.device) -> float:
    """The median over the rounds, in which both take turns."""
    inputs = {layer.weight.shape[1]: random(num_rows, layer.weight.shape[1], device) for layer in ours}
    kind = activation_dtype(ours[0].weight)  # fp32 on a CPU
    calls = [(layer, inputs[layer.weight.shape[1]].to(kind)) for layer in ours]
    plain = [(as_linear(layer.weight), inputs[layer.weight.shape[1]]) for layer in ours]
    ways = [recorded(side, device) for side in (calls, plain)]
    count = max(1, round(SHORTEST_S / seconds_of(ways[1], device)))

    def repeated(way: Callable[[], None]) -> float:
        return seconds_of(lambda: [way() for _ in range(count)], device)

    rounds = [[repeated(way) for way in ways] for _ in range(ROUNDS)]
    return statistics.median(mine / theirs for mine, theirs in rounds)


def as_linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def recorded(calls: list[tuple[nn.Module, torch.Tensor]], device: torch.device) -> Callable[[], None]:
    """The calls of modules, on a GPU as one CUDA graph: the device's time, not that of Python."""

    def all_calls() -> None:
        for module, x in calls:
            module(x)

    if device.type == "cpu":
        all_calls()  # warm-up
        return all_calls
    recorder = Recorder(device)
    recorder.warm_up(all_calls)
    replay = recorder.record(all_calls)
    replay()
    return replay


def kernels(device: torch.device, size: str, prompt_len: int, quant: str) -> dict[str, Any]:
    """Microseconds and launches of a decode step by kernel, the longest first; on a CPU by operation."""
    shape = (1, prompt_len + PROFILED_STEPS + 1)
    run = RunConfig(size=size, device=device.type, dtype="bf16", quant=quant, max_batch_size=1, max_seq_len=shape[1])
    sampling = SamplingConfig(temperature=0, max_gen_len=PROFILED_STEPS + 1)
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with LLM.of_checkpoint(run, random_checkpoint(run), connect(run), codec=None) as llm:
        for _ in range(2):  # the first warms up
            profiler = profile(activities=[kind])
            request = Request(id="0", prompt=list(range(prompt_len)), sampling=sampling)
            for count, _ in enumerate(llm.serve([request], shape, frozenset())):
                if count == 0:  # the prompt is done
                    profiler.start()
            profiler.stop()
    on_gpu = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    times = {event.key: (event.self_device_time_total, event.count) for event in on_gpu}
    if device.type == "cpu":
        times = {event.key: (event.self_cpu_time_total, event.count) for event in profiler.key_averages()}
    longest = sorted(times.items(), key=lambda one: -one[1][0])
    return {
        "busy_us": sum(taken for taken, _ in times.values()) / PROFILED_STEPS,
        "launches": sum(count for _, count in times.values()) / PROFILED_STEPS,
        "kernels": [[name[:80], taken / PROFILED_STEPS, count / PROFILED_STEPS] for name, (taken, count) in longest],
    }


def seconds_of(act: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    act()
    synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    kind, wanted = sys.argv[1], json.loads(sys.argv[2])
    sides = {"ceiling": ceiling, "products": products, "share": share, "layers": layers, "kernels": kernels}
    device = choose_device(wanted.pop("device"), 0, 1)
    print(json.dumps(sides[kind](device, **wanted)), flush=True)


if __name__ == "__main__":
    main()
