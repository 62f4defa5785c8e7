"""What lies between the products of many rows on a GPU, in Triton: each step reads and writes its rows once.

For 2048 tokens of 7B in bf16 these steps of a block move 0.3 GB, 0.1 ms at an H100's rate, beside 1.3 ms of products;
torch's operations, which pass over the rows for each sign of a formula, move three times as much.

Imported only where `cuda.steps_on` says so: Triton may be missing. Shapes as in model.py.
"""

import torch
import triton
import triton.language as tl

# Elements of a row that one program takes: 16 for each of its 128 threads, two loads of 16 bytes in half precision.
# Small programs, so that many find room on a multiprocessor, and their loads are on the way together.
BLOCK, WARPS = 2048, 4
NORM_ELEMENTS_PER_WARP = 256  # a norm needs its whole row in one program: 8 for each thread, 16 bytes
MOST_WARPS = 32


@triton.jit
def rotate_and_store_kernel(
    heads,
    rotations,
    keys,
    values,
    positions,
    tokens_per_row,
    slot_stride,
    position_stride,
    QUERY_COLS: tl.constexpr,
    KEY_COLS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one token's heads [queries, keys, values] some columns: pairs of the first two are turned as complex numbers,
    in fp32; queries stay where they are."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    turned_cols: tl.constexpr = QUERY_COLS + KEY_COLS
    all_cols: tl.constexpr = turned_cols + KEY_COLS
    x = tl.load(heads + token * all_cols + cols, mask=cols < all_cols, other=0.0)
    table = tl.load(rotations + token * HEAD_DIM + cols % HEAD_DIM, mask=cols < turned_cols, other=0.0)
    real, imaginary = tl.split(tl.reshape(x.to(tl.float32), [BLOCK // 2, 2]))
    cos, sin = tl.split(tl.reshape(table, [BLOCK // 2, 2]))
    pairs = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    turned = tl.reshape(pairs, [BLOCK]).to(x.dtype)
    place = token // tokens_per_row * slot_stride + tl.load(positions + token) * position_stride
    is_key = (cols >= QUERY_COLS) & (cols < turned_cols)
    is_value = (cols >= turned_cols) & (cols < all_cols)
    tl.store(heads + token * all_cols + cols, turned, mask=cols < QUERY_COLS)
    tl.store(keys + place + (cols - QUERY_COLS), turned, mask=is_key)
    tl.store(values + place + (cols - turned_cols), x, mask=is_value)


@triton.jit
def swiglu_kernel(x, y, hidden_dim, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gates = x + row * 2 * hidden_dim + cols
    gate = tl.load(gates, mask=cols < hidden_dim, other=0.0).to(tl.float32)
    up = tl.load(gates + hidden_dim, mask=cols < hidden_dim, other=0.0).to(tl.float32)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row * hidden_dim + cols, hidden.to(y.dtype.element_ty), mask=cols < hidden_dim)


@triton.jit
def norm_kernel(x, delta, weight, y, eps, DIM: tl.constexpr, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    """One row. The sum is rounded to the type of x before its norm is taken, as it would be between two steps."""
    start = tl.program_id(0).to(tl.int64) * DIM
    cols = tl.arange(0, BLOCK)
    h = tl.load(x + start + cols, mask=cols < DIM, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + start + cols, mask=cols < DIM, other=0.0)
        h = (h.to(tl.float32) + added.to(tl.float32)).to(h.dtype)
        tl.store(x + start + cols, h, mask=cols < DIM)
    h = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, axis=0) / DIM + eps)
    w = tl.load(weight + cols, mask=cols < DIM, other=0.0).to(tl.float32)
    tl.store(y + start + cols, (h * scale * w).to(y.dtype.element_ty), mask=cols < DIM)


def rotate_and_store(
    heads_NHD: torch.Tensor,
    rotations_N1d: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions_N: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """The queries of `heads_NHD` (`num_heads` of them, then keys, then values), turned where they are: [N, H, D].

    Keys, turned too, and values go to the tokens' positions in `keys`, `values` [B, L, K, D], N / B tokens a row."""
    num_tokens, _, head_dim = heads_NHD.shape
    num_rows, _, num_kv_heads, _ = keys.shape
    assert heads_NHD.is_contiguous() and keys.stride() == values.stride() and keys.stride(2) == head_dim
    table = torch.view_as_real(rotations_N1d.contiguous())
    grid = num_tokens, triton.cdiv(heads_NHD.stride(0), BLOCK)
    rotate_and_store_kernel[grid](
        heads_NHD,
        table,
        keys,
        values,
        positions_N,
        num_tokens // num_rows,
        *keys.stride()[:2],
        QUERY_COLS=num_heads * head_dim,
        KEY_COLS=num_kv_heads * head_dim,
        HEAD_DIM=head_dim,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return heads_NHD[:, :num_heads]


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """fused.swiglu, computed in fp32 and rounded once."""
    x, hidden_dim = x.contiguous(), x.shape[1] // 2
    y_NF = x.new_empty(len(x), hidden_dim)
    flags = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": True}
    swiglu_kernel[len(x), triton.cdiv(hidden_dim, BLOCK)](x, y_NF, hidden_dim, **flags)
    return y_NF


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, delta: torch.Tensor | None = None) -> torch.Tensor:
    """fused.rms_norm of x [N, C], to which `delta` is added first, in place."""
    assert x.is_contiguous() and (delta is None or delta.is_contiguous())
    y, block = torch.empty_like(x), 1 << (x.shape[1] - 1).bit_length()
    warps = min(MOST_WARPS, max(1, block // NORM_ELEMENTS_PER_WARP))
    addresses = x, x if delta is None else delta, weight, y
    flags = {"DIM": x.shape[1], "HAS_DELTA": delta is not None, "BLOCK": block}
    norm_kernel[len(x),](*addresses, eps, **flags, num_warps=warps, enable_fp_fusion=True)
    return y
