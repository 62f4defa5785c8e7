"""How many bytes a rank holds: sums over the placements that loading uses. No formula of its own."""

from llama_mp.config import ModelConfig
from llama_mp.layout import heads_per_rank, shards

BYTES_PER_ELEMENT = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}


def weight_bytes(config: ModelConfig, rank: int, mp: int, dtype: str) -> int:
    """Bytes of the parameters of `rank`, zeros of the padding included; tied embeddings are held once."""
    return sum(shard.num_elements for shard in shards(config, rank, mp).values()) * BYTES_PER_ELEMENT[dtype]


def kv_cache_bytes(config: ModelConfig, mp: int, dtype: str, *, batch_size: int, seq_len: int) -> int:
    """Bytes of one rank's keys and values: 2 x layers x batch x length x local KV heads x head_dim x bytes."""
    num_kv, _ = heads_per_rank(config, mp)
    elements = 2 * config.num_layers * batch_size * seq_len * num_kv * config.head_dim
    return elements * BYTES_PER_ELEMENT[dtype]


def padding_share(config: ModelConfig, mp: int) -> float:
    """Zeros and repeated KV heads over all ranks, as a share of the model's own matrix elements (norms aside)."""
    matrices = [shard for rank in range(mp) for shard in shards(config, rank, mp).values() if len(shard.shape) == 2]
    own = sum(shard.num_elements for shard in shards(config, 0, 1).values() if len(shard.shape) == 2)
    return sum(shard.num_elements for shard in matrices) / own - 1
