"""What a doctor is asked, what was found of the ranks and their machines, and which of it is a fault.

The measuring is in examine.py, the table in doctor_text.py. GiB = 2**30 bytes, as free and nvidia-smi count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, NamedTuple

from llama_mp.cores import threads_asked
from llama_mp.errors import RequestError, counted
from llama_mp.flags import Flags, check_at_least, flag
from llama_mp.gpus import GIB, MIB
from llama_mp.leftovers import Leftover

MAX_TIMEOUT_S = 600.0
SLOW = 4  # times the median of pairs of the same kind
LEAST_PAIRS = 3  # of which a median says something
FAST_ENOUGH_S = 1e-3  # a busy machine answers as late now and then
HOST_BYTES = GIB // 2  # a rank's own, torch imported and CUDA's libraries loaded
FREE_SHARE = 0.8  # of a GPU, with what the driver and one context take
SHM_BYTES = 1e9  # NCCL's documentation (Troubleshooting, Shared memory) starts containers with --shm-size=1g
LISTENING_ADVICE = (
    "ip -br address lists the interfaces for GLOO_SOCKET_IFNAME, ulimit -n how many sockets a process has"
)
LOOPBACK_ADVICE = (
    "the host's name stands for itself there (/etc/hosts): set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the "
    "interface that joins the nodes (ip -br address)"
)
MEMLOCK_BYTES = 64 * MIB  # less cannot hold the buffers that InfiniBand sends from


@dataclass(frozen=True, kw_only=True)
class DoctorFlags(Flags):
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "what the ranks are to compute on")
    step_timeout: float = flag(10.0, "seconds after which a step of the examination is given up")
    json: bool = flag(False, "print one JSON object instead of a table")
    mp: int | None = flag(None, "start this many ranks; default: torchrun's, or 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, step_timeout=1)
        threads_asked()  # wrong ones are refused before any rank starts
        if self.step_timeout > MAX_TIMEOUT_S:
            raise RequestError(f"--step_timeout is {self.step_timeout}, but must be at most {MAX_TIMEOUT_S:g}")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine, as its first rank sees it. `shm_bytes`: the size of /dev/shm. Limits are None where there is none."""

    name: str
    num_ranks: int
    torch: str
    cuda: str | None  # the version that torch was built for
    install_cuda: str  # the command for such a build
    has_nvidia: bool
    driver: str | None
    num_devices: int  # that torch sees
    free_bytes: int
    shm_bytes: int
    memlock_bytes: int | None
    has_infiniband: bool
    leftovers: list[Leftover]
    trouble: str | None = None  # what could not be looked at, and why

    @property
    def lacks_devices(self) -> bool:
        return self.num_devices < self.num_ranks


class Device(NamedTuple):
    rank: int
    name: str
    free_bytes: int
    total_bytes: int


class Pair(NamedTuple):
    """Two ranks: half of a message's way there and back, and how fast long ones go. `trouble`: why they are unknown."""

    ranks: tuple[int, int]
    latency_s: float | None = None
    bytes_per_s: float | None = None
    trouble: str | None = None


class Sum(NamedTuple):
    """An all-reduce over all ranks."""

    num_bytes: int
    seconds: float | None = None
    trouble: str | None = None


class Fault(NamedTuple):
    fault: str
    advice: str


@dataclass(kw_only=True)
class Findings:
    """What is known so far; the examination fills it in."""

    wanted: str  # --device
    hosts: list[Host] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # the host of each rank
    addresses: list[str | None] = field(default_factory=list)
    device: Literal["cpu", "cuda"] = "cpu"
    backend: str = "none"  # what carries the sums
    devices: list[Device] = field(default_factory=list)
    unreached: list[tuple[int, int, str]] = field(default_factory=list)  # from a rank, to a rank, why
    pairs: list[Pair] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    troubles: list[Fault] = field(default_factory=list)  # that ended a step
    silent: dict[int, str] = field(default_factory=dict)  # what is known of ranks that do not answer
    left_out: str | None = None  # what was not examined, and why

    @property
    def as_json(self) -> dict[str, Any]:
        told = faults(self)
        named = {
            "devices": [device._asdict() for device in self.devices],
            "pairs": [pair._asdict() for pair in self.pairs],
            "sums": [one._asdict() for one in self.sums],
            "unreached": [{"from": a, "to": b, "why": why} for a, b, why in self.unreached],
        }
        named["silent"] = [{"rank": rank, "why": why} for rank, why in self.silent.items()]
        named["troubles"] = [trouble._asdict() for trouble in self.troubles]
        hosts = [asdict(host) | {"leftovers": [left._asdict() for left in host.leftovers]} for host in self.hosts]
        found = asdict(self) | named | {"hosts": hosts}
        return {"healthy": not told, "faults": [fault._asdict() for fault in told]} | found

    def rank(self, number: int) -> str:
        return f"rank {number} on {self.places[number]}"

    def is_one_host(self, ranks: Sequence[int]) -> bool:
        return len({self.places[rank] for rank in ranks}) == 1


def faults(found: Findings) -> list[Fault]:
    """In the order in which they are worth being mended."""
    of_hosts = [fault for host in found.hosts for fault in (*of_devices(host, found), *of_memory(host, found))]
    return [*of_silence(found), *of_hosts, *of_gpus(found), *of_network(found), *of_pairs(found), *of_sums(found)]


def failure(found: Findings) -> str | None:
    """The error's text, None when nothing is wrong."""
    told = faults(found)
    return f"{counted(len(told), 'fault')} found: {told[0].fault}; {told[0].advice}" if told else None


# ---- each machine ----------------------------------------------------------------------------------------------------


def of_devices(host: Host, found: Findings) -> Iterator[Fault]:
    if found.wanted == "cpu":
        return
    wants_gpu = found.wanted == "cuda" or host.has_nvidia
    if host.cuda is None and wants_gpu:
        yield Fault(f"{host.name}: torch {host.torch} is a CPU build, which uses no GPU", host.install_cuda)
    elif host.num_devices == 0 and wants_gpu:
        yield Fault(
            f"{host.name}: torch {host.torch} for CUDA {host.cuda} finds no GPU (driver {host.driver or 'absent'})",
            "see whether nvidia-smi works there and its CUDA version is as new; in Docker, start with --gpus all",
        )
    elif 0 < host.num_devices < host.num_ranks:
        yield Fault(
            f"{host.name}: {counted(host.num_ranks, 'rank')}, but {counted(host.num_devices, 'CUDA device')}",
            f"start {counted(host.num_devices, 'rank')} there, give --device cpu, or look at CUDA_VISIBLE_DEVICES",
        )


def of_memory(host: Host, found: Findings) -> Iterator[Fault]:
    if host.trouble:
        yield Fault(f"{host.name}: {host.trouble}", "mend that first: more may be behind it")
    if host.free_bytes < host.num_ranks * HOST_BYTES:
        yield Fault(
            f"{host.name}: {host.free_bytes / GIB:.1f} GiB of main memory are free for {host.num_ranks} ranks",
            "end what holds it (ps aux --sort -rss)",
        )
    for kind, name, held_bytes, remedy in host.leftovers:
        what = "was left by an earlier run" if kind != "GPU process" else "computes there"
        yield Fault(f"{host.name}: {kind} {name} {what} and holds {held_bytes / GIB:.2f} GiB", remedy)
    if found.device == "cuda" and host.num_ranks > 1 and host.shm_bytes < SHM_BYTES:
        yield Fault(
            f"{host.name}: /dev/shm has {host.shm_bytes / MIB:.0f} MiB, in which NCCL's ranks meet",
            "docker run --shm-size=1g (or --ipc=host); outside of containers mount -o remount,size=1g /dev/shm",
        )
    needs_lock = found.device == "cuda" and host.has_infiniband and len(found.hosts) > 1
    if needs_lock and host.memlock_bytes is not None and host.memlock_bytes < MEMLOCK_BYTES:
        yield Fault(
            f"{host.name}: a process may lock {host.memlock_bytes / MIB:.1f} MiB, too little for InfiniBand",
            "ulimit -l unlimited, for the scheduler's daemon too; in Docker --ulimit memlock=-1",
        )


def of_gpus(found: Findings) -> Iterator[Fault]:
    for rank, name, free_bytes, total_bytes in found.devices:
        if free_bytes < FREE_SHARE * total_bytes:
            yield Fault(
                f"{found.rank(rank)}: {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB are free on its {name}",
                "nvidia-smi lists who holds the rest; end what an earlier run has left",
            )


# ---- between the ranks -----------------------------------------------------------------------------------------------


def of_silence(found: Findings) -> Iterator[Fault]:
    for rank, why in found.silent.items():
        yield Fault(f"{found.rank(rank)} does not answer: {why}", "look at that machine, and start again")


def of_network(found: Findings) -> Iterator[Fault]:
    alike: dict[tuple[str, str, bool], list[tuple[int, int, str]]] = {}
    for rank, other, why in found.unreached:  # a firewall parts all ranks of two hosts
        kind = found.places[rank], found.places[other], rank == other
        alike.setdefault(kind, []).append((rank, other, why))
    for (_, _, is_own), [(rank, other, why), *more] in alike.items():
        if is_own:
            what, advice = f"{found.rank(rank)} cannot listen: {why}", LISTENING_ADVICE
        else:
            what = f"{found.rank(rank)} does not reach {found.rank(other)} at {found.addresses[other]}: {why}"
            is_inside = found.is_one_host((rank, other))
            is_loopback = (found.addresses[other] or "").startswith("127.")
            advice = LOOPBACK_ADVICE if is_loopback and not is_inside else connections_advice(is_inside)
        yield Fault(what + (f"; {len(more)} more like it there" if more else ""), advice)
    yield from found.troubles


def connections_advice(is_one_host: bool) -> str:
    if is_one_host:
        return "set GLOO_SOCKET_IFNAME=lo, or look at the firewall and the container's network"
    return "open the firewall between the nodes, or name their common interface in GLOO_SOCKET_IFNAME"


def carrier_advice(found: Findings, ranks: Sequence[int]) -> str:
    """What to try when what carries data between `ranks` fails, hangs or crawls."""
    if found.device == "cpu":
        return "end what else runs on these cores" if found.is_one_host(ranks) else connections_advice(False)
    if found.is_one_host(ranks):
        return (
            "NCCL_P2P_DISABLE=1 (cards that do not reach each other's memory: ACS or IOMMU in the BIOS), then "
            "NCCL_SHM_DISABLE=1; NCCL_DEBUG=INFO tells the way taken"
        )
    return (
        "NCCL_SOCKET_IFNAME to the interface that joins the nodes (ip -br address), NCCL_IB_DISABLE=1 to leave "
        "InfiniBand out, ulimit -l unlimited"
    )


def of_pairs(found: Findings) -> Iterator[Fault]:
    for pair in found.pairs:
        if pair.trouble:
            what = f"between {found.rank(pair.ranks[0])} and {found.rank(pair.ranks[1])}: {pair.trouble}"
            yield Fault(what, carrier_advice(found, pair.ranks))
    for pair, why in slow_pairs(found):
        what = f"{found.rank(pair.ranks[0])} and {found.rank(pair.ranks[1])} are slow: {why}"
        yield Fault(what, carrier_advice(found, pair.ranks))


def slow_pairs(found: Findings) -> Iterator[tuple[Pair, str]]:
    """Pairs several times slower than the median of their kind: within a host, or between hosts."""
    whole = [pair for pair in found.pairs if not pair.trouble]
    for is_inside in (True, False):
        alike = [pair for pair in whole if found.is_one_host(pair.ranks) is is_inside]
        if len(alike) < LEAST_PAIRS:
            continue
        usual_s, usual_rate = (median(pair[index] for pair in alike) for index in (1, 2))
        for pair in alike:
            if pair.latency_s > max(SLOW * usual_s, FAST_ENOUGH_S):
                yield pair, f"{pair.latency_s * 1e6:.0f} us a message, where {usual_s * 1e6:.0f} are usual"
            elif SLOW * pair.bytes_per_s < usual_rate:
                yield pair, f"{pair.bytes_per_s / 1e9:.2f} GB/s, where {usual_rate / 1e9:.2f} are usual"


def of_sums(found: Findings) -> Iterator[Fault]:
    everyone = range(len(found.places))
    for num_bytes, _, trouble in found.sums:
        if trouble:
            yield Fault(
                f"all-reduce of {num_bytes} bytes over {found.backend}: {trouble}", carrier_advice(found, everyone)
            )
