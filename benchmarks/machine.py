"""What every benchmark says of the machine: how fast it reads memory, and what a figure is worth nothing without."""

import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def memory_read_rate() -> float:
    """Bytes per second at which torch's threads read 1 GiB, the best of 5: the sum leaves nothing but reading to do."""
    block = torch.ones(2**28, dtype=torch.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.numel() * block.element_size() / min(times)


def environment(*peers: ModuleType) -> dict[str, Any]:
    """Date, machine, versions (torch's and the peers') and command."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return {
        "date": date.today().isoformat(),
        "machine": f"{', '.join(sorted(models)) or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "threads": torch.get_num_threads(),
        "versions": {package.__name__: package.__version__ for package in (torch, *peers)},
        "command": " ".join(["python", *sys.argv]),
    }


def keep(name: str, result: dict[str, Any]) -> None:
    """Append `result` to benchmarks/results/NAME.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
