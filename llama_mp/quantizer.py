"""What is made of a parameter once it is filled: fewer bits, the same ones at every model-parallel degree."""

import contextlib
from collections.abc import Iterable
from types import TracebackType

import torch
import torch.distributed as dist

from llama_mp.checkpoint.load import not_finite
from llama_mp.errors import LostContact
from llama_mp.layout import Shard, split_of
from llama_mp.machine import return_holes
from llama_mp.memory import is_quantized
from llama_mp.quant import largest_of_rows, largest_weight, pack
from llama_mp.world import World


class Quantizer:
    """`quantizer(shard, parameter)`: what is held of a parameter under `--quant`. Tensors of the checkpoint that hold
    what cannot be a weight go to `not_finite`, by name.

    Under int8 the ranks agree on the largest magnitude of each row of wo and w2, whose columns they share. So every
    rank goes through all of `shards` in the same order, in a `with` of its quantizer: one that leaves it by an error
    tells the others, who would wait for it, and who then fail with LostContact."""

    def __init__(self, quant: str, shards: Iterable[Shard], world: World) -> None:
        self.quant, self.world = quant, world
        self.not_finite: list[str] = []
        self.shared = [shard for shard in shards if quant == "int8" and world.size > 1 and is_split_by_columns(shard)]
        self.num_left = len(self.shared)

    def __call__(self, shard: Shard, parameter: torch.Tensor) -> torch.Tensor:
        quant = self.quant if is_quantized(shard, self.quant) else "none"
        self.not_finite += not_finite(shard, parameter, largest_weight(quant))
        if quant == "none":
            return parameter
        return_holes()  # where parameters of a small model were: a third of what it holds, at the end
        if shard not in self.shared:
            return pack(parameter, quant)
        maxima = largest_of_rows(parameter)
        return pack(parameter, quant, self.over_ranks(maxima.cpu()).to(maxima.device))

    def over_ranks(self, maxima: torch.Tensor, *, failed: bool = False) -> torch.Tensor:
        """The greatest of each element over the ranks. A last element tells whether one of them has failed."""
        message = torch.cat([maxima, torch.tensor([float(failed)])])
        self.num_left -= 1
        with self.world.in_step():
            dist.all_reduce(message, dist.ReduceOp.MAX)
        if message[-1] and not failed:
            raise LostContact("another rank failed while the weights were quantized; its own failure says why")
        return message[:-1]

    def __enter__(self) -> "Quantizer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        is_first = isinstance(error, Exception) and not isinstance(error, LostContact)
        if is_first and self.num_left:  # the others wait in the next reduction, or come to it
            with contextlib.suppress(LostContact):
                self.over_ranks(torch.zeros(self.shared[-self.num_left].shape[0]), failed=True)


def is_split_by_columns(shard: Shard) -> bool:
    split = split_of(shard.name, embedding_axis=0)
    return split is not None and split[0] == 1
