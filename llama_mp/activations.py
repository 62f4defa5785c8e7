"""Bytes that the passes hold beside weights and cache, at their peak: what model.py and sampling.py keep alive at once.

Letters as in model.py: N tokens of a pass, L positions attended, C model dimension, H query heads, K KV heads, D head
dimension, F hidden dimension, V vocabulary; H, K and F are this rank's share; e bytes an element. On a CPU activations
are fp32 whatever the weights are (kernels.py). A GPU of compute capability 8.0 or later runs kernels of our own between
the products (cuda_elementwise.py) and flash attention (causal.py); an older one torch's operations.
"""

from typing import NamedTuple

from llama_mp.chunks import PRODUCT_BYTES, PRODUCT_ROWS, batch_sizes
from llama_mp.config import ModelConfig
from llama_mp.cores import fast_bf16
from llama_mp.layout import heads_per_rank, padded
from llama_mp.workload import BYTES_PER_ELEMENT

BF16, FP32, INT64, COMPLEX64 = 2, 4, 8, 8
ALIGNMENT = 16  # bytes: torch's kernels of attention take heads of whole ones on a GPU
# What a captured kernel takes of a GPU's memory, and how many there are in a block: estimates, by figures that others
# saw; no measurement of ours stands behind them yet.
CAPTURED_KERNEL_BYTES, KERNELS_PER_BLOCK, KERNELS_AROUND = 64 << 10, 10, 6


class Sizes(NamedTuple):
    """What one rank computes with; `e` bytes an element, `c` one of the cache."""

    C: int
    H: int
    K: int
    D: int
    F: int
    V: int  # of all ranks together, padding included
    mp: int
    e: int
    c: int
    on_cpu: bool
    has_kernels: bool  # a GPU that runs our own
    quant: str  # of the matrices
    dtype: str  # of the run, as --dtype names it

    @property
    def has_flash(self) -> bool:
        return self.has_kernels and self.e < FP32

    @property
    def filled_head(self) -> int:
        """Elements of a head as torch's kernels of attention take it."""
        return self.D if self.on_cpu else padded(self.D, ALIGNMENT // self.e)

    @property
    def rounds(self) -> bool:
        """Whether a CPU rounds the factors of many rows to bf16 (kernels.rounds)."""
        return self.on_cpu and self.dtype == "bf16" and fast_bf16() is not None

    @property
    def by_torch(self) -> bool:
        """Whether a CPU leaves the products of many rows to torch: with weights in fp16, and where it multiplies
        tiles of bf16."""
        in_tiles = self.rounds and fast_bf16() == "torch"
        return self.on_cpu and (in_tiles or (self.dtype == "fp16" and self.quant == "none"))

    def product(self, num_tokens: int, num_in: int, num_out: int) -> int:
        """Bytes beside the input of a product, its output among them (kernels.linear). On a CPU with a compiler the
        input is turned, and rounded where bf16 is faster. torch's products have weights of their own type, and the
        output in bf16 for a moment; or some of the weight's rows at a time, and what they make."""
        output, factor = num_tokens * num_out * self.e, num_tokens * num_in * (BF16 if self.rounds else FP32)
        if not self.on_cpu:
            return output + self.unpacked(num_in, num_out)
        if not self.by_torch:
            return output + factor
        if self.rounds and self.quant == "none":
            return num_tokens * num_out * BF16 + max(factor, output)
        rounded, size = (factor, BF16) if self.rounds else (0, FP32)
        num_rows = min(num_out, max(1, PRODUCT_BYTES["cpu"] // size // num_in))
        return output + rounded + num_rows * (num_in + num_tokens) * size

    def unpacked(self, num_in: int, num_out: int) -> int:
        """Of packed weights some rows at a time, as a GPU multiplies with them; of int4 beside them the codes of half a
        row's weights, a byte each, and its scales and offsets in fp32."""
        if self.quant == "none":
            return 0
        unit = PRODUCT_ROWS["cuda"]
        num_rows = min(num_out, max(1, PRODUCT_BYTES["cuda"] // self.e // (num_in * unit)) * unit)
        on_the_way = num_in // 2 + num_in // 4 if self.quant == "int4" else 0
        return num_rows * (num_in * self.e + on_the_way)


def sizes_of(
    config: ModelConfig,
    mp: int,
    dtype: str,
    hidden_unit: int = 1,
    *,
    on_cpu: bool = False,
    has_kernels: bool = True,
    quant: str = "none",
) -> Sizes:
    """`dtype` of the weights and the cache, and, but on a CPU, of the activations."""
    num_kv, num_queries = heads_per_rank(config, mp)
    element_bytes = BYTES_PER_ELEMENT[dtype]
    return Sizes(
        C=config.dim,
        H=num_queries,
        K=num_kv,
        D=config.head_dim,
        F=padded(config.hidden_dim, mp * hidden_unit) // mp,
        V=padded(config.vocab_size, mp),
        mp=mp,
        e=FP32 if on_cpu else element_bytes,
        c=element_bytes,
        on_cpu=on_cpu,
        has_kernels=has_kernels and not on_cpu,
        quant=quant,
        dtype=dtype,
    )


def rotation_bytes(config: ModelConfig, length: int) -> int:
    """The table of rotations that a run keeps: complex64 [L, D / 2]."""
    return length * config.head_dim // 2 * COMPLEX64


def prefill_bytes(s: Sizes, num_tokens: int, length: int) -> int:
    """A pass over `num_tokens` tokens of one row, the last of them at position `length` - 1.

    On a CPU, from the second pass on, a mask says what each token sees: bool [N, L], of which the kernels of attention
    make numbers of type e. Keys and values are made of type e there where the cache is not, and repeated for each query
    head where several share one."""
    if not s.on_cpu:
        attend = causal_bytes(s, num_tokens, length)
        return max(block_bytes(s, num_tokens, attend), num_tokens * s.C * s.e + choice_bytes(s, 1))
    mask = num_tokens * length if length > num_tokens else 0
    widened = 2 * s.K * length * s.D * s.e if s.c < s.e else 0
    attend = mask * s.e + num_tokens * s.H * s.D * s.e
    if s.H > s.K:  # what is repeated is let go then
        attend = 2 * s.H * length * s.D * s.e + max(widened, attend)
    else:
        attend += widened
    return mask + max(block_bytes(s, num_tokens, attend), num_tokens * s.C * s.e + choice_bytes(s, 1))


def causal_bytes(s: Sizes, num_tokens: int, length: int) -> int:
    """What causal.py makes beside q, k and v: its result and, by flash attention, the logarithm of each sum, in fp32;
    by the other kernel keys and values for each query head, where several share one. Heads that are no whole ones of
    ALIGNMENT bytes are filled up first, and cut again in the end."""
    head, num_kv = s.filled_head, s.K if s.has_flash else s.H
    repeated = 2 * s.H * length * s.D * s.e if num_kv > s.K else 0
    filled = (num_tokens * s.H + 2 * num_kv * length) * head * s.e if head > s.D else 0
    made = num_tokens * s.H * (head * s.e + (FP32 if s.has_flash else 0))
    if not filled:
        return repeated + made
    return max(filled + max(repeated, made), num_tokens * s.H * (head + s.D) * s.e)


def decode_bytes(s: Sizes, batch_size: int, length: int) -> int:
    """A step of one token for each row. Rows of different lengths have a mask; no keys or values are copied."""
    mask = batch_size * length if batch_size > 1 and not s.has_kernels else 0
    attend = mask * s.e + batch_size * s.H * s.D * s.e
    return mask + max(block_bytes(s, batch_size, attend), batch_size * s.C * s.e + choice_bytes(s, batch_size))


def static_bytes(s: Sizes, num_slots: int) -> int:
    """What captured steps read and write at addresses that stay: token, position and logits of each slot."""
    return num_slots * (INT64 + INT64 + s.V * s.e)


def captured_bytes(s: Sizes, num_layers: int, num_slots: int) -> int:
    """What captured steps keep beside: the memory that the largest of them computes in, which no other pass gets, and
    the kernels of a graph for each of `batch_sizes`."""
    logits = num_slots * s.V * s.e
    gathering = logits // s.mp + 2 * logits if s.mp > 1 else logits
    pool = max(block_bytes(s, num_slots, num_slots * s.H * s.D * s.e), num_slots * s.C * s.e + gathering)
    return (
        pool + len(batch_sizes(num_slots)) * (num_layers * KERNELS_PER_BLOCK + KERNELS_AROUND) * CAPTURED_KERNEL_BYTES
    )


def sums_bytes(s: Sizes, num_tokens: int, num_parts: int) -> int:
    """Beside a pass, where a rank adds up `num_parts` parts in pairs, in fp32, and then the sums of all ranks: what is
    added, and the sums of two rounds."""
    own, others = (count + count // 2 + count // 4 for count in (num_parts, s.mp))
    num_sums = own if s.mp == 1 else max(own, num_parts + others)
    return num_sums * num_tokens * s.C * FP32


def block_bytes(s: Sizes, num_tokens: int, attend: int) -> int:
    """The most that one block holds: where q and k are rotated, in attention (`attend`), behind it, or in the
    feed-forward part.

    Around each, the block's input, x after attention and the normed x are alive: C each; kernels add to x in place.
    Over several ranks the last sum, C, may be let go late by the thread that made it.
    Rotation: q, k, v, (H + 2K) D; of q and k an fp32 copy (where e is less), the complex product, the result; kernels
    turn q where it is and k on its way to the cache.
    Behind attention: its output H D and wo's C.
    Feed-forward: w13's output 2F, of which SwiGLU makes F, by torch's operations on a GPU by way of silu(gate); our own
    products on a CPU make F at once. Then that F and w2's C."""
    N, qk, fused = num_tokens, (s.H + s.K) * s.D, (s.H + 2 * s.K) * s.D
    heads = N * fused * s.e
    rotated = 0 if s.has_kernels else N * qk * s.e
    rotate = 0 if s.has_kernels else N * qk * (FP32 if s.e == FP32 else FP32 + FP32 + s.e)
    behind = N * s.H * s.D * s.e + s.product(N, s.H * s.D, s.C)
    if s.has_kernels and s.mp == 1 and s.quant == "none":
        # Products add to x themselves, and the normed x ends with the product that it is for.
        return N * s.C * s.e + max(N * (s.C + 2 * s.F) * s.e, N * 3 * s.F * s.e, N * s.C * s.e + heads, heads + attend)
    attention = 2 * N * s.C * s.e + max(s.product(N, s.C, fused), heads + rotate, behind)
    if s.on_cpu and not s.by_torch:
        hidden = s.product(N, s.C, s.F)
    else:
        hidden = max(s.product(N, s.C, 2 * s.F), N * (3 if s.by_torch or s.has_kernels else 4) * s.F * s.e)
    down = N * s.F * s.e + s.product(N, s.F, s.C)
    num_kept = 2 if s.has_kernels else 3
    feed_forward = num_kept * N * s.C * s.e + max(hidden, down)
    attending = 2 * N * s.C * s.e + heads + rotated + attend
    late = N * s.C * s.e if s.mp > 1 else 0
    return max(attention, feed_forward, attending) + late


def choice_bytes(s: Sizes, batch_size: int) -> int:
    """Rank 0's logits, and what sampling makes of them where it has to sort them all.

    Logits, in type e: this rank's part, the parts received, and all joined. For each of them `sample` holds an fp32
    copy (where e is less), and `_draw` at its peak nine numbers of 8 bytes and a bool."""
    num_logits = batch_size * s.V
    gathering = num_logits * s.e // s.mp + 2 * num_logits * s.e if s.mp > 1 else 0
    drawing = num_logits * (s.e + (FP32 if s.e < FP32 else 0) + 9 * INT64 + 1)
    return max(gathering, drawing)
