"""Planned bytes against the bytes of what is really made."""

from pathlib import Path

import pytest
import torch
from factory import MODELS, checkpoint, random_tensors, write_meta

from llama_mp.cache import KVCache
from llama_mp.checkpoint.load import load_shards, open_source
from llama_mp.config import load_size, size_names
from llama_mp.layout import fuse, shards
from llama_mp.memory import BYTES_PER_ELEMENT, kv_cache_bytes, padding_share, weight_bytes

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
