"""How fast blocks come that wait elsewhere, and in what memory they compute.

    python benchmarks/offload.py
    python benchmarks/offload.py --size 7B --dtype fp16 --device cuda      (on a machine with a GPU)

Random weights in the shape of `--size`; no more memory than a third of them, unless `--budget_gib` says otherwise.
From the disk: their file is read from a cold cache, in turn by one thread in order (the disk's sequential rate) and by
passes of a model of which nothing is computed. From main memory, on a GPU: the same passes beside copies of one pinned
buffer after the other (the rate of the bus). Then a few tokens are generated, and memory is held against the budget.
Each part runs in a process of its own. The last line is JSON; `--save` keeps it in benchmarks/results/.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import page_cache
import torch
from machine import environment, keep

from llama_mp import cli
from llama_mp.config import ModelConfig, RunConfig, SamplingConfig, load_size
from llama_mp.flags import Flags, check_at_least, flag
from llama_mp.llm import LLM
from llama_mp.locate import random_checkpoint
from llama_mp.memory import weight_bytes
from llama_mp.parallel import connect
from llama_mp.request import Request
from llama_mp.stream import Streamed

GIB = 2**30
READ_BYTES = 16 << 20  # by one call of the sequential reader
SHAPE = (1, 64)  # of the cache: slots, positions
PROMPT_LEN = 16


@dataclass(frozen=True, kw_only=True)
class BenchFlags(Flags):
    size: str = flag("llama3.2-1b", "a model of configs/: its shape")
    layers: int | None = flag(None, "so many of its layers; default: all")
    device: Literal["cpu", "cuda"] = flag("cpu", "where blocks come to")
    dtype: Literal["fp32", "fp16", "bf16"] = flag("bf16", "type of the weights")
    budget_gib: float | None = flag(None, "memory of the device; default: a third of the model")
    pairs: int = flag(7, "times that each is measured, in turn")
    gen_len: int = flag(4, "tokens generated")
    folder: Path | None = flag(None, "where the blocks are written; default: the folder of temporary files")
    save: bool = flag(False, "keep the result in benchmarks/results/offload.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, layers=3, pairs=1, gen_len=2)

    @property
    def config(self) -> ModelConfig:
        config = load_size(self.size)
        return replace(config, num_layers=self.layers or config.num_layers)

    @property
    def budget_bytes(self) -> int:
        third = weight_bytes(self.config, 0, 1, self.dtype) // 3
        return third if self.budget_gib is None else int(self.budget_gib * GIB)


@contextmanager
def opened(flags: BenchFlags, place: str) -> Iterator[LLM]:
    """A model of random weights whose blocks wait in `place`."""
    run = RunConfig(
        size=flags.size,
        dtype=flags.dtype,
        device=flags.device,
        offload=place,
        device_memory_gib=flags.budget_bytes / GIB,
        max_batch_size=SHAPE[0],
        max_seq_len=SHAPE[1],
    )
    checkpoint = replace(random_checkpoint(run), config=flags.config)
    with LLM.of_checkpoint(run, checkpoint, connect(run), codec=None) as llm:
        yield llm


def main(flags: BenchFlags) -> None:
    result = environment() | {name: getattr(flags, name) for name in ("size", "layers", "device", "dtype")}
    result["budget_gb"] = flags.budget_bytes / 1e9
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        result["disk_written"] = in_process(generated, flags, "disk")
        result["disk_found"] = in_process(generated, flags, "disk")
        result["disk_rate"] = in_process(disk_rate, flags)
    if flags.device == "cuda":
        result["host"] = in_process(generated, flags, "cpu")
        result["host_rate"] = in_process(host_rate, flags)
    if flags.save:
        keep("offload", result)
    print(json.dumps(result))


def in_process(part: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `part` returns in a process of its own: another one's leavings would hide memory that it takes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(part, *arguments).result()


def generated(flags: BenchFlags, place: str) -> dict[str, Any]:
    """Tokens generated, blocks coming meanwhile; the peak of memory."""
    with opened(flags, place) as llm:
        sampling = SamplingConfig(temperature=0, max_gen_len=flags.gen_len)
        for _ in llm.serve([Request(id="0", prompt=list(range(PROMPT_LEN)), sampling=sampling)], SHAPE, frozenset()):
            pass
        step_bytes = pass_bytes(streamed(llm))
        found = {
            "loaded_s": round(llm.loaded.seconds, 1),
            "weights_gb": llm.loaded.weight_bytes / 1e9,
            "gb_per_token": step_bytes / 1e9,
            "tokens_per_s": llm.stats.decoded_tokens / llm.stats.decode_s,
            "gb_per_s": llm.stats.decode_steps * step_bytes / llm.stats.decode_s / 1e9,
            "peak_gb": llm.peak_memory.read() / 1e9,
            "planned_gb": llm.planned.allocated_bytes / 1e9,
            "peak_to_budget": llm.peak_memory.read() / flags.budget_bytes,
        }
    print(
        f"{found['weights_gb']:.2f} GB of weights, {place}: {found['tokens_per_s']:.2f} tokens/s, "
        f"{found['gb_per_s']:.2f} GB/s of blocks; peak memory {found['peak_gb']:.3f} GB, planned "
        f"{found['planned_gb']:.3f}, {found['peak_to_budget']:.0%} of the budget",
        flush=True,
    )
    return found


def disk_rate(flags: BenchFlags) -> dict[str, Any]:
    with opened(flags, "disk") as llm:
        file, layers = llm.store.file.path, streamed(llm)
        one_pass(layers, llm.world.device)  # which checks each block, as the first pass of a run does
        ways = {"sequential": partial(read_in_order, file), "streamed": partial(one_pass, layers, llm.world.device)}
        return compared("disk, cold cache", ways, flags.pairs, before=partial(page_cache.drop, file))


def host_rate(flags: BenchFlags) -> dict[str, Any]:
    with opened(flags, "cpu") as llm:
        layers, device = streamed(llm), llm.world.device
        ways = {"bus": partial(copy_over, layers, device), "streamed": partial(one_pass, layers, device)}
        for way in ways.values():
            way()  # warm-up
        return compared("pinned memory to GPU", ways, flags.pairs, before=partial(torch.cuda.synchronize, device))


def streamed(llm: LLM) -> Streamed:
    assert isinstance(llm.model.layers, Streamed), "the budget holds the whole model: lower --budget_gib"
    return llm.model.layers


def pass_bytes(layers: Streamed) -> int:
    """What comes in one pass."""
    return len(layers.order) * layers.slots[0].flat.nbytes


def one_pass(layers: Streamed, device: torch.device) -> int:
    """All blocks asked for, and the slots filled for the next pass; bytes that came."""
    for _ in layers:
        pass
    for slot in layers.slots:
        layers.carrier.wait(slot)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return pass_bytes(layers)


def read_in_order(file: Path) -> int:
    """By one thread, as `cat` would; bytes read."""
    buffer, total = bytearray(READ_BYTES), 0
    with file.open("rb", buffering=0) as opened_file:
        while count := opened_file.readinto(buffer):
            total += count
    return total


def copy_over(layers: Streamed, device: torch.device) -> int:
    """As many bytes as a pass brings, from one buffer, without waiting for anything."""
    buffer = next(iter(layers.carrier.buffers.values()))
    for i in range(len(layers.order)):
        layers.slots[i % len(layers.slots)].flat.copy_(buffer, non_blocking=True)
    torch.cuda.synchronize(device)
    layers.rewind()
    return pass_bytes(layers)


def compared(
    name: str, ways: dict[str, Callable[[], int]], pairs: int, *, before: Callable[[], None]
) -> dict[str, Any]:
    """GB/s of each way, in turn; the ratio of the second to the first within each pair."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(pairs):
        for way, act in ways.items():
            before()
            start = time.perf_counter()
            num_bytes = act()
            rates[way].append(num_bytes / (time.perf_counter() - start) / 1e9)
    base, other = ways
    ratio = statistics.median(b / a for a, b in zip(rates[base], rates[other], strict=True))
    medians = ", ".join(f"{way} {statistics.median(values):.2f} GB/s" for way, values in rates.items())
    print(f"{name}: {medians}; ratio, median of {pairs} pairs: {ratio:.2f}", flush=True)
    return {"gb_per_s": {way: [round(r, 3) for r in values] for way, values in rates.items()}, "ratio": round(ratio, 3)}


if __name__ == "__main__":
    cli.main(BenchFlags, main, summary=__doc__)
