"""Keys and values of the tokens seen, in slots: one row of the batch each, sized by the request.

S slots, L positions, K KV heads of this rank, D head dimension.
"""

from dataclasses import dataclass

import torch

from llama_mp.config import ModelConfig
from llama_mp.layout import heads_per_rank


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """`keys[layer]` and `values[layer]` are [S, L, K, D]; a slot's positions fill up from 0."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def allocate(
        cls, config: ModelConfig, mp: int, *, num_slots: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        num_kv, _ = heads_per_rank(config, mp)
        shape = (num_slots, max_seq_len, num_kv, config.head_dim)
        # Zeros, not empty: masked positions of a shorter row are multiplied by 0, and 0 x NaN is NaN.
        make = [[torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)] for _ in "kv"]
        return cls(keys=make[0], values=make[1])

    @property
    def num_slots(self) -> int:
        return self.keys[0].shape[0]

    @property
    def max_seq_len(self) -> int:
        return self.keys[0].shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(held.nbytes for held in (*self.keys, *self.values))

    def grow(self, max_seq_len: int) -> None:
        """Have `max_seq_len` positions, the first of which hold what they held. One tensor after the other is replaced:
        beside the larger cache there is one of the smaller ones at most."""
        for kind in (self.keys, self.values):
            for layer, held in enumerate(kind):
                kind[layer] = lengthened(held, max_seq_len)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        for held in (*self.keys, *self.values):
            held[target, :length] = held[source, :length]


def lengthened(held: torch.Tensor, max_seq_len: int) -> torch.Tensor:
    """`held`, [S, L, K, D], in `max_seq_len` positions, zeros in those that are new."""
    num_slots, length, *head = held.shape
    longer = held.new_zeros(num_slots, max_seq_len, *head)
    longer[:, :length] = held
    return longer
