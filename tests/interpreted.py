"""What a process of its own runs: the kernels for GPUs in Triton's interpreter on tensors of the CPU, beside torch.

Each function returns the largest error, relative to the largest value that torch has in fp64 or fp32."""

import os
from unittest.mock import patch

import torch
import torch.nn.functional as F

from llama_mp import cuda, quant
from llama_mp import model as model_module
from llama_mp.cache import KVCache
from llama_mp.config import ModelConfig, RunConfig
from llama_mp.model import Step, build, fill
from llama_mp.parallel import connect
from llama_mp.rope import rotate, rotation_table

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROCESSORS = 8  # of the card that is played
HEADS = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
CONFIG = ModelConfig(name="small", dim=32, hidden_dim=20, num_layers=1, vocab_size=18, **HEADS)


def start() -> None:
    """Before Triton is imported: from here on its kernels are interpreted, and what `cuda` computes is its own."""
    os.environ["TRITON_INTERPRET"] = "1"
    cuda.available = lambda device: True
    cuda.num_processors = lambda device: PROCESSORS


def weight_of(kind: str, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As it is held, and the matrix that it is then, fp64."""
    if kind in TYPES:
        return matrix.to(TYPES[kind]), matrix.to(TYPES[kind]).double()
    packed = quant.pack(matrix, kind)
    return packed, quant.dequantize(packed, matrix.shape[1], torch.float32).double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def product(kind: str, rows: int, cols: int, *, normed: bool, gated: bool, added: bool) -> float:
    torch.manual_seed(rows + cols)
    weight, matrix = weight_of(kind, torch.randn(2 * rows if gated else rows, cols))
    x, norm, residual = 3 * torch.randn(1, cols), torch.randn(cols), torch.randn(1, rows)
    assert cuda.suits_one(x, weight)
    more = {"norm": (norm, 1e-5)} if normed else {}
    found = cuda.product(x, weight, **more, added_to=residual if added else None, is_gated=gated)
    expected = F.rms_norm(x.double(), (cols,), norm.double(), 1e-5) if normed else x.double()
    expected = expected @ matrix.T
    expected = F.silu(expected[:, :rows]) * expected[:, rows:] if gated else expected
    return error(found, expected + residual if added else expected)


def product_of_several(kind: str, dtype: str, num_tokens: int, rows: int, cols: int) -> float:
    torch.manual_seed(rows + cols)
    weight, matrix = weight_of(kind, torch.randn(rows, cols))
    x = torch.randn(num_tokens, cols).to(TYPES[dtype])
    assert cuda.suits(x, weight) and not cuda.suits_one(x, weight)
    return error(cuda.product(x, weight), x.double() @ matrix.T)


def attention(group: int, head_dim: int, length: int, positions: list[int], dtype: str = "fp32") -> list[float]:
    """Of what comes out, of the keys and of the values: slots and positions that are no row's are poison."""
    torch.manual_seed(head_dim)
    num_rows, num_kv, num_heads = len(positions), 2, 2 * group
    made = [torch.randn(num_rows + 2, length, num_kv, head_dim).to(TYPES[dtype]) for _ in "kv"]
    heads = torch.randn(num_rows, num_heads + 2 * num_kv, head_dim).to(TYPES[dtype])
    rotations = torch.polar(torch.ones(num_rows, 1, head_dim // 2), torch.randn(num_rows, 1, head_dim // 2))
    held = [torch.full_like(x, float("nan")) for x in made]
    for row, position in enumerate(positions):
        for mine, theirs in zip(held, made, strict=True):
            mine[row, :position] = theirs[row, :position]
    expected = expected_of(heads, rotations, held, positions, group)
    keys, values = (x.clone() for x in held)
    found = cuda.attend(heads, rotations, keys[:num_rows], values[:num_rows], torch.tensor(positions))
    stored = [(keys, rotate(heads, rotations)[:, num_heads:-num_kv]), (values, heads[:, -num_kv:])]
    rtol = max(1e-5, torch.finfo(TYPES[dtype]).eps)  # rounded once, perhaps to the other side
    for row, position in enumerate(positions):
        for (mine, new), before in zip(stored, held, strict=True):
            torch.testing.assert_close(mine[row, position], new[row], rtol=rtol, atol=1e-6)
            mine[row, position] = before[row, position]
    assert all(
        torch.equal(mine.nan_to_num(), before.nan_to_num()) for (mine, _), before in zip(stored, held, strict=True)
    )
    return error(found, expected)


def expected_of(
    heads: torch.Tensor, rotations: torch.Tensor, held: list[torch.Tensor], positions: list[int], group: int
) -> torch.Tensor:
    num_heads = held[0].shape[2] * group
    q, k, v = rotate(heads, rotations)[:, :num_heads], rotate(heads, rotations)[:, num_heads:], heads[:, num_heads:]
    k, v = k[:, : held[0].shape[2]], v[:, held[0].shape[2] :]
    found = []
    for row, position in enumerate(positions):
        keys, values = (torch.cat([old[row, :position], new[row, None]]) for old, new in zip(held, (k, v), strict=True))
        keys, values = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
        found.append(F.scaled_dot_product_attention(q[row, :, None].double(), keys, values).squeeze(1))
    return torch.stack(found)


def model(quant_kind: str, num_rows: int) -> float:
    """Of a step's logits by the kernels, beside torch's own operations; rows at their own positions."""
    torch.manual_seed(num_rows)
    world = connect(RunConfig(device="cpu"))
    held = build(CONFIG, 1, quant_kind)
    fill(held, {name: filled(name, parameter, quant_kind) for name, parameter in held.named_parameters()})
    positions = torch.tensor([7, 0, 3][:num_rows])
    found = []
    for steps_on in (False, True):
        cache = KVCache.allocate(CONFIG, 1, num_slots=3, max_seq_len=16, dtype=torch.float32, device=world.device)
        for index, x in enumerate([*cache.keys, *cache.values]):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(index)))
        step = Step(
            batch_size=num_rows,
            slots_N=torch.arange(num_rows),
            positions_N=positions,
            rotations_N1d=rotation_table(CONFIG, 16, world.device).unsqueeze(1)[positions],
            attended_slots=slice(0, num_rows),
            length=8,
            mask=(torch.arange(8) <= positions.unsqueeze(1))[:, None, None],
        )
        with (
            patch.object(cuda, "steps_on", lambda device, on=steps_on: on),
            patch.object(model_module, "suits", lambda x, state: False),  # as on a GPU, what these are not for
            patch.object(cuda, "product", wraps=cuda.product) as product,
            patch.object(cuda, "attend", wraps=cuda.attend) as attend,
            torch.inference_mode(),
        ):
            found.append(held.logits(held(torch.tensor([5, 6, 7][:num_rows]), step, cache)))
        num_products = 0 if quant_kind == "none" and num_rows > 1 else 5  # four of the block, and the output
        counts = product.call_count, attend.call_count
        assert counts == ((num_products, 1) if steps_on else (0, 0)), counts
    world.close()
    return error(found[1], found[0].double())


def filled(name: str, parameter: torch.Tensor, quant_kind: str) -> torch.Tensor:
    if parameter.is_floating_point():
        return torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
    cols = {"w2": CONFIG.hidden_dim, "wo": CONFIG.num_heads * CONFIG.head_dim}.get(name.split(".")[-2], CONFIG.dim)
    return quant.pack(torch.randn(len(parameter), cols) / cols**0.5, quant_kind)
