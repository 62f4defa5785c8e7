"""The table of cards: names forgiven and refused, figures that are possible, the card of this machine."""

from pathlib import Path

import pytest

from llama_mp import gpus
from llama_mp.errors import RequestError
from llama_mp.gpus import ALIASES, GPUS, find_gpu, gpu_of_this_machine, plain

GIB = 2**30


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_card_is_found_by_its_name_and_possible(gpu: gpus.Gpu) -> None:
    assert find_gpu(gpu.name) is gpu
    assert find_gpu(f"NVIDIA GeForce {gpu.name.lower()}") is gpu
    assert 4 * GIB <= gpu.usable_bytes < gpu.memory_bytes <= 192 * GIB
    assert 150e9 <= gpu.bandwidth_bytes_per_s <= 8e12
    assert "NVIDIA" in gpu.source
    # bf16 came with Ampere: no GTX, no RTX 20, no Turing Quadro, no Tesla
    older = gpu.name.startswith(("GTX", "RTX 20", "TITAN", "Quadro", "Tesla"))
    assert gpu.has_bf16 is not older


def test_names_are_there_once() -> None:
    assert len({plain(gpu.name) for gpu in GPUS}) == len(GPUS) >= 40
    assert not {plain(gpu.name) for gpu in GPUS} & {plain(alias) for alias in ALIASES}


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("2080", "RTX 2080"),
        ("rtx2080ti", "RTX 2080 Ti"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("Tesla V100-SXM2-32GB", "Tesla V100 32GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("t4", "Tesla T4"),
    ],
)
def test_what_people_and_drivers_call_a_card(asked: str, meant: str) -> None:
    assert find_gpu(asked).name == meant


def test_unknown_cards_name_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"--gpu RTX 3095 is not known; nearest: RTX 3090.*--vram_gib"):
        find_gpu("RTX 3095")
    with pytest.raises(RequestError, match="--gpu gtx 1060 is not known; nearest: GTX 1060 6GB;"):
        find_gpu("gtx 1060")
    with pytest.raises(RequestError, match="--gpu abacus is not known; known: GTX 1060 6GB, GTX 1070"):
        find_gpu("abacus")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "nvidia-smi"


def says(program: Path, text: str, code: int = 0) -> None:
    program.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
    program.chmod(0o755)


def test_the_card_of_this_machine(nvidia_smi: Path) -> None:
    assert gpu_of_this_machine() is None
    says(nvidia_smi, "NVIDIA GeForce RTX 3090, 24576\\nTesla T4, 15360\\n")
    found = gpu_of_this_machine()
    assert (found.name, found.memory_bytes) == ("NVIDIA GeForce RTX 3090", 24 * GIB)
    assert found.bandwidth_bytes_per_s == find_gpu("RTX 3090").bandwidth_bytes_per_s


def test_a_card_of_this_machine_that_is_not_in_the_table(nvidia_smi: Path) -> None:
    says(nvidia_smi, "NVIDIA Abacus, 1000\\n")
    assert gpu_of_this_machine().memory_bytes == 1000 * 2**20
    assert gpu_of_this_machine().bandwidth_bytes_per_s is None
    says(nvidia_smi, "NVIDIA-SMI has failed because it could not communicate with the driver", 9)
    assert gpu_of_this_machine() is None
