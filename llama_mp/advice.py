"""What fits on a device, and how fast it would be at best: the answers to "and if it does not fit?"."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from llama_mp.config import ModelConfig
from llama_mp.memory import (
    BYTES_PER_ELEMENT,
    RankMemory,
    Workload,
    cache_bytes,
    can_run,
    decode_read_bytes,
    offloaded_bytes,
    rank_memory,
)

PCIE_BYTES_PER_S = 25e9  # PCIe 4.0 x16 from pinned memory: 32e9 in theory, 25e9 in practice
DISK_BYTES_PER_S = 3e9  # an NVMe drive
MAX_BATCH = 1 << 16
LEAST_LENGTH = 64  # advice to run a shorter one would help nobody
NUM_OPTIONS = 6
QUANTS = ("int8", "int4")


class Device(NamedTuple):
    """Room for one rank: bytes that it may take in all, and the bytes per second at which it reads them, if known."""

    room_bytes: int
    bandwidth_bytes_per_s: float | None = None
    has_bf16: bool = True
    more_ranks_help: bool = True  # not where the ranks share one memory


class Option(NamedTuple):
    """A way to run a model that fits: the flags to give, the memory of a rank, tokens/s at best."""

    flags: str
    memory: RankMemory
    tokens_per_s: float | None

    def __str__(self) -> str:
        speed = "" if self.tokens_per_s is None else f", at most {rate(self.tokens_per_s)}"
        return f"{self.flags}: {self.memory.total_bytes / 1e9:.2f} GB per rank{speed}"


def rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s >= 10 else f"{tokens_per_s:.2g} tokens/s"


def fits(config: ModelConfig, mp: int, workload: Workload, device: Device) -> bool:
    has_room = rank_memory(config, mp, workload).total_bytes <= device.room_bytes
    return has_room and can_run(config, mp, workload)


def with_staying(config: ModelConfig, mp: int, workload: Workload, device: Device) -> Workload:
    """`workload` as it would run: with as many blocks on the device as fit; none, if not even the slots do."""
    if workload.offload == "none":
        return workload
    count = largest(lambda n: fits(config, mp, replace(workload, num_staying=n), device), config.num_layers)
    return replace(workload, num_staying=count)


def tokens_per_s(config: ModelConfig, mp: int, workload: Workload, device: Device) -> float | None:
    """The bandwidth's limit on decoding, all rows of the batch together: a step reads every weight once, and the cache
    to its full length. Offloaded blocks come over PCIe, or from the disk, while others are read: the slower counts."""
    if device.bandwidth_bytes_per_s is None:
        return None
    read_bytes = decode_read_bytes(config, mp, workload) + cache_bytes(config, mp, workload)
    read_s = read_bytes / device.bandwidth_bytes_per_s
    link = PCIE_BYTES_PER_S if workload.offload == "cpu" else DISK_BYTES_PER_S
    return workload.batch_size / max(read_s, offloaded_bytes(config, mp, workload) / link)


def largest(suits: Callable[[int], bool], high: int) -> int:
    """The largest number from 1 to `high` that suits, 0 if none; where one suits, so do all below."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if suits(middle) else (low, middle - 1)
    return low


def max_batch_size(config: ModelConfig, mp: int, workload: Workload, device: Device) -> int:
    """Rows of the workload's length that fit; 0: not one."""
    return largest(lambda rows: fits(config, mp, replace(workload, batch_size=rows), device), MAX_BATCH)


def max_seq_len(config: ModelConfig, mp: int, workload: Workload, device: Device) -> int:
    """The length, within the context, at which the workload's batch fits; 0 or 1: none."""
    return largest(
        lambda length: length < 2 or fits(config, mp, replace(workload, seq_len=length), device), config.context_length
    )


def advice(config: ModelConfig, mp: int, workload: Workload, device: Device) -> list[Option]:
    """Ways to run on such devices a workload that does not fit, the fastest first: each changes as little as it can."""
    changes = candidates(config, mp, workload, device) or last_resorts(config, mp, workload, device)
    changes = [(degree, with_staying(config, degree, changed, device)) for degree, changed in changes]
    options = [
        Option(
            flags_of(mp, workload, degree, changed),
            rank_memory(config, degree, changed),
            tokens_per_s(config, degree, changed, device),
        )
        for degree, changed in changes
    ]
    return sorted(options, key=lambda option: -(option.tokens_per_s or 0))[:NUM_OPTIONS]


def candidates(config: ModelConfig, mp: int, workload: Workload, device: Device) -> list[tuple[int, Workload]]:
    """What fits of: the smallest degree, as asked, in half precision and in fewer bits; the largest batch; the largest
    length; the blocks in main memory and on disk."""
    shorter = [workload]
    if workload.element_bytes == BYTES_PER_ELEMENT["fp32"]:
        shorter.append(replace(workload, dtype="bf16" if device.has_bf16 else "fp16"))
    shorter += [replace(workload, quant=quant) for quant in quants(workload) if workload.quant == "none"]
    degrees = [(smallest_degree(config, mp, changed, device), changed) for changed in shorter]
    found = [(degree, changed) for degree, changed in degrees if degree]
    rows = max_batch_size(config, mp, workload, device)
    if 0 < rows < workload.batch_size:
        found.append((mp, replace(workload, batch_size=rows)))
    length = max_seq_len(config, mp, workload, device)
    if LEAST_LENGTH <= length < workload.seq_len:
        found.append((mp, replace(workload, seq_len=length)))
    elsewhere = [replace(workload, offload=place) for place in places(workload)]
    return found + [(mp, changed) for changed in elsewhere if fits(config, mp, changed, device)]


def last_resorts(config: ModelConfig, mp: int, workload: Workload, device: Device) -> list[tuple[int, Workload]]:
    """What fits of: fewer bits and blocks elsewhere together, with as many rows as that leaves room for."""
    changed = [
        replace(workload, quant=quant, offload=place) for quant in quants(workload) for place in places(workload)
    ]
    rows = [min(workload.batch_size, max_batch_size(config, mp, one, device)) for one in changed]
    return [(mp, replace(one, batch_size=row)) for one, row in zip(changed, rows, strict=True) if row]


def quants(workload: Workload) -> tuple[str, ...]:
    return () if workload.deterministic else QUANTS


def places(workload: Workload) -> tuple[str, ...]:
    """Where blocks could wait, other than on the device, if they are not to already."""
    if workload.offload == "disk" or workload.deterministic:
        return ()
    return ("cpu", "disk") if workload.offload == "none" and workload.device == "cuda" else ("disk",)


def smallest_degree(config: ModelConfig, mp: int, workload: Workload, device: Device) -> int | None:
    """The fewest ranks, from `mp` on, on which it fits; `mp` alone where ranks share one memory."""
    degrees = range(mp, (config.num_heads if device.more_ranks_help else mp) + 1)
    return next((degree for degree in degrees if fits(config, degree, workload, device)), None)


def flags_of(mp: int, workload: Workload, degree: int, changed: Workload) -> str:
    """The flags in which `changed` over `degree` ranks differs from `workload` over `mp`."""
    flags = [f"--mp {degree}"] if degree != mp else []
    names = {"dtype": "--dtype", "quant": "--quant", "offload": "--offload"}
    names |= {"batch_size": "--batch_size", "seq_len": "--seq_len"}
    flags += [
        f"{flag} {getattr(changed, name)}"
        for name, flag in names.items()
        if getattr(changed, name) != getattr(workload, name)
    ]
    return " ".join(flags)
