"""What earlier runs have left is found, and what still has its use is not."""

import mmap
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_mp import leftovers


def test_a_rank_is_left_when_who_started_it_is_gone(tmp_path: Path) -> None:
    script = tmp_path / "launch" / "infer.py"
    script.parent.mkdir()
    script.write_text("held = bytes(range(256)) * 40_000\nprint(flush=True)\nimport time\ntime.sleep(60)\n")
    starter = subprocess.Popen(
        ["sh", "-c", '"$0" "$1" --prompt secret & echo $!; read line', sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "test"},
        text=True,
    )
    pid = int(starter.stdout.readline())
    try:
        assert starter.stdout.readline() == "\n"  # it runs, and holds its memory

        def found() -> list[leftovers.Leftover]:
            return [left for left in leftovers.lost_ranks() if left.name.startswith(f"{pid} ")]

        assert found() == []
        starter.stdin.close()
        starter.wait()
        [left] = found()
        assert left.name == f"{pid} ({script})" and left.kind == "process"
        assert left.held_bytes > 10e6
        assert left.remedy == f"kill -9 {pid}"
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_process_that_torchrun_has_not_started_is_nobodys_leftover() -> None:
    assert not any(re.match(rf"{os.getpid()} ", left.name) for left in leftovers.lost_ranks())


def test_shared_memory_that_nobody_has_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "SHM", tmp_path)
    for name in ("torch_123_45_0", "nccl-AbCdEf", "other"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 32)
    with (tmp_path / "torch_123_45_0").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert [left.name for left in leftovers.unused_files()] == [str(tmp_path / "nccl-AbCdEf")]
    found = list(leftovers.unused_files())
    assert [Path(left.name).name for left in found] == ["nccl-AbCdEf", "torch_123_45_0"]
    assert found[0].remedy == f"rm {tmp_path}/nccl-AbCdEf"
    monkeypatch.setattr(leftovers, "SHM", tmp_path / "absent")
    assert list(leftovers.unused_files()) == []


def test_processes_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(leftovers.gpu_processes()) == []
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '123, /usr/bin/python3, 2048'\necho '124, [Not Found], [N/A]'\n")
    smi.chmod(0o755)
    [left] = leftovers.gpu_processes()
    assert (left.kind, left.name, left.held_bytes) == ("GPU process", "123 (/usr/bin/python3)", 2 << 30)


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (dvs-builder@U16)",
    ],
)
def test_the_drivers_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(leftovers, "DRIVER", tmp_path / "version")
    assert leftovers.driver_version() is None
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.2.0\n")
    assert leftovers.driver_version() == "550.54.15"
