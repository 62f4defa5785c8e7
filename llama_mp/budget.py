"""What a run may take and what it will: how many blocks stay on the device while the others wait elsewhere.

Counted is what a rank allocates: weights, cache and activations. What a process takes besides (165 MB on a CPU) is not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llama_mp.advice import largest
from llama_mp.config import ModelConfig, RunConfig
from llama_mp.errors import RequestError, counted
from llama_mp.fit import Room, check_fits, free_host_bytes
from llama_mp.memory import BLOCK_SLOTS, RankMemory, num_streamed, rank_memory, waiting_bytes
from llama_mp.runtime import later_bytes
from llama_mp.workload import Workload

GIB = 2**30
ROUNDING = 1e4  # of GiB in errors: what they say is enough, to 0.1 MiB


@dataclass
class Fitting:
    """The memory of one rank of a run. `settle` it, then `check` each cache before it is made."""

    run: RunConfig
    config: ModelConfig
    mp: int
    dtype: str
    device: str
    num_staying: int = 0  # blocks that stay on the device
    has_kernels: bool = True  # a GPU runs those of our own

    def workload(self, shape: Sequence[int]) -> Workload:
        """What runs in a cache of (slots, positions) `shape`."""
        num_slots, seq_len = shape
        return Workload(
            dtype=self.dtype,
            quant=self.run.quant,
            offload=self.run.offload,
            num_staying=self.num_staying,
            batch_size=num_slots,
            seq_len=max(2, seq_len),
            device=self.device,
            deterministic=self.run.deterministic,
            has_kernels=self.has_kernels,
            eager=self.run.eager,
        )

    def settle(self, shape: Sequence[int], room: Room) -> None:
        """Let as many blocks stay as `room` and the flags hold beside a cache of `shape`; none, if they hold none."""
        allowed = min([room.free_bytes - later_bytes(self.mp, self.device), *self.device_limits()])
        workload = self.workload(shape)

        def fits(count: int) -> bool:
            return on_device_bytes(self.config, self.mp, replace(workload, num_staying=count)) <= allowed

        self.num_staying = largest(fits, self.config.num_layers)

    def device_limits(self) -> dict[int, str]:
        """Bytes that the flags allow on the device, with the flag. On a CPU, blocks on the disk leave main memory to
        those that compute: both flags mean the same there."""
        limits = {"--device_memory_gib": self.run.device_memory_gib}
        if self.waits_on_disk_alone:
            limits["--host_memory_gib"] = self.run.host_memory_gib
        return {int(gib * GIB): flag for flag, gib in limits.items() if gib is not None}

    @property
    def waits_on_disk_alone(self) -> bool:
        """Whether no block passes through main memory other than to compute there."""
        return self.device == "cpu" and self.run.offload == "disk"

    def check(self, shape: Sequence[int], room: Room, local_size: int, *, has_weights: bool) -> RankMemory:
        """The plan of a cache of `shape`. Raises RequestError where the flags do not allow it, or where it, and the
        weights unless they are here already, do not fit what is free."""
        workload = self.workload(shape)
        self.check_device(workload)
        self.check_host(workload, math.inf if has_weights or self.run.force else free_host_bytes() // local_size)
        if not self.run.force:
            check_fits(self.config, self.mp, workload, room, has_weights=has_weights)
        return rank_memory(self.config, self.mp, workload)

    def check_device(self, workload: Workload) -> None:
        limits = self.device_limits()
        needed = on_device_bytes(self.config, self.mp, workload)
        if not limits or needed <= min(limits):
            return
        flag = limits[min(limits)]
        streamed = num_streamed(self.config, workload)
        count = self.config.num_layers - streamed + BLOCK_SLOTS * (streamed > 0)
        held = f"{count} blocks, the rest of the model and {workload.batch_size} x {workload.seq_len} tokens of cache"
        raise RequestError(
            f"{flag} {in_gib(min(limits))} is too little for {self.named(workload)}: {held} take {in_gib(needed)} GiB "
            f"a rank; give {flag} {in_gib(needed)}, or lower --max_batch_size, --max_seq_len"
        )

    def check_host(self, workload: Workload, free_bytes: float) -> None:
        waiting = waiting_bytes(self.config, self.mp, workload)
        allowed = math.inf if self.run.host_memory_gib is None else self.run.host_memory_gib * GIB
        blocks = f"{self.named(workload)}: blocks that pass through main memory take {in_gib(waiting)} GiB a rank"
        on_disk = ", or --offload disk" if workload.offload == "cpu" else ""
        if waiting > allowed:
            raise RequestError(
                f"--host_memory_gib {self.run.host_memory_gib:g} is too little for {blocks}; "
                f"give --host_memory_gib {in_gib(waiting)}{on_disk}"
            )
        if waiting > free_bytes and workload.device == "cuda":  # on a CPU they count as weights
            raise RequestError(
                f"too little main memory for {blocks}, and {in_gib(free_bytes)} are free; free some{on_disk}"
            )

    def named(self, workload: Workload) -> str:
        return f"{self.config.name} over {counted(self.mp, 'rank')} in {workload.dtype}"


def on_device_bytes(config: ModelConfig, mp: int, workload: Workload) -> int:
    """What the device's budget is for; blocks that wait are not, even where they lie in the memory of the same CPU."""
    waiting = waiting_bytes(config, mp, workload) if workload.device == "cpu" else 0
    return rank_memory(config, mp, workload).allocated_bytes - waiting


def in_gib(num_bytes: float) -> str:
    """As a flag takes it; rounded up, so that what is said to be needed is enough."""
    return f"{math.ceil(num_bytes / GIB * ROUNDING) / ROUNDING:g}"
