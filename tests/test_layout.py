"""Which elements of which global tensor lie where: counted, for every degree, without a byte of weights."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from factory import MODELS, cut, random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mp.config import ModelConfig, load_size, size_names
from llama_mp.errors import RequestError
from llama_mp.layout import (
    FUSED,
    Placement,
    Shard,
    Span,
    cover,
    fuse,
    global_shapes,
    heads_per_rank,
    kv_slots,
    matrix_shape,
    padded_sizes,
    query_slots,
    row_chunks,
    shards,
)


def model(num_kv_heads: int, group: int = 1, **fields: int) -> ModelConfig:
    num_heads = num_kv_heads * group
    defaults = dict(dim=num_heads * 2, head_dim=2, hidden_dim=7, vocab_size=11, num_layers=1)
    return ModelConfig(name="m", num_heads=num_heads, num_kv_heads=num_kv_heads, **(defaults | fields))


@st.composite
def models_and_degrees(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    size = st.integers(1, 40)
    config = model(
        draw(st.integers(1, 6)),
        draw(st.integers(1, 6)),
        head_dim=2 * draw(st.integers(1, 3)),
        hidden_dim=draw(size),
        vocab_size=draw(size),
        dim=draw(size),
    )
    return config, draw(st.integers(1, config.num_heads))


def times_held(parts: Sequence[Shard], shape: tuple[int, ...]) -> torch.Tensor:
    """How often each element of a global tensor of `shape` is placed; checks each shard's inside on the way."""
    held = torch.zeros(matrix_shape(shape), dtype=torch.int32)
    for part in parts:
        local = torch.zeros(matrix_shape(part.shape), dtype=torch.int32)
        for p in part.placements:
            target = local[p.row : p.row + len(p.rows), p.col : p.col + len(p.cols)]
            assert target.shape == (len(p.rows), len(p.cols)), f"{p} reaches out of {part.shape}"
            target += 1
            source = held[slice(*p.rows), slice(*p.cols)]
            assert source.shape == (len(p.rows), len(p.cols)), f"{p} reaches out of the global {shape}"
            source += 1
        assert local.max() <= 1, f"placements of {part.name} overlap"
        assert part.is_padded == (local.min() == 0)
    return held


def copies_of_each_kv_head(config: ModelConfig, mp: int) -> int:
    """DESIGN.md's rule, written out again: ceil(G / q) for the smallest q for which all fit on mp ranks."""
    if mp <= config.num_kv_heads:
        return 1
    group = config.num_heads // config.num_kv_heads
    q = 1
    while config.num_kv_heads * math.ceil(group / q) > mp:
        q += 1
    return math.ceil(group / q)


@given(models_and_degrees())
@settings(max_examples=150, deadline=None)
def test_each_element_is_placed_once_but_repeated_kv_heads_and_norms(drawn: tuple[ModelConfig, int]) -> None:
    config, mp = drawn
    ranks = [shards(config, rank, mp) for rank in range(mp)]
    for name, shape in global_shapes(config).items():
        assert len({rank[name].shape for rank in ranks}) == 1, f"{name} differs in shape between the ranks"
        times = 1
        if ".wk." in name or ".wv." in name:
            times = copies_of_each_kv_head(config, mp)
        if len(shape) == 1:
            times = mp
        held = times_held([rank[name] for rank in ranks], shape)
        assert (held == times).all(), f"{name}: held {held.unique().tolist()} times, not {times}"


@given(models_and_degrees())
@settings(max_examples=150, deadline=None)
def test_query_slots_stand_with_the_kv_head_they_attend_to(drawn: tuple[ModelConfig, int]) -> None:
    config, mp = drawn
    group = config.num_queries_per_kv
    num_kv, num_queries = heads_per_rank(config, mp)
    seen = []
    for rank in range(mp):
        keys, queries = kv_slots(config, rank, mp), query_slots(config, rank, mp)
        assert (len(keys), len(queries)) == (num_kv, num_queries)
        assert num_queries % num_kv == 0
        for slot, query in enumerate(queries):
            if query is not None:
                assert keys[slot // (num_queries // num_kv)] == query // group
        seen += [query for query in queries if query is not None]
    assert sorted(seen) == list(range(config.num_heads))


@given(models_and_degrees(), st.data())
@settings(max_examples=150, deadline=None)
def test_cover_reads_any_region_back_from_shards_of_any_degree(
    drawn: tuple[ModelConfig, int], data: st.DataObject
) -> None:
    config, mp = drawn
    axis = data.draw(st.sampled_from([0, 1])) if config.dim % mp == 0 else 0
    name = data.draw(st.sampled_from(sorted(global_shapes(config))))
    shape = global_shapes(config)[name]
    num_rows, num_cols = matrix_shape(shape)
    rows = Span(*sorted(data.draw(st.tuples(st.integers(0, num_rows), st.integers(0, num_rows)))))
    cols = Span(*sorted(data.draw(st.tuples(st.integers(0, num_cols), st.integers(0, num_cols)))))
    whole = torch.arange(1, num_rows * num_cols + 1).reshape(num_rows, num_cols)
    held = [shards(config, rank, mp, embedding_axis=axis)[name] for rank in range(mp)]
    written = [cut(shard, {name: whole.reshape(shape)}).reshape(matrix_shape(shard.shape)) for shard in held]
    region = torch.zeros(len(rows), len(cols), dtype=whole.dtype)
    for rank, p in cover(held, rows, cols):
        target = region[p.rows.start - rows.start :, p.cols.start - cols.start :][: len(p.rows), : len(p.cols)]
        assert not target.any(), "a part is covered twice"
        target.copy_(written[rank][p.row : p.row + len(p.rows), p.col : p.col + len(p.cols)])
    assert torch.equal(region, whole[slice(*rows), slice(*cols)])


def test_cover_says_what_no_shard_holds() -> None:
    held = [Shard(name="w", shape=(2, 3), placements=(Placement(source="w", rows=Span(0, 2), cols=Span(0, 3)),))]
    with pytest.raises(LookupError, match=r"rows \(1, 3\), cols \(0, 3\) are not covered"):
        cover(held, Span(1, 3), Span(0, 3))


# ---- the padding rule's examples -------------------------------------------------------------------------------


def test_copies_of_a_kv_head_are_neighbours() -> None:
    config = model(2, 2)
    assert [kv_slots(config, rank, 4) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [query_slots(config, rank, 4) for rank in range(4)] == [[0], [1], [2], [3]]


Slots = list[tuple[list[int | None], list[int | None]]]
N = None


@pytest.mark.parametrize(
    ("num_kv_heads", "group", "mp", "expected"),
    [
        (3, 3, 2, [([0, 1], [0, 1, 2, 3, 4, 5]), ([2, N], [6, 7, 8, N, N, N])]),
        (3, 3, 3, [([0], [0, 1, 2]), ([1], [3, 4, 5]), ([2], [6, 7, 8])]),
        (3, 3, 4, [([0], [0, 1, 2]), ([1], [3, 4, 5]), ([2], [6, 7, 8]), ([N], [N, N, N])]),
        (
            *(3, 3, 8),
            [([k], [3 * k + i, 3 * k + i + 1 if i == 0 else N]) for k in range(3) for i in (0, 2)]
            + [([N], [N, N]), ([N], [N, N])],
        ),
        (
            13,
            1,
            8,
            [([2 * r, 2 * r + 1], [2 * r, 2 * r + 1]) for r in range(6)] + [([12, N], [12, N]), ([N, N], [N, N])],
        ),
    ],
)
def test_padding_of_heads(num_kv_heads: int, group: int, mp: int, expected: Slots) -> None:
    config = model(num_kv_heads, group)
    assert [(kv_slots(config, r, mp), query_slots(config, r, mp)) for r in range(mp)] == expected


def test_52_heads_over_8_ranks_are_56() -> None:
    config = load_size("33B")
    assert heads_per_rank(config, 8) == (7, 7)
    assert sum(slot is None for rank in range(8) for slot in query_slots(config, rank, 8)) == 4


@pytest.mark.parametrize(("mp", "heads", "hidden", "vocab"), [(3, 11, 3670, 10667), (6, 6, 1835, 5334)])
def test_7b_over_3_and_6_ranks(mp: int, heads: int, hidden: int, vocab: int) -> None:
    held = shards(load_size("7B"), 0, mp)
    assert held["layers.0.attention.wq.weight"].shape == (heads * 128, 4096)
    assert held["layers.0.attention.wo.weight"].shape == (4096, heads * 128)
    assert held["layers.31.feed_forward.w1.weight"].shape == (hidden, 4096)
    assert held["layers.31.feed_forward.w2.weight"].shape == (4096, hidden)
    assert held["output.weight"].shape == held["tok_embeddings.weight"].shape == (vocab, 4096)


@pytest.mark.parametrize("mp", [0, -1, 10, 64])
def test_a_degree_without_a_layout_names_both_numbers(mp: int) -> None:
    with pytest.raises(
        RequestError, match=f"^{mp} ranks for model m with 9 attention heads: use between 1 and 9 ranks$"
    ):
        shards(model(3, 3), 0, mp)


def test_embeddings_on_axis_1_cannot_be_padded() -> None:
    with pytest.raises(RequestError, match="dim 18 does not divide over 4 shards; split the embeddings by vocabulary"):
        shards(model(3, 3), 0, 4, embedding_axis=1)


# ---- against plain chunks --------------------------------------------------------------------------------------

AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}  # DESIGN.md's table


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("mp", [1, 2, 4])
def test_dividing_degrees_are_plain_chunks(mp: int, embedding_axis: int) -> None:
    config = replace(MODELS["gqa"], num_kv_heads=4, hidden_dim=96, vocab_size=332)
    tensors = random_tensors(config)
    for rank in range(mp):
        for name, shard in shards(config, rank, mp, embedding_axis=embedding_axis).items():
            axis = {**AXES, "tok_embeddings": embedding_axis}.get(name.split(".")[-2])
            expected = tensors[name] if axis is None else tensors[name].chunk(mp, dim=axis)[rank]
            assert torch.equal(cut(shard, tensors), expected), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mp", [1, 3, 8])
def test_fuse_stacks_what_it_replaces_and_leaves_the_rest(name: str, mp: int) -> None:
    tensors = random_tensors(MODELS[name])
    for rank in range(mp):
        plain = shards(MODELS[name], rank, mp)
        fused = fuse(plain)
        assert sum(s.num_elements for s in fused.values()) == sum(s.num_elements for s in plain.values())
        for key, shard in fused.items():
            *prefix, stem, _ = key.split(".")
            parts = [".".join([*prefix, part, "weight"]) for part in FUSED.get(stem, (stem,))]
            assert shard.name == key
            assert torch.equal(cut(shard, tensors), torch.cat([cut(plain[part], tensors) for part in parts]))


# ---- every size ------------------------------------------------------------------------------------------------


def num_times_held(parts: Sequence[Shard], shape: tuple[int, ...]) -> int:
    """How often a global tensor is placed, the same for all its elements; counted along its split axis alone."""
    whole = matrix_shape(shape)
    placements = [p for part in parts for p in part.placements]
    axis = 0 if all(p.cols == (0, whole[1]) for p in placements) else 1
    assert all((p.cols, p.rows)[axis] == (0, whole[1 - axis]) for p in placements)
    spans = [(p.rows, p.cols)[axis] for p in placements]
    change = torch.zeros(whole[axis] + 1, dtype=torch.int32)
    for span in spans:
        change[span.start] += 1
        change[span.stop] -= 1
    [times] = change.cumsum(0)[:-1].unique().tolist()
    return times


@pytest.mark.parametrize("size", size_names())
def test_every_size_is_covered_exactly_at_1_to_8_and_16_ranks(size: str) -> None:
    config = replace(load_size(size), num_layers=1)  # layers are alike
    for mp in [mp for mp in (*range(1, 9), 16) if mp <= config.num_heads]:
        for axis in (0, 1) if config.dim % mp == 0 else (0,):
            ranks = [shards(config, rank, mp, embedding_axis=axis) for rank in range(mp)]
            for name, shape in global_shapes(config).items():
                times = num_times_held([rank[name] for rank in ranks], shape)
                kv = copies_of_each_kv_head(config, mp) if ".wk." in name or ".wv." in name else 1
                assert times == (mp if len(shape) == 1 else kv), f"{name} at MP {mp}"


# ---- sizes and steps -------------------------------------------------------------------------------------------


@given(drawn=models_and_degrees())
def test_padded_sizes_are_those_of_all_shards_together(drawn: tuple[ModelConfig, int]) -> None:
    config, mp = drawn
    of_ranks = [shards(config, rank, mp) for rank in range(mp)]

    def rows(name: str) -> int:
        return sum(held[name].shape[0] for held in of_ranks)

    held = {
        "num_heads": rows("layers.0.attention.wq.weight") // config.head_dim,
        "num_kv_heads": rows("layers.0.attention.wk.weight") // config.head_dim,
        "hidden_dim": rows("layers.0.feed_forward.w1.weight"),
        "vocab_size": rows("tok_embeddings.weight"),
    }
    sizes = padded_sizes(config, mp)
    assert {name: sizes.get(name, getattr(config, name)) for name in held} == held
    assert set(sizes) <= set(held) and all(size > getattr(config, name) for name, size in sizes.items())


def test_padded_sizes_of_a_degree_that_divides_are_none() -> None:
    assert padded_sizes(load_size("7B"), 8) == {}
    assert padded_sizes(load_size("llama2-70b"), 16) == {"num_kv_heads": 16}
    assert padded_sizes(load_size("smollm2-135m"), 2) == {"num_heads": 12, "num_kv_heads": 4}


@given(
    start=st.integers(0, 50),
    num_rows=st.integers(0, 200),
    num_cols=st.integers(0, 40),
    max_elements=st.integers(1, 500),
    unit=st.integers(1, 20),
)
def test_chunks_of_rows_are_whole_units_in_order(
    start: int, num_rows: int, num_cols: int, max_elements: int, unit: int
) -> None:
    rows = Span(start, start + num_rows)
    chunks = list(row_chunks(rows, num_cols, max_elements, unit=unit))
    assert [row for chunk in chunks for row in range(*chunk)] == list(range(*rows))
    for number, chunk in enumerate(chunks):
        assert len(chunk) % unit == 0 or number == len(chunks) - 1
        assert len(chunk) * num_cols <= max_elements or len(chunk) <= unit
    # and no smaller than need be: one more unit would not fit
    for chunk in chunks[:-1]:
        assert (len(chunk) + unit) * max(1, num_cols) > max_elements
