"""docs/hardware.md and its figure: the records of what ran, and the plan of what would. The two are never mixed."""

import importlib.util
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llama_mp.advice import Device, fits, tokens_per_s, with_staying
from llama_mp.config import load_size, size_names
from llama_mp.errors import RequestError
from llama_mp.files import write_whole
from llama_mp.gpus import find_gpu
from llama_mp.memory import Workload, rank_memory

PAGE, FIGURE = "hardware.md", "hardware.svg"
GB = 1e9
SEQ_LEN = 2048
FIGURE_SIZES, FIGURE_DEGREES = ("7B", "13B", "33B", "65B"), (1, 2, 4, 8)
FIGURE_CARDS = ("RTX 2080", "RTX 4080", "RTX 4090", "A100 40GB", "A100 80GB SXM")


class Row(NamedTuple):
    """What somebody may have, and ask about. `gpu` None: a CPU."""

    size: str
    mp: int
    gpu: str | None
    dtype: Literal["fp16", "bf16"] = "fp16"
    offload: Literal["none", "cpu"] = "none"


ROWS = (
    Row("7B", 1, "A100 40GB"),
    Row("7B", 1, "RTX 4090"),
    Row("7B", 1, "RTX 4080"),
    Row("7B", 1, "RTX 2080", offload="cpu"),
    Row("13B", 2, "RTX 3090"),
    Row("33B", 4, "RTX 3090"),
    Row("65B", 8, "RTX 3090"),
    Row("65B", 8, "A100 40GB"),
    Row("7B", 1, None, "bf16"),
)

INTRODUCTION = """\
# What runs where

Written by `python launch/plan.py --guide` from the records in [runs/](runs/) and from the plan: change those, not this
page. Any other model, number of ranks or card:

```sh
python launch/plan.py --size 13B --mp 2 --gpu "RTX 3090"
```

GB is 10^9 bytes, as the cards' makers count bandwidth; VRAM is in GiB, 2^30 bytes, as they count memory.
"""
MEASURED = """\
## Measured

Each row is one run; its record has the command and the rest. Tokens/s are those of decoding, all rows of the batch
together. The peak is that of the rank that holds most: allocated on a GPU, on a CPU private memory above that of a
process without a model; the planned one beside it counts the same. Random weights have the shape of the model, and its
speed. The memory speed of a shared machine drifts: the record of a bench has the ceiling of its own minute.
"""
PLANNED = f"""\
## Planned

Nothing in this table was run. Batch 1, {SEQ_LEN} positions. Tokens/s is what the memory's bandwidth allows at most,
or that of the bus for what is offloaded, for a step reads every weight and the whole cache: expect half of it. The peak
is that of one rank, and counts what the driver and the libraries take.
"""
COLUMNS = "Model | MP | GPU | VRAM | Precision | Environment | tokens/s"
MEASURED_HEADING = f"{COLUMNS} | measured peak | planned peak | batch x length | run"
PLANNED_HEADING = f"{COLUMNS} at most | planned peak | fits"
OFFLOAD_NOTE = "Where blocks are offloaded, as many as fit stay on the card."


def write_guide(docs: Path) -> tuple[Path, Path]:
    """Render the page and the figure into `docs`, from the records in its runs/."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("the guide's figure is drawn by matplotlib, which is not installed: pip install matplotlib")
    docs.mkdir(parents=True, exist_ok=True)
    write_whole(docs / PAGE, page(read_records(docs / "runs")).encode())
    write_whole(docs / FIGURE, figure())
    return docs / PAGE, docs / FIGURE


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of `folder`, by size, degree, device and precision. Raises RequestError for one that is none."""
    records = []
    for file in sorted(folder.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8")) | {"file": file.name}
            measured_row(record)
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{file} is no record of a run ({error!r}): remove it, or run again") from error
        records.append(record)
    return sorted(records, key=place)


def place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    known = size_names()
    size = known.index(record["size"]) if record["size"] in known else len(known)
    return (size, record["size"], record["mp"], record["device"], record["dtype"], record["date"], record["file"])


# ---- the page ------------------------------------------------------------------------------------------------------


def page(records: Sequence[Mapping[str, Any]]) -> str:
    measured = table(MEASURED_HEADING, [measured_row(record) for record in records])
    planned = table(PLANNED_HEADING, [planned_row(row) for row in ROWS])
    figure = f"![Memory of a rank by model and MP degree, with the memory of common cards]({FIGURE})\n"
    return "\n".join([INTRODUCTION, MEASURED, measured, PLANNED, planned, f"{OFFLOAD_NOTE}\n", figure])


def table(heading: str, rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, " | ".join("---" for _ in heading.split("|")), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def measured_row(record: Mapping[str, Any]) -> list[str]:
    environment = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if name != "python")
    is_cpu = record["device_type"] == "cpu"
    rate = record["decode_tokens_per_s"]
    return [
        record["size"] + (" (random weights)" if record["weights"] == "random" else ""),
        str(record["mp"]),
        f"none: {record['device']}, {environment['cores']} cores" if is_cpu else f"{record['mp']} x {record['device']}",
        ("host: " if is_cpu else "") + gib(record["device_memory_bytes"]),
        precision(record["dtype"], record["quant"], record["offload"])
        + (", deterministic" if record.get("deterministic") else ""),
        f"{environment['kind']}; {versions}",
        "" if rate is None else f"{rate:.1f}",
        gigabytes(record["peak_memory_bytes"]),
        gigabytes(record["planned_memory_bytes"]),
        f"{record['batch_size']} x {record['seq_len']}",
        f"[{record['verb']}, {record['date']}](runs/{record['file']})",
    ]


def planned_row(row: Row) -> list[str]:
    config, workload = load_size(row.size), workload_of(row)
    model, kind = [row.size, str(row.mp)], precision(row.dtype, "none", row.offload)
    if row.gpu is None:
        peak = gigabytes(rank_memory(config, row.mp, workload).total_bytes)
        return [*model, "none: CPU", "host's", kind, "any", "", peak, ""]
    gpu = find_gpu(row.gpu)
    device = Device(gpu.usable_bytes, gpu.bandwidth_bytes_per_s)
    workload = with_staying(config, row.mp, workload, device)
    peak = gigabytes(rank_memory(config, row.mp, workload).total_bytes)
    rate = tokens_per_s(config, row.mp, workload, device)
    card = [f"{row.mp} x {gpu.name}", gib(gpu.memory_bytes)]
    return [*model, *card, kind, "any", f"{rate:.3g}", peak, "yes" if fits(config, row.mp, workload, device) else "no"]


def workload_of(row: Row) -> Workload:
    device = "cpu" if row.gpu is None else "cuda"
    has_kernels = row.gpu is not None and find_gpu(row.gpu).has_kernels
    return Workload(dtype=row.dtype, offload=row.offload, seq_len=SEQ_LEN, device=device, has_kernels=has_kernels)


def precision(dtype: str, quant: str, offload: str) -> str:
    quantized = "" if quant == "none" else f", weights {quant}"
    return dtype + quantized + ("" if offload == "none" else f", offload to {offload}")


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / GB:.2f} GB"


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.0f} GiB"


# ---- the figure ----------------------------------------------------------------------------------------------------


def figure_data() -> dict[str, list[float]]:
    """GB of one rank in fp16, by size, at each of FIGURE_DEGREES."""
    workload = Workload(dtype="fp16", seq_len=SEQ_LEN)
    return {
        size: [round(rank_memory(load_size(size), mp, workload).total_bytes / GB, 3) for mp in FIGURE_DEGREES]
        for size in FIGURE_SIZES
    }


def described() -> str:
    """What the figure shows, kept in the file itself: whether it is in step with the plan needs no drawing to tell."""
    cards = {name: find_gpu(name).memory_bytes for name in FIGURE_CARDS}
    return json.dumps({"mp": FIGURE_DEGREES, "gb_per_rank": figure_data(), "cards": cards})


def figure() -> bytes:
    """The SVG: the same bytes at every drawing by one version of matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "llama-mp", "svg.fonttype": "none", "font.size": 10}):
        drawing = Figure(figsize=(8, 5), layout="constrained")
        draw(drawing.subplots())
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": described()})
    return buffer.getvalue()


def draw(axes: Any) -> None:
    xs = range(len(FIGURE_DEGREES))
    for size, values in figure_data().items():
        axes.plot(xs, values, marker="o", label=size, linewidth=2)
        axes.annotate(size, (0, values[0]), xytext=(-8, 0), textcoords="offset points", ha="right", va="center")
        for x, value in zip(xs, values, strict=True):
            above = dict(xytext=(0, 6), textcoords="offset points", ha="center")
            axes.annotate(f"{value:.0f}", (x, value), **above, fontsize=8)
    for name in FIGURE_CARDS:
        limit = find_gpu(name).memory_bytes / GB
        axes.axhline(limit, color="0.6", linestyle="--", linewidth=1, zorder=0)
        beside = dict(xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points", va="center")
        axes.annotate(f"{name}: {gib(find_gpu(name).memory_bytes)}", (1.0, limit), **beside, fontsize=8, color="0.35")
    axes.set_yscale("log", base=2)
    axes.set_xticks(xs, [f"MP {mp}" for mp in FIGURE_DEGREES])
    axes.set_xlim(-0.5, len(FIGURE_DEGREES) - 0.7)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("GB per rank")
    axes.set_title(f"Memory of one rank: fp16, batch 1, {SEQ_LEN} positions (planned)")
