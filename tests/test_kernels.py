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
WITH_FP32 = PACKS | {"fp32": lambda weight: weight}
MANY_SHAPES = [(77, 100, 9), (1, 2, 17), (24, 1030, 33), (50, 4134, 64), (3, 71, 70), (25, 2048, 130)]
SHAPES = [(1, 2), (3, 8), (5, 35), (16, 64), (96, 576), (331, 130), (7, 4096), (50, 1000)]


@pytest.fixture(params=["x86-64", "x86-64-v3", "native"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels as built for a machine with neither AVX2 nor AVX-512, for one with AVX2, and for this one."""
    option = f"-march={request.param}"
    if request.param == "x86-64-v3" and not {"avx2", "fma"} <= cpu_features():
        pytest.skip("this machine has no AVX2")
    monkeypatch.setattr(kernels, "NATIVE", option)
    forget_libraries()
    assert kernels.load_kernels() is library_of(kernels.SOURCE, option)
    assert kernels.load_many_rows() is library_of(kernels.MANY_ROWS, option)
    yield request.param
    forget_libraries()


def forget_libraries() -> None:
    kernels.load_kernels.cache_clear()
    kernels.load_many_rows.cache_clear()


def multiplies_pairs() -> bool:
    """Whether the kernels as built do, or the machine has nothing that does."""
    return kernels.fast_bf16() is None or (
        kernels.fast_bf16() == "pairs" and kernels.load_many_rows().multiplies_pairs()
    )


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


def test_int4_takes_x_rounded_where_the_run_is_in_bf16_and_the_machine_multiplies_it(machine: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, cols in SHAPES:
        packed = PACKS["int4"](torch.randn(rows, cols, generator=generator))
        for num_rows in (1, 3, kernels.MAX_ROWS):
            x = torch.randn(num_rows, cols, generator=generator)
            rounded = x.bfloat16() if kernels.load_many_rows().multiplies_pairs() else x
            found, expected = kernels.linear(x, packed, torch.bfloat16), rounded.double() @ exact(packed, cols).T
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6 * cols)
    assert kernels.kind_of(torch.uint8, torch.float32) == kernels.KINDS[torch.uint8]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PACKS)
def test_rows_do_not_depend_on_each_other(machine: str, kind: str, precision: torch.dtype) -> None:
    weight, x = PACKS[kind](torch.randn(50, 70)), torch.randn(kernels.MAX_ROWS, 70)
    alone = [kernels.linear(x_1C, weight, precision) for x_1C in x.split(1)]
    for count in range(1, kernels.few_rows(weight.dtype, precision) + 1):
        assert torch.equal(kernels.linear(x[:count], weight, precision), torch.cat(alone[:count]))


@pytest.mark.parametrize("by", ["torch", "pairs", None])
@pytest.mark.parametrize("kind", WITH_FP32)
def test_many_rows(machine: str, monkeypatch: pytest.MonkeyPatch, kind: str, by: str | None) -> None:
    """Columns and rows of more and less than what is computed at once; on machines that multiply bf16 and on others."""
    monkeypatch.setattr(kernels, "fast_bf16", lambda: by)
    monkeypatch.setattr(kernels, "PRODUCT_BYTES", {"cpu": 4000})
    for rows, cols, num_rows in MANY_SHAPES:
        weight = WITH_FP32[kind](torch.randn(rows, cols))
        x = torch.randn(num_rows, cols)
        found, expected = kernels.linear(x, weight, torch.bfloat16), x.double() @ exact(weight, cols).T
        error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert found.dtype is torch.float32
        assert error < (1e-2 if by and kind != "fp32" else 2e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WITH_FP32)
def test_many_rows_do_not_depend_on_each_other_nor_on_threads(machine: str, kind: str, precision: torch.dtype) -> None:
    weight = WITH_FP32[kind](torch.randn(60, 2100))
    x, threads = torch.randn(100, 2100), torch.get_num_threads()
    found = kernels.linear_of_many(x, weight, precision)
    assert (found is None) == (precision is torch.bfloat16 and kind != "fp32" and not multiplies_pairs())
    if found is None:
        return  # torch's, which promises nothing
    try:
        for num_threads, rows in ((1, slice(0, 16)), (3, slice(7, 60)), (1, slice(90, 100))):
            torch.set_num_threads(num_threads)
            assert torch.equal(kernels.linear_of_many(x[rows], weight, precision), found[rows])
            assert torch.equal(kernels.linear_of_many(x, weight[24:], precision), found[:, 24:])
    finally:
        torch.set_num_threads(threads)


def test_many_rows_of_weights_that_are_not_finite_show(machine: str) -> None:
    weight = torch.ones(4, 64).bfloat16()
    weight[0, 3], weight[1, 5], weight[2, 7] = float("nan"), float("inf"), float("-inf")
    found = kernels.linear(torch.ones(20, 64), weight)
    assert found[:, 0].isnan().all()
    assert found[:, 1:].unique(dim=0).tolist() == [[float("inf"), float("-inf"), 64.0]]


@pytest.mark.parametrize("kind", PACKS)
def test_a_run_in_fp32_rounds_nothing(kind: str) -> None:
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


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_takes_columns_of_a_wider_matrix(machine: str, kind: str) -> None:
    """Beside them lies what is none of theirs; behind the last of them, nothing."""
    weight, wide = WITH_FP32[kind](torch.randn(16, 36)), WITH_FP32[kind](torch.full((16, 100), float("nan")))
    wide[:, 64:] = weight
    for num_rows in (2, 20):
        x = torch.randn(num_rows, 36)
        assert torch.equal(kernels.linear(x, wide[:, 64:]), kernels.linear(x, weight))
        wide[:, 20:56] = weight
        assert torch.equal(kernels.linear(x, wide[:, 20:56]), kernels.linear(x, weight))
    row = weight[3:4].t().clone().t()  # contiguous, though a step from row to row is one element
    assert torch.equal(kernels.linear(x[:2], row), kernels.linear(x[:2], weight[3:4]))


@pytest.mark.parametrize("num_rows", [2, 20])
def test_columns_that_are_no_neighbours_are_refused(num_rows: int) -> None:
    with pytest.raises(AssertionError):
        kernels.linear(torch.ones(num_rows, 8), torch.ones(8, 4, dtype=torch.bfloat16).t())


def test_results_lie_beside_their_factors_whatever_torchs_default_device_is(machine: str) -> None:
    x, weight = torch.randn(20, 64), torch.randn(16, 64).bfloat16()
    expected = kernels.linear(x, weight)
    with torch.device("meta"):
        found = kernels.linear(x, weight)
    assert torch.equal(found, expected)


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
        kernels.linear_by_torch(torch.empty(70, 11008, dtype=torch.half, device=DEVICE), weight, torch.half)
    parts = [call.args[0] for call in multiply.call_args_list]
    assert len(parts) == 6 and sum(part.shape[1] for part in parts) == 4096
    assert all(part.storage_offset() * part.element_size() % 16 == 0 for part in parts)
