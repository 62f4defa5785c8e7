"""A world of several ranks of which only rank 0 is there: to measure one rank's share of a model on one device.

The others say at once what rank 0 says, and their sums cost nothing: what is left is the step without its messages.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups

from llama_mp.world import World

NAME = "pretended"


class Group(dist.ProcessGroup):
    """Every collective is over when it returns. Sums stay what rank 0 holds, so that no number grows."""

    def getBackendName(self) -> str:
        return NAME

    def allreduce(self, tensors: Sequence[torch.Tensor], options: Any = None) -> dist.Work:
        return Done()

    def broadcast(self, tensors: Sequence[torch.Tensor], options: Any = None) -> dist.Work:
        return Done()

    def allgather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], options: Any = None
    ) -> dist.Work:
        return self.gather(outputs, inputs)

    def gather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], options: Any = None
    ) -> dist.Work:
        """Rank 0's part in the place of each: memory that nobody wrote could hold NaN."""
        for part in outputs[0]:
            part.copy_(inputs[0])
        return Done()


class Done(dist.Work):
    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True


class Attended(dist.Store):
    """Where torch counts who has come to a new group: all have."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def add(self, key: str, amount: int) -> int:
        return self.size

    def set(self, key: str, value: str) -> None:
        pass

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        pass


dist.Backend.register_backend(NAME, lambda store, rank, size, timeout: Group(rank, size), devices=["cpu", "cuda"])


class PretendedWorld(World):
    """Rank 0 of `size`; what it gathers is its own message, that often."""

    def tell(self, message: Any) -> Any:
        return message

    def gather(self, message: Any) -> list[Any]:
        return [message] * self.size


def pretend(size: int, device: torch.device) -> PretendedWorld:
    """In the place of llama_mp.parallel.connect."""
    store = Attended(size)
    dist.init_process_group(NAME, store=store, rank=0, world_size=size)
    fairscale_groups.initialize_model_parallel(size, model_parallel_backend=NAME)
    return PretendedWorld(rank=0, size=size, device=device, store=store)
