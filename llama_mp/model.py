"""The LLaMA transformer on fairscale's parallel layers, one rank's part of it.

Shape suffixes: B rows, T tokens of a row, N = B x T tokens, H query heads, K KV heads, G = H / K, D head dimension,
L positions attended, C model dimension, F hidden dimension, V vocabulary; H, K, F and V are this rank's share.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import nn

from llama_mp import cuda
from llama_mp.cache import KVCache
from llama_mp.causal import attend_causally
from llama_mp.config import ModelConfig
from llama_mp.fused import (
    Half,
    add_and_norm,
    attend,
    attends,
    attention_half,
    feed_forward_half,
    for_rows,
    gated,
    half_of,
    rms_norm,
    suits,
    swiglu,
)
from llama_mp.kernels import activation_dtype, few_rows
from llama_mp.layers import ColumnLinear, Embedding, RowLinear
from llama_mp.layout import heads_per_rank, padded
from llama_mp.memory import hidden_unit
from llama_mp.parallel import reduce
from llama_mp.quant import empty_packed
from llama_mp.rope import rotate


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where the N tokens of one forward pass stand: in the batch, in the cache, in their texts."""

    batch_size: int
    slots_N: torch.Tensor
    positions_N: torch.Tensor
    rotations_N1d: torch.Tensor
    attended_slots: slice  # the slots of the B rows
    length: int  # positions attended
    mask: torch.Tensor | None  # what each token may see, broadcast to [B, H, T, L]; None: everything, or as below
    is_causal: bool = False  # each token sees itself and those before; on a CPU T = L, and else a mask says so


class RMSNorm(nn.Module):
    """Root mean square layer normalization (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta, and its norm. x may be overwritten."""
        return add_and_norm(x, delta, self.weight, self.eps)

    def before(self, column: ColumnLinear, x: torch.Tensor) -> torch.Tensor:
        """`column` of the normed x; by one kernel where `cuda.suits_one` says so."""
        if cuda.suits_one(x, column.weight):
            return cuda.product(x, column.weight, norm=(self.weight, self.eps))
        return column(self(x))


class Attention(nn.Module):
    """What one rank of `mp` adds to the sum over all."""

    def __init__(self, config: ModelConfig, mp: int) -> None:
        super().__init__()
        self.num_kv_heads, self.num_heads = heads_per_rank(config, mp)
        self.head_dim = config.head_dim
        num_fused = self.num_heads + 2 * self.num_kv_heads
        self.wqkv = ColumnLinear(config.dim, num_fused * config.head_dim)
        self.wo = RowLinear(self.num_heads * config.head_dim, config.dim)

    def forward(self, x_NC: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`keys`, `values`: this layer's cache [slots, positions, K, D]; the tokens' own are written first."""
        return self.wo(self.attend(self.wqkv(x_NC), step, keys, values))

    def attend(self, heads_NE: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What wo is multiplied with, of what wqkv made."""
        heads_NHD = heads_NE.unflatten(-1, (-1, self.head_dim))
        is_one_each = len(heads_NE) == step.batch_size
        if is_one_each and attends(heads_NE, keys):
            slots = step.attended_slots
            y_NHD = attend(heads_NHD, step.rotations_N1d, keys[slots], values[slots], step.positions_N)
            return y_NHD.flatten(1)
        q_NHD = self.store(heads_NHD, step, keys, values)
        k_BKLD = keys[step.attended_slots, : step.length].transpose(1, 2)
        v_BKLD = values[step.attended_slots, : step.length].transpose(1, 2)
        y_NHD = (self.attend_one if is_one_each else self.attend_many)(q_NHD, k_BKLD, v_BKLD, step)
        return y_NHD.flatten(1)

    def store(self, heads_NHD: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The tokens' keys and values into the cache, and their queries, all but the values turned: [N, H, D]. Kernels
        for a GPU overwrite `heads_NHD`."""
        if kernels := for_rows(heads_NHD):
            slots = step.attended_slots
            cache = keys[slots], values[slots], step.positions_N
            return kernels.rotate_and_store(heads_NHD, step.rotations_N1d, *cache, self.num_heads)
        qk_NHD, v_NKD = heads_NHD.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        q_NHD, k_NKD = rotate(qk_NHD, step.rotations_N1d).split([self.num_heads, self.num_kv_heads], dim=1)
        keys[step.slots_N, step.positions_N] = k_NKD.to(keys.dtype)
        values[step.slots_N, step.positions_N] = v_NKD.to(values.dtype)
        return q_NHD

    def attend_one(self, q_NHD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, step: Step) -> torch.Tensor:
        """One token a row: the G query heads that share a KV head stand where a sequence would, in the type of the
        cache, so that none of it is copied."""
        q_BKGD = q_NHD.unflatten(1, (self.num_kv_heads, -1)).to(k_BKLD.dtype)
        y_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BKLD, v_BKLD, attn_mask=step.mask)
        return y_BKGD.flatten(1, 2).to(q_NHD.dtype)

    def attend_many(self, q_NHD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, step: Step) -> torch.Tensor:
        """T tokens a row: on a CPU keys and values are repeated for each query head."""
        group = self.num_heads // self.num_kv_heads
        q_BHTD = q_NHD.unflatten(0, (step.batch_size, -1)).transpose(1, 2)
        if q_NHD.device.type == "cuda":
            return attend_causally(q_BHTD, k_BKLD, v_BKLD).transpose(1, 2).flatten(0, 1)
        k_BKLD, v_BKLD = k_BKLD.to(q_NHD.dtype), v_BKLD.to(q_NHD.dtype)
        if group > 1:
            k_BKLD, v_BKLD = (x.repeat_interleave(group, dim=1) for x in (k_BKLD, v_BKLD))
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BKLD, v_BKLD, attn_mask=step.mask, is_causal=step.is_causal)
        return y_BHTD.transpose(1, 2).flatten(0, 1)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x), the gate w1 and the up projection w3 in one matrix.

    What one rank of `mp` adds to the sum over all."""

    def __init__(self, config: ModelConfig, mp: int) -> None:
        super().__init__()
        self.hidden_dim = padded(config.hidden_dim, mp) // mp
        self.w13 = ColumnLinear(config.dim, 2 * self.hidden_dim)
        self.w2 = RowLinear(self.hidden_dim, config.dim)

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        return self.w2(gated(x_NC, self.w13.weight, self.w13.precision))

    def hidden(self, x_NC: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """What w2 is multiplied with, of x that is yet to be normed."""
        if cuda.suits_one(x_NC, self.w13.weight):
            return cuda.product(x_NC, self.w13.weight, norm=(norm.weight, norm.eps), is_gated=True)
        return swiglu(norm.before(self.w13, x_NC))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, mp: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, mp)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config, mp)
        self.known: Callable[[], torch.Tensor | None] = lambda: None  # the weight for which `halves` were taken down
        self.made: tuple[Half, Half] | None = None

    def forward(self, x_NC: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if cuda.steps_on(x_NC.device):
            if len(x_NC) == 1 or self.attention.wo.adds(x_NC):
                return self.on_cuda(x_NC, step, keys, values)
        elif self.is_step_of_few(x_NC, step) and suits(x_NC, keys) and (halves := self.halves()):
            return self.in_two_calls(halves, x_NC, step, keys[step.attended_slots], values[step.attended_slots])
        attended_NC = reduce(self.attention(self.attention_norm(x_NC), step, keys, values))
        x_NC, normed_NC = self.ffn_norm.of_sum(x_NC, attended_NC)
        del attended_NC  # a pass over a prompt is planned without it
        return x_NC.add_(reduce(self.feed_forward(normed_NC)))

    def is_step_of_few(self, x_NC: torch.Tensor, step: Step) -> bool:
        """Whether there is a token a row, and so few of them as the products of a half take."""
        column = self.attention.wqkv
        return len(x_NC) == step.batch_size <= few_rows(column.weight.dtype, column.precision)

    def on_cuda(self, x_NC: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """On a GPU what lies around a product is done by the kernel of the product, where it can."""
        attention, feed_forward = self.attention, self.feed_forward
        attended_NE = attention.attend(self.attention_norm.before(attention.wqkv, x_NC), step, keys, values)
        x_NC = attention.wo.added_to(x_NC, attended_NE)
        del attended_NE  # a pass over a prompt is planned without it
        return feed_forward.w2.added_to(x_NC, feed_forward.hidden(x_NC, self.ffn_norm))

    def in_two_calls(
        self, halves: tuple[Half, Half], x_NC: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """One token a row on a CPU: the same as `forward`, to the bit."""
        attending, feeding = halves
        num_heads, positions_N = self.attention.num_heads, step.positions_N
        attended_NC = attention_half(attending, x_NC, step.rotations_N1d, keys, values, positions_N, num_heads)
        x_NC = x_NC + reduce(attended_NC)
        return x_NC + reduce(feed_forward_half(feeding, x_NC))

    def halves(self) -> tuple[Half, Half] | None:
        """What the calls need to know of the weights, taken down once; None where the kernels do not take them."""
        if self.known() is not self.attention.wqkv.weight:
            attention, feed_forward = self.attention, self.feed_forward
            width = attention.num_heads * attention.head_dim
            pairs = (
                (self.attention_norm, attention.wqkv.weight, attention.wo.weight, width),
                (self.ffn_norm, feed_forward.w13.weight, feed_forward.w2.weight, feed_forward.hidden_dim),
            )
            precision = attention.wqkv.precision
            made = tuple(half_of(norm.weight, norm.eps, *weights, precision) for norm, *weights in pairs)
            self.known, self.made = weakref.ref(attention.wqkv.weight), None if None in made else made
        return self.made


class Transformer(nn.Module):
    """Built on the meta device; the parameters come from `load_shards` by assignment."""

    def __init__(self, config: ModelConfig, mp: int) -> None:
        super().__init__()
        vocab_size = padded(config.vocab_size, mp)
        self.tok_embeddings = Embedding(vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, mp) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = ColumnLinear(config.dim, vocab_size // mp)

    def forward(self, tokens_N: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        """Hidden states [N, C] before the last norm."""
        x_NC = self.tok_embeddings(tokens_N).to(activation_dtype(self.tok_embeddings.weight))
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x_NC = layer(x_NC, step, keys, values)
        return x_NC

    def logits(self, x_NC: torch.Tensor) -> torch.Tensor:
        """This rank's part [N, V] of the logits."""
        return self.norm.before(self.output, x_NC)


@contextlib.contextmanager
def without_filling() -> Iterator[None]:
    """fairscale fills each weight with random numbers. On the meta device, where there is nothing to fill, that would
    import torch's compiler: 2 s and 70 MB of each rank."""
    fill_weight = fairscale_layers._initialize_affine_weight
    fairscale_layers._initialize_affine_weight = lambda *_, **__: None
    try:
        yield
    finally:
        fairscale_layers._initialize_affine_weight = fill_weight


def build(config: ModelConfig, mp: int, quant: str = "none", precision: torch.dtype = torch.float32) -> Transformer:
    """The rank's model without weights, for a run in `precision`."""
    config = replace(config, hidden_dim=padded(config.hidden_dim, hidden_unit(quant) * mp))
    with torch.device("meta"), without_filling():
        model = Transformer(config, mp).eval().requires_grad_(False)
    for module in model.modules():
        is_tied = module is model.output and config.tied_embeddings
        if quant != "none" and isinstance(module, ColumnLinear | RowLinear) and not is_tied:
            module.weight = nn.Parameter(empty_packed(module.weight, quant), requires_grad=False)
    set_precision(model, precision)
    return model


def set_precision(model: nn.Module, precision: torch.dtype) -> None:
    """Tell the products of `model` what they may round to."""
    for module in model.modules():
        if isinstance(module, ColumnLinear | RowLinear):
            module.precision = precision


def fill(model: Transformer, parameters: dict[str, torch.Tensor]) -> None:
    """Give `model` its weights, every one of them. Tied embeddings serve as the output matrix too."""
    tied = {name.replace("tok_embeddings", "output"): p for name, p in parameters.items() if name.startswith("tok_")}
    model.load_state_dict(tied | parameters, strict=True, assign=True)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"{len(left)} parameters without weights: {left[:3]}"
