"""Rotary position embeddings (Su et al. 2021) in Meta's order: elements 2i and 2i+1 of a head are one complex number.

N tokens, H heads, D head dimension.
"""

import math

import torch

from llama_mp.config import ModelConfig, RopeScaling


def scaled_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians per position of each pair, fp32 [D / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else scale(frequencies, config.rope_scaling)


def scale(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's scaling: wavelengths beyond the original context are stretched by `factor`, those well within it
    stay, with a linear ramp in the number of turns between (llama-models, apply_scaling)."""
    turns = scaling.original_context_length * frequencies / (2 * math.pi)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotation_table(config: ModelConfig, length: int, device: torch.device) -> torch.Tensor:
    """exp(i x position x frequency) for positions below `length`, complex64 [length, D / 2]."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), scaled_frequencies(config))
    return torch.polar(torch.ones_like(angles), angles).to(device)


def rotate(x_NHD: torch.Tensor, rotations_N1d: torch.Tensor) -> torch.Tensor:
    """`x` turned by its token's rotation (d = D / 2), computed in fp32, in the type of `x`."""
    pairs = torch.view_as_complex(x_NHD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations_N1d).flatten(-2).type_as(x_NHD)
