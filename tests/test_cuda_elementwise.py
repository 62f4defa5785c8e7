"""The kernels for many rows on a GPU: in Triton's interpreter against torch, and as machine code."""

from pathlib import Path

import numpy as np
import pytest
from factory import MODELS
from interpreted_rows import DIMS, HEADS, HIDDEN, interpreted, prompts, steps
from ranks import alone


def test_steps_are_torchs() -> None:
    """The interpreter cuts bf16 off where a GPU rounds it to the nearest."""
    found = alone(interpreted, steps)
    assert len(found) == 3 * (3 * len(HEADS) + len(HIDDEN) + 3 * len(DIMS))
    for name, (computed, expected) in found.items():
        step, dtype = name.split()[:2]
        rounding = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}[dtype]
        if step == "values" or (step == "sum" and dtype != "bf16"):
            rounding = 0
        np.testing.assert_allclose(computed, expected, rtol=rounding, atol=rounding, err_msg=name)


def test_a_prompts_logits_are_torchs() -> None:
    for name, (computed, expected) in alone(interpreted, prompts, MODELS).items():
        np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-4 * abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code_reads_16_bytes_at_a_time_and_spills_nothing(tmp_path: Path, capability: int) -> None:
    """Of 7B's shapes in bf16: each load is whole but that of the position and, in a norm, of the sums of its warps."""
    from sass import SPILLS, instructions

    from llama_mp import cuda_elementwise as kernels

    half, whole = "*bf16", "i32"
    asked = {
        "rotate_and_store": (
            {"heads": half, "rotations": "*fp32", "keys": half, "values": half, "positions": "*i64"}
            | dict.fromkeys(("tokens_per_row", "slot_stride", "position_stride"), whole),
            {"QUERY_COLS": 4096, "KEY_COLS": 4096, "HEAD_DIM": 128, "BLOCK": kernels.BLOCK},
            kernels.WARPS,
        ),
        "swiglu": ({"x": half, "y": half, "hidden_dim": whole}, {"BLOCK": kernels.BLOCK}, kernels.WARPS),
        "norm": (
            dict.fromkeys(("x", "delta", "weight", "y"), half) | {"eps": "fp32"},
            {"DIM": 4096, "HAS_DELTA": True, "BLOCK": 4096},
            4096 // kernels.NORM_ELEMENTS_PER_WARP,
        ),
    }
    for name, (types, constants, num_warps) in asked.items():
        kernel = getattr(kernels, f"{name}_kernel")
        where = {"capability": capability, "num_warps": num_warps, "path": tmp_path / "cubin"}
        found = instructions(kernel, types, constants, **where)
        loads = {op: count for op, count in found.items() if op.startswith(("LDG", "STG"))}
        narrow = {op for op in loads if not op.endswith(".128")}
        assert narrow == ({"LDG.E.64"} if name == "rotate_and_store" else set()), (name, loads)
        assert not [op for op in found if op.startswith(SPILLS)], (name, found)
        assert found["SHFL.BFLY"] == 0 or name == "norm"
