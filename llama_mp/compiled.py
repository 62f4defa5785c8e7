"""C sources of this package, built once with the machine's compiler and kept in the user's cache."""

import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from llama_mp.cores import cpu_features
from llama_mp.errors import rank_zero_speaks, say

# Not -ffast-math, which would change how the whole process rounds.
# -shared without -lgomp: OpenMP's symbols come from the runtime that torch has loaded (see kernels.c).
COMPILE = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fopenmp", "-c")
NATIVE = "-march=native"  # vectors as wide as this machine's; one of another kind that shares the folder has its own


@functools.cache
def load_library(source: Path, *options: str) -> ctypes.CDLL | None:
    """The compiled `source`; None, said once on stderr, where it cannot be built."""
    try:
        return library_of(source, *options)
    except OSError as error:
        say_once(f"no compiled kernels ({error}): torch's own, slower ones are used")
        return None


@functools.cache
def say_once(text: str) -> None:
    """On stderr, on rank 0: what keeps one source from being built mostly keeps all."""
    if rank_zero_speaks():
        say(text)


@functools.cache
def library_of(source: Path, *options: str) -> ctypes.CDLL:
    """The compiled `source`. Raises OSError, in one line, where it cannot be built."""
    try:
        return ctypes.CDLL(str(built_library(source, [*COMPILE, *options])))
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(reason(error)) from error


def built_library(source: Path, options: list[str]) -> Path:
    """The library in the user's cache, built if this source was not built with this compiler before.

    One process builds while the others wait: the lock goes when its holder does, and a file appears by rename."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        raise OSError(f"no C compiler {compiler[0]}: install one, for example gcc")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    headers = [header.read_bytes() for header in sorted(source.parent.glob("*.h"))]
    built_from = [source.read_bytes(), *headers, version, repr([*options, *sorted(cpu_features())]).encode()]
    key = hashlib.sha256(b"\0".join(built_from)).hexdigest()[:16]
    folder = cache_folder()
    library = folder / f"{source.stem}-{key}.so"
    with (folder / f"{source.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            build(compiler, options, source, library)
    return library


def build(compiler: list[str], options: list[str], source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        module, shared = Path(work) / "module.o", Path(work) / "library.so"
        subprocess.run([*compiler, *options, str(source), "-o", str(module)], capture_output=True, check=True)
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
        telling = [line for line in said if "error:" in line] or said[-1:]  # not the caret that points at it
        return f"{error.cmd[0]} failed" + (f": {telling[0]}" if telling else "")
    return " ".join(str(error).split())
