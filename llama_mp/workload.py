"""How a model is to run, as far as its memory depends on it."""

from dataclasses import dataclass
from typing import Literal

from llama_mp.flags import check_at_least

BYTES_PER_ELEMENT = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How a model is to run: what its memory depends on beside its architecture and the number of ranks."""

    dtype: Literal["fp32", "tf32", "fp16", "bf16"]
    quant: Literal["none", "int8", "int4"] = "none"
    offload: Literal["none", "cpu", "disk"] = "none"
    batch_size: int = 1
    seq_len: int = 2048
    device: Literal["cuda", "cpu"] = "cuda"
    num_staying: int = 0  # blocks that stay on the device when the others wait elsewhere
    deterministic: bool = False
    has_kernels: bool = True  # a GPU of compute capability 8.0 or later: it runs those of our own
    eager: bool = False  # no CUDA graphs

    def __post_init__(self) -> None:
        check_at_least(self, batch_size=1, seq_len=2)

    @property
    def element_bytes(self) -> int:
        return BYTES_PER_ELEMENT[self.dtype]
