"""Whether our own kernels for NVIDIA GPUs can be used."""

import importlib.util

import torch


def available(device: torch.device) -> bool:
    """Whether `device` is one that Triton, which comes with torch, compiles them for."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
