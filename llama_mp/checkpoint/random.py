"""Random weights for any architecture, made as they are read: to measure a shape whose checkpoint is not at hand."""

import math
import zlib

import torch

from llama_mp.config import ModelConfig
from llama_mp.layout import Span, global_shapes

TABLE_LENGTH = 1 << 20  # 2 MiB in bf16: stays in the caches, and holds a place of its own for each row of a matrix
ROW_STRIDE = 2654435761  # odd and large (Knuth's multiplicative hash), so that neighbouring rows begin far apart


class RandomSource:
    """A checkpoint that is nowhere. Each row of a matrix is a window of one fixed table of random numbers, its place
    counted from the tensor's name and the row: a rank makes its own share alone, at the speed of a copy, and the model
    is the same at every degree. Uniform within 1/sqrt(columns), which keeps the activations of any depth finite in
    fp16; the weights of norms are ones."""

    precision = "bf16"

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config, self.device, self.bytes_read = config, device, 0
        self.shapes = global_shapes(config)
        # Drawn and scaled on the CPU, so that every device has the same values: CUDA multiplies with a reciprocal.
        self.table = torch.rand(TABLE_LENGTH, generator=torch.Generator().manual_seed(1)).mul_(2).sub_(1).bfloat16()
        self.scaled = (0, self.table)  # columns of the matrix last read, and on the device the table within its bounds

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, rows: Span, cols: Span) -> torch.Tensor:
        shape = self.shapes[name]
        part = self.window(name, shape[1], rows, cols) if len(shape) == 2 else self.ones(len(rows))
        self.bytes_read += part.nbytes
        return part

    def ones(self, length: int) -> torch.Tensor:
        return torch.ones(length, dtype=torch.bfloat16, device=self.device)

    def window(self, name: str, num_cols: int, rows: Span, cols: Span) -> torch.Tensor:
        assert num_cols < TABLE_LENGTH, f"{name} has {num_cols} columns"
        if self.scaled[0] != num_cols:
            self.scaled = (num_cols, (self.table / math.sqrt(num_cols)).to(self.device))
        windows = self.scaled[1].as_strided((TABLE_LENGTH - len(cols) + 1, len(cols)), (1, 1))
        numbers = torch.arange(rows.start, rows.stop, device=self.device)
        starts = (zlib.crc32(name.encode()) + numbers * ROW_STRIDE) % (TABLE_LENGTH - num_cols)
        return windows.index_select(0, starts + cols.start)
