"""Run records: one JSON file for each run with --record, which names no host and no user."""

import fcntl
import getpass
import os
import platform
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from llama_mp.cores import cores_at_hand
from llama_mp.errors import LAUNCHED, RequestError
from llama_mp.files import json_bytes, write_whole
from llama_mp.flags import Flags, flag, texts_given

RUNS = Path("docs/runs")
PRIVATE_TEXTS = ("prompt", "system", "stop")  # flags whose values are somebody's words
# What the firmware of well-known clouds calls itself (dmidecode, system-manufacturer).
CLOUDS = {
    "Amazon EC2": "AWS",
    "Google": "Google Cloud",
    "Microsoft Corporation": "Azure",
    "DigitalOcean": "DigitalOcean",
    "Hetzner": "Hetzner",
    "OpenStack Foundation": "OpenStack",
}
LAPTOP_CHASSIS = {"8", "9", "10", "14", "31", "32"}  # SMBIOS specification 3.6, 7.4.1
DMI = Path("/sys/class/dmi/id")
CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))


@dataclass(frozen=True, kw_only=True)
class RecordConfig(Flags):
    """For the verbs that run a model."""

    record: Path | None = flag(None, f"write a JSON record of the run into a folder; alone: {RUNS}", bare=str(RUNS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.record is not None:
            there = next(folder for folder in (self.record, *self.record.absolute().parents) if folder.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                raise RequestError(f"--record {self.record}: {there} is no folder that can be written; give another")


def save(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write `record` into a new file of `folder`, which appears whole and replaces none."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)  # another run may be choosing the same name
        path = free_name(folder, stem(record))
        write_whole(path, json_bytes(record))
    finally:
        os.close(opened)
    return path


def stem(record: Mapping[str, Any]) -> str:
    parts = [record["size"], f"mp{record['mp']}", record["device"], record["dtype"], record["date"]]
    return "-".join(re.sub("[^a-z0-9.]+", "-", part.lower()).strip("-.") for part in parts)


def free_name(folder: Path, name: str) -> Path:
    path, count = folder / f"{name}.json", 1
    while path.exists():
        count += 1
        path = folder / f"{name}-{count}.json"
    return path


# ---- what is told of the machine and the command -----------------------------------------------------------------


def environment(versions: Mapping[str, str]) -> dict[str, Any]:
    """The kind of machine, its CPU, the cores at hand, and `versions` beside Python's."""
    return {
        "kind": kind_of_machine(),
        "cpu": cpu_name(),
        "cores": cores_at_hand(),
        "versions": {"python": platform.python_version(), **versions},
    }


def kind_of_machine() -> str:
    """What the kernel and the firmware tell: a job of SLURM, a container, a known cloud, a laptop."""
    vendor, chassis = first_line(DMI / "sys_vendor"), first_line(DMI / "chassis_type")
    is_virtual = "hypervisor" in cpu_fields().get("flags", "").split()
    kinds = ["SLURM"] if "SLURM_JOB_ID" in os.environ else []
    kinds += ["container"] if any(mark.exists() for mark in CONTAINER_MARKS) else []
    if is_virtual:
        kinds.append(f"cloud VM ({CLOUDS[vendor]})" if vendor in CLOUDS else "virtual machine")
    else:
        kinds.append("laptop" if chassis in LAPTOP_CHASSIS else "physical machine")
    return ", ".join(kinds)


def first_line(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""


def cpu_fields() -> dict[str, str]:
    """The first core as /proc/cpuinfo describes it."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name() -> str:
    return cpu_fields().get("model name", platform.machine())


def host_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def command_of(flags: Flags, ranks: int) -> str:
    """The command that makes this run again: flags that differ from their defaults, paths shortened, texts left out."""
    script = f"launch/{Path(sys.argv[0]).name}"
    by_itself = ranks == 1 or LAUNCHED in os.environ
    words = ["python", script] if by_itself else ["torchrun", f"--nproc_per_node={ranks}", script]
    for name, text in texts_given(flags):
        if name in ("record", "json", "output") or (name == "mp" and not by_itself):
            continue
        words.append(f"--{name}")
        if text is not None:
            words.append("..." if name in PRIVATE_TEXTS else quoted(without_names(text)))
    return " ".join(words)


def quoted(text: str) -> str:
    """`text` for a shell, which expands a ~ at its beginning."""
    if text == "~":
        return text
    return f"~/{shlex.quote(text[2:])}" if text.startswith("~/") else shlex.quote(text)


def without_names(text: str) -> str:
    """`text` with a path under the home folder begun with ~, another absolute path cut to its last part, and the names
    of the user and the host left out wherever they stand."""
    home = os.path.expanduser("~")
    if text == home or text.startswith(home + os.sep):
        text = "~" + text[len(home) :]
    elif text.startswith(os.sep):
        text = f".../{Path(text).name}"
    for name in filter(None, {getpass.getuser(), socket.gethostname(), socket.gethostname().split(".")[0]}):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "...", text)
    return text


def today() -> str:
    return date.today().isoformat()
