"""Open a checkpoint of any format, and fill one rank's parameters from it: each rank reads its own pieces alone."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from llama_mp.checkpoint.gguf import GGUFSource
from llama_mp.checkpoint.hf import HFSource
from llama_mp.checkpoint.meta import MetaSource
from llama_mp.checkpoint.random import RandomSource
from llama_mp.checkpoint.source import Source, as_matrix, check_tensors
from llama_mp.chunks import LOAD_ELEMENTS
from llama_mp.layout import Shard, row_chunks
from llama_mp.locate import Checkpoint

CPU = torch.device("cpu")
Transform = Callable[[Shard, torch.Tensor], torch.Tensor]  # of a filled parameter, into what is held of it
SOURCES = {"meta": MetaSource, "hf": HFSource, "gguf": GGUFSource}


def open_source(checkpoint: Checkpoint, device: torch.device = CPU) -> Source:
    """The checkpoint's header read and checked against its architecture; no weight is read yet. Random weights are made
    on `device`.

    Raises RequestError for files that are not whole, and for missing, unknown or wrongly shaped tensors."""
    if checkpoint.kind == "random":
        return RandomSource(checkpoint.config, device)
    source = SOURCES[checkpoint.kind](checkpoint)
    check_tensors(checkpoint, source)
    return source


def load_shards(
    shards: Mapping[str, Shard],
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    transform: Transform = lambda _, parameter: parameter,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter of `shards`, by name, on `device` in `dtype`, zeros where no placement is; then transformed,
    before the next one is read."""
    for name, shard in shards.items():
        yield name, transform(shard, load_shard(shard, source, dtype=dtype, device=device))


def load_shard(shard: Shard, source: Source, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    make = torch.zeros if shard.is_padded else torch.empty
    parameter = make(shard.shape, dtype=dtype, device=device)
    matrix = as_matrix(parameter)
    num_filled = 0
    for placement in shard.placements:
        for rows in row_chunks(placement.rows, len(placement.cols), LOAD_ELEMENTS):
            part = source.read(placement.source, rows, placement.cols)
            row = placement.row + rows.start - placement.rows.start
            target = matrix[row : row + len(rows), placement.col : placement.col + len(placement.cols)]
            target.copy_(as_matrix(part))
            num_filled += part.numel()
    # Placements do not overlap, so the count proves that every element was filled, or is padding made zero above.
    assert num_filled == shard.num_placed, f"{shard.name}: {num_filled} of {shard.num_placed} elements filled"
    return parameter


def not_finite(shard: Shard, parameter: torch.Tensor, most: float = math.inf) -> list[str]:
    """The checkpoint's tensors whose part in `parameter` holds NaN, infinity, or a magnitude above `most`, in the
    parameter's own type.

    The logits alone do not tell: torch's attention on a CPU makes zeros of scores that are NaN."""
    if is_finite(parameter, most):
        return []
    matrix = as_matrix(parameter)
    parts = {p: matrix[p.row : p.row + len(p.rows), p.col : p.col + len(p.cols)] for p in shard.placements}
    return list(dict.fromkeys(p.source for p, part in parts.items() if not is_finite(part, most)))


def is_finite(tensor: torch.Tensor, most: float = math.inf) -> bool:
    """Extremes take over NaN, at the speed of memory; on a CPU isfinite().all() takes thirty times as long."""
    if tensor.numel() == 0:
        return True
    return all(math.isfinite(extreme) and abs(extreme) <= most for extreme in map(torch.Tensor.item, tensor.aminmax()))
