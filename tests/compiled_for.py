"""What a process of its own runs: the kernels for GPUs compiled as a step of 7B starts them, without a card."""

import os
import re
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from llama_mp import cuda
from llama_mp.memory import packed_row_bytes

KINDS = {"bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32"}
DIM, HIDDEN_DIM, NUM_HEADS, HEAD_DIM = 4096, 11008, 32, 128


class Built(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int
    widths: set[int]  # bytes of a copy from memory to shared memory


class Recorder:
    """Stands where a kernel was, and keeps what it is started with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launch = kernel, None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **named: setattr(self, "launch", (arguments, named))


def kernels_of_7b(capability: int, cache: Path, names: Collection[str] = ()) -> dict[str, Built]:
    """By the name of the kernel and of what it is started for; all, or those of `names`."""
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    from llama_mp import cuda_attention, cuda_kernels  # which import Triton

    cuda.num_processors = lambda device: 132
    cuda_attention.join_shares = Recorder(None)
    found = {}
    for name, start in starts().items():
        if not names or name in names:
            module, kernel = cuda_attention if name.startswith("attend") else cuda_kernels, name.split()[0]
            with patch.object(module, kernel, Recorder(getattr(module, kernel))) as recorder:
                start()
            found[name] = built(recorder, capability)
    return found


def starts() -> dict[str, Any]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(kind: str, rows: int, cols: int) -> torch.Tensor:
        dtype = KINDS[kind]
        return empty(rows, cols if kind == "bf16" else packed_row_bytes(cols, kind), dtype=dtype)

    norm = (empty(DIM), 1e-5)
    found = {}
    for kind in KINDS:
        fused, gated, last = (weight(kind, *s) for s in ((3 * DIM, DIM), (2 * HIDDEN_DIM, DIM), (DIM, HIDDEN_DIM)))
        one = f"product_of_one {kind}"
        found[f"{one} normed"] = lambda w=fused: cuda.product(empty(1, DIM), w, norm=norm)
        found[f"{one} gated"] = lambda w=gated: cuda.product(empty(1, DIM), w, norm=norm, is_gated=True)
        found[f"{one} added"] = lambda w=last: cuda.product(empty(1, HIDDEN_DIM), w, added_to=empty(1, DIM))
        if kind != "bf16":
            for rows in (2, 64):
                found[f"product_of_several {kind} {rows}"] = lambda w=fused, n=rows: cuda.product(empty(n, DIM), w)
    for rows in (1, 64):  # in several shares, and in one
        cache, heads = empty(rows, 512, NUM_HEADS, HEAD_DIM), empty(rows, 3 * NUM_HEADS, HEAD_DIM)
        more = empty(rows, 1, HEAD_DIM // 2, dtype=torch.complex64), cache, cache, empty(rows, dtype=torch.int64)
        found[f"attend {rows}"] = lambda heads=heads, more=more: cuda.attend(heads, *more)
    return found


def built(recorder: Recorder, capability: int) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments, named = recorder.launch
    options = {name: named.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    values = dict(zip(recorder.kernel.arg_names, arguments, strict=False)) | named
    signature, aligned = {}, {}
    for index, (name, value) in enumerate(values.items()):
        signature[name] = type_of(name, value, named)
        is_multiple = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if signature[name] != "constexpr" and is_multiple:
            aligned[index,] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in values.items() if signature[name] == "constexpr"}
    source = ASTSource(recorder.kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used = resources(compiled.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x([0-9a-f]+)", compiled.asm["ptx"])
    return Built(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, {int(n, 16) for n in copies})


def type_of(name: str, value: Any, constants: dict[str, Any]) -> str:
    if isinstance(value, torch.Tensor):
        return "*i64" if value.dtype is torch.int64 else f"*{NAMES[value.dtype]}"
    if name in constants or value is None or value == 1:
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32"


def resources(cubin: bytes, cuobjdump: Path) -> dict[str, int]:
    file = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    file.write_bytes(cubin)
    told = subprocess.run([cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
