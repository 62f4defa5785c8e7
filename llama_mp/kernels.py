"""Matrix products of a few rows on a CPU: our own kernels.c, built once with the machine's compiler, else torch's.

torch 2.13 streams bf16 weights at 11 to 25 GB/s on two cores that read memory at 45 (benchmarks/linear.py measures
both); decoding is nothing but that stream.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from llama_mp import quant
from llama_mp.errors import rank_zero_speaks

SOURCE = Path(__file__).with_name("kernels.c")
# Sums may be reordered, which vectorizing needs; not -ffast-math, which would change how the whole process rounds.
# -shared without -lgomp: OpenMP's symbols come from the runtime that torch has loaded (see kernels.c).
COMPILE = ["-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
COMPILE += ["-fassociative-math", "-fopenmp", "-c"]
MAX_ROWS = 3  # from here on arithmetic counts, which torch's blocked kernels do better


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, weight)` for x [N, in] and weight [out, in], which may be packed (quant.py)."""
    if not weight.is_floating_point():
        return quant.linear(x, weight)
    suits = x.dtype is torch.bfloat16 and len(x) < MAX_ROWS and x.device.type == "cpu" and weight.shape[1] % 2 == 0
    return linear_bf16(x, weight) if suits and load_library() else F.linear(x, weight)


def linear_bf16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear` by the compiled kernel: bf16 on the CPU, `weight` contiguous with an even number of columns."""
    x = x.contiguous()
    y = torch.empty(len(x), len(weight), dtype=torch.bfloat16)
    if load_library().linear_bf16(weight.data_ptr(), x.data_ptr(), y.data_ptr(), len(x), *weight.shape):
        raise MemoryError("no memory for a copy of the activations")
    return y


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels; None, said once on stderr, where they cannot be built."""
    try:
        library = ctypes.CDLL(str(built_library()))
    except (OSError, subprocess.CalledProcessError) as error:
        if rank_zero_speaks():
            print(f"no compiled kernels ({reason(error)}): torch's own, slower ones are used", file=sys.stderr)
        return None
    library.linear_bf16.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3
    return library


def built_library() -> Path:
    """The library in the user's cache, built if this source was not built with this compiler before.

    One process builds while the others wait: the lock goes when its holder does, and a file appears by rename."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        raise OSError(f"no C compiler {compiler[0]}: install one, for example gcc")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, repr(COMPILE).encode()])).hexdigest()[:16]
    folder = cache_folder()
    library = folder / f"kernels-{key}.so"
    with (folder / "kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            build(compiler, library)
    return library


def build(compiler: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        module, shared = Path(work) / "kernels.o", Path(work) / "kernels.so"
        subprocess.run([*compiler, *COMPILE, str(SOURCE), "-o", str(module)], capture_output=True, check=True)
        subprocess.run([*compiler, "-shared", str(module), "-o", str(shared)], capture_output=True, check=True)
        os.replace(shared, library)


def cache_folder() -> Path:
    """~/.cache/llama-mp, ours alone: what lies there is loaded as code. Raises OSError when others may write to it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        raise OSError("no home folder for the cache: set XDG_CACHE_HOME")
    folder = Path(home) / "llama-mp"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} can be written by others: chmod 700 it")
    return folder


def reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr.decode(errors="replace").strip().splitlines()
        return f"{' '.join(error.cmd[:2])} failed" + (f": {said[-1]}" if said else "")
    return " ".join(str(error).split())
