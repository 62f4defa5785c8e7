"""What a run will take: the plan of one model, as flags ask for it, and of all models in a table."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from llama_mp.advice import Device, Option, advice, fits, max_batch_size, with_staying
from llama_mp.config import ModelConfig, check_deterministic, load_size, size_names
from llama_mp.errors import RequestError
from llama_mp.flags import Flags, check_at_least, flag
from llama_mp.gpus import Gpu, card_of, find_gpu, gpu_of_this_machine
from llama_mp.layout import heads_per_rank
from llama_mp.memory import (
    RankMemory,
    Workload,
    check_layout,
    checkpoint_bytes,
    host_bytes,
    offloaded_bytes,
    rank_memory,
)
from llama_mp.virtual import degrees

TABLE_DEGREES = (1, 2, 4, 8)
PUBLISHED = "fp16"  # what checkpoints are published in has 2 bytes a weight, whatever computes


@dataclass(frozen=True, kw_only=True)
class PlanFlags(Flags):
    size: str | None = flag(None, "a model of configs/; default: a table of all")
    ckpt_dir: Path | None = flag(None, "plan for this checkpoint: its headers are read, no weights")
    mp: int | None = flag(None, "ranks; default: 1, in the table 1, 2, 4 and 8")
    batch_size: int = flag(1, "rows computed at once")
    seq_len: int = flag(2048, "tokens of prompt and answer that a row holds")
    dtype: Literal["fp32", "tf32", "fp16", "bf16"] = flag("fp16", "precision of weights and computation")
    quant: Literal["none", "int8", "int4"] = flag("none", "weights of the matrices in fewer bits")
    offload: Literal["none", "cpu", "disk"] = flag("none", "where blocks wait that are not on the device")
    deterministic: bool = flag(False, "a run whose bits are the same over 1, 2, 4 and 8 ranks")
    gpu: str | None = flag(None, 'a card, such as "RTX 3090"; default: the one of this machine')
    vram_gib: float | None = flag(None, "memory of any other card, in GiB (2**30 bytes)")
    json: bool = flag(False, "print JSON, sizes in bytes")
    guide: bool = flag(False, "write docs/hardware.md and its figure, from the records in docs/runs/ and the plan")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide and [f.name for f in fields(self) if getattr(self, f.name) != f.default] != ["guide"]:
            raise RequestError("--guide takes no other flag: it writes the whole page")
        check_at_least(self, mp=1, batch_size=1, seq_len=2, vram_gib=0)
        check_deterministic(self)
        for one, other in (("size", "ckpt_dir"), ("gpu", "vram_gib")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise RequestError(f"--{one} and --{other} are both given: drop one")
        if self.dtype == "bf16" and self.gpu and not find_gpu(self.gpu).has_bf16:
            raise RequestError(f"--dtype bf16, but {find_gpu(self.gpu).name} computes no bf16: use --dtype fp16")

    @property
    def workload(self) -> Workload:
        return Workload(
            dtype=self.dtype,
            quant=self.quant,
            offload=self.offload,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            deterministic=self.deterministic,
        )

    def workload_on(self, card: Gpu | None) -> Workload:
        return replace(self.workload, has_kernels=card is None or card.has_kernels)

    def find_card(self) -> Gpu | None:
        """The card to plan for: as asked, else this machine's, if it has one."""
        return card_of(self.gpu, self.vram_gib) or gpu_of_this_machine()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one model over `mp` ranks, each on a card like `card`."""

    config: ModelConfig
    mp: int
    workload: Workload
    card: Gpu | None
    checkpoint_bytes: int

    @property
    def device(self) -> Device | None:
        card = self.card
        return card and Device(card.usable_bytes, card.bandwidth_bytes_per_s, card.has_bf16)

    @property
    def settled(self) -> Workload:
        """The workload as it would run on the card: more than two blocks stay on it where it has room for them."""
        return with_staying(self.config, self.mp, self.workload, self.device) if self.device else self.workload

    @property
    def per_rank(self) -> RankMemory:
        return rank_memory(self.config, self.mp, self.settled)

    @property
    def host_bytes(self) -> int:
        return host_bytes(self.config, self.mp, self.settled)

    @property
    def disk_bytes(self) -> int:
        """The checkpoint, and with --offload disk the blocks again, as they are loaded."""
        on_disk = self.workload.offload == "disk"
        return self.checkpoint_bytes + on_disk * self.mp * offloaded_bytes(self.config, self.mp, self.workload)

    @property
    def fits(self) -> bool | None:
        return self.device and fits(self.config, self.mp, self.workload, self.device)

    @property
    def max_batch_size(self) -> int | None:
        return self.device and max_batch_size(self.config, self.mp, self.workload, self.device)

    @property
    def valid_mp(self) -> list[int]:
        return degrees(self.config, self.workload.deterministic)

    @property
    def heads(self) -> int:
        """Query heads over all ranks, those of zeros included."""
        return self.mp * heads_per_rank(self.config, self.mp)[1]

    @property
    def advice(self) -> list[Option]:
        return advice(self.config, self.mp, self.workload, self.device) if self.fits is False else []

    def as_json(self) -> dict[str, Any]:
        """The object of the commands' contract."""
        return {
            "size": self.config.name,
            "mp": self.mp,
            "dtype": self.workload.dtype,
            "quant": self.workload.quant,
            "deterministic": self.workload.deterministic,
            "batch_size": self.workload.batch_size,
            "seq_len": self.workload.seq_len,
            "per_rank": self.per_rank._asdict() | {"total_bytes": self.per_rank.total_bytes},
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "fits": self.fits,
            "valid_mp": self.valid_mp,
            "max_batch_size": self.max_batch_size,
        }


def plan_one(flags: PlanFlags, config: ModelConfig, files: tuple[Path, ...] = ()) -> Plan:
    """The plan for `config`, or its checkpoint in `files`. Raises RequestError for what it cannot run."""
    if flags.seq_len > config.context_length:
        raise RequestError(f"--seq_len is {flags.seq_len}, above {config.context_length}, the context of {config.name}")
    check_layout(config, flags.mp or 1, flags.quant, flags.deterministic)
    card = flags.find_card()
    return Plan(
        config=config,
        mp=flags.mp or 1,
        workload=flags.workload_on(card),
        card=card,
        checkpoint_bytes=sum(file.stat().st_size for file in files) or checkpoint_bytes(config, PUBLISHED),
    )


def plan_all(flags: PlanFlags) -> Iterator[Plan]:
    """The rows of the table: every size whose context is long enough, at every degree that it has."""
    card = flags.find_card()
    for config in map(load_size, size_names()):
        if flags.seq_len > config.context_length:
            continue
        for mp in (flags.mp,) if flags.mp else TABLE_DEGREES:
            if mp in degrees(config, flags.deterministic):
                yield Plan(
                    config=config,
                    mp=mp,
                    workload=flags.workload_on(card),
                    card=card,
                    checkpoint_bytes=checkpoint_bytes(config, PUBLISHED),
                )


def too_long(flags: PlanFlags) -> list[str]:
    """The sizes that `plan_all` leaves out."""
    return [name for name in size_names() if load_size(name).context_length < flags.seq_len]
