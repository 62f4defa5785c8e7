"""The matrix products of a decode step and of a prompt in bf16: ours beside torch's, in GB/s of weights, with the
ceiling, and in GFLOP/s. torch is handed activations in bf16 and leaves its result so; ours are fp32 before and after.

For each shape, copies of the weight of 600 MB in all are gone through, so that each is read from memory and not from a
cache; the two contenders take turns, and the medians are shown. Rows are those of the batch, or a prompt's tokens.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import memory_read_rate

from llama_mp import kernels

SHAPES = {"SmolLM2 w13": (3072, 576), "SmolLM2 w2": (576, 1536), "SmolLM2 output": (49152, 576), "7B w2": (11008, 4096)}
ROWS = (1, 2, 3, 4, 8, 16, 128, 512)
STREAMED_BYTES = 600e6
REPEATS = 60

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    print(f"{torch.get_num_threads()} threads read memory at {memory_read_rate() / 1e9:.1f} GB/s")
    for (name, (num_out, num_in)), num_rows in itertools.product(SHAPES.items(), ROWS):
        num_bytes = 2 * num_out * num_in
        weights = [torch.randn(num_out, num_in).bfloat16() for _ in range(max(2, int(STREAMED_BYTES / num_bytes)))]
        x = torch.randn(num_rows, num_in)
        found = []
        for who, product, factor in (("torch", F.linear, x.bfloat16()), ("ours", ours, x)):
            seconds = median_s(product, factor, weights)
            gb_per_s, gflop_per_s = (amount / seconds / 1e9 for amount in (num_bytes, num_rows * num_bytes))
            found.append(f"{who} {gb_per_s:5.1f} GB/s, {gflop_per_s:4.0f} GFLOP/s")
        print(f"{name:15} {num_rows:3} rows: {'; '.join(found)}")


def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return kernels.linear(x, weight, torch.bfloat16)


def median_s(product: Product, x: torch.Tensor, weights: list[torch.Tensor]) -> float:
    """The median time of one product."""
    times = []
    for weight in itertools.islice(itertools.cycle(weights), REPEATS):
        start = time.perf_counter()
        product(x, weight)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
