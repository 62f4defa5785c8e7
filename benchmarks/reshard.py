"""A checkpoint given another number of shards: our time and memory beside a copy's and beside those of a short script.

Three ways in turn, `--rounds` times for each pair of degrees: `cp -r IN OUT; sync`; launch/reshard.py, which computes
SHA-256 and CRC-32 of all that it writes and has it on disk when it ends; and benchmarks/plain_reshard.py, which loads
everything, joins, cuts, saves and syncs. Each starts after a sync, with the output of the one before removed, and with
its input in the page cache, where reading it has just put it; in half of the runs, unless `--cold false`, with an input
that is not there. Seconds are of the whole command and, as `work`, of it without the start and the end of an
interpreter that imports torch. Memory is the most private anonymous memory (RssAnon) that the process had, looked at
every 20 ms, beyond what `import torch` takes.

The weights are random, in the shape of 7B with `--layers` layers, in bf16; 9 layers are 4.2 GB, and the short script
takes up to three times that in memory. Prints first how fast this machine hashes; the last line is JSON. `--save` keeps
it in benchmarks/results/.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import page_cache
import torch
from machine import environment, keep
from measured import Measured, measure
from plain_reshard import placed

from llama_mp import cli
from llama_mp.checkpoint.cut import BLOCK_BYTES
from llama_mp.checkpoint.digests import in_threads
from llama_mp.config import ModelConfig, load_size
from llama_mp.cores import num_threads
from llama_mp.errors import RequestError, RunError
from llama_mp.flags import Flags, check_at_least, flag
from llama_mp.layout import shards
from llama_mp.params_json import hidden_dim, params_of

ROOT = Path(__file__).parents[1]
DTYPE = torch.bfloat16
MEMORY_BOUND = "100 MB + 2 x the largest output tensor"
HASHED_BYTES = 256 << 20  # by each thread, to see how fast it is

Digests = dict[tuple[str, str], str]


@dataclass(frozen=True, kw_only=True)
class BenchFlags(Flags):
    folder: Path | None = flag(None, "on the disk to measure; default: the system's folder for temporary files")
    degrees: tuple[str, ...] = flag(("1:4", "4:1", "8:2", "3:2"), "shards of the input and of the output; may repeat")
    layers: int = flag(9, "layers of the model")
    dim: int = flag(4096, "model dimension, a multiple of 64")
    rounds: int = flag(3, "times that each is run, in turn")
    cold: bool = flag(True, "also measure with an input that is not in the page cache")
    save: bool = flag(False, "keep the result in benchmarks/results/reshard.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, layers=1, dim=64, rounds=1)
        if self.dim % 64:
            raise RequestError(f"--dim is {self.dim}, but must be a multiple of 64: 32 heads of an even width")
        for pair in self.degrees:
            if not all(part.isdecimal() and 1 <= int(part) <= 32 for part in pair.split(":")) or pair.count(":") != 1:
                raise RequestError(f"--degrees is {pair!r}, but must be two numbers from 1 to 32, as in 8:2")

    @property
    def config(self) -> ModelConfig:
        shape = {"dim": self.dim, "head_dim": 0, "hidden_dim": hidden_dim(self.dim, 256, None)}
        return replace(load_size("7B"), name="7B's shape", num_layers=self.layers, **shape)


def main(flags: BenchFlags) -> None:
    num_bytes = sum(size_of(flags.config, 1).values())
    with tempfile.TemporaryDirectory(prefix="bench-reshard-", dir=checked_folder(flags.folder, num_bytes)) as name:
        folder = Path(name)
        result = environment() | {"threads": num_threads(), "disk": disk_of(folder), "bytes": num_bytes}
        result |= {"layers": flags.layers, "dim": flags.dim, "rounds": flags.rounds}
        result["hashing_gb_per_s"] = hashing_rates()
        print(described_ceiling(result), flush=True)
        result["degrees"] = {}
        for pair in flags.degrees:
            measured = Pair(flags.config, folder, *map(int, pair.split(":"))).run(flags)
            result["degrees"][pair] = measured
            print(described(pair, measured), flush=True)
    if flags.save:
        keep("reshard", result)
    print(json.dumps(result))


def checked_folder(folder: Path | None, num_bytes: int) -> Path:
    """Where to work. Raises RequestError where there is no room for the input and two outputs."""
    folder = folder or Path(tempfile.gettempdir())
    if not folder.is_dir():
        raise RequestError(f"--folder {folder} is not a folder: give one on the disk to measure")
    free = shutil.disk_usage(folder).free
    if free < 3 * num_bytes:
        raise RequestError(
            f"--folder {folder} has {free / 1e9:.1f} GB free, and 3 x {num_bytes / 1e9:.1f} GB are needed: make room, "
            "give a folder on another disk, or fewer --layers"
        )
    return folder


# ---- one pair of degrees ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A checkpoint of `num_shards` shards in `folder`, to be written anew in `mp`."""

    config: ModelConfig
    folder: Path
    num_shards: int
    mp: int

    @property
    def source(self) -> Path:
        return self.folder / "in"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def run(self, flags: BenchFlags) -> dict[str, Any]:
        """Every way in every state of the cache, in turn."""
        write_input(self.source, self.config, self.num_shards)
        ways = {"cp": self.copy, "reshard": self.ours, "plain": self.plain}
        found: dict[str, dict[str, list[Measured]]] = {}
        written: dict[str, Digests] = {}
        for _, cache, name in product(range(flags.rounds), ("cold", "cached") if flags.cold else ("cached",), ways):
            found.setdefault(cache, {}).setdefault(name, []).append(self.measured(ways[name], cache))
            if name not in written:
                written[name] = digests_of(self.output)
        if written["reshard"] != written["plain"]:
            raise RunError(f"{self.num_shards} -> {self.mp} shards: {ROOT}/benchmarks/plain_reshard.py and we differ")
        shutil.rmtree(self.output)
        shutil.rmtree(self.source)
        largest = max(size_of(self.config, self.mp).values())
        return {"memory_bound": 100 * 10**6 + 2 * largest} | {cache: summary(ways) for cache, ways in found.items()}

    def measured(self, way: Callable[[], Measured], cache: str) -> Measured:
        shutil.rmtree(self.output, ignore_errors=True)
        os.sync()
        for file in self.source.iterdir():
            page_cache.fill(file) if cache == "cached" else page_cache.drop(file)
        return way()

    def copy(self) -> Measured:
        start = time.monotonic()
        subprocess.run(["sh", "-c", 'cp -r "$0" "$1" && sync', self.source, self.output], check=True)
        seconds = time.monotonic() - start
        return Measured(seconds, seconds, 0)

    def ours(self) -> Measured:
        flags = ("--input", self.source, "--output", self.output, "--mp", str(self.mp))
        return measure(ROOT / "launch" / "reshard.py", *flags)

    def plain(self) -> Measured:
        return measure(ROOT / "benchmarks" / "plain_reshard.py", self.source, self.output, str(self.mp))


def embedding_axis(config: ModelConfig, mp: int) -> int:
    return config.embedding_axis if config.dim % mp == 0 else 0


def size_of(config: ModelConfig, mp: int) -> dict[str, int]:
    """Bytes of the tensors of a shard; the first holds as much as any other."""
    held = shards(config, 0, mp, embedding_axis=embedding_axis(config, mp))
    return {name: shard.num_elements * DTYPE.itemsize for name, shard in held.items()}


def write_input(folder: Path, config: ModelConfig, mp: int) -> None:
    """A Meta folder, one shard in memory at a time: random matrices, zeros in the padding, norms of ones."""
    folder.mkdir()
    axis = embedding_axis(config, mp)
    for rank in range(mp):
        tensors = {}
        for name, shard in shards(config, rank, mp, embedding_axis=axis).items():
            tensors[name] = torch.zeros(shard.shape, dtype=DTYPE)
            for p in shard.placements:
                part = placed(tensors[name], p)
                part.fill_(1) if len(shard.shape) == 1 else part.uniform_(-0.05, 0.05)
        torch.save(tensors, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params_of(config, mp=mp, embedding_axis=axis)))


def digests_of(folder: Path) -> Digests:
    """SHA-256 of each tensor of each shard, as torch.load has it."""
    tensors = {
        (file.name, name): tensor
        for file in folder.glob("*.pth")
        for name, tensor in torch.load(file, mmap=True, weights_only=True).items()
    }
    found = in_threads(lambda tensor: hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest(), tensors.values())
    return dict(zip(tensors, found, strict=True))


# ---- what is said ----------------------------------------------------------------------------------------------


def hashing_rates() -> dict[str, float]:
    """GB/s of all threads together, over a block that stays in the cache."""
    block = memoryview(os.urandom(BLOCK_BYTES))

    def hash_all(update: Callable[[memoryview], Any]) -> None:
        for _ in range(HASHED_BYTES // BLOCK_BYTES):
            update(block)

    rates = {}
    for name, update in {"sha256": hashlib.sha256().update, "crc32": zlib.crc32}.items():
        start = time.monotonic()
        for _ in in_threads(lambda _, update=update: hash_all(update), range(num_threads())):
            pass
        rates[name] = num_threads() * HASHED_BYTES / (time.monotonic() - start) / 1e9
    return {name: round(rate, 2) for name, rate in rates.items()}


def disk_of(folder: Path) -> str:
    """Device and type of its file system."""
    return " ".join(subprocess.check_output(["df", "--output=source,fstype", folder], text=True).split()[2:])


def summary(ways: Mapping[str, list[Measured]]) -> dict[str, Any]:
    """All seconds, the medians of the ratios to the copy of the same round, and the highest peaks."""
    copies = [m.whole_s for m in ways["cp"]]
    result: dict[str, Any] = {"cp_s": [round(s, 2) for s in copies]}
    for name in ("reshard", "plain"):
        for kind in ("whole_s", "work_s"):
            seconds = [getattr(m, kind) for m in ways[name]]
            ratios = [ours / copy for ours, copy in zip(seconds, copies, strict=True)]
            result[f"{name}_{kind}"] = [round(s, 2) for s in seconds]
            result[f"{name}_{kind}_to_cp"] = round(statistics.median(ratios), 2)
        result[f"{name}_memory_bytes"] = max(m.memory_bytes for m in ways[name])
    return result


def described_ceiling(result: Mapping[str, Any]) -> str:
    rates = result["hashing_gb_per_s"]
    floor_s = result["bytes"] / 1e9 * sum(1 / rate for rate in rates.values())
    return (
        f"{result['bytes'] / 1e9:.2f} GB in bf16 ({result['layers']} layers, dim {result['dim']}), {result['disk']}\n"
        f"{result['threads']} threads hash at {rates['sha256']:.2f} GB/s (SHA-256) and {rates['crc32']:.2f} GB/s "
        f"(CRC-32): both of all that is written takes at least {floor_s:.2f} s"
    )


def described(pair: str, measured: Mapping[str, Any]) -> str:
    """The medians of one pair of degrees, a line for each way."""
    lines = []
    for cache in ("cached", "cold"):
        if (found := measured.get(cache)) is None:
            continue
        head = f"{pair.replace(':', ' -> ')}, input {'in' if cache == 'cached' else 'not in'} the page cache"
        lines += [head, f"  {'cp -r; sync':12}{statistics.median(found['cp_s']):7.2f} s"]
        for name in ("reshard", "plain"):
            whole, work = (statistics.median(found[f"{name}_{kind}"]) for kind in ("whole_s", "work_s"))
            ratios = f"{found[f'{name}_whole_s_to_cp']:.2f} and {found[f'{name}_work_s_to_cp']:.2f} x cp"
            memory = f"{found[f'{name}_memory_bytes'] / 1e6:.0f} MB"
            lines.append(f"  {name:12}{whole:7.2f} s, of which work {work:.2f} s: {ratios}; {memory}")
    lines.append(f"  {MEMORY_BOUND}: {measured['memory_bound'] / 1e6:.0f} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.main(BenchFlags, main, summary=__doc__)
