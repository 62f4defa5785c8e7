"""--deterministic: logits whose bits are the same over 1, 2, 4 and 8 ranks.

The model is always cut for VIRTUAL_RANKS ranks, and each rank plays some of them (virtual.py). So no product, softmax
or sum within a virtual rank knows how many ranks there are: the same numbers in the same shapes, aligned alike since
each parameter and cache is a tensor of its own, on one thread. What the virtual ranks make is added in fp32 and in
pairs, ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), of which a rank does those that it holds.

Nor does anything know what else runs: a prompt goes through in passes of SCORED_CHUNK tokens, whatever is asked of it,
and each row of a batch takes a step of its own.

Shapes as in model.py.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_rank
from torch import nn

from llama_mp.cache import KVCache
from llama_mp.chunks import SCORED_CHUNK
from llama_mp.config import ModelConfig
from llama_mp.kernels import activation_dtype
from llama_mp.layout import padded
from llama_mp.model import (
    Attention,
    ColumnLinear,
    FeedForward,
    RMSNorm,
    Step,
    Transformer,
    build,
    set_precision,
    without_filling,
)
from llama_mp.parallel import all_gather, share
from llama_mp.runner import Runner
from llama_mp.virtual import VIRTUAL_RANKS, played_by, slot_length


def keep_to_one_way(device: torch.device) -> None:
    """Let torch compute on one thread, and on a GPU by algorithms that give the same bits each time."""
    torch.set_num_threads(1)
    if device.type == "cuda":  # on a CPU one thread is enough, and this imports torch's compiler: 2 s and 70 MB a rank
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.utils.deterministic.fill_uninitialized_memory = False  # all that is read has been written
        torch.use_deterministic_algorithms(True)


def go_any_way(device: torch.device, num_threads: int) -> None:
    """End `keep_to_one_way`."""
    torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # torch's default


def total(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum over all virtual ranks, of which `parts` are those that this rank plays, in the type of a part."""
    own = added_in_pairs([part.float() for part in parts])
    return added_in_pairs(all_gather(own)).to(parts[0].dtype)


def added_in_pairs(parts: list[torch.Tensor]) -> torch.Tensor:
    """Neighbours, then neighbouring sums; a power of two of them."""
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


class Rows(nn.Module):
    """The embeddings of one virtual rank, from token `start` on; zeros for the tokens of others."""

    def __init__(self, start: int, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, dim))
        self.start = start

    def forward(self, tokens_N: torch.Tensor) -> torch.Tensor:
        local_N = tokens_N - self.start
        elsewhere_N = (local_N < 0) | (local_N >= len(self.weight))
        return F.embedding(local_N.masked_fill(elsewhere_N, 0), self.weight).masked_fill(elsewhere_N[:, None], 0)


class Block(nn.Module):
    """One of the model's, as `num_played` virtual ranks hold it."""

    def __init__(self, config: ModelConfig, num_played: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = nn.ModuleList(Attention(config, VIRTUAL_RANKS) for _ in range(num_played))
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = nn.ModuleList(FeedForward(config, VIRTUAL_RANKS) for _ in range(num_played))

    def forward(
        self, x_NC: torch.Tensor, step: Step, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """`keys`, `values`: a cache for each virtual rank played."""
        normed_NC, caches = self.attention_norm(x_NC), zip(self.attention, keys, values, strict=True)
        x_NC = x_NC + total([attention(normed_NC, step, own, other) for attention, own, other in caches])
        normed_NC = self.ffn_norm(x_NC)
        return x_NC + total([feed_forward(normed_NC) for feed_forward in self.feed_forward])


class DeterministicTransformer(Transformer):
    """The virtual ranks that one of `mp` ranks plays, in step with each other."""

    def __init__(self, config: ModelConfig, mp: int) -> None:
        nn.Module.__init__(self)  # none of its layers are those of one rank
        played = played_by(get_model_parallel_rank(), mp)
        num_tokens = padded(config.vocab_size, VIRTUAL_RANKS) // VIRTUAL_RANKS
        self.num_played = len(played)
        self.tok_embeddings = nn.ModuleList(Rows(v * num_tokens, num_tokens, config.dim) for v in played)
        self.layers = nn.ModuleList(Block(config, self.num_played) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.ModuleList(ColumnLinear(config.dim, num_tokens) for _ in played)

    def forward(self, tokens_N: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        """Hidden states [N, C] before the last norm. `cache`: as `allocate_cache` makes it."""
        x_NC = self.embedded(tokens_N)
        for index, layer in enumerate(self.layers):
            x_NC = layer(x_NC, step, *self.caches_of(index, cache))
        return x_NC

    def embedded(self, tokens_N: torch.Tensor) -> torch.Tensor:
        x_NC = total([rows(tokens_N) for rows in self.tok_embeddings])
        return x_NC.to(activation_dtype(self.tok_embeddings[0].weight))

    def caches_of(self, layer: int, cache: KVCache) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        own = slice(layer * self.num_played, (layer + 1) * self.num_played)
        return cache.keys[own], cache.values[own]

    def logits(self, x_NC: torch.Tensor) -> torch.Tensor:
        """This rank's part [N, V] of the logits, a row at a time: the last of many is what it would be alone."""
        rows = [self.norm(x_1C) for x_1C in x_NC.split(1)]
        return torch.cat([torch.cat([output(x_1C) for output in self.output], dim=-1) for x_1C in rows])


class DeterministicRunner(Runner):
    """Each token goes through in a pass that its own prompt, and its place in it, decide alone."""

    def prefill(self, tokens: Sequence[int], *, slot: int, start: int, all_logits: bool) -> torch.Tensor | None:
        found = []
        for first in range(0, len(tokens), SCORED_CHUNK):
            chunk = tokens[first : first + SCORED_CHUNK]
            logits = super().prefill(chunk, slot=slot, start=start + first, all_logits=all_logits)
            found = [*found, logits] if all_logits else [logits]
        return None if found[0] is None else torch.cat(found)

    def decode(self, positions: Sequence[int]) -> torch.Tensor | None:
        rows = zip(share(self.tokens_S[: len(positions)]).tolist(), positions, strict=True)
        found = [self.prefill([token], slot=i, start=at, all_logits=False) for i, (token, at) in enumerate(rows)]
        return None if found[0] is None else torch.cat(found)


def build_deterministic(
    config: ModelConfig, mp: int, quant: str = "none", precision: torch.dtype = torch.float32
) -> DeterministicTransformer:
    """This rank's model without weights: those of `virtual_shards`."""
    assert quant == "none", quant
    with torch.device("meta"), without_filling():
        model = DeterministicTransformer(config, mp).eval().requires_grad_(False)
    set_precision(model, precision)
    return model


def allocate_cache(
    config: ModelConfig, mp: int, *, num_slots: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """A cache for each virtual rank that a rank plays, layer by layer."""
    apart = replace(config, num_layers=config.num_layers * VIRTUAL_RANKS // mp)
    length = slot_length(config, max_seq_len, dtype.itemsize)
    shape = {"num_slots": num_slots, "max_seq_len": length}
    cache = KVCache.allocate(apart, VIRTUAL_RANKS, **shape, dtype=dtype, device=device)
    keys, values = ([held[:, :max_seq_len] for held in kind] for kind in (cache.keys, cache.values))
    return KVCache(keys=keys, values=values)


class Mode(NamedTuple):
    """What a run is made of. `build`, `allocate`: as model.build and KVCache.allocate."""

    build: Callable[[ModelConfig, int, str, torch.dtype], Transformer]
    allocate: Callable[..., KVCache]
    runner: type[Runner]


ORDINARY = Mode(build, KVCache.allocate, Runner)
DETERMINISTIC = Mode(build_deterministic, allocate_cache, DeterministicRunner)
