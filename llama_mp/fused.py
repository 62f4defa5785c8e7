"""What lies between the matrix products: on a CPU in fp32 by our own fused.c, one call instead of several of torch's;
and for few rows a half of a block, its products included, in one call.

Shapes: N rows, H query heads, K KV heads, D head dimension, S slots, L positions, F hidden dimension.
"""

import ctypes
import functools
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from llama_mp import cuda, kernels
from llama_mp.compiled import NATIVE, load_library

SOURCE = Path(__file__).with_name("fused.c")
KINDS = {torch.float32: 0, torch.bfloat16: 1}  # of norms and caches
ADDRESS, LONG = ctypes.c_void_p, ctypes.c_long


def suits(x: torch.Tensor, state: torch.Tensor) -> bool:
    """Whether fused.c computes with activations `x` and a norm's weight or a cache `state`."""
    on_cpu = x.device.type == "cpu" and x.dtype is torch.float32
    return on_cpu and state.dtype in KINDS and load_steps() is not None


def for_rows(x: torch.Tensor) -> ModuleType | None:
    """The kernels for many rows such as `x` on a GPU, if it runs them; imported here, since Triton may be missing."""
    if not cuda.steps_on(x.device):
        return None
    from llama_mp import cuda_elementwise

    return cuda_elementwise


def add_and_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, for which x may be overwritten, and its `rms_norm`."""
    if kernels := for_rows(x):
        return x, kernels.rms_norm(x, weight, eps, delta)
    x = x + delta
    return x, rms_norm(x, weight, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`F.rms_norm` of x [N, C]; the weight may be of another type."""
    if kernels := for_rows(x):
        return kernels.rms_norm(x, weight, eps)
    if not suits(x, weight):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    x = x.contiguous()
    y = torch.empty_like(x)
    load_steps().rms_norm(x.data_ptr(), weight.data_ptr(), KINDS[weight.dtype], eps, y.data_ptr(), *x.shape)
    return y


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [N, 2 F], which holds the gate and behind it the up projection (Shazeer 2020)."""
    if kernels := for_rows(x):
        return kernels.swiglu(x)
    if not suits(x, x):
        gate_NF, up_NF = x.chunk(2, dim=-1)
        return F.silu(gate_NF) * up_NF
    x, hidden_dim = x.contiguous(), x.shape[1] // 2
    y_NF = x.new_empty(len(x), hidden_dim)
    load_steps().swiglu(x.data_ptr(), y_NF.data_ptr(), len(x), hidden_dim)
    return y_NF


def gated(x: torch.Tensor, weight: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """`swiglu` of the product of x [N, C] with `weight` [2 F, C], in a run in `precision`: of many rows on a CPU in one
    go."""
    is_of_many = kernels.takes_many(x, weight, precision) and suits(x, x)
    y_NF = kernels.linear_of_many(x, weight, precision, is_gated=True) if is_of_many else None
    return swiglu(kernels.linear(x, weight, precision)) if y_NF is None else y_NF


def attends(x: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether `attend` computes with activations `x` over a cache of `keys`."""
    return suits(x, keys) or cuda.steps_on(keys.device)


def attend(
    heads_NHD: torch.Tensor,
    rotations_N1d: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions_N: torch.Tensor,
) -> torch.Tensor:
    """Attention of one token for each of N rows, where `attends` says so: [N, H, D].

    `heads_NHD`: H query heads, then K of keys and K of values, which are stored at the rows' positions first. `keys`,
    `values` [S, L, K, D]: row i's slot is the i-th."""
    if cuda.steps_on(keys.device):
        return cuda.attend(heads_NHD, rotations_N1d, keys, values, positions_N)
    num_rows, num_fused, head_dim = heads_NHD.shape
    num_kv_heads = keys.shape[2]
    num_heads = num_fused - 2 * num_kv_heads
    y_NHD = heads_NHD.new_empty(num_rows, num_heads, head_dim)
    tensors = heads_NHD.contiguous(), rotations_N1d.contiguous(), keys, values, positions_N, y_NHD
    slot_bytes, position_bytes = (stride * keys.element_size() for stride in keys.stride()[:2])
    sizes = num_rows, num_heads, num_kv_heads, head_dim, slot_bytes, position_bytes
    if load_steps().attend(*(t.data_ptr() for t in tensors), KINDS[keys.dtype], *sizes):
        raise MemoryError("no memory for the scores of attention")
    return y_NHD


# ---- halves of a block --------------------------------------------------------------------------------------------


class Half(ctypes.Structure):
    """`half` in fused.c, by the addresses of weights that must outlive it."""

    _fields_ = (
        *((name, ADDRESS) for name in ("linear", "norm", "first", "second")),
        *((f"{name}_kind", LONG) for name in ("norm", "first", "second")),
        *((name, LONG) for name in ("dim", "first_rows", "second_cols", "first_row_bytes", "second_row_bytes")),
        ("eps", ctypes.c_double),
    )


def half_of(
    norm: torch.Tensor,
    eps: float,
    first: torch.Tensor,
    second: torch.Tensor,
    second_cols: int,
    precision: torch.dtype,
) -> Half | None:
    """A norm's weight and those of the products behind it, on a CPU, in a run in `precision`; None where the kernels do
    not take them."""
    library = kernels.load_kernels() if norm.device.type == "cpu" and load_steps() else None
    known = norm.dtype in KINDS and first.dtype in kernels.KINDS and second.dtype in kernels.KINDS
    if not library or not known:
        return None
    return Half(
        linear=ctypes.cast(library.linear, ADDRESS).value,
        norm=norm.data_ptr(),
        first=first.data_ptr(),
        second=second.data_ptr(),
        norm_kind=KINDS[norm.dtype],
        first_kind=kernels.kind_of(first.dtype, precision),
        second_kind=kernels.kind_of(second.dtype, precision),
        dim=len(norm),
        first_rows=len(first),
        second_cols=second_cols,
        first_row_bytes=kernels.row_bytes(first),
        second_row_bytes=kernels.row_bytes(second),
        eps=eps,
    )


def attention_half(
    half: Half,
    x: torch.Tensor,
    rotations_N1d: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions_N: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`attend` with the products around it: this rank's part of what is added to x [N, C]."""
    y = torch.empty_like(x)
    tensors = x, y, rotations_N1d, keys, values, positions_N
    slot_stride, position_stride, head_dim, _ = keys.stride()
    size = keys.element_size()
    sizes = x.shape[0], num_heads, keys.shape[2], head_dim, slot_stride * size, position_stride * size
    addresses = (tensor.data_ptr() for tensor in tensors)
    if load_steps().attention_half(ctypes.byref(half), *addresses, KINDS[keys.dtype], *sizes):
        raise MemoryError("no memory for a step of attention")
    return y


def feed_forward_half(half: Half, x: torch.Tensor) -> torch.Tensor:
    """This rank's part of what is added to x [N, C]."""
    y = torch.empty_like(x)
    if load_steps().feed_forward_half(ctypes.byref(half), x.data_ptr(), y.data_ptr(), x.shape[0]):
        raise MemoryError("no memory for a step of the feed-forward part")
    return y


@functools.cache
def load_steps() -> ctypes.CDLL | None:
    """The compiled steps, if this machine can build them."""
    library = load_library(SOURCE, NATIVE)
    if library is not None:
        library.rms_norm.argtypes = [ADDRESS, ADDRESS, ctypes.c_int, ctypes.c_float, ADDRESS, LONG, LONG]
        library.rms_norm.restype = library.swiglu.restype = None
        library.swiglu.argtypes = [ADDRESS, ADDRESS, LONG, LONG]
        library.attend.argtypes = [ADDRESS] * 6 + [ctypes.c_int] + [LONG] * 6
        library.attention_half.argtypes = [ADDRESS] * 7 + [ctypes.c_int] + [LONG] * 6
        library.feed_forward_half.argtypes = [ADDRESS] * 3 + [LONG]
    return library
