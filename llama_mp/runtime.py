"""Bytes that a process takes beside all that it computes with."""

# On a GPU: CUDA's context, the kernels of torch, cuBLAS and NCCL, and what torch's allocator keeps between tensors.
# Estimates, as nvidia-smi shows for a process of torch 2 on cards of these years; no measurement of ours stands behind
# them yet. On a CPU: private memory of a process of torch 2.13 after `connect` (161 MB; benchmarks/plan.py).
CUDA_RUNTIME_BYTES, NCCL_BYTES = 600_000_000, 400_000_000
CUDA_HOST_BYTES = 1_500_000_000  # main memory of a process of torch that computes on a GPU: an estimate too
CPU_RUNTIME_BYTES = 165_000_000
# The workspace of cuBLAS is a tensor of torch's for each stream (torch, CUDABlas.cpp): 32 MiB on Hopper, and elsewhere
# these 8, as which of the cards that run our kernels are Hopper's a plan does not always know.
CUBLAS_BYTES, OLDER_CUBLAS_BYTES = 32 << 20, 65 << 17
CUDA_LATER_BYTES = 200_000_000  # of the above, what kernels and cuBLAS take as they are used first: an estimate


def later_bytes(mp: int, device: str) -> int:
    """What a process takes on its device once it computes, and what is free before does not show."""
    return 0 if device == "cpu" else CUDA_LATER_BYTES + runtime_bytes(mp, device) - CUDA_RUNTIME_BYTES


def runtime_bytes(mp: int, device: str) -> int:
    if device == "cpu":
        return CPU_RUNTIME_BYTES
    return CUDA_RUNTIME_BYTES + (NCCL_BYTES if mp > 1 else 0)


def workspace_bytes(has_kernels: bool) -> int:
    """What cuBLAS takes for each stream, on a GPU that runs our kernels or an older one."""
    return CUBLAS_BYTES if has_kernels else OLDER_CUBLAS_BYTES
