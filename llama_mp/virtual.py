"""The layout of --deterministic: that of 8 ranks, whatever their number. Fewer play several of these virtual ranks
each, one after another, so that every product has the same factors everywhere."""

import math

from llama_mp.config import ModelConfig
from llama_mp.errors import RequestError
from llama_mp.layout import Shard, fuse, heads_per_rank, padded, shards

VIRTUAL_RANKS = 8
ALIGNMENT = 64  # bytes: as torch aligns a tensor on a CPU


def layout_degree(mp: int, deterministic: bool) -> int:
    """For how many ranks the model is cut when `mp` run it."""
    return VIRTUAL_RANKS if deterministic else mp


def played_by(rank: int, mp: int) -> range:
    """The virtual ranks that `rank` of `mp` plays."""
    return range(rank * VIRTUAL_RANKS // mp, (rank + 1) * VIRTUAL_RANKS // mp)


def virtual_shards(config: ModelConfig, rank: int, mp: int) -> dict[str, Shard]:
    """The parameters of all that `rank` plays, by their names in deterministic.py; vectors, which are alike, once."""
    held = [fuse(shards(config, virtual, VIRTUAL_RANKS)) for virtual in played_by(rank, mp)]
    return {name_among(shard, index): shard for index, own in enumerate(held) for shard in own.values()}


def name_among(shard: Shard, index: int) -> str:
    """layers.0.attention.7.wo.weight for the last of eight layers.0.attention.wo.weight; output.7.weight."""
    if len(shard.shape) == 1:
        return shard.name
    words = shard.name.split(".")
    return ".".join([*words[:-2], str(index), *words[-2:]] if len(words) > 2 else [words[0], str(index), words[1]])


def slot_length(config: ModelConfig, length: int, element_bytes: int) -> int:
    """Positions of a virtual rank's cache that hold `length`, so that each slot is aligned: torch's attention rounds
    otherwise where keys are not."""
    num_kv, _ = heads_per_rank(config, VIRTUAL_RANKS)
    return padded(length, ALIGNMENT // math.gcd(ALIGNMENT, num_kv * config.head_dim * element_bytes))


def degrees(config: ModelConfig, deterministic: bool) -> list[int]:
    """The numbers of ranks that the model can run on."""
    found = range(1, config.num_heads + 1)
    return [mp for mp in found if VIRTUAL_RANKS in found and VIRTUAL_RANKS % mp == 0] if deterministic else list(found)


def check_virtual(config: ModelConfig, mp: int) -> None:
    """Raise RequestError unless `mp` ranks can play the virtual ones."""
    if config.num_heads < VIRTUAL_RANKS:
        raise RequestError(
            f"--deterministic cuts a model into {VIRTUAL_RANKS} parts, and {config.name} has {config.num_heads} "
            "attention heads: leave it out"
        )
    if VIRTUAL_RANKS % mp:
        raise RequestError(
            f"--deterministic over {mp} ranks: the {VIRTUAL_RANKS} parts that it cuts a model into do not divide over "
            "them; use 1, 2, 4 or 8 ranks"
        )
