"""The compiled matrix product against torch in fp64, and how it is built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_mp import kernels


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (3, 8), (4, 64), (5, 34), (96, 576), (331, 130), (7, 4096)])
def test_equals_the_product_in_fp64(num_rows: int, rows: int, cols: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, cols, generator=generator).bfloat16()
    x = torch.randn(num_rows, cols, generator=generator).bfloat16()
    exact = x.double() @ weight.double().T
    found = kernels.linear(x, weight)
    assert kernels.load_kernels() is not None
    assert found.dtype is torch.bfloat16
    # One rounding to bf16 (8 bits), and fp32 sums before it.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4 * cols**0.5)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, x = torch.randn(50, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    together = kernels.linear(x, weight)
    assert all(torch.equal(together[i : i + 1], kernels.linear(x[i : i + 1], weight)) for i in range(2))


def test_rounds_to_nearest_even_and_keeps_what_is_not_finite() -> None:
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1.0, 3.3e38, float("inf"), float("nan")])
    high = values.bfloat16()
    low = (values - high.float()).nan_to_num(0.0, 0.0, 0.0).bfloat16()
    weight = torch.stack([high, low], dim=1)  # high + low is the value, exactly
    found = kernels.linear(torch.ones(1, 2, dtype=torch.bfloat16), weight)[0]
    expected = (weight.float().sum(1)).bfloat16()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_takes_views_that_are_not_contiguous() -> None:
    x = torch.randn(2, 128).bfloat16()[:, ::2]
    weight = torch.randn(16, 64).bfloat16()
    torch.testing.assert_close(kernels.linear(x, weight), kernels.linear(x.contiguous(), weight), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_are_torchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 8).to(dtype), torch.randn(4, 8).to(dtype)
    assert torch.equal(kernels.linear(x, weight), torch.nn.functional.linear(x, weight))


SCRIPT = """
import torch
from llama_mp import kernels
kernels.linear(torch.ones(1, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16))
print(kernels.linear(torch.ones(1, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16)).tolist())
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


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "llama-mp"
    folder.mkdir()
    folder.chmod(0o777)
    done = run_with(XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout == "[[4.0, 4.0]]\n"
    assert "can be written by others" in done.stderr
