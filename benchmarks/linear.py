"""The matrix products of a decode step in bf16: our kernel beside torch's, in GB/s of weights, with the ceiling.

For each shape, copies of the weight of 600 MB in all are gone through in turn, so that each is read from memory and not
from a cache; the two contenders alternate, and the medians are shown. Rows are the rows of the batch.
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
BATCHES = (1, 2, 3, 4, 8)
STREAMED_BYTES = 600e6
REPEATS = 60


def main() -> None:
    print(f"{torch.get_num_threads()} threads read memory at {memory_read_rate() / 1e9:.1f} GB/s")
    for (name, (rows, cols)), batch in itertools.product(SHAPES.items(), BATCHES):
        num_bytes = 2 * rows * cols
        weights = [torch.randn(rows, cols).bfloat16() for _ in range(max(2, int(STREAMED_BYTES / num_bytes)))]
        x = torch.randn(batch, cols)
        theirs, ours = median_s(F.linear, x.bfloat16(), weights), median_s(kernels.linear_of_few, x, weights)
        print(
            f"{name:15} batch {batch}: torch {num_bytes / theirs / 1e9:5.1f} GB/s, ours {num_bytes / ours / 1e9:5.1f}"
        )


def median_s(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, weights: list[torch.Tensor]
) -> float:
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
