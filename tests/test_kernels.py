"""The compiled matrix products against torch in fp64, and how they are built."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from fake_cuda import DEVICE, fake_cuda

from llama_mp import kernels, quant
from llama_mp.compiled import library_of
from llama_mp.cores import cpu_features

Pack = Callable[[torch.Tensor], torch.Tensor]
PACKS: dict[str, Pack] = {
    "bf16": lambda weight: weight.bfloat16(),
    "int8": lambda weight: quant.pack(weight, "int8"),
    "int4": lambda weight: quant.pack(weight, "int4"),
}
SHAPES = [(1, 2), (3, 8), (5, 34), (16, 64), (96, 576), (331, 130), (7, 4096), (50, 1000)]


@pytest.fixture(params=["x86-64", "x86-64-v3", "native"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels as built for a machine with neither AVX2 nor AVX-512, for one with AVX2, and for this one."""
    option = f"-march={request.param}"
    if request.param == "x86-64-v3" and not {"avx2", "fma"} <= cpu_features():
        pytest.skip("this machine has no AVX2")
    monkeypatch.setattr(kernels, "NATIVE", option)
    kernels.load_kernels.cache_clear()
    assert kernels.load_kernels() is library_of(kernels.SOURCE, option)
    yield request.param
    kernels.load_kernels.cache_clear()


def exact(packed: torch.Tensor, num_cols: int) -> torch.Tensor:
    return packed.double() if packed.is_floating_point() else quant.dequantize(packed, num_cols, torch.float32).double()


@pytest.mark.parametrize("kind", PACKS)
def test_equals_the_product_in_fp64(machine: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, cols in SHAPES:
        packed = PACKS[kind](torch.randn(rows, cols, generator=generator))
        for num_rows in (1, 2, 3, 5, kernels.MAX_ROWS):
            x = torch.randn(num_rows, cols, generator=generator)
            expected = x.double() @ exact(packed, cols).T
            found = kernels.linear(x, packed)
            assert found.dtype is torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6 * cols)


@pytest.mark.parametrize("kind", PACKS)
def test_rows_do_not_depend_on_each_other(machine: str, kind: str) -> None:
    weight, x = PACKS[kind](torch.randn(50, 70)), torch.randn(kernels.MAX_ROWS, 70)
    for count in range(1, kernels.MAX_ROWS + 1):
        together = kernels.linear(x[:count], weight)
        assert all(torch.equal(together[i : i + 1], kernels.linear(x[i : i + 1], weight)) for i in range(count))


@pytest.mark.parametrize("fast_bf16", [False, True])
@pytest.mark.parametrize("kind", PACKS)
def test_many_rows(machine: str, monkeypatch: pytest.MonkeyPatch, kind: str, fast_bf16: bool) -> None:
    """By torch's products, with the weight unpacked some rows at a time."""
    monkeypatch.setattr(kernels, "has_fast_bf16", lambda: fast_bf16)
    monkeypatch.setattr(kernels, "PRODUCT_BYTES", {"cpu": 4000})
    weight, x = PACKS[kind](torch.randn(77, 100)), torch.randn(kernels.MAX_ROWS + 1, 100)
    found, expected = kernels.linear(x, weight, torch.bfloat16), x.double() @ exact(weight, 100).T
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert found.dtype is torch.float32
    assert error < (1e-2 if fast_bf16 else 1e-6)


@pytest.mark.parametrize("kind", PACKS)
def test_a_run_in_fp32_rounds_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(kernels, "has_fast_bf16", lambda: True)
    weight, x = PACKS[kind](torch.randn(77, 100)), torch.randn(40, 100)
    found = kernels.linear(x, weight, torch.float32)
    torch.testing.assert_close(found.double(), x.double() @ exact(weight, 100).T, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_unpacks_as_quant_does(machine: str, kind: str) -> None:
    for cols in (2, 70, 96, 1000):
        packed = PACKS[kind](torch.randn(9, cols))
        expected = quant.dequantize(packed, cols, torch.float32)
        torch.testing.assert_close(kernels.unpacked(packed, cols, torch.float32), expected, rtol=1e-6, atol=1e-6)


def test_weights_that_are_not_finite_show() -> None:
    weight = torch.ones(4, 64).bfloat16()
    weight[0, 3], weight[1, 5], weight[2, 7] = float("nan"), float("inf"), float("-inf")
    found = kernels.linear(torch.ones(1, 64), weight)[0]
    assert found.isnan().tolist() == [True, False, False, False]
    assert found[1:].tolist() == [float("inf"), float("-inf"), 64.0]


def test_takes_views_that_are_not_contiguous() -> None:
    x = torch.randn(2, 128)[:, ::2]
    weight = torch.randn(16, 64).bfloat16()
    assert torch.equal(kernels.linear(x, weight), kernels.linear(x.contiguous(), weight))


def test_the_product_is_fp32_whatever_torchs_default_type_is() -> None:
    """A caller that makes it bf16, as Meta's own code does, would have the kernels write beyond their result."""
    x, weight, default = torch.randn(2, 64), torch.randn(16, 64).bfloat16(), torch.get_default_dtype()
    expected = kernels.linear(x, weight)
    torch.set_default_dtype(torch.float64)
    try:
        found = kernels.linear(x, weight)
    finally:
        torch.set_default_dtype(default)
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_the_same_type_are_torchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 8).to(dtype), torch.randn(4, 8).to(dtype)
    assert torch.equal(kernels.linear(x, weight), torch.nn.functional.linear(x, weight))


SCRIPT = """
import torch
from llama_mp import kernels
kernels.linear(torch.ones(1, 4), torch.ones(2, 4, dtype=torch.bfloat16))
print(kernels.linear(torch.ones(1, 4), torch.ones(2, 4, dtype=torch.bfloat16)).tolist())
"""


def run_with(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_built_once_into_a_folder_of_the_users_own(tmp_path: Path) -> None:
    done = [run_with(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    assert [d.stdout for d in done] == ["[[4.0, 4.0]]\n"] * 2
    assert [d.stderr for d in done] == ["", ""]
    folder = tmp_path / "llama-mp"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.glob("kernels-*.so"))) == 1
    assert {path.suffix for path in folder.iterdir()} == {".so", ".lock"}


def test_without_a_compiler_torch_does_it_and_says_so_once(tmp_path: Path) -> None:
    done = run_with(XDG_CACHE_HOME=str(tmp_path), CC="no-such-compiler")
    assert done.stdout == "[[4.0, 4.0]]\n"
    assert done.stderr.count("\n") == 1
    assert "no C compiler" in done.stderr


def test_a_compilers_error_is_told_and_not_the_caret_below_it(tmp_path: Path) -> None:
    done = run_with(XDG_CACHE_HOME=str(tmp_path), CC="cc -include no-such-file.h")
    assert done.stdout == "[[4.0, 4.0]]\n"
    assert "no-such-file.h: No such file" in done.stderr


def test_a_blank_name_of_the_compiler_is_none(tmp_path: Path) -> None:
    done = run_with(XDG_CACHE_HOME=str(tmp_path), CC=" ")
    assert (done.stdout, done.stderr) == ("[[4.0, 4.0]]\n", "")


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "llama-mp"
    folder.mkdir()
    folder.chmod(0o777)
    done = run_with(XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout == "[[4.0, 4.0]]\n"
    assert "can be written by others" in done.stderr


def test_parts_of_a_gpus_product_begin_where_it_can_write_16_bytes() -> None:
    """Of 762 rows of w2 at a time in 7B, every second part would begin elsewhere."""
    with fake_cuda(), patch.object(kernels, "multiply_into") as multiply:
        weight = quant.empty_packed(torch.empty(4096, 11008, device=DEVICE), "int8")
        kernels.linear_of_many(torch.empty(70, 11008, dtype=torch.half, device=DEVICE), weight, torch.half)
    parts = [call.args[0] for call in multiply.call_args_list]
    assert len(parts) == 6 and sum(part.shape[1] for part in parts) == 4096
    assert all(part.storage_offset() * part.element_size() % 16 == 0 for part in parts)
