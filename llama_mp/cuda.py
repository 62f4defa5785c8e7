"""The steps of decoding on a GPU by our own kernels (cuda_kernels.py), where Triton is at hand.

Nothing here asks the device for a value, and each launch depends on shapes alone: a CUDA graph can hold them.
Shapes: N rows, H query heads, K KV heads, D head dimension, S slots, L positions.
"""

import functools
import importlib.util
import math

import torch

from llama_mp.compiled import say_once

MIN_CAPABILITY = (8, 0)  # copies from memory to shared memory that run ahead by themselves, and bf16
VECTOR_BYTES = 16  # what a thread loads at once: each row of a weight has to begin at a multiple of it
# Of a word of 4 bytes.
ELEMENTS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 2, torch.int8: 4, torch.uint8: 8}
PACKED = (torch.int8, torch.uint8)
MAX_ROWS = 64  # of a product with packed weights: from there on arithmetic counts

# An H100 reads 3.35 TB/s some 700 ns after it was asked: 18 KB have to be on their way to each multiprocessor at all
# times. A program of four warps holds two chunks of 16 KB, one of them on its way; 3 to 6 programs fit side by side.
# Each vector of x is made fp32 once for 8 rows of a weight: for fewer, instructions would count. By the compiled code a
# weight takes 4 of them in bf16, 5 in int8 and int4; an H100 issues 17, 8.5 and 5.4 while it reads one.
ROWS, WARPS, STAGES = 8, 4, 3
# Vectors of a row in a chunk, by the elements of a word: for int4 half as many, or registers would be the limit, and
# the 4096 columns of 7B one chunk, with none to run ahead. Two threads share a vector then, and copy 8 bytes each.
VECTORS = {1: 128, 2: 128, 4: 128, 8: 64}
TILE_BYTES = 16384  # of keys, of values, or of several rows of x at once: all that is ahead fits into shared memory
LEAST_OF_DOT = 16  # the least side of a matrix that matrix units multiply
MIN_SHARE, MAX_SHARES = 128, 64  # less positions are not worth a program; registers to join more of them
PROGRAMS_PER_PROCESSOR = 2  # of attention, in flight together
LOG2_E = math.log2(math.e)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether our kernels run on `device`. What is lost on a GPU where they do not is said once."""
    if device.type != "cuda" or not torch.cuda.is_available():  # a device that torch pretends, to try shapes
        return False
    why = obstacle(device)
    if why is not None:
        say_once(f"torch's own operations are used, since {why}: decoding is slower")
    return why is None


def obstacle(device: torch.device) -> str | None:
    """What keeps our kernels from a GPU."""
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "ours need a newer card"
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton (pip install triton)"
    try:
        try_one(device)
    except Exception as error:  # no C compiler, no Python.h, no room for a cache, a card that Triton does not know yet
        first = next(iter(str(error).strip().splitlines()), "")
        return f"Triton does not run here ({type(error).__name__}: {first})"
    return None


def try_one(device: torch.device) -> None:
    """Compile the least of our kernels and run it. Raises what kept it from that."""
    from llama_mp.cuda_kernels import set_to_one

    number = torch.zeros(1, device=device)
    set_to_one[(1,)](number)
    if number.item() != 1:
        raise RuntimeError("a kernel left no trace")


def steps_on(device: torch.device) -> bool:
    """Whether decode steps on `device` are those of our kernels. Who asks torch for deterministic algorithms, as
    --deterministic does, wants torch's, which are the same for any number of rows."""
    return available(device) and not torch.are_deterministic_algorithms_enabled()


def suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `product` multiplies x with `weight`: few enough rows to be bound by its bytes, each of them aligned."""
    if len(x) > (MAX_ROWS if weight.dtype in PACKED else 1) or not steps_on(x.device):
        return False
    return weight.stride(0) * weight.element_size() % VECTOR_BYTES == 0 and weight.data_ptr() % VECTOR_BYTES == 0


def suits_one(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether it does more than that: for one row."""
    return len(x) == 1 and suits(x, weight)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    added_to: torch.Tensor | None = None,
    is_gated: bool = False,
) -> torch.Tensor:
    """x [N, in] times the transpose of `weight` [out, in], which `suits` says it takes, in the type of x.

    One row may be more: x is normed first by `norm`, a weight and its eps; `is_gated`: the weight holds a gate, and
    behind it an up projection, and what comes out is silu(gate) * up; the result is added to `added_to`."""
    if len(x) > 1:
        assert norm is None and added_to is None and not is_gated
        return packed_product(x, weight)
    num_rows = len(weight) // 2 if is_gated else len(weight)
    y = x.new_empty(1, num_rows)
    # To norm x costs instructions too, by which int4 is bound: twice the rows share them, with nothing ahead, since
    # registers hold no more.
    rows, stages = (2 * ROWS, 2) if norm and weight.dtype is torch.uint8 else (ROWS, STAGES)
    rows = rows // 2 if is_gated else rows
    whole = num_rows // rows * rows
    for at, in_program in ((slice(0, whole), rows), (slice(whole, num_rows), num_rows - whole)):
        if at.start < at.stop:
            residual = None if added_to is None else added_to[:, at]
            num_gates = num_rows if is_gated else 0
            product_of_rows(x, weight[at.start :], norm, residual, y[:, at], in_program, num_gates, stages)
    return y


def product_of_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    added_to: torch.Tensor | None,
    y: torch.Tensor,
    rows: int,
    num_gates: int,
    stages: int,
) -> None:
    """As many of the weight's rows as y [1, out] has columns, `rows` in a program, which divide them."""
    from llama_mp.cuda_kernels import product_of_one  # Triton is not everywhere

    norm_weight, eps = norm or (None, 0.0)
    places = ELEMENTS[weight.dtype]
    product_of_one[(y.shape[1] // rows,)](
        weight.view(torch.int32), x.contiguous(), norm_weight, added_to, y,
        num_gates, x.shape[1], weight.stride(0) * weight.element_size() // VECTOR_BYTES, eps,
        KIND=str(weight.dtype).removeprefix("torch."), PLACES=places, ROWS=rows, V=VECTORS[places], STAGES=stages,
        NORMED=norm is not None, GATED=num_gates > 0, ADDED=added_to is not None,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def packed_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from llama_mp.cuda_kernels import product_of_several

    x = x.contiguous()
    (num_tokens, num_cols), num_rows = x.shape, len(weight)
    y = x.new_empty(num_tokens, num_rows)
    most = max(LEAST_OF_DOT, power_of_two(num_tokens))
    is_int4, is_fp32 = weight.dtype is torch.uint8, x.dtype is torch.float32
    rows = 32 if most <= 32 or is_fp32 else 64
    # Registers hold no more of int4, two weights to a byte, nor of fp32, which no matrix unit multiplies without loss.
    bytes_at_once = TILE_BYTES // (4 if is_int4 else 1) // (4 if is_fp32 else 1)
    vectors = bytes_at_once // (most * VECTOR_BYTES * x.element_size())
    product_of_several[(-(-num_rows // rows),)](
        weight, x, y, num_tokens, num_rows, num_cols, weight.stride(0) // VECTOR_BYTES,
        M=most, ROWS=rows, V=min(max(vectors, 1), 16), STAGES=STAGES + 2 if is_int4 else STAGES,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def attend(
    heads_NHD: torch.Tensor,
    rotations_N1d: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions_N: torch.Tensor,
) -> torch.Tensor:
    """`fused.attend` on a GPU, [N, H, D]: the rows' positions count, of whatever length the cache is."""
    from llama_mp import cuda_attention

    num_rows, num_fused, head_dim = heads_NHD.shape
    length, num_kv_heads = keys.shape[1:3]
    num_heads = num_fused - 2 * num_kv_heads
    y_NHD = heads_NHD.new_empty(num_rows, num_heads, head_dim)
    num_splits = splits(num_rows * num_kv_heads, length, keys.device)
    sums = y_NHD.new_empty(num_rows, num_heads, num_splits, head_dim, dtype=torch.float32)
    states = sums.new_empty(num_rows, num_heads, num_splits, 2)
    width = max(LEAST_OF_DOT, power_of_two(head_dim))
    at_once = min(128, max(LEAST_OF_DOT, TILE_BYTES // (width * keys.element_size())))
    cuda_attention.attend[(num_kv_heads, num_splits, num_rows)](
        heads_NHD.contiguous(), torch.view_as_real(rotations_N1d.contiguous()), keys, values, positions_N,
        sums, states, y_NHD, keys.stride(0), keys.stride(1), num_heads, num_kv_heads, num_splits,
        head_dim**-0.5 * LOG2_E,
        GROUP_HEADS=num_heads // num_kv_heads, HEAD_DIM=head_dim,
        G=max(LEAST_OF_DOT, power_of_two(num_heads // num_kv_heads)), D=width, L=at_once, STAGES=2,
        SPLIT=num_splits > 1, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    if num_splits > 1:
        cuda_attention.join_shares[(num_rows * num_heads,)](
            sums, states, y_NHD, num_splits,
            HEAD_DIM=head_dim, D=width, SPLITS=power_of_two(num_splits), num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y_NHD


def splits(num_programs: int, length: int, device: torch.device) -> int:
    """Of a row's positions, `length` at most, where `num_programs` would run without: enough to fill the card."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * num_processors(device) // num_programs)
    return max(1, min(wanted, -(-length // MIN_SHARE), MAX_SHARES))


@functools.cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(number: int) -> int:
    """The least that is no less than `number`."""
    return 1 << (number - 1).bit_length()
