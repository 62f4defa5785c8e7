"""What a short script does to give a Meta folder another number of shards: load all of it, join, cut, save.

    python benchmarks/plain_reshard.py IN OUT MP

The layout is the project's own, so that both write the same tensors; the rest is torch.load and torch.save. It ends
with a sync, as the copy beside it does.
"""

import json
import os
import sys
from pathlib import Path

import torch

from llama_mp.checkpoint.source import as_matrix
from llama_mp.layout import Placement, Shard, global_shapes, shards
from llama_mp.locate import checkpoint_at
from llama_mp.params_json import OWN_KEY, SHARDS_KEY, params_of


def main(source: Path, output: Path, mp: int) -> None:
    checkpoint = checkpoint_at(source)
    config = checkpoint.config
    loaded = [torch.load(file, weights_only=True) for file in checkpoint.files]
    axis = json.loads((source / "params.json").read_text())[OWN_KEY][SHARDS_KEY]["embedding_axis"]
    held = [shards(config, rank, len(loaded), embedding_axis=axis) for rank in range(len(loaded))]
    joined = {name: join(name, shape, held, loaded) for name, shape in global_shapes(config).items()}
    output.mkdir()
    axis = config.embedding_axis if config.dim % mp == 0 else 0
    for rank in range(mp):
        cut = {name: part(shard, joined) for name, shard in shards(config, rank, mp, embedding_axis=axis).items()}
        torch.save(cut, output / f"consolidated.{rank:02d}.pth")
    (output / "params.json").write_text(json.dumps(params_of(config, mp=mp, embedding_axis=axis)))
    os.sync()


def join(
    name: str, shape: tuple[int, ...], held: list[dict[str, Shard]], loaded: list[dict[str, torch.Tensor]]
) -> torch.Tensor:
    """The whole tensor, of all shards."""
    whole = torch.empty(shape, dtype=loaded[0][name].dtype)
    for of_rank, tensors in zip(held, loaded, strict=True):
        for p in of_rank[name].placements:
            as_matrix(whole)[slice(*p.rows), slice(*p.cols)] = placed(tensors[name], p)
    return whole


def part(shard: Shard, joined: dict[str, torch.Tensor]) -> torch.Tensor:
    """What one shard of the output holds, zeros where nothing is placed."""
    whole = joined[shard.name]
    cut = torch.zeros(shard.shape, dtype=whole.dtype)
    for p in shard.placements:
        placed(cut, p).copy_(as_matrix(whole)[slice(*p.rows), slice(*p.cols)])
    return cut


def placed(tensor: torch.Tensor, p: Placement) -> torch.Tensor:
    """The part of a shard's tensor that `p` fills."""
    return as_matrix(tensor)[p.row : p.row + len(p.rows), p.col : p.col + len(p.cols)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
