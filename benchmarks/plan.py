"""How wrong the plan is: the memory of a rank as planned, and the peak that a run really has.

    python benchmarks/plan.py

Random weights in the shape of real models, with fewer layers where the whole is too large for this machine: what a
rank holds hangs on shapes alone. On a CPU measured is private memory above that of the process before anything of the
model is there; on a GPU torch's peak. Each configuration runs in processes of its own; the prompt fills the cache but
for the last tokens, which are sampled from the whole vocabulary in a full batch. Results: results/plan.jsonl.
"""

import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from machine import environment, keep

from llama_mp.cache import KVCache
from llama_mp.checkpoint.load import load_shards
from llama_mp.config import ModelConfig, RunConfig, SamplingConfig, load_size
from llama_mp.dtypes import DTYPES
from llama_mp.engine import Engine
from llama_mp.layout import Span, fuse, shards
from llama_mp.machine import PeakMemory
from llama_mp.memory import RankMemory, Workload, rank_memory
from llama_mp.model import build, fill
from llama_mp.parallel import connect
from llama_mp.request import Request
from llama_mp.runner import Leader, Runner, follow
from llama_mp.world import World

GENERATED = 4  # tokens after each prompt
# size, layers, dtype, MP, batch, length
CONFIGURATIONS = [
    ("llama3.2-1b", 16, "bf16", 1, 1, 512),
    ("llama3.2-1b", 16, "bf16", 1, 8, 640),
    ("llama3.2-1b", 16, "bf16", 2, 1, 512),
    ("llama3.2-1b", 16, "bf16", 2, 4, 1024),
    ("llama3.2-1b", 8, "fp32", 1, 1, 512),
    ("llama3.2-1b", 8, "fp32", 1, 8, 1024),
    ("llama3.2-1b", 16, "fp32", 2, 2, 1024),
    ("7B", 4, "bf16", 1, 1, 512),
    ("7B", 4, "bf16", 1, 2, 2048),
    ("7B", 4, "bf16", 2, 2, 1024),
    ("7B", 2, "fp32", 1, 1, 1024),
    ("7B", 4, "fp32", 2, 8, 320),
    ("llama3-8b", 2, "bf16", 1, 2, 1024),
    ("llama3-8b", 2, "bf16", 3, 2, 1024),
]


class RandomSource:
    """A checkpoint of random numbers: what is read is a view of one block, as of a mapped file. That of
    llama_mp/checkpoint/random.py makes what is read, and the peak was 5 to 12 MB higher for it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.block = torch.rand(1, max(config.hidden_dim, config.vocab_size, config.dim), dtype=dtype) / 64

    def read(self, name: str, rows: Span, cols: Span) -> torch.Tensor:
        return self.block[:, : len(cols)].expand(len(rows), -1)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One line of the results."""

    size: str
    num_layers: int
    dtype: str
    mp: int
    batch_size: int
    seq_len: int

    @property
    def config(self) -> ModelConfig:
        return replace(load_size(self.size), num_layers=self.num_layers)

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def planned(self) -> RankMemory:
        sizes = {"batch_size": self.batch_size, "seq_len": self.seq_len}
        return rank_memory(self.config, self.mp, Workload(dtype=self.dtype, device=self.device, **sizes))


def measure(wanted: Configuration) -> list[dict[str, Any]] | None:
    """In a rank: bytes of what was made, and the most that was held; on rank 0 those of every rank."""
    world = connect(RunConfig(device=wanted.device))
    peak = PeakMemory(world.device)
    config, dtype = wanted.config, DTYPES[wanted.dtype]
    model = build(config, world.size)
    source = RandomSource(config, dtype)
    held = fuse(shards(config, world.rank, world.size))
    fill(model, dict(load_shards(held, source, dtype=dtype, device=world.device)))
    cache = KVCache.allocate(
        config,
        world.size,
        num_slots=wanted.batch_size,
        max_seq_len=wanted.seq_len,
        dtype=dtype,
        device=world.device,
    )
    answer(wanted, Runner(config, model, cache), world)
    weights = {p.data_ptr(): p.nbytes for p in model.parameters()}
    found = {
        "weights_bytes": sum(weights.values()),
        "kv_cache_bytes": sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)),
        "peak_bytes": peak.read(),
        "slack_bytes": slack_bytes(),
    }
    peak.close()
    gathered = world.gather(found)
    world.close()
    return gathered if world.is_leader else None


def answer(wanted: Configuration, runner: Runner, world: World) -> None:
    """Prompts that fill the batch and nearly the cache, and a few tokens after each."""
    if not world.is_leader:
        follow(runner)
        return
    leader = Leader(runner, world)
    engine = Engine(leader, eos_ids=frozenset())
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_gen_len=GENERATED)
    for row in range(wanted.batch_size):
        prompt = [(7 * i + row) % wanted.config.vocab_size for i in range(wanted.seq_len - GENERATED - row)]
        engine.submit(Request(id=str(row), prompt=prompt, sampling=sampling))
    while engine.has_work:
        engine.step()
    leader.stop()


class MallocInfo(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"]
    ]
    _fields_ += [(name, ctypes.c_size_t) for name in ["uordblks", "fordblks", "keepcost"]]


def slack_bytes() -> int:
    """Bytes that were freed, and that malloc keeps for later."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    return mallinfo2().fordblks


def run(wanted: Configuration) -> list[dict[str, Any]]:
    """`measure` in processes of its own: a result for each rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={wanted.mp}"]
    own = [sys.executable] if wanted.mp == 1 else command
    done = subprocess.run([*own, __file__, json.dumps(vars(wanted))], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    print("planned / measured peak of the rank that holds most, GB = 1e9 bytes; weights and cache are exact")
    for values in CONFIGURATIONS:
        names = ("size", "num_layers", "dtype", "mp", "batch_size", "seq_len")
        wanted = Configuration(**dict(zip(names, values, strict=True)))
        ranks, planned = run(wanted), wanted.planned
        most = max(ranks, key=lambda rank: rank["peak_bytes"])
        assert (most["weights_bytes"], most["kv_cache_bytes"]) == planned[:2], (most, planned)
        error = planned.allocated_bytes / most["peak_bytes"] - 1
        print(
            f"{wanted.size:12} {wanted.num_layers:3} layers {wanted.dtype} MP {wanted.mp} batch {wanted.batch_size}"
            f" length {wanted.seq_len:5}: {planned.allocated_bytes / 1e9:6.3f} / {most['peak_bytes'] / 1e9:6.3f}"
            f" ({error:+.1%}), slack {most['slack_bytes'] / 1e9:.3f}",
            flush=True,
        )
        keep("plan", environment() | vars(wanted) | {"planned": planned._asdict(), "ranks": ranks, "error": error})


if __name__ == "__main__":
    if sys.argv[1:]:
        found = measure(Configuration(**json.loads(sys.argv[1])))
        if found:
            print(json.dumps(found), flush=True)
    else:
        main()
