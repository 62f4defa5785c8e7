"""The kernels for GPUs: what they compute, in Triton's interpreter, and what they are compiled to for cards."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import compiled_for
import interpreted
import pytest
import torch
from ranks import JOB_TIMEOUT_S, SERVER, alone

from llama_mp import compiled, cuda

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Calls functions of interpreted.py in a process of their own."""
    with SERVER.Pool(1, initializer=interpreted.start) as pool:
        yield lambda function, *args, **named: pool.apply_async(function, args, named).get(JOB_TIMEOUT_S)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_products_of_one_row(run: Run, kind: str) -> None:
    """Rows and columns that are no whole number of blocks; columns of one block, and of several."""
    for rows, cols in ((21, 576), (3, 1376)):
        for normed, gated, added in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1)):
            assert run(interpreted.product, kind, rows, cols, normed=normed, gated=gated, added=added) <= 1e-5
    if kind.startswith("int"):  # whose rows are filled up
        assert run(interpreted.product, kind, 5, 37, normed=True, gated=True, added=True) <= 1e-5


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_products_of_several_rows(run: Run, kind: str) -> None:
    """(The interpreter knows no matrix product in bf16.)"""
    for num_tokens, rows, cols in ((2, 21, 576), (64, 33, 37)):
        assert run(interpreted.product_of_several, kind, "fp32", num_tokens, rows, cols) <= 1e-5
    assert run(interpreted.product_of_several, kind, "fp16", 33, 40, 576) <= 2e-3


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 80), (4, 6), (8, 128)])
def test_attention_of_rows_at_their_own_positions(run: Run, group: int, head_dim: int) -> None:
    """In one share, and in several, of which some have no positions; what is stored, and what is not touched."""
    for length, positions in ((100, [0, 99, 64]), (400, [0, 1, 399, 130])):
        assert run(interpreted.attention, group, head_dim, length, positions) <= 1e-5
    assert run(interpreted.attention, group, head_dim, 400, [200], "fp16") <= 2e-3


@pytest.mark.parametrize(("quant", "num_rows"), [("none", 3), ("int8", 3), ("int4", 1)])
def test_a_model_takes_the_same_step(run: Run, quant: str, num_rows: int) -> None:
    assert run(interpreted.model, quant, num_rows) <= 1e-5


# ---- where ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A card of the newest kind, without Triton."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    for function in (cuda.available, compiled.say_once):
        function.cache_clear()
    yield torch.device("cuda")
    for function in (cuda.available, compiled.say_once):
        function.cache_clear()


def test_without_triton_torch_does_it_and_says_so_once(card: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(cuda.steps_on(device) for device in (card, torch.device("cuda", 0), torch.device("cpu")))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no Triton" in said


def test_an_older_card_is_left_to_torch(
    card: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda, "try_one", lambda device: None)
    assert cuda.steps_on(card) and capsys.readouterr().err == ""
    cuda.available.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not cuda.steps_on(card) and "a newer card" in capsys.readouterr().err


def test_a_machine_that_cannot_compile_is_left_to_torch(
    card: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda, "try_one", Mock(side_effect=RuntimeError("Failed to find C compiler.\nMore of it")))
    assert not cuda.steps_on(card)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "does not run here (RuntimeError: Failed to find C compiler.)" in said


def test_not_where_torchs_algorithms_are_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda device: True)
    assert cuda.steps_on(torch.device("cpu"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not cuda.steps_on(torch.device("cpu"))


@pytest.mark.parametrize(
    ("num_programs", "length", "expected"),
    [(32, 4096, 9), (32, 384, 3), (8, 100, 1), (1, 1 << 20, 64), (2048, 4096, 1)],
)
def test_shares_of_attention_fill_a_card_and_no_more(
    monkeypatch: pytest.MonkeyPatch, num_programs: int, length: int, expected: int
) -> None:
    monkeypatch.setattr(cuda, "num_processors", lambda device: 132)
    assert cuda.splits(num_programs, length, torch.device("cuda")) == expected


# ---- for cards ---------------------------------------------------------------------------------------------------


def check(found: dict[str, compiled_for.Built]) -> None:
    """Memory is kept busy by what is copied ahead, and by several programs beside each other. Spills are traffic."""
    for name, built in found.items():
        assert built.spilled_bytes == 0, name
        if "fp32" not in name and not name.endswith("_kernel"):  # where arithmetic counts, or nothing is ahead
            widths = {4, 8, 16} if "of_one int4" in name else {16}  # of its ranges, codes and x
            assert built.widths == widths, f"{name}: copies of {built.widths} bytes"
        assert built.shared_bytes <= 99 * 1024, name  # of a program, on the smallest of these cards
        assert built.registers <= (168 if "of_one" in name else 255), name  # three programs of four warps


def test_compiled_without_spills_and_with_copies_of_16_bytes(tmp_path: Path) -> None:
    """The kernels that a step of 7B in bf16 starts most, for an H100, and those that need most registers."""
    several = [f"product_of_several int4 {rows}" for rows in ("32 bf16", "64 fp32")]
    found = alone(compiled_for.kernels_of_7b, 90, tmp_path, ["product_of_one bf16 normed", "attend 1", *several])
    assert len(found) == 4
    check(found)


def test_compiled_once_for_several_numbers_of_rows_and_of_shares() -> None:
    """For each size of a batch anew it would take a second, in the middle of an answer."""
    for names in ([f"product_of_several int8 {rows} bf16" for rows in (2, 16)], ["attend 1", "attend 3"]):
        assert alone(compiled_for.compilations, names) == 1


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_all_are_compiled_without_spills(capability: int, tmp_path: Path) -> None:
    check(alone(compiled_for.kernels_of_7b, capability, tmp_path))
