"""The kernels for many rows on a GPU: in Triton's interpreter against torch, and as machine code."""

from pathlib import Path

import compiled_for
import numpy as np
import pytest
from factory import MODELS
from interpreted_rows import DIMS, HEADS, HIDDEN, Arrays, interpreted, prompts, steps
from ranks import alone


def test_steps_are_torchs() -> None:
    """The interpreter cuts bf16 off where a GPU rounds it to the nearest."""
    check(alone(interpreted, steps), exact={"values fp32", "values fp16", "values bf16", "sum fp32", "sum fp16"})


def check(found: Arrays, exact: set[str]) -> None:
    assert len(found) == 3 * (3 * len(HEADS) + len(HIDDEN) + 3 * len(DIMS))
    for name, (computed, expected) in found.items():
        step, dtype = name.split()[:2]
        rounding = 0 if f"{step} {dtype}" in exact else {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}[dtype]
        np.testing.assert_allclose(computed, expected, rtol=rounding, atol=rounding, err_msg=name)


def test_a_prompts_logits_are_torchs() -> None:
    chosen = {name: MODELS[name] for name in ("mha", "gqa", "heads-9-3")}
    for name, (computed, expected) in alone(interpreted, prompts, chosen).items():
        np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-4 * abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code_reads_16_bytes_at_a_time_and_spills_nothing(tmp_path: Path, capability: int) -> None:
    """Of 7B's shapes in bf16: each load is whole but that of the position and, in a norm, of the sums of its warps."""
    names = "rotate_and_store_kernel", "swiglu_kernel", "norm_kernel"
    for name, built in alone(compiled_for.kernels_of_7b, capability, tmp_path, names).items():
        loads = {op: count for op, count in built.instructions.items() if op.startswith(("LDG", "STG"))}
        narrow = {op for op in loads if not op.endswith(".128")}
        assert narrow == ({"LDG.E.64"} if name == names[0] else set()), (name, loads)
        assert built.spilled_bytes == 0, name
        assert built.instructions["SHFL.BFLY"] == 0 or name == "norm_kernel"
