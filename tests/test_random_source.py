"""Random weights: the same model at every degree, finite at every depth, and only a rank's own share of it."""

from dataclasses import replace

import pytest
import torch
from factory import MODELS

from llama_mp.checkpoint.load import load_shards, open_source
from llama_mp.checkpoint.random import TABLE_LENGTH, RandomSource
from llama_mp.checkpoint.source import Source, check_tensors
from llama_mp.config import ModelConfig, RunConfig, load_size, size_names
from llama_mp.layout import Span, global_shapes, shards
from llama_mp.locate import random_checkpoint

CPU = torch.device("cpu")


def loaded(source: Source, config: ModelConfig, rank: int, mp: int) -> dict[str, torch.Tensor]:
    return dict(load_shards(shards(config, rank, mp), source, dtype=torch.float32, device=CPU))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mp", [2, 3, 8])
def test_the_model_is_the_same_at_every_degree(name: str, mp: int) -> None:
    config = MODELS[name]
    whole = loaded(RandomSource(config, CPU), config, 0, 1)
    for rank in range(mp):
        for name, part in loaded(RandomSource(config, CPU), config, rank, mp).items():
            for p in shards(config, rank, mp)[name].placements:
                held = part.view(len(part), -1)[p.row : p.row + len(p.rows), p.col : p.col + len(p.cols)]
                assert torch.equal(held, whole[name].view(len(whole[name]), -1)[slice(*p.rows), slice(*p.cols)]), name


def test_values_are_spread_evenly_within_their_bounds_and_rows_differ() -> None:
    config = load_size("smollm2-135m")
    matrix = RandomSource(config, CPU).read("layers.0.feed_forward.w2.weight", Span(0, 576), Span(0, 1536)).float()
    scaled = matrix * 1536**0.5
    assert scaled.abs().max() <= 1.01
    assert abs(scaled.mean()) < 0.01 and abs(scaled.std() - 3**-0.5) < 0.01
    assert len(matrix.unique(dim=0)) == 576
    products = torch.corrcoef(matrix).fill_diagonal_(0)
    assert products.abs().max() < 0.3  # rows whose windows overlap are shifted, and not alike


def test_two_tensors_of_one_shape_differ_and_norms_are_ones() -> None:
    source = RandomSource(MODELS["gqa"], CPU)
    first, second = (source.read(f"layers.{i}.attention.wq.weight", Span(0, 8), Span(0, 8)) for i in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(source.read("norm.weight", Span(0, 8), Span(0, 1)), torch.ones(8, dtype=torch.bfloat16))


@pytest.mark.parametrize("size", size_names())
def test_every_size_has_a_place_for_each_row_and_a_checked_set_of_tensors(size: str) -> None:
    checkpoint = random_checkpoint(RunConfig(size=size))
    source = open_source(checkpoint)
    check_tensors(checkpoint, source)
    for name, shape in global_shapes(source.config).items():
        corner = source.read(name, Span(shape[0] - 1, shape[0]), Span(0, shape[1] if len(shape) == 2 else 1))
        assert torch.isfinite(corner).all() and corner.numel() < TABLE_LENGTH


def test_a_rank_makes_its_own_share_alone() -> None:
    config = replace(load_size("smollm2-135m"), num_layers=2)
    read = []
    for mp in (1, 3):
        source = RandomSource(config, CPU)
        loaded(source, config, 0, mp)
        read.append(source.bytes_read)
    assert read[1] < 0.35 * read[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device answers")
def test_a_gpu_makes_the_same_weights() -> None:
    name, rows, cols = "layers.79.feed_forward.w2.weight", Span(8000, 8192), Span(11, 22016)
    here, there = (
        RandomSource(load_size("65B"), torch.device(kind)).read(name, rows, cols) for kind in ("cpu", "cuda")
    )
    assert torch.equal(here, there.cpu())
