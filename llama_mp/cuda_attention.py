"""Triton kernels, which cuda.py starts: attention of one token a row over a cache, split over its positions.

Shapes: G query heads of a KV head, D head dimension, both filled up to powers of two; L positions at once.
"""

import triton
import triton.language as tl


@triton.jit
def rotated(x_ptr, rotations_ptr, d, known):
    """Elements `d` of the heads at `x_ptr`, turned in pairs and rounded to their type, as rope.rotate does."""
    x = tl.load(x_ptr + d, mask=known, other=0).to(tl.float32)
    other = tl.load(x_ptr + (d ^ 1), mask=known, other=0).to(tl.float32)
    cosine = tl.load(rotations_ptr + (d & -2), mask=known, other=0)
    sine = tl.load(rotations_ptr + (d | 1), mask=known, other=0)
    return (x * cosine + tl.where(d % 2 == 0, -other, other) * sine).to(x_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["num_splits"])  # one for any number of shares but one
def attend(
    heads_ptr, rotations_ptr, keys_ptr, values_ptr, positions_ptr, sums_ptr, states_ptr, y_ptr,
    slot_stride, position_stride, num_heads, num_kv_heads, num_splits, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, G: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
    STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One row's attention to one KV head, over one of `num_splits` shares of the row's earlier positions, L at once.

    The new key and value are stored, and begin the sums of share 0: no share reads what another writes. SPLIT: sums
    that are yet to be divided go to `sums`, with the maximum and the weight in `states`, for `join_shares`."""
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g, d = tl.arange(0, G), tl.arange(0, D)
    heads_ptr += row * (num_heads + 2 * num_kv_heads) * HEAD_DIM
    rotations_ptr += row * HEAD_DIM
    position = tl.load(positions_ptr + row)
    is_query = (g < GROUP_HEADS)[:, None] & (d < HEAD_DIM)[None, :]
    q_ptr = heads_ptr + (kv_head * GROUP_HEADS + g[:, None]) * HEAD_DIM
    q = rotated(q_ptr, rotations_ptr, d[None, :], is_query).to(keys_ptr.dtype.element_ty)
    keys_ptr += row * slot_stride + kv_head * HEAD_DIM + d
    values_ptr += row * slot_stride + kv_head * HEAD_DIM + d
    k_ptr, at = heads_ptr + (num_heads + kv_head) * HEAD_DIM, position * position_stride
    most, weight, sums = start_of_share(
        q, k_ptr, k_ptr + num_kv_heads * HEAD_DIM, rotations_ptr, keys_ptr + at, values_ptr + at, d, d < HEAD_DIM,
        scale, split == 0,
    )  # fmt: skip
    share = tl.cdiv(tl.cdiv(position, L), num_splits) * L
    first, last = split * share, tl.minimum((split + 1) * share, position)
    most, weight, sums = add_positions(
        q, keys_ptr, values_ptr, position_stride, first, last, scale, most, weight, sums, d < HEAD_DIM, L, STAGES
    )
    place = row * num_heads + kv_head * GROUP_HEADS + g
    if SPLIT:
        place = place * num_splits + split
        tl.store(sums_ptr + place[:, None] * HEAD_DIM + d[None, :], sums, mask=is_query)
        tl.store(states_ptr + place * 2, most, mask=g < GROUP_HEADS)
        tl.store(states_ptr + place * 2 + 1, weight, mask=g < GROUP_HEADS)
    else:
        y = (sums / weight[:, None]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + place[:, None] * HEAD_DIM + d[None, :], y, mask=is_query)


@triton.jit
def start_of_share(q, k_ptr, v_ptr, rotations_ptr, keys_ptr, values_ptr, d, in_head, scale, is_first):
    """The first share begins with the new key, which is rotated, and value; it stores them."""
    most = tl.full([q.shape[0]], -float("inf"), tl.float32)
    weight, sums = tl.zeros([q.shape[0]], tl.float32), tl.zeros(q.shape, tl.float32)
    if is_first:
        k = rotated(k_ptr, rotations_ptr, d, in_head).to(keys_ptr.dtype.element_ty)
        v = tl.load(v_ptr + d, mask=in_head, other=0).to(values_ptr.dtype.element_ty)
        tl.store(keys_ptr, k, mask=in_head)
        tl.store(values_ptr, v, mask=in_head)
        most = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
        weight, sums = weight + 1, sums + v.to(tl.float32)[None, :]
    return most, weight, sums


@triton.jit
def add_positions(
    q, keys_ptr, values_ptr, position_stride, first, last, scale, most, weight, sums, in_head,
    L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Positions `first` to `last` - 1 of a softmax whose maximum is not known yet (Milakov and Gimelshein 2018). Scores
    count powers of 2."""
    for start in tl.range(first, last, L, num_stages=STAGES):
        at = start + tl.arange(0, L)
        seen = at < last
        k = tl.load(keys_ptr[None, :] + at[:, None] * position_stride, mask=seen[:, None] & in_head[None, :], other=0)
        scores = tl.dot(q, k.trans(), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        fading, parts = tl.exp2(most - higher), tl.exp2(scores - higher[:, None])
        v = tl.load(values_ptr[None, :] + at[:, None] * position_stride, mask=seen[:, None] & in_head[None, :], other=0)
        sums = tl.dot(parts.to(v.dtype), v, sums * fading[:, None], input_precision="ieee")
        most, weight = higher, weight * fading + tl.sum(parts, 1)
    return most, weight, sums


@triton.jit(do_not_specialize=["num_splits"])
def join_shares(
    sums_ptr, states_ptr, y_ptr, num_splits, HEAD_DIM: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """One head's attention from its shares; one without positions has a maximum of -inf, and no weight."""
    place = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, D)
    known, in_head = split < num_splits, d < HEAD_DIM
    at = place * num_splits + split
    most = tl.load(states_ptr + at * 2, mask=known, other=-float("inf"))
    weight = tl.load(states_ptr + at * 2 + 1, mask=known, other=0)
    sums = tl.load(sums_ptr + at[:, None] * HEAD_DIM + d[None, :], mask=known[:, None] & in_head[None, :], other=0)
    fading = tl.exp2(most - tl.max(most, 0))
    y = tl.sum(sums * fading[:, None], 0) / tl.sum(weight * fading, 0)
    tl.store(y_ptr + place * HEAD_DIM + d, y.to(y_ptr.dtype.element_ty), mask=in_head)
