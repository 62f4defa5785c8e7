"""What a process of its own runs: the kernels for GPUs compiled as a step of 7B starts them, without a card."""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from llama_mp import cuda
from llama_mp.memory import packed_row_bytes

KINDS = {"bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8"} | {
    torch.int32: "i32",
    torch.int64: "i64",
}
DIM, HIDDEN_DIM, NUM_HEADS, HEAD_DIM = 4096, 11008, 32, 128


class Built(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int
    widths: set[int]  # bytes of a copy from memory to shared memory
    instructions: Counter[str]  # how often each occurs, by its full name, as in LDG.E.128


class Recorder:
    """Stands where a kernel was, and keeps what it is started with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launch = kernel, None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **named: setattr(self, "launch", (arguments, named))


def kernels_of_7b(capability: int, cache: Path, names: Collection[str] = ()) -> dict[str, Built]:
    """By the name of the kernel and of what it is started for; all, or those of `names`."""
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    cuda.num_processors = lambda device: 132
    return {name: built(launched(name), capability) for name in starts() if not names or name in names}


def launched(name: str) -> Recorder:
    """What of `starts` one kernel is started with."""
    from llama_mp import cuda_attention, cuda_elementwise, cuda_kernels  # which import Triton

    kernel = name.split()[0]
    module = next(m for m in (cuda_attention, cuda_elementwise, cuda_kernels) if hasattr(m, kernel))
    other = patch.object(cuda_attention, "join_shares", Recorder(None))
    with other, patch.object(module, kernel, Recorder(getattr(module, kernel))) as recorder:
        starts()[name]()
    return recorder


def compilations(names: Collection[str]) -> int:
    """For how many different kinds of launches, `names` among `starts`, a kernel is compiled."""
    cuda.num_processors = lambda device: 132
    found = []
    for kind in (specialized(launched(name)) for name in names):
        found += [kind] if kind not in found else []
    return len(found)


def starts() -> dict[str, Callable[[], object]]:
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
        for rows, name in [(n, name) for n in (2, 16, 32, 64) for name in ("bf16", "fp32") if kind != "bf16"]:
            x = empty(rows, DIM, dtype=torch.bfloat16 if name == "bf16" else torch.float32)
            found[f"product_of_several {kind} {rows} {name}"] = lambda w=fused, x=x: cuda.product(x, w)
    for rows in (1, 3, 64):  # in several shares, in others, and in one
        cache, heads = empty(rows, 2048, NUM_HEADS, HEAD_DIM), empty(rows, 3 * NUM_HEADS, HEAD_DIM)
        more = empty(rows, 1, HEAD_DIM // 2, dtype=torch.complex64), cache, cache, empty(rows, dtype=torch.int64)
        found[f"attend {rows}"] = lambda heads=heads, more=more: cuda.attend(heads, *more)
    return found | starts_of_rows(empty)


def starts_of_rows(empty: Callable[..., torch.Tensor]) -> dict[str, Callable[[], object]]:
    """Of the kernels for a prompt's tokens."""
    from llama_mp import cuda_elementwise as kernels

    x, heads, cache = empty(4, DIM), empty(4, 3 * NUM_HEADS, HEAD_DIM), empty(1, 512, NUM_HEADS, HEAD_DIM)
    where = empty(4, 1, HEAD_DIM // 2, dtype=torch.complex64), cache, cache, empty(4, dtype=torch.int64), NUM_HEADS
    return {
        "rotate_and_store_kernel": lambda: kernels.rotate_and_store(heads, *where),
        "swiglu_kernel": lambda: kernels.swiglu(empty(4, 2 * HIDDEN_DIM)),
        "norm_kernel": lambda: kernels.rms_norm(x, empty(DIM), 1e-5, x),
    }


def built(recorder: Recorder, capability: int) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, aligned, options = specialized(recorder)
    attributes = {(recorder.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(recorder.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used, instructions = read(compiled.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin")
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x([0-9a-f]+)", compiled.asm["ptx"])
    widths = {int(number, 16) for number in copies}
    return Built(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, widths, instructions)


def specialized(recorder: Recorder) -> tuple[dict[str, str], dict[str, Any], list[str], dict[str, Any]]:
    """What Triton compiles a launch for: its arguments' types, those that are constants, and those that divide by 16,
    as tensors' addresses and a model's sizes do; and its options."""
    arguments, named = recorder.launch
    options = {name: value for name, value in named.items() if name in ("num_warps", "enable_fp_fusion")}
    named = {name: value for name, value in named.items() if name not in options}
    values = dict(zip(recorder.kernel.arg_names, arguments, strict=False)) | named
    alike = {parameter.name for parameter in recorder.kernel.params if parameter.do_not_specialize}
    ones = {name for name, value in values.items() if isinstance(value, int) and value == 1 and name not in alike}
    signature = {
        name: "constexpr" if name in ones | named.keys() or value is None else type_of(value)
        for name, value in values.items()
    }
    constants = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = [
        name
        for name, kind in signature.items()
        if kind.startswith("*") or (kind == "i32" and values[name] % 16 == 0 and name not in alike)
    ]
    return signature, constants, aligned, options


def type_of(value: torch.Tensor | float) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def read(cubin: bytes, tools: Path) -> tuple[dict[str, int], Counter[str]]:
    """What a kernel takes, and its instructions."""
    file = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    file.write_bytes(cubin)
    used, listed = (
        subprocess.run([tools / command, flag, file], capture_output=True, text=True, check=True).stdout
        for command, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    taken = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
    return taken, Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listed))
