"""Planned bytes against the bytes of what is really made."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factory import MODELS, checkpoint, random_tensors, write_meta
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mp.cache import KVCache
from llama_mp.checkpoint.load import load_shards, open_source
from llama_mp.config import ModelConfig, load_size, size_names
from llama_mp.dtypes import DTYPES
from llama_mp.errors import RequestError
from llama_mp.layout import Shard, fuse, global_shapes, heads_per_rank, padded, shards
from llama_mp.memory import (
    BYTES_PER_ELEMENT,
    Workload,
    check_layout,
    checkpoint_bytes,
    host_bytes,
    is_quantized,
    kv_cache_bytes,
    offloaded_bytes,
    padding_share,
    parameters,
    rank_memory,
    run_time_shards,
    weight_bytes,
)
from llama_mp.quant import pack
from llama_mp.runtime import CUBLAS_BYTES, OLDER_CUBLAS_BYTES

CPU = torch.device("cpu")


def test_each_dtype_has_its_size() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == BYTES_PER_ELEMENT


@pytest.mark.parametrize("name", MODELS)
def test_weight_bytes_are_those_of_the_loaded_parameters(tmp_path: Path, name: str) -> None:
    config = MODELS[name]
    source = open_source(checkpoint(write_meta(tmp_path, config, random_tensors(config), 1)))
    for mp in (1, 2, 3, 8):
        for rank in range(mp):
            for dtype in ("fp32", "bf16"):
                parameters = load_shards(fuse(shards(config, rank, mp)), source, dtype=DTYPES[dtype], device=CPU)
                held = sum(parameter.untyped_storage().nbytes() for _, parameter in parameters)
                assert weight_bytes(config, rank, mp, dtype) == held


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_quantized_weight_bytes_are_those_of_the_packed_parameters(tmp_path: Path, name: str, quant: str) -> None:
    config = MODELS[name]
    source = open_source(checkpoint(write_meta(tmp_path, config, random_tensors(config), 1)))

    def transform(shard: Shard, parameter: torch.Tensor) -> torch.Tensor:
        return pack(parameter, quant) if is_quantized(shard, quant) else parameter

    for mp in (1, 2, 3):
        for rank in range(mp):
            wanted = run_time_shards(config, rank, mp, quant)
            held = load_shards(wanted, source, dtype=torch.bfloat16, device=CPU, transform=transform)
            assert weight_bytes(config, rank, mp, "bf16", quant) == sum(parameter.nbytes for _, parameter in held)


@pytest.mark.parametrize(("size", "gigabytes"), [("7B", 13.48), ("13B", 26.03), ("33B", 65.06), ("65B", 130.57)])
def test_weight_bytes_are_the_published_parameters_in_fp16(size: str, gigabytes: float) -> None:
    assert weight_bytes(load_size(size), 0, 1, "fp16") / 1e9 == pytest.approx(gigabytes, abs=0.005)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_cache_bytes_are_those_of_the_cache(name: str, dtype: str) -> None:
    for mp in (1, 2, 3, 4, 8):
        cache = KVCache.allocate(
            MODELS[name], mp, num_slots=3, max_seq_len=17, dtype=DTYPES[dtype], device=torch.device("meta")
        )
        held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
        assert kv_cache_bytes(MODELS[name], mp, dtype, batch_size=3, seq_len=17) == held


def test_kv_cache_of_7b_and_of_grouped_queries() -> None:
    # 2 x layers x length x kv_dim x 2 bytes: half a MiB a token in 7B, and a quarter of that with 8 of 32 heads.
    assert kv_cache_bytes(load_size("7B"), 1, "fp16", batch_size=1, seq_len=2048) == 2**30
    assert kv_cache_bytes(load_size("llama3-8b"), 1, "fp16", batch_size=1, seq_len=2048) == 2**28
    assert kv_cache_bytes(load_size("llama3-8b"), 8, "fp16", batch_size=8, seq_len=2048) == 2**28


# ---- properties --------------------------------------------------------------------------------------------------


def repeated_elements(config: ModelConfig, mp: int) -> int:
    """wk and wv where a KV head lies on several ranks: every copy but the first, written out from the rule."""
    if mp <= config.num_kv_heads:
        return 0
    _, num_queries = heads_per_rank(config, mp)
    copies = -(-config.num_queries_per_kv // num_queries)
    return config.num_layers * 2 * (copies - 1) * config.num_kv_heads * config.head_dim * config.dim


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(size_names()), st.data())
def test_weights_over_all_ranks_are_the_checkpoint(size: str, data: st.DataObject) -> None:
    """Padding and repeats aside: zeros are what no placement covers, norms are on each rank."""
    config = replace(load_size(size), num_layers=2)  # all layers are alike
    mp = data.draw(st.integers(1, min(config.num_heads, 24)))
    own = sum(math.prod(shape) for shape in global_shapes(config).values())
    norms = sum(math.prod(shape) for shape in global_shapes(config).values() if len(shape) == 1)
    held = [fuse(shards(config, rank, mp)) for rank in range(mp)]
    zeros = sum(shard.num_elements - shard.num_placed for rank in held for shard in rank.values())
    planned = sum(weight_bytes(config, rank, mp, "fp16") for rank in range(mp)) // 2
    assert planned - zeros - repeated_elements(config, mp) - (mp - 1) * norms == own
    assert checkpoint_bytes(config, "fp16") == 2 * own


@pytest.mark.parametrize("size", size_names())
def test_every_degree_of_every_size_has_a_plan(size: str) -> None:
    config = load_size(size)
    whole = weight_bytes(config, 0, 1, "fp16")
    for mp in range(1, config.num_heads + 1):
        memory = rank_memory(config, mp, Workload(dtype="fp16"))
        assert min(memory) > 0 and memory.total_bytes == sum(memory)
        assert whole <= mp * memory.weights_bytes  # rank 0 holds the most: no rank has more than it
    for mp in (0, config.num_heads + 1):
        with pytest.raises(RequestError, match=f"use between 1 and {config.num_heads} ranks"):
            rank_memory(config, mp, Workload(dtype="fp16"))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(size_names()),
    st.sampled_from(["fp32", "fp16"]),
    st.sampled_from(["none", "int8", "int4"]),
    st.sampled_from(["none", "cpu"]),
    st.integers(1, 8),
    st.integers(2, 2000),
    st.integers(1, 9),
)
def test_more_work_never_takes_less(size, dtype, quant, offload, batch, length, mp) -> None:
    """Which the search for the largest batch and length relies on."""

    def total(batch: int, length: int) -> int:
        work = Workload(dtype=dtype, quant=quant, offload=offload, batch_size=batch, seq_len=length)
        return rank_memory(load_size(size), mp, work).total_bytes

    assert total(batch, length) <= total(batch + 1, length)
    assert total(batch, length) <= total(batch, length + 1)


def test_33b_over_8_ranks_is_planned_with_56_heads() -> None:
    config = load_size("33B")
    assert config.num_heads == 52
    memory = rank_memory(config, 8, Workload(dtype="fp16", batch_size=2, seq_len=1024))
    block = 7 * 128 * 4 * config.dim + 3 * config.hidden_dim // 8 * config.dim + 2 * config.dim  # 56 / 8 heads a rank
    others = 2 * config.vocab_size // 8 * config.dim + config.dim
    assert memory.weights_bytes == 2 * (60 * block + others)
    assert memory.kv_cache_bytes == 2 * 2 * 60 * 2 * 1024 * 7 * 128


# ---- fewer bits, blocks elsewhere --------------------------------------------------------------------------------


def test_int8_and_int4_count_their_scales() -> None:
    config = load_size("7B")
    dim, hidden, vocab, fp16 = 4096, 11008, 32000, 2
    outside = fp16 * (vocab * dim + dim)  # embeddings and the last norm stay as they are
    norms = fp16 * 2 * dim
    rows = (3 * dim, dim, 2 * hidden, dim, vocab)  # wqkv, wo, w13, w2 of a block, and the output
    cols = (dim, dim, dim, hidden, dim)
    # and rows are filled up to 16 bytes
    int8 = [row * (col + 4 + 12) for row, col in zip(rows, cols, strict=True)]
    int4 = [row * col // 32 * (16 + 4) for row, col in zip(rows, cols, strict=True)]
    assert weight_bytes(config, 0, 1, "fp16", "int8") == outside + 32 * (norms + sum(int8[:4])) + int8[4]
    assert weight_bytes(config, 0, 1, "fp16", "int4") == outside + 32 * (norms + sum(int4[:4])) + int4[4]


@pytest.mark.parametrize("mp", [1, 3, 7])
def test_int4_fills_the_hidden_size_up_to_whole_groups_on_each_rank(mp: int) -> None:
    config = load_size("7B")
    filled = replace(config, hidden_dim=padded(config.hidden_dim, 32 * mp))
    assert filled.hidden_dim // mp % 32 == 0
    assert weight_bytes(config, 0, mp, "fp16", "int4") == weight_bytes(filled, 0, mp, "fp16", "int4")


def test_groups_of_int4_do_not_reach_across_heads_on_two_ranks() -> None:
    for size in size_names():
        check_layout(load_size(size), 2, "int4")
    check_layout(MODELS["gqa"], 1, "int4")
    check_layout(MODELS["gqa"], 2, "int8")
    with pytest.raises(RequestError, match=r"over 2 ranks: model gqa has heads of 8, .* use --quant int8, or one rank"):
        check_layout(MODELS["gqa"], 2, "int4")
    with pytest.raises(RequestError, match="use between 1 and 8 ranks"):
        check_layout(MODELS["gqa"], 9, "none")


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloading_leaves_two_blocks_and_what_is_outside_of_them(place: str) -> None:
    config = load_size("7B")
    work = Workload(dtype="fp16", offload=place)
    held = parameters(config, 0, 2, "none", "fp16")
    assert rank_memory(config, 2, work).weights_bytes == 2 * held.block + held.others
    assert offloaded_bytes(config, 2, work) == 32 * held.block
    assert weight_bytes(config, 0, 2, "fp16") == 32 * held.block + held.others
    plain, elsewhere = host_bytes(config, 2, Workload(dtype="fp16")), host_bytes(config, 2, work)
    assert elsewhere - plain == 2 * (32 if place == "cpu" else 2) * held.buffer  # from disk by way of two buffers


# ---- what padding costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", size_names())
def test_the_native_degree_costs_nothing(size: str) -> None:
    assert padding_share(load_size(size), load_size(size).native_mp) == 0


@pytest.mark.parametrize("mp", [1, 2, 4, 8, 16, 32])
def test_degrees_that_divide_cost_nothing(mp: int) -> None:
    assert padding_share(load_size("7B"), mp) == 0


def matrix_elements(size: str) -> int:
    return weight_bytes(load_size(size), 0, 1, "fp16") // 2 - load_size(size).dim * (2 * load_size(size).num_layers + 1)


def test_four_heads_of_zeros_at_33b_over_8_ranks() -> None:
    zeros = 60 * 4 * (4 * 128 * 6656)  # layers, of wq wk wv wo, 4 heads; hidden size and vocabulary divide
    assert padding_share(load_size("33B"), 8) == pytest.approx(zeros / matrix_elements("33B"))


def test_repeated_kv_heads_at_llama3_8b_over_16_ranks() -> None:
    copies = 32 * 2 * (8 * 128 * 4096)  # layers, of wk wv, each of the 8 heads once more
    assert padding_share(load_size("llama3-8b"), 16) == pytest.approx(copies / matrix_elements("llama3-8b"))


def test_9_heads_over_2_ranks() -> None:
    zeros = 30 * (2 * 3 * 64 + 2 * 1 * 64) * 576  # layers, of wq wo one group of 3 heads, of wk wv one head
    assert padding_share(load_size("smollm2-135m"), 2) == pytest.approx(zeros / matrix_elements("smollm2-135m"))


def test_graphs_keep_logits_workspace_pool_and_kernels_where_steps_are_captured() -> None:
    config = load_size("7B")
    captured = Workload(dtype="bf16", batch_size=16)
    eager = rank_memory(config, 1, replace(captured, eager=True))
    graphs = rank_memory(config, 1, captured)
    static = 16 * (8 + 8 + 2 * config.vocab_size)
    assert graphs.activation_bytes - eager.activation_bytes == static + CUBLAS_BYTES
    kernels = 6 * (32 * 10 + 6) * 65536  # of steps of 1, 2, 4, 8, 12 and 16 rows
    step = graphs.runtime_bytes - eager.runtime_bytes - kernels
    assert 2 * 16 * (4096 + 3 * 11008) <= step <= 2 * 16 * (4 * 4096 + 3 * 11008 + config.vocab_size)
    for without in ({"offload": "cpu"}, {"deterministic": True}, {"device": "cpu"}):
        workload = replace(captured, **without)
        assert rank_memory(config, 1, workload) == rank_memory(config, 1, replace(workload, eager=True))


def test_blocks_that_all_stay_are_captured_as_without_offloading() -> None:
    config, resident = load_size("7B"), Workload(dtype="bf16")
    offloaded = replace(resident, offload="cpu", num_staying=config.num_layers)
    assert rank_memory(config, 1, offloaded) == rank_memory(config, 1, resident)


def test_our_kernels_take_less_than_torchs_operations() -> None:
    config, with_kernels = load_size("7B"), Workload(dtype="fp16", eager=True)
    older = rank_memory(config, 1, replace(with_kernels, has_kernels=False))
    # x, normed x, q, k and v in fp16, beside q and k in fp32, turned in fp32 and turned in fp16; against x beside w13's
    # output and what SwiGLU makes of it.
    rotating, feeding = (2 + 3) * 2 + 2 * (4 + 4 + 2), 1 * 2
    more = 2047 * ((rotating - feeding) * config.dim - 3 * 2 * config.hidden_dim)
    workspaces = CUBLAS_BYTES - OLDER_CUBLAS_BYTES
    assert older.activation_bytes - rank_memory(config, 1, with_kernels).activation_bytes == more - workspaces
