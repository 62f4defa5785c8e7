"""What processes of their own run (ranks.alone), to see how much memory something holds."""

import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch

import llama_mp.compare_logits
from llama_mp import machine
from llama_mp.checkpoint.load import load_shards, open_source
from llama_mp.checkpoint.reshard import Job
from llama_mp.checkpoint.verify import LogitsCheck, VerifyFlags, verify
from llama_mp.compare_logits import compare_logits
from llama_mp.layout import fuse, shards
from llama_mp.locate import Checkpoint, config_of, files_of
from llama_mp.machine import private_bytes
from llama_mp.reshard_request import ReshardFlags, check_request

CPU = torch.device("cpu")


class Watch:
    """The most private memory held since, looked at every millisecond; and how often it was."""

    def __init__(self) -> None:
        machine.SAMPLE_S, machine.private_bytes = 0.001, Mock(wraps=private_bytes)
        self.peak = machine.PeakMemory(CPU)

    def read(self) -> dict[str, int]:
        return {"num_samples": machine.private_bytes.call_count, "peak": self.peak.read()}


def loading_one_rank(path: Path) -> dict[str, int]:
    """Of the weights of rank 0 of 2: their own bytes, and the peak."""
    torch.set_num_threads(1)
    watch = Watch()
    kind, files = files_of(path)
    config = config_of(path, kind, files)
    source = open_source(Checkpoint(path=path, kind=kind, files=files, config=config, tokenizer=path))
    parameters = dict(load_shards(fuse(shards(source.config, 0, 2)), source, dtype=torch.bfloat16, device=CPU))
    return watch.read() | {"own": sum(parameter.nbytes for parameter in parameters.values())}


def verifying(path: Path, against: Path) -> dict[str, Any]:
    watch = Watch()
    report = verify(VerifyFlags(path=path, against=against))
    return watch.read() | {"failure": report.failure}


def resharding(source: Path, output: Path, **flags: Any) -> tuple[int, int, int]:
    """Bytes: the peak, the largest tensor of a shard, and what --dry_run announces."""
    peak, asked = machine.PeakMemory(CPU), ReshardFlags(input=source, output=output, **flags)
    job = Job.open(asked, check_request(asked))
    job.run()
    largest = max(piece.num_bytes for pieces in job.sink.pieces.values() for piece in pieces)
    return peak.read(), largest, job.memory_bytes


def a_block_that_is_freed() -> tuple[int, int]:
    """Bytes: the peak, which is above what there was before, and what is left."""
    before, peak = private_bytes(), machine.PeakMemory(CPU)
    block = torch.ones(25_000_000)
    time.sleep(0.3)
    del block
    return peak.read(), private_bytes() - before


def freed_between_tensors(*, ours: bool) -> int:
    """Bytes that go back to the kernel when every second of twelve tensors is freed; with `ours`, our settings."""
    if ours:
        machine.return_freed_memory()
    torch.ones(7_000_000)
    blocks = [torch.ones(2_000_000) for _ in range(12)]
    full = private_bytes()
    del blocks[::2]
    return full - private_bytes()


def comparing_logits(path: Path, against: Path) -> dict[str, Any]:
    watch = Watch()
    logits = compare_logits(path, against)
    return watch.read() | {"equal": logits.equal}


def without_memory(path: Path, against: Path) -> LogitsCheck:
    """What is said where next to no memory is free."""
    with patch.object(llama_mp.compare_logits, "free_host_bytes", lambda: 10_000):
        return compare_logits(path, against)
