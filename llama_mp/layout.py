"""Which slices of which global tensors make each parameter of rank `r` of `mp`: the only place that knows.

Every weight is a slice of a global tensor, in Meta's names and Meta's row order. Along its one split axis a
parameter is a row of slots (heads, hidden units, vocabulary entries); a slot that no global slot fills holds
zeros, and zeros in those places change no output. Loading, resharding, planning and reading a sharded
checkpoint all follow from `shards`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from llama_mp.config import ModelConfig
from llama_mp.errors import RequestError


class Span(NamedTuple):
    """Indices start <= i < stop along one axis."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The part rows x cols of the global tensor `source`, put at (row, col) of a parameter. Vectors: cols (0, 1)."""

    source: str
    rows: Span
    cols: Span
    row: int = 0
    col: int = 0


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One parameter of one rank. What no placement covers is zero."""

    name: str
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def num_elements(self) -> int:
        rows, cols = matrix_shape(self.shape)
        return rows * cols

    @property
    def num_placed(self) -> int:
        return sum(len(p.rows) * len(p.cols) for p in self.placements)

    @property
    def is_padded(self) -> bool:
        return self.num_elements > self.num_placed


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) of a matrix, or (length, 1) of a vector."""
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def row_chunks(rows: Span, num_cols: int, max_elements: int, *, unit: int = 1) -> Iterator[Span]:
    """`rows` in order, at most `max_elements` at a time, but always whole units of rows, counted from the first."""
    step = max(1, max_elements // max(1, num_cols * unit)) * unit
    for start in range(rows.start, rows.stop, step):
        yield Span(start, min(start + step, rows.stop))


def global_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model in Meta's names, unsplit. Tied embeddings have no `output.weight`."""
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = {
        "attention.wq.weight": (q_dim, config.dim),
        "attention.wk.weight": (kv_dim, config.dim),
        "attention.wv.weight": (kv_dim, config.dim),
        "attention.wo.weight": (config.dim, q_dim),
        "feed_forward.w1.weight": (config.hidden_dim, config.dim),
        "feed_forward.w3.weight": (config.hidden_dim, config.dim),
        "feed_forward.w2.weight": (config.dim, config.hidden_dim),
        "attention_norm.weight": (config.dim,),
        "ffn_norm.weight": (config.dim,),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, config.dim)}
    for layer in range(config.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["norm.weight"] = (config.dim,)
    if not config.tied_embeddings:
        shapes["output.weight"] = (config.vocab_size, config.dim)
    return shapes


# Axis and kind of slot for each matrix; vectors are replicated. tok_embeddings: see `split_of`.
SPLITS = {
    "wq": (0, "query"),
    "wk": (0, "kv"),
    "wv": (0, "kv"),
    "wo": (1, "query"),
    "w1": (0, "hidden"),
    "w3": (0, "hidden"),
    "w2": (1, "hidden"),
    "output": (0, "vocab"),
}
FUSED = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}


def split_of(name: str, embedding_axis: int) -> tuple[int, str] | None:
    """(axis, kind of slot) along which the global tensor `name` is split, None for a replicated one."""
    stem = name.split(".")[-2]
    if stem == "tok_embeddings":
        return (0, "vocab") if embedding_axis == 0 else (1, "dim")
    return SPLITS.get(stem)


def joined_shape(name: str, parts: Sequence[tuple[int, ...]], embedding_axis: int) -> tuple[int, ...]:
    """The shape of the matrix whose shards have the shapes `parts`: what is padding in them is counted too."""
    axis, _ = split_of(name, embedding_axis) or (None, None)
    return tuple(sum(part[i] for part in parts) if i == axis else size for i, size in enumerate(parts[0]))


def shards(
    config: ModelConfig, rank: int, mp: int, *, embedding_axis: int = 0, hidden_unit: int = 1
) -> dict[str, Shard]:
    """The parameters of `rank` of `mp`. At run time embeddings are split by vocabulary (axis 0), in Meta's
    LLaMA 1 and 2 files by model dimension (axis 1). The hidden size is cut into whole `hidden_unit`s."""
    check_degree(config, mp, embedding_axis)
    assert 0 <= rank < mp, f"rank {rank} of {mp}"
    runs = {
        "query": head_runs(query_slots(config, rank, mp), config.head_dim),
        "kv": head_runs(kv_slots(config, rank, mp), config.head_dim),
        "hidden": chunk_runs(config.hidden_dim, rank, mp, hidden_unit),
        "vocab": chunk_runs(config.vocab_size, rank, mp),
        "dim": chunk_runs(config.dim, rank, mp),
    }
    result = {}
    for name, shape in global_shapes(config).items():
        split = split_of(name, embedding_axis)
        axis, slots = split or (0, None)
        length, spans = runs[slots] if slots else (shape[0], [(Span(0, shape[0]), 0)])
        result[name] = shard_along(name, shape, axis, length, spans)
    return result


def shard_along(name: str, shape: tuple[int, ...], axis: int, length: int, spans: Sequence[tuple[Span, int]]) -> Shard:
    """`name` cut on `axis` to `length` slots, of which each (global span, offset) of `spans` fills some."""
    rows, cols = matrix_shape(shape)
    if axis == 0:
        placements = [Placement(source=name, rows=span, cols=Span(0, cols), row=at) for span, at in spans]
        local = (length, *shape[1:])
    else:
        placements = [Placement(source=name, rows=Span(0, rows), cols=span, col=at) for span, at in spans]
        local = (rows, length)
    return Shard(name=name, shape=local, placements=tuple(placements))


def check_degree(config: ModelConfig, mp: int, embedding_axis: int = 0) -> None:
    """Raise RequestError where no layout of degree `mp` exists."""
    if not 1 <= mp <= config.num_heads:
        raise RequestError(
            f"{mp} ranks for model {config.name} with {config.num_heads} attention heads: "
            f"use between 1 and {config.num_heads} ranks"
        )
    if embedding_axis == 1 and config.dim % mp:
        raise RequestError(
            f"model {config.name}: dim {config.dim} does not divide over {mp} shards; "
            "split the embeddings by vocabulary (axis 0)"
        )


# ---- slots -----------------------------------------------------------------------------------------------------


def heads_per_rank(config: ModelConfig, mp: int) -> tuple[int, int]:
    """(KV heads, query heads) that each rank holds, padding included."""
    if mp <= config.num_kv_heads:
        num_kv = -(-config.num_kv_heads // mp)
        return num_kv, num_kv * config.num_queries_per_kv
    return 1, queries_per_copy(config, mp)


def queries_per_copy(config: ModelConfig, mp: int) -> int:
    """Query slots beside each copy of a KV head when mp exceeds the KV heads: the fewest that fit on mp ranks."""
    group = config.num_queries_per_kv
    return next(q for q in range(1, group + 1) if config.num_kv_heads * -(-group // q) <= mp)


def kv_slots(config: ModelConfig, rank: int, mp: int) -> list[int | None]:
    """The global KV head in each KV slot of `rank`; None is a slot of zeros.

    Copies of one head stand on neighbouring ranks (0, 0, 1, 1)."""
    num_kv, num_queries = heads_per_rank(config, mp)
    if mp <= config.num_kv_heads:
        heads = range(rank * num_kv, (rank + 1) * num_kv)
    else:
        heads = [rank // -(-config.num_queries_per_kv // num_queries)]
    return [head if head < config.num_kv_heads else None for head in heads]


def query_slots(config: ModelConfig, rank: int, mp: int) -> list[int | None]:
    """The global query head in each query slot of `rank`, grouped by KV slot; None is a slot of zeros."""
    group = config.num_queries_per_kv
    _, num_queries = heads_per_rank(config, mp)
    if mp <= config.num_kv_heads:
        return [None if kv is None else kv * group + i for kv in kv_slots(config, rank, mp) for i in range(group)]
    [kv] = kv_slots(config, rank, mp)
    first = rank % -(-group // num_queries) * num_queries  # queries of this KV head that earlier copies serve
    return [None if kv is None or i >= group else kv * group + i for i in range(first, first + num_queries)]


def head_runs(slots: Sequence[int | None], head_dim: int) -> tuple[int, list[tuple[Span, int]]]:
    """Slots of heads as (length, [(global span, offset)]) in elements, neighbours joined."""
    runs: list[tuple[Span, int]] = []
    for slot, head in enumerate(slots):
        if head is None:
            continue
        span, at = Span(head * head_dim, (head + 1) * head_dim), slot * head_dim
        if runs and runs[-1][0].stop == span.start and runs[-1][1] + len(runs[-1][0]) == at:
            runs[-1] = (Span(runs[-1][0].start, span.stop), runs[-1][1])
        else:
            runs.append((span, at))
    return len(slots) * head_dim, runs


def chunk_runs(total: int, rank: int, mp: int, unit: int = 1) -> tuple[int, list[tuple[Span, int]]]:
    """`total` elements in mp equal chunks of whole units, zeros at the end of the last ones: (length, runs)."""
    length = padded(total, mp * unit) // mp
    span = Span(min(rank * length, total), min((rank + 1) * length, total))
    return length, [(span, 0)] if len(span) else []


def padded_sizes(config: ModelConfig, mp: int, hidden_unit: int = 1) -> dict[str, int]:
    """The sizes of which mp ranks together hold more than the model has, with what they hold: zeros fill them up,
    and KV heads are there several times."""
    num_kv, num_queries = heads_per_rank(config, mp)
    held = {
        "num_heads": num_queries * mp,
        "num_kv_heads": num_kv * mp,
        "hidden_dim": padded(config.hidden_dim, mp * hidden_unit),
        "vocab_size": padded(config.vocab_size, mp),
    }
    return {name: size for name, size in held.items() if size != getattr(config, name)}


def padded(total: int, multiple: int) -> int:
    """The least multiple of `multiple` that is >= `total`."""
    return -(-total // multiple) * multiple


# ---- what is made of shards ------------------------------------------------------------------------------------


def fuse(unfused: dict[str, Shard]) -> dict[str, Shard]:
    """Stack wq, wk, wv into wqkv and w1, w3 into w13: one matrix product instead of two or three."""
    head = {parts[0]: (name, parts) for name, parts in FUSED.items()}
    rest = {part for parts in FUSED.values() for part in parts[1:]}
    result = {}
    for name, shard in unfused.items():
        prefix, _, stem = name.removesuffix(".weight").rpartition(".")
        if stem in head:
            fused, parts = head[stem]
            name = f"{prefix}.{fused}.weight"
            shard = stack_rows(name, [unfused[f"{prefix}.{part}.weight"] for part in parts])
        if stem not in rest:
            result[name] = shard
    return result


def stack_rows(name: str, parts: Iterable[Shard]) -> Shard:
    """The parameter `name` that holds the rows of `parts`, one after the other."""
    placements: list[Placement] = []
    rows = cols = 0
    for part in parts:
        placements += [replace(p, row=p.row + rows) for p in part.placements]
        rows, cols = rows + part.shape[0], part.shape[1]
    return Shard(name=name, shape=(rows, cols), placements=tuple(placements))


def cover(held: Sequence[Shard], rows: Span, cols: Span) -> list[tuple[int, Placement]]:
    """Where the region rows x cols of a global tensor lies among its shards, `held` by rank, each element once.

    Returns (rank, placement) with `placement.rows`, `.cols` the global part and `.row`, `.col` its place in that
    rank's shard. Raises LookupError when a part lies nowhere."""
    parts = []
    at = [rows.start, cols.start]
    by_start = sorted(
        ((rank, p) for rank, shard in enumerate(held) for p in shard.placements),
        key=lambda item: (item[1].rows.start, item[1].cols.start),
    )
    for rank, p in by_start:
        row_span = Span(max(p.rows.start, at[0]), min(p.rows.stop, rows.stop))
        col_span = Span(max(p.cols.start, at[1]), min(p.cols.stop, cols.stop))
        if row_span.start >= row_span.stop or col_span.start >= col_span.stop:
            continue
        at_row, at_col = p.row + row_span.start - p.rows.start, p.col + col_span.start - p.cols.start
        parts.append((rank, replace(p, rows=row_span, cols=col_span, row=at_row, col=at_col)))
        if len(col_span) == len(cols):  # split by rows: go on below; otherwise to the right
            at[0] = row_span.stop
        else:
            at[1] = col_span.stop
    if sum(len(p.rows) * len(p.cols) for _, p in parts) != len(rows) * len(cols):
        raise LookupError(f"rows {tuple(rows)}, cols {tuple(cols)} are not covered by the shards")
    return parts
