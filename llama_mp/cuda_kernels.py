"""Triton kernels, which cuda.py starts: products of few rows, bound by the rate at which weights are read.

Sums are fp32. A row of a weight is `row_vectors` vectors of 16 bytes, what a thread loads best, each 4 words of int32.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(32)  # of int4, as quant.py packs it


@triton.jit
def set_to_one(x_ptr):
    """To try whether anything runs."""
    tl.store(x_ptr, 1.0)


# ---- one row of x ------------------------------------------------------------------------------------------------


@triton.jit
def element(words, k: tl.constexpr, KIND: tl.constexpr, one):
    """Element k of each word as fp32. A code of int8 or int4 becomes the highest bits of a mantissa, which costs less
    than converting an integer: 1.5 + code / 256, or 1 + code / 16. `one`: the bits of 1.5, or 1."""
    if KIND == "float32":
        return words.to(tl.float32, bitcast=True)
    elif KIND == "bfloat16":
        return (words << 16 if k == 0 else words & -0x10000).to(tl.float32, bitcast=True)
    elif KIND == "float16":
        return (words >> (16 * k)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        BITS: tl.constexpr = 8 if KIND == "int8" else 4
        LEFT: tl.constexpr = 23 - BITS - BITS * k
        bits = words << LEFT if LEFT >= 0 else words >> -LEFT
        return ((bits & ((1 << BITS) - 1 << 23 - BITS)) ^ one).to(tl.float32, bitcast=True)


@triton.jit
def by_place(x, V: tl.constexpr, KIND: tl.constexpr):
    """x [V, elements of a vector] as tuples: the k-th [V, 4] is what element k of each word is multiplied with."""
    if KIND == "float32":
        return (x,)
    elif KIND == "int8":
        even, odd = tl.split(x.reshape(V, 4, 2, 2))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return (x0, x1, x2, x3)
    elif KIND == "uint8":  # byte b of word j holds elements 4 j + b of a group, and 16 + 4 j + b in its high half
        even, odd = tl.split(x.reshape(V, 2, 4, 2, 2).permute(0, 2, 3, 1, 4))
        x04, x15 = tl.split(even)
        x26, x37 = tl.split(odd)
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        return (x0, x1, x2, x3, x4, x5, x6, x7)
    else:
        return tl.split(x.reshape(V, 4, 2))


@triton.jit
def row_sum(sums, total, end, KIND: tl.constexpr):
    """Of a row's `sums`; `total`: the sums of x. A row of int8 has its scale before its `end`."""
    if KIND == "int8":
        sums = (sums - 1.5 * total) * 256
    y = tl.sum(tl.sum(sums, 1), 0)
    if KIND == "int8":
        y *= tl.load(end - 1).to(tl.float32, bitcast=True)
    return y


@triton.jit
def half_of_word(words, shift: tl.constexpr):
    return (words >> shift).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def columns_of(
    x_ptr, norm_ptr, at, num_cols, squares, V: tl.constexpr, KIND: tl.constexpr, PLACES: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """The elements `at` [V, elements of a vector] of x by their places, times `norm` where NORMED; the sums [V, 4] of
    those of a word; and `squares`, grown by theirs before `norm`."""
    # x is the same for all programs of a multiprocessor: its first cache (.ca) holds it.
    loaded = by_place(tl.load(x_ptr + at, mask=at < num_cols, other=0, cache_modifier=".ca"), V, KIND)
    if NORMED:
        norm = by_place(tl.load(norm_ptr + at, mask=at < num_cols, other=0, cache_modifier=".ca"), V, KIND)
    x = ()
    total = tl.zeros([V, 4], tl.float32)
    for k in tl.static_range(PLACES):
        part = loaded[k].to(tl.float32)
        if NORMED:
            squares += part * part
            part *= norm[k].to(tl.float32)
        total += part
        x = x + (part,)  # noqa: RUF005 - Triton unpacks no tuples
    return x, total, squares


@triton.jit
def add_vectors(
    sums, w_row_ptr, start, num_vectors, x, total, one, V: tl.constexpr, KIND: tl.constexpr, PLACES: tl.constexpr
):  # fmt: skip
    """`sums` [V, 4] and the products of a row's vectors from `start` on; of `row_sum` what is left to do."""
    vectors = start + tl.arange(0, V)
    known = vectors < num_vectors
    words = tl.load(w_row_ptr + vectors[:, None] * 4 + tl.arange(0, 4)[None, :], mask=known[:, None], other=0)
    found = tl.zeros([V, 4], tl.float32) if KIND == "uint8" else sums
    for k in tl.static_range(PLACES):
        found += element(words, k, KIND, one) * x[k]
    if KIND == "uint8":
        ranges = tl.load(w_row_ptr + num_vectors * 4 + vectors, mask=known, other=0)
        scale = 16 * half_of_word(ranges, 0)
        offset = half_of_word(ranges, 16) - scale  # of a code that counts from 1, not from 0
        found = sums + found * scale[:, None] + total * offset[:, None]
    return found


@triton.jit
def product_of_one(
    w_ptr, x_ptr, norm_ptr, residual_ptr, y_ptr, num_gates, num_cols, row_vectors, eps,
    KIND: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
    NORMED: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """y = x W^T for ROWS rows of W. NORMED: x is divided by its root mean square, and times `norm`, first. GATED: of W
    `num_gates` rows further on there is another, and y becomes silu(y) times what it makes. ADDED: `residual` is added.
    PLACES: elements of a word.

    Rows are tuples, not a dimension: Triton 3.6 would convert x anew for each."""
    ALL: tl.constexpr = 2 * ROWS if GATED else ROWS
    row = tl.program_id(0) * ROWS
    # Bits that the compiler does not know as a constant: so it masks and sets them by one instruction.
    one = (0x3FC00000 if KIND == "int8" else 0x3F800000) + tl.program_id(1)
    elements = tl.arange(0, V)[:, None] * (4 * PLACES) + tl.arange(0, 4 * PLACES)[None, :]
    num_vectors = tl.cdiv(num_cols, 4 * PLACES)
    sums = (tl.zeros([V, 4], tl.float32),) * ALL
    squares, total = tl.zeros([V, 4], tl.float32), tl.zeros([V, 4], tl.float32)
    for start in tl.range(0, num_vectors, V, num_stages=STAGES):
        at = start * (4 * PLACES) + elements
        x, of_chunk, squares = columns_of(x_ptr, norm_ptr, at, num_cols, squares, V, KIND, PLACES, NORMED)
        total += of_chunk
        grown = ()
        for i in tl.static_range(ALL):
            w_row_ptr = w_ptr + (row + i % ROWS + i // ROWS * num_gates).to(tl.int64) * row_vectors * 4
            found = add_vectors(sums[i], w_row_ptr, start, num_vectors, x, of_chunk, one, V, KIND, PLACES)
            grown = grown + (found,)  # noqa: RUF005
        sums = grown
    factor = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / num_cols + eps) if NORMED else 1.0
    for i in tl.static_range(ROWS):
        end = w_ptr + (row + i + 1).to(tl.int64) * row_vectors * 4
        y = factor * row_sum(sums[i], total, end, KIND)
        if GATED:
            end += num_gates.to(tl.int64) * row_vectors * 4
            y *= tl.sigmoid(y) * (factor * row_sum(sums[ROWS + i], total, end, KIND))
        if ADDED:
            y += tl.load(residual_ptr + row + i).to(tl.float32)
        tl.store(y_ptr + row + i, y.to(y_ptr.dtype.element_ty))


# ---- several rows of x, packed weights ---------------------------------------------------------------------------


@triton.jit
def unpacked(
    codes, w_row_ptrs, vectors, num_vectors, width: tl.constexpr, ROWS: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """The weights of the low halves of int4's `codes` [ROWS, 16 V], and those of the high ones."""
    ranges_ptr = w_row_ptrs.to(tl.pointer_type(tl.float16))[:, None] + num_vectors * 8 + vectors[None, :] * 2
    known = (vectors < num_vectors)[None, :]
    scale = tl.load(ranges_ptr, mask=known, other=0).to(tl.float32)[:, :, None]
    offset = tl.load(ranges_ptr + 1, mask=known, other=0).to(tl.float32)[:, :, None]
    of_group = codes.reshape(ROWS, V, 16)
    low = (of_group & 15).to(tl.float32) * scale + offset
    high = (of_group >> 4).to(tl.float32) * scale + offset
    return low.to(width).reshape(ROWS, 16 * V), high.to(width).reshape(ROWS, 16 * V)


@triton.jit(do_not_specialize=["num_tokens"])  # or it would be compiled twice, for multiples of 16 and the others
def product_of_several(
    w_ptr, x_ptr, y_ptr, num_tokens, num_rows, num_cols, row_vectors,
    M: tl.constexpr, ROWS: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = x W^T for ROWS rows of W, packed, by matrix units: codes of int8 as they are, their scale at the end; weights
    of int4 rounded to the type of x, as torch's operations round them (kernels.linear_by_torch)."""
    tokens = tl.arange(0, M)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w_row_ptrs = w_ptr + tl.minimum(rows, num_rows - 1).to(tl.int64) * (row_vectors * 16)
    x_row_ptrs = x_ptr + tokens * num_cols
    there = tokens[:, None] < num_tokens
    sums = tl.zeros([M, ROWS], tl.float32)
    width: tl.constexpr = x_ptr.dtype.element_ty
    ELEMENTS: tl.constexpr = GROUP if w_ptr.dtype.element_ty == tl.uint8 else 16  # of a vector
    num_vectors = tl.cdiv(num_cols, ELEMENTS)
    for start in tl.range(0, num_vectors, V, num_stages=STAGES):
        vectors = start + tl.arange(0, V)
        bytes_of = tl.arange(0, 16 * V)
        codes = tl.load(
            w_row_ptrs[:, None] + start * 16 + bytes_of[None, :],
            mask=(start + bytes_of // 16 < num_vectors)[None, :],
            other=0,
        )
        low = start * ELEMENTS + bytes_of // 16 * ELEMENTS + bytes_of % 16
        x = tl.load(x_row_ptrs[:, None] + low[None, :], mask=there & (low < num_cols)[None, :], other=0)
        if w_ptr.dtype.element_ty == tl.uint8:
            w, high = unpacked(codes, w_row_ptrs, vectors, num_vectors, width, ROWS, V)
            in_row = (low + 16 < num_cols)[None, :]
            high_x = tl.load(x_row_ptrs[:, None] + low[None, :] + 16, mask=there & in_row, other=0)
            sums = tl.dot(high_x, high.trans(), sums, input_precision="ieee")
        else:
            w = codes.to(width)
        sums = tl.dot(x, w.trans(), sums, input_precision="ieee")
    if w_ptr.dtype.element_ty == tl.int8:
        last_ptr = w_row_ptrs.to(tl.pointer_type(tl.float32)) + row_vectors * 4 - 1
        sums *= tl.load(last_ptr)[None, :]
    at = tokens[:, None] * num_rows + rows[None, :]
    tl.store(y_ptr + at, sums.to(width), mask=there & (rows < num_rows)[None, :])
