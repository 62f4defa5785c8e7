"""Devices and precisions, decided without having them; cores and memory as the machine counts them."""

import re
from collections import namedtuple
from pathlib import Path

import held
import pytest
import torch
from ranks import alone

from llama_mp import machine
from llama_mp.config import RunConfig
from llama_mp.errors import RequestError

Gpu = namedtuple("Gpu", "count capability")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A machine that seems to have two older cards."""
    found = Gpu(count=2, capability=(7, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found.count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2080")
    return found


def test_local_rank_picks_the_device(gpu: Gpu) -> None:
    assert machine.choose_device("auto", 1, 2) == torch.device("cuda", 1)
    assert machine.choose_device("cpu", 1, 2) == torch.device("cpu")
    with pytest.raises(RequestError, match="3 ranks on this machine, but 2 CUDA devices"):
        machine.choose_device("auto", 2, 3)


def test_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_device("auto", 0, 8) == torch.device("cpu")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(RequestError, match="--device cuda, but no NVIDIA driver answers: see nvidia-smi"):
        machine.choose_device("cuda", 0, 1)


def test_a_torch_without_cuda_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "NVIDIA_FILES", (tmp_path / "driver", tmp_path / "nvidia0"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.unused_gpu("auto") is None
    install = "is a CPU build: pip install .* https://pypi.org/simple torch==2"
    with pytest.raises(RequestError, match=f"--device cuda, but this torch .* {install}"):
        machine.choose_device("cuda", 0, 1)
    (tmp_path / "nvidia0").touch()
    said = machine.unused_gpu("auto")
    assert re.match(f"the GPU of this machine is not used, this torch .* {install}", said) and "\n" not in said
    assert machine.unused_gpu("cpu") is None
    monkeypatch.setattr(torch.version, "cuda", "12.6")  # then a driver that does not answer is no fault of torch
    assert machine.unused_gpu("auto") is None


def test_nvidias_tools_tell_of_a_gpu_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "NVIDIA_FILES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not machine.has_nvidia()
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert machine.has_nvidia()


@pytest.mark.parametrize(
    ("wanted", "precision", "expected"),
    [
        ("auto", "fp16", torch.bfloat16),
        ("auto", "bf16", torch.bfloat16),
        ("auto", "fp32", torch.float32),
        ("fp16", "fp32", torch.float16),
        ("fp32", "bf16", torch.float32),
    ],
)
def test_dtype_on_a_cpu(wanted: str, precision: str, expected: torch.dtype) -> None:
    assert machine.choose_dtype(wanted, precision, torch.device("cpu")) == expected


def test_tf32_is_for_gpus() -> None:
    with pytest.raises(RequestError, match="use --dtype fp32"):
        machine.choose_dtype("tf32", "fp32", torch.device("cpu"))


def test_dtype_on_a_card_without_bf16(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    assert machine.choose_dtype("auto", "bf16", card) == torch.float16
    assert machine.choose_dtype("auto", "fp16", card) == torch.float16
    assert machine.choose_dtype("tf32", "fp32", card) == torch.float32
    assert torch.backends.cuda.matmul.allow_tf32
    machine.choose_dtype("fp32", "fp32", card)
    assert not torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(RequestError, match="RTX 2080 computes no bf16: use --dtype fp16"):
        machine.choose_dtype("bf16", "bf16", card)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores_at_hand", lambda: 6)
    assert [machine.threads_per_rank(n) for n in (1, 2, 4, 8)] == [6, 3, 1, 1]
    monkeypatch.setenv("LLAMA_MP_THREADS", "5")
    assert machine.threads_per_rank(4) == 5
    for wrong in ("many", "0", "-1", "1.5"):
        monkeypatch.setenv("LLAMA_MP_THREADS", wrong)
        with pytest.raises(RequestError, match=f"LLAMA_MP_THREADS is '{wrong}', but must be a whole number above 0"):
            RunConfig()


def test_peak_memory_is_remembered() -> None:
    most, left = alone(held.a_block_that_is_freed)
    assert 100e6 <= most < 110e6
    assert left < 10e6


def test_holes_between_tensors_are_given_back() -> None:
    """Without our settings malloc keeps all six: a larger block freed before makes it hold on to smaller ones."""
    kept, returned = (alone(held.freed_between_tensors, ours=ours) for ours in (False, True))
    assert kept < 10e6 < 45e6 < returned
