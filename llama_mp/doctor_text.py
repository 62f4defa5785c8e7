"""A doctor's findings for people: plain columns, then the faults, each with its remedy below it."""

import textwrap
from collections.abc import Iterator, Sequence

from llama_mp.doctor import Findings, Pair, faults
from llama_mp.errors import counted
from llama_mp.gpus import GIB
from llama_mp.plan_text import BOLD, FAINT, GREEN, RED, WIDTH, aligned, painted

MAX_PAIRS = 28  # of eight ranks
UNITS = "GiB = 2**30 bytes, GB = 1e9 bytes"


def page(found: Findings, *, coloured: bool) -> str:
    ranks, hosts = counted(len(found.places), "rank"), counted(len(found.hosts), "host")
    over = f", summing over {found.backend}" if found.backend != "none" else ""
    lines = [painted(f"{ranks} on {hosts}, device {found.device}{over}; {UNITS}", BOLD, coloured)]
    for heads, rows in tables(found):
        widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
        lines += ["", painted(aligned(heads, widths), FAINT, coloured), *(aligned(row, widths) for row in rows)]
    if len(found.pairs) > MAX_PAIRS:
        lines.append(f"the {MAX_PAIRS} slowest of {len(found.pairs)} pairs")
    if found.left_out:
        lines += ["", f"not examined: {found.left_out}"]
    return "\n".join([*lines, "", *verdict(found, coloured)])


def tables(found: Findings) -> Iterator[tuple[Sequence[str], list[Sequence[str]]]]:
    """Heads and rows; a table without rows is left out."""
    heads = ("host", "ranks", "GPUs", "torch", "for CUDA", "driver", "free GiB", "/dev/shm GiB")
    rows = [
        (
            *(host.name, str(host.num_ranks), str(host.num_devices), host.torch, host.cuda or "-", host.driver or "-"),
            *(f"{size / GIB:.1f}" for size in (host.free_bytes, host.shm_bytes)),
        )
        for host in found.hosts
    ]
    devices = [
        (f"{rank} on {found.places[rank]}", name, f"{free_bytes / GIB:.1f}", f"{total_bytes / GIB:.1f}")
        for rank, name, free_bytes, total_bytes in found.devices
    ]
    pairs = [
        (
            " and ".join(f"{rank} on {found.places[rank]}" for rank in pair.ranks),
            "-" if pair.latency_s is None else f"{pair.latency_s * 1e6:.0f}",
            "-" if pair.bytes_per_s is None else f"{pair.bytes_per_s / 1e9:.2f}",
        )
        for pair in shown(found.pairs)
    ]
    sums = [
        (f"all-reduce of {one.num_bytes // 1024} KiB", "-" if one.seconds is None else f"{one.seconds * 1e6:.0f}")
        for one in found.sums
    ]
    yield heads, rows
    for names, lines in [
        (("rank", "device", "free GiB", "of"), devices),
        (("ranks", "us a message", "GB/s"), pairs),
        (("over all ranks", "us"), sums),
    ]:
        if lines:
            yield names, lines


def shown(pairs: Sequence[Pair]) -> list[Pair]:
    """All where they are few, else those in trouble and the slowest."""
    if len(pairs) <= MAX_PAIRS:
        return list(pairs)
    return sorted(pairs, key=lambda pair: (not pair.trouble, pair.bytes_per_s or 0))[:MAX_PAIRS]


def verdict(found: Findings, coloured: bool) -> Iterator[str]:
    told = faults(found)
    if not told:
        yield painted("healthy", GREEN, coloured)
    for fault, advice in told:
        yield painted(textwrap.fill(fault, WIDTH, subsequent_indent="  "), RED, coloured)
        yield textwrap.fill(advice, WIDTH, initial_indent="  -> ", subsequent_indent="     ", break_on_hyphens=False)
