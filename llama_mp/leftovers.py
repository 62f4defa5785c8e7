"""What earlier runs have left on this machine and still holds memory: ranks without the torchrun that started them,
processes on its GPUs, files in /dev/shm that nobody uses. Looked at before the ranks of this run touch a GPU."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llama_mp.deaths import PROC
from llama_mp.gpus import MIB

SHM = Path("/dev/shm")
OURS = re.compile(rb"launch/\w+\.py|llama_mp")
STARTER = re.compile(rb"torchrun|torch\.distributed|" + OURS.pattern)  # in the command line of who starts ranks
RANK_OF_TORCHRUN = b"TORCHELASTIC_RUN_ID="
SHM_FILE = re.compile(r"torch_\d+_|nccl-|cuda\.shm\.")  # as torch and NCCL name theirs
COMPUTE_APPS = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"]
DRIVER = PROC / "driver" / "nvidia" / "version"
SMI_TIMEOUT_S = 8.0  # a driver that hangs is known by it


class Leftover(NamedTuple):
    """`kind`: "process", "GPU process" or "file"; `name`: its number and command, or its path."""

    kind: str
    name: str
    held_bytes: int
    remedy: str


def leftovers() -> list[Leftover]:
    return [*lost_ranks(), *gpu_processes(), *unused_files()]


def lost_ranks() -> Iterator[Leftover]:
    """Ranks of ours that torchrun started, and whose parent now is neither torchrun nor one of us."""
    for folder in PROC.glob("[0-9]*"):
        command = content(folder / "cmdline")
        if OURS.search(command) and RANK_OF_TORCHRUN in content(folder / "environ"):
            pid, status = int(folder.name), fields_of(folder)
            if status and not STARTER.search(content(PROC / status["PPid"] / "cmdline")):
                held = sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in status)
                yield Leftover("process", f"{pid} ({shown(command)})", held, f"kill -9 {pid}")


def gpu_processes() -> Iterator[Leftover]:
    """Whatever computes on this machine's GPUs, as far as this container sees it."""
    if shutil.which(COMPUTE_APPS[0]) is None:
        return
    listed = subprocess.run(COMPUTE_APPS, capture_output=True, text=True, timeout=SMI_TIMEOUT_S)
    for pid, name, mib in re.findall(r"^(\d+), (.+), (\d+)$", listed.stdout, re.MULTILINE):
        remedy = f"kill {pid} if nobody needs it, or wait for its end"
        yield Leftover("GPU process", f"{pid} ({name})", int(mib) * MIB, remedy)


def unused_files() -> Iterator[Leftover]:
    """Shared memory of torch and NCCL that belongs to this user and that no process has mapped."""
    if not SHM.is_dir():
        return
    found = [(file, file.stat()) for file in sorted(SHM.iterdir()) if SHM_FILE.match(file.name)]
    own = [(file, status.st_blocks * 512) for file, status in found if status.st_uid == os.getuid()]
    maps = b"".join(content(folder / "maps") for folder in PROC.glob("[0-9]*")) if own else b""
    for file, held in own:
        if os.fsencode(file) not in maps:
            yield Leftover("file", str(file), held, f"rm {file}")


def content(file: Path) -> bytes:
    """Nothing of a process that has ended, or that is another user's."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def fields_of(process: Path) -> dict[str, str]:
    """proc(5)'s status."""
    lines = content(process / "status").decode(errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def shown(command: bytes) -> str:
    """As a person would write it, cut short: prompts are nobody's business."""
    words = command.decode(errors="replace").split("\0")
    return next((word for word in words if OURS.search(word.encode())), words[0])


def driver_version() -> str | None:
    """Of the NVIDIA kernel module, such as 550.54.15."""
    found = re.search(rb"Kernel Module.*?\s(\d+\.[\d.]+)", content(DRIVER))
    return found[1].decode() if found else None
