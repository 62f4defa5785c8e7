"""What every benchmark says of the machine, because a figure is worth nothing without it."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.distributed import HashStore

from llama_mp.ceiling import make_block, together
from llama_mp.cores import cores_at_hand
from llama_mp.records import cpu_name, today
from llama_mp.world import World

RESULTS = Path(__file__).parent / "results"


def memory_read_rate() -> float:
    """Bytes per second at which torch's threads read memory, as launch/bench.py measures it."""
    world = World(rank=0, size=1, device=torch.device("cpu"), store=HashStore())
    block = make_block(world.device, 1)
    return together(world, block, block.sum)


def environment(*peers: ModuleType) -> dict[str, Any]:
    """Date, machine, versions (torch's and the peers') and command."""
    return {
        "date": today(),
        "machine": f"{cpu_name()}, {cores_at_hand()} cores",
        "threads": torch.get_num_threads(),
        "versions": {package.__name__: package.__version__ for package in (torch, *peers)},
        "command": " ".join(["python", *sys.argv]),
    }


def keep(name: str, result: dict[str, Any]) -> None:
    """Append `result` to benchmarks/results/NAME.jsonl."""
    write_line(RESULTS / f"{name}.jsonl", result)


def write_line(path: Path, result: dict[str, Any]) -> None:
    """Append `result` in JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")
