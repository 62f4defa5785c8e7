"""Plans for people: a page for one model, a table of all. Colours only where a terminal reads them."""

import textwrap
from collections.abc import Sequence

from llama_mp.advice import DISK_BYTES_PER_S, PCIE_BYTES_PER_S, rate, tokens_per_s
from llama_mp.errors import counted
from llama_mp.gpus import GIB, RESERVED
from llama_mp.layout import padded_sizes
from llama_mp.memory import hidden_unit
from llama_mp.plan import Plan
from llama_mp.virtual import layout_degree

GB = 1e9
WIDTH = 100  # columns of a sentence
UNITS = "GB = 1e9 bytes, GiB = 2**30 bytes"
BOLD, GREEN, RED, FAINT = "1", "32", "31", "2"
HEADS = ("model", "MP", "on disk", "weights", "cache", "activations", "together", "runtime", "per rank")
ERROR = (
    "How wrong this may be: weights and cache are exact; with the activations, the peak of one pass as the program "
    "computes it, the plan was within 4 % of what was measured on a CPU (make bench-plan). Runtime on a GPU is an "
    "estimate: drivers and cards differ by half a GB."
)


def painted(text: str, code: str, coloured: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if coloured else text


def page(plan: Plan, *, coloured: bool) -> str:
    """One plan as lines."""
    workload, memory = plan.workload, plan.per_rank
    asked = [workload.dtype, f"quant {workload.quant}", f"offload {workload.offload}"]
    asked += ["deterministic"] if workload.deterministic else []
    title = f"{plan.config.name} over {counted(plan.mp, 'rank')}, batch {workload.batch_size}, "
    title += f"length {workload.seq_len}, {', '.join(part for part in asked if not part.endswith(' none'))}"
    rows = [
        ("weights", memory.weights_bytes),
        ("KV cache", memory.kv_cache_bytes),
        ("activations", memory.activation_bytes),
        ("runtime", memory.runtime_bytes),
        ("total", memory.total_bytes),
    ]
    lines = [
        painted(title, BOLD, coloured),
        painted(f"{'per rank':<12} {'GB':>8} {'GiB':>8}   {UNITS}", FAINT, coloured),
    ]
    lines += [f"{name:<12} {size / GB:>8.2f} {size / GIB:>8.2f}" for name, size in rows]
    lines.append(
        f"on disk {plan.disk_bytes / GB:.1f} GB; main memory while all ranks load: {plan.host_bytes / GB:.1f} GB, "
        "and what caches the files"
    )
    works = plan.valid_mp
    padding = padded_sizes(plan.config, layout_degree(plan.mp, workload.deterministic), hidden_unit(workload.quant))
    if padding:
        held = ", ".join(f"{name} {size}" for name, size in padding.items())
        lines.append(f"filled up with zeros, or repeated, to divide over the ranks: {held}")
    lines.append(f"ranks that work: {', '.join(map(str, works)) if workload.deterministic else f'1 to {works[-1]}'}")
    return "\n".join([*lines, *verdict(plan, coloured), painted(textwrap.fill(ERROR, WIDTH), FAINT, coloured)])


def verdict(plan: Plan, coloured: bool) -> list[str]:
    """Whether it fits, and what does if it does not."""
    if plan.card is None:
        return ["no card was named, and none was found here: give --gpu NAME or --vram_gib GIB to know what fits"]
    room = f"{plan.card.name}, {plan.card.memory_bytes / GIB:.1f} GiB of which the driver keeps {RESERVED:.1%}"
    if plan.fits:
        speed = tokens_per_s(plan.config, plan.mp, plan.settled, plan.device)
        limit = "" if speed is None else f"; at most {rate(speed)} by its bandwidth, the cache full"
        return [painted("fits", GREEN, coloured) + f" {room}: batches up to {plan.max_batch_size}{limit}"]
    lines = [painted("does not fit", RED, coloured) + f" {room}"]
    options = plan.advice
    if not options:
        return [*lines, "nothing that one such card a rank could run: take a smaller model, or larger cards"]
    lines.append("what fits, the fastest first:")
    lines += [f"  {option}" for option in options]
    if any("--offload" in option.flags for option in options):
        rates = f"{PCIE_BYTES_PER_S / GB:.0f} GB/s from main memory (PCIe 4.0 x16), {DISK_BYTES_PER_S / GB:.0f} GB/s"
        lines.append(f"offloaded blocks are reckoned to come at {rates} from a disk")
    return lines


def table(plans: Sequence[Plan], *, coloured: bool) -> str:
    """A line a plan."""
    first = plans[0].workload
    title = f"{first.dtype}, batch {first.batch_size}, length {first.seq_len}; per rank in GB; {UNITS}"
    with_card = plans[0].card is not None
    heads = [*HEADS, *(["fits"] if with_card else [])]
    rows = [cells(plan) for plan in plans]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [painted(title, BOLD, coloured), painted(aligned(heads, widths), FAINT, coloured)]
    for plan, row in zip(plans, rows, strict=True):
        line = aligned(row, widths)
        lines.append(painted(line, GREEN if plan.fits else RED, coloured and with_card))
    lines += [f"fits: one {plans[0].card.name} a rank"] if with_card else []
    return "\n".join([*lines, painted(textwrap.fill(ERROR, WIDTH), FAINT, coloured)])


def cells(plan: Plan) -> list[str]:
    memory = plan.per_rank
    sizes = (*memory[:3], memory.allocated_bytes, memory.runtime_bytes, memory.total_bytes)
    shown = [plan.config.name, str(plan.mp), f"{plan.disk_bytes / GB:.1f}", *(f"{size / GB:.2f}" for size in sizes)]
    return [*shown, *(["yes" if plan.fits else "no"] if plan.card else [])]


def aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *cells[1:]])
