"""What benchmarks/gpu.py measures, part by part, and what is aimed at."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from gpu_runs import Runs

from llama_mp.config import load_size
from llama_mp.memory import Workload, rank_memory

GIB = 2**30
PREFILL_SHAPES = {"7B": "llama2-7b"}  # the same matrices, and a context that holds the prompt and an answer
OFFLOADED_LEN = 32  # tokens, where each brings half of the model over the bus
SHARE_MP = 8
MOST_KERNELS = 8  # that are printed; all of them are kept
# size, and flags of launch/bench.py
SIZES: list[tuple[str, dict[str, Any]]] = [
    ("13B", {}),
    ("33B", {}),
    ("65B", {"quant": "int8"}),
    ("7B", {"offload": "cpu", "device_memory_gib": 8, "gen_len": OFFLOADED_LEN}),
    ("7B", {"offload": "cpu", "device_memory_gib": 16, "gen_len": OFFLOADED_LEN}),
    ("65B", {}),
]


class Goal(NamedTuple):
    """A figure with what is aimed at: `least`, or `most`; neither where the figure is told alone."""

    name: str
    found: float
    least: float | None = None
    most: float | None = None

    @property
    def is_met(self) -> bool | None:
        if self.least is not None:
            return self.found >= self.least
        return None if self.most is None else self.found <= self.most

    def line(self) -> str:
        aims = {">=": self.least, "<=": self.most}
        aimed = "".join(f"{sign} {bound:g}: " for sign, bound in aims.items() if bound is not None)
        verdict = {True: "met", False: "missed", None: ""}[self.is_met]
        return f"{self.name:44} {self.found:7.3f}  {aimed}{verdict}".rstrip()

    def record(self) -> dict[str, Any]:
        return self._asdict() | {"met": self.is_met}


class Found(NamedTuple):
    """What a case found: figures as they were answered, goals made of them, and what else is to be told."""

    figures: dict[str, Any]
    goals: Sequence[Goal] = ()
    remarks: Sequence[str] = ()


class Case(NamedTuple):
    name: str
    measure: Callable[[], Found]


def decode(runs: Runs) -> Iterator[Case]:
    for size in runs.asked.size:
        yield Case(f"{size} bf16", partial(decode_of, runs, size, least=0.80, is_recorded=True))
        yield Case(f"{size} bf16 eager", partial(decode_of, runs, size, eager=True))


def decode_of(runs: Runs, size: str, *, least: float | None = None, **flags: Any) -> Found:
    figures = runs.ours(size, **flags)
    return Found(figures, [Goal("of the read rate", fraction(runs, figures), least=least)])


def fraction(runs: Runs, figures: dict[str, Any]) -> float:
    """Bytes that the steps had to read, weights and cache, of what the device reads in that time at its best."""
    rate = max(runs.ceiling["read_gb_per_s"], figures["ceiling_gb_per_s"])
    return figures["achieved_gb_per_s"] / rate


def quant(runs: Runs) -> Iterator[Case]:
    for size in runs.asked.size:
        for bits, least in (("int8", 1.5), ("int4", 1.9)):
            yield Case(f"{size} {bits}", partial(quant_of, runs, size, bits, least))


def quant_of(runs: Runs, size: str, bits: str, least: float) -> Found:
    base = runs.ours(size)
    figures = runs.ours(size, quant=bits, is_recorded=True)
    goal = Goal("tokens/s to bf16's", figures["decode_tokens_per_s"] / base["decode_tokens_per_s"], least=least)
    return Found(figures, [goal, Goal("of the read rate", fraction(runs, figures))])


def prefill(runs: Runs) -> Iterator[Case]:
    for size in runs.asked.size:
        yield Case(f"{size} prompt of {runs.asked.prefill_len}", partial(prefill_of, runs, size))


def prefill_of(runs: Runs, size: str) -> Found:
    """Time of the products alone to that of the whole prompt, sampling included."""
    length, shape = runs.asked.prefill_len, PREFILL_SHAPES.get(size, size)
    alone = runs.side("products", size=shape, num_tokens=length)
    figures = runs.ours(shape, prompt_len=length, gen_len=2)
    rate = alone["products_s"] * figures["prefill_tokens_per_s"] / length
    remark = f"products alone {alone['products_tflops']:.0f} TFLOP/s"
    return Found(figures | alone, [Goal("of cuBLAS's rate on the same shapes", rate, least=0.85)], [remark])


def batch(runs: Runs) -> Iterator[Case]:
    for size in runs.asked.size:
        for rows in (64, 128):
            yield Case(f"{size} batch {rows}", partial(decode_of, runs, size, least=0.5, batch_size=rows))


def share(runs: Runs) -> Iterator[Case]:
    for size in runs.asked.size:
        yield Case(f"{size} one rank of {SHARE_MP}", partial(share_of, runs, size))
        yield Case(f"{size} parallel layers", partial(layers_of, runs, size))


def share_of(runs: Runs, size: str) -> Found:
    """The step without its messages."""
    lengths = {"prompt_len": runs.asked.prompt_len, "gen_len": runs.asked.gen_len}
    whole = runs.ours(size)
    figures = runs.side("share", size=size, mp=SHARE_MP, dtype="bf16", **lengths)
    return Found(figures, [Goal("step to that of MP 1", figures["tpot_s"] / whole["tpot_s"], most=0.25)])


def layers_of(runs: Runs, size: str) -> Found:
    rows = [1, runs.asked.prefill_len]
    figures = runs.side("layers", size=size, rows=rows)
    return Found(
        figures, [Goal(f"{count} rows, time to Linear's", figures[f"{count}_rows"], most=1.01) for count in rows]
    )


def kernels(runs: Runs) -> Iterator[Case]:
    for size in runs.asked.size:
        for bits in ("none", "int8", "int4"):
            name = f"{size} {'bf16' if bits == 'none' else bits}: where a step's time goes"
            yield Case(name, partial(kernels_of, runs, size, bits))


def kernels_of(runs: Runs, size: str, bits: str) -> Found:
    whole = runs.ours(size, **({} if bits == "none" else {"quant": bits}))
    figures = runs.side("kernels", size=size, quant=bits, prompt_len=runs.asked.prompt_len)
    longest = [f"{name} {taken:.0f} us in {count:.0f}" for name, taken, count in figures["kernels"][:MOST_KERNELS]]
    busy = Goal("of a step in kernels", figures["busy_us"] / 1e6 / whole["tpot_s"])
    return Found(figures, [busy], [f"{figures['launches']:.0f} launches", *longest])


def sizes(runs: Runs) -> Iterator[Case]:
    """Those that this card holds, by the plan; what it does not hold is said."""
    for size, flags in SIZES:
        name = " ".join([size, "bf16", *(f"{name} {value}" for name, value in flags.items() if name != "gen_len")])
        yield Case(name, partial(size_of, runs, size, flags))


def size_of(runs: Runs, size: str, flags: dict[str, Any]) -> Found:
    has_bytes, needs_bytes = runs.ceiling["device_memory_bytes"], planned_bytes(runs, size, flags)
    if needs_bytes > has_bytes:
        return Found({}, remarks=[f"not run: takes {needs_bytes / GIB:.0f} GiB, the card has {has_bytes / GIB:.0f}"])
    figures = runs.ours(size, is_recorded=True, **flags)
    peak = figures["peak_memory_bytes"]
    goals = [Goal("error of the planned peak", abs(figures["planned_memory_bytes"] / peak - 1), most=0.02)]
    if budget := flags.get("device_memory_gib"):
        goals.append(Goal("peak, of the budget", peak / (budget * GIB), most=1))
    else:
        goals.append(Goal("of the read rate", fraction(runs, figures)))
    return Found(figures, goals, [f"peak {peak / 1e9:.2f} GB, planned {figures['planned_memory_bytes'] / 1e9:.2f}"])


def planned_bytes(runs: Runs, size: str, flags: dict[str, Any]) -> int:
    """The most that a process takes on the device."""
    if budget := flags.get("device_memory_gib"):
        return budget * GIB
    length = runs.asked.prompt_len + runs.asked.gen_len
    workload = Workload(dtype="bf16", quant=flags.get("quant", "none"), seq_len=length)
    return rank_memory(load_size(size), 1, workload).total_bytes


def peers(runs: Runs) -> Iterator[Case]:
    for size in runs.asked.size:
        yield from gpt_fast(runs, size, ["none"])
        yield Case(f"{size} Hugging Face bf16", partial(peer_of, runs, "hugging_face", size, "none", None))


def peers_quant(runs: Runs) -> Iterator[Case]:
    for size in runs.asked.size:
        yield from gpt_fast(runs, size, ["int8", "int4"])


def gpt_fast(runs: Runs, size: str, quants: list[str]) -> Iterator[Case]:
    """Its bf16 is what is to be reached."""
    for bits in quants:
        name, least = (f"{size} gpt-fast bf16", 1.0) if bits == "none" else (f"{size} gpt-fast {bits}", None)
        if runs.asked.gpt_fast is None:
            yield Case(name, lambda: Found({}, remarks=["not run: no --gpt_fast FOLDER"]))
            continue
        wanted = {"folder": str(runs.asked.gpt_fast.resolve()), "quant": bits}
        yield Case(name, partial(peer_of, runs, "gpt_fast", size, bits, least, **wanted))


def peer_of(runs: Runs, kind: str, size: str, bits: str, least: float | None, **wanted: Any) -> Found:
    flags = {} if bits == "none" else {"quant": bits}
    ours = runs.ours(size, **flags)
    theirs = runs.peer(kind, size, **wanted)
    rates = {name: ours[f"{name}_tokens_per_s"] / theirs[f"{name}_tokens_per_s"] for name in ("decode", "prefill")}
    goals = [Goal("our tokens/s to theirs", rates["decode"], least=least)]
    return Found(theirs, [*goals, Goal("our prompt's tokens/s to theirs", rates["prefill"])])


PARTS = {
    "decode": decode,
    "quant": quant,
    "prefill": prefill,
    "batch": batch,
    "share": share,
    "kernels": kernels,
    "sizes": sizes,
    "peers": peers,
    "peers_quant": peers_quant,
}
