"""Kernels of our own for CUDA devices, written in Triton: whether a device runs them."""

import functools
import importlib.util

import torch

LEAST_CAPABILITY = (8, 0)  # bf16, and copies that do not wait


@functools.cache
def available(device: torch.device) -> bool:
    """Whether `device` runs them: a CUDA device of Ampere or later, and Triton is installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
