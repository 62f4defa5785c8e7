"""Triton kernels compiled for cards that this machine does not have, and what the machine code shows."""

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
SPILLS = ("LDL", "STL")  # loads and stores of what found no register


def instructions(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], *, capability: int, num_warps: int, path: Path
) -> Counter[str]:
    """How often each instruction occurs, by its full name, as in LDG.E.128. `types` are those of the arguments, in
    Triton's words; addresses and whole numbers divide by 16, as those of the shapes that matter do."""
    divisible = [["tt.divisibility", 16]]
    whole = [name for name, kind in types.items() if kind != "fp32"]
    source = ASTSource(
        kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=dict(constants),
        attrs={(kernel.arg_names.index(name),): divisible for name in whole},
    )
    target = GPUTarget("cuda", capability, 32)
    path.write_bytes(
        triton.compile(source, target=target, options={"num_warps": num_warps, "enable_fp_fusion": True}).asm["cubin"]
    )
    listed = subprocess.run([DISASSEMBLER, "-c", path], capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listed))
