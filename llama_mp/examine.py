"""A doctor's examination, step by step: each machine, its devices, what is between the ranks.

What was found before a rank fell silent is reported all the same, by the first rank that answers.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llama_mp import deaths, errors, machine
from llama_mp.doctor import Device, DoctorFlags, Fault, Findings, Host, failure
from llama_mp.errors import DONE, RunError
from llama_mp.fit import free_host_bytes
from llama_mp.leftovers import SHM, SMI_TIMEOUT_S, Leftover, driver_version, leftovers
from llama_mp.network import look_at_ports, measure_network
from llama_mp.ward import Patient, Silence, Ward, close, enter
from llama_mp.world import is_first_to_speak

START_S = 60.0  # for ranks to import torch beside each other
SPEAK_S = 5.0
INFINIBAND = Path("/sys/class/infiniband")


def examine(flags: DoctorFlags, show: Callable[[Findings], None]) -> int:
    """Examine this world; one rank shows what was found. Returns the exit code, or ends the process with it where
    something is wrong, since a thread of it may hang."""
    ward = enter(flags.step_timeout)
    ward.hear_torchrun()
    found = diagnose(ward, flags.device)
    if failure(found) is None:
        if ward.world.is_leader:
            show(found)
        close()
        return DONE
    is_first = next(rank for rank in range(ward.world.size) if rank not in found.silent) == ward.world.rank
    code = errors.RUN_FAILED
    if is_first and is_first_to_speak(ward.world.store, ward.world.rank):
        show(found)
        sys.stdout.flush()
        errors.set_speaker(lambda: True)
        code = errors.report(RunError(failure(found)))
        ward.world.store.set("doctor/said", "")
    else:
        ward.wait_for("doctor/said", SPEAK_S)  # torchrun ends all ranks when one has ended
    sys.stderr.flush()
    ward.end_silent(list(found.silent))
    os._exit(code)


def diagnose(ward: Ward, wanted: str) -> Findings:
    found = Findings(wanted=wanted, places=["an unknown host"] * ward.world.size)
    try:
        meet(ward, found)
        look_at_hosts(ward, found)
        look_at_devices(ward, found)
        if ward.world.size > 1:
            look_at_ports(ward, found)
            if found.unreached:
                found.left_out = "messages and sums, until all ranks reach each other"
            else:
                measure_network(ward, found)
    except Silence as silence:
        for rank in silence.ranks:
            found.silent[rank] = f"{ward.why_silent(rank)} (in {silence.step})"
        found.left_out = f"what follows {silence.step}"
    return found


def meet(ward: Ward, found: Findings) -> None:
    def introduce() -> Patient:
        return Patient(deaths.own_host(), os.getpid(), deaths.born(os.getpid()))

    told = ward.together("the ranks' start", introduce, max(START_S, ward.limit_s))
    ward.patients = [Patient(*one.result) for one in told.values()]
    found.places = [patient.host for patient in ward.patients]


# ---- each machine and device -----------------------------------------------------------------------------------------


def look_at_hosts(ward: Ward, found: Findings) -> None:
    """By the first rank of each, and before any rank is a process on a GPU itself."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    name = found.places[ward.world.rank]

    def look() -> dict[str, Any] | None:
        return asdict(host(name, ward.world.local_size)) if is_first else None

    told = ward.together("the look at each host", look)
    for rank, (result, trouble, _) in told.items():
        if trouble:
            what = f"{found.rank(rank)}: its host cannot be looked at: {trouble}"
            found.troubles.append(Fault(what, "see the system's log there (dmesg)"))
        if result:
            found.hosts.append(Host(**result | {"leftovers": [Leftover(*left) for left in result["leftovers"]]}))


def host(name: str, num_ranks: int) -> Host:
    memlock_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    left, trouble = [], None
    try:
        left = leftovers()
    except subprocess.TimeoutExpired:
        trouble = f"nvidia-smi did not answer in {SMI_TIMEOUT_S:g} s: the driver hangs; reboot, or see dmesg"
    shm = os.statvfs(SHM) if SHM.is_dir() else None
    return Host(
        name=name,
        num_ranks=num_ranks,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        install_cuda=machine.cuda_remedy(),
        has_nvidia=machine.has_nvidia(),
        driver=driver_version(),
        num_devices=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        free_bytes=free_host_bytes(),
        shm_bytes=shm.f_frsize * shm.f_blocks if shm else 0,
        memlock_bytes=None if memlock_bytes == resource.RLIM_INFINITY else memlock_bytes,
        has_infiniband=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
        leftovers=left,
        trouble=trouble,
    )


def look_at_devices(ward: Ward, found: Findings) -> None:
    """All ranks go on with their GPUs, or all without."""
    if found.wanted == "cpu" or not found.hosts or any(host.lacks_devices for host in found.hosts):
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    def look() -> tuple[str, int, int]:
        return torch.cuda.get_device_name(device), *torch.cuda.mem_get_info(device)

    for rank, (result, trouble, _) in ward.together("the look at each GPU", look).items():
        if trouble:
            what = f"{found.rank(rank)}: its GPU does not answer: {trouble}"
            found.troubles.append(Fault(what, "nvidia-smi -q and dmesg (Xid) show its state; reset it, or reboot"))
        else:
            found.devices.append(Device(rank, *result))
    if len(found.devices) == ward.world.size:
        found.device, ward.world.device = "cuda", device
