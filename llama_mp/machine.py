"""What this machine offers a rank: its device, its precision, its cores; and how much memory the rank took."""

import ctypes
import shutil
import threading
from pathlib import Path

import torch

from llama_mp.cores import cores_at_hand, threads_asked
from llama_mp.errors import RequestError
from llama_mp.fit import Room, free_host_bytes

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SAMPLE_S = 0.05
RETURNED_BYTES = 4 << 20  # a block of this size or more goes back to the kernel when it is freed
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
NVIDIA_FILES = (Path("/proc/driver/nvidia"), Path("/dev/nvidia0"))
CPU_BUILD = f"this torch {torch.__version__} is a CPU build"


def choose_device(wanted: str, local_rank: int, local_size: int) -> torch.device:
    """`cuda:LOCAL_RANK` where there is CUDA, unless the CPU is wanted."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        if torch.version.cuda is None:
            raise RequestError(f"--device cuda, but {CPU_BUILD}: {cuda_remedy()}, or give --device cpu")
        raise RequestError("--device cuda, but no NVIDIA driver answers: see nvidia-smi, or give --device cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_size > count:
        raise RequestError(
            f"{local_size} ranks on this machine, but {count} CUDA devices: start {count} ranks, or --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def unused_gpu(wanted: str) -> str | None:
    """What to tell the user of a machine whose NVIDIA GPU this torch was not built to use."""
    if wanted != "auto" or torch.version.cuda is not None or not has_nvidia():
        return None
    return f"the GPU of this machine is not used, {CPU_BUILD}: {cuda_remedy()}; --device cpu is silent about it"


def has_nvidia() -> bool:
    """Whether the NVIDIA driver or its tools are here, whatever torch was built for."""
    return any(path.exists() for path in NVIDIA_FILES) or shutil.which("nvidia-smi") is not None


def cuda_remedy() -> str:
    version = torch.__version__.split("+")[0]  # PyPI's own builds for Linux are those with CUDA
    return f"pip install --force-reinstall --index-url https://pypi.org/simple torch=={version}"


def choose_dtype(wanted: str, precision: str, device: torch.device) -> torch.dtype:
    """The type to compute in. auto: a GPU computes in the checkpoint's `precision`; a CPU in bf16 unless the checkpoint
    is fp32: decoding is bound by memory, and bf16 halves the bytes where fp16 arithmetic is emulated."""
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "auto":
        wanted = precision if on_gpu or precision == "fp32" else "bf16"
        wanted = "fp16" if wanted == "bf16" and not has_bf16 else wanted
    if wanted == "bf16" and not has_bf16:
        raise RequestError(f"--dtype bf16, but {torch.cuda.get_device_name(device)} computes no bf16: use --dtype fp16")
    if wanted == "tf32" and not on_gpu:
        raise RequestError("--dtype tf32 is a mode of NVIDIA GPUs, and this run is on the CPU: use --dtype fp32")
    torch.backends.cuda.matmul.allow_tf32 = wanted == "tf32"
    return DTYPES[wanted]


def threads_per_rank(local_size: int) -> int:
    """LLAMA_MP_THREADS, else the cores at hand shared among this machine's ranks."""
    return threads_asked() or max(1, cores_at_hand() // local_size)


def free_room(device: torch.device, local_size: int) -> Room:
    """The memory that each of this machine's `local_size` ranks can still get."""
    if device.type == "cpu":
        return Room(free_host_bytes() // local_size, "for it in main memory", is_shared=True)
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for later
    return Room(free + kept, f"on {device}", is_shared=False)


def return_freed_memory() -> None:
    """Let malloc keep little of what is freed. By itself it keeps blocks of up to 32 MiB as soon as one of that size
    was freed: 0.2 GB of holes between the tensors of a model of 1B parameters."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * RETURNED_BYTES)


def return_holes() -> None:
    """Give back what was freed between what is still held, which malloc does not do by itself."""
    ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """The most bytes held since it was made: allocated on a GPU; on a CPU private memory (mapped checkpoint pages are
    none) above that of the process as it was then, looked at every SAMPLE_S by a thread, since the kernel keeps no
    peak of it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.most = device, 0
        self.base = private_bytes() if device.type == "cpu" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.stopped = threading.Event()
            threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while not self.stopped.wait(SAMPLE_S):
            self.most = max(self.most, private_bytes())

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(self.most, private_bytes()) - self.base

    def close(self) -> None:
        if self.device.type == "cpu":
            self.stopped.set()


def private_bytes() -> int:
    """Anonymous memory of this process now, as the kernel counts it (proc(5), RssAnon)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel states no RssAnon")
