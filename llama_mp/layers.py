"""fairscale's parallel layers without the memory and the autograd wrappers of training: one rank's part of each."""

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from llama_mp import cuda
from llama_mp.kernels import linear
from llama_mp.parallel import reduce


class WithoutWeights(nn.Module):
    """fairscale's constructors allocate with `torch.Tensor`, which heeds no device: parameters become shapes without
    data on their way in, before anything touches their memory. Weights assigned later stay what they are."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if param is not None and name not in self._parameters:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        super().register_parameter(name, param)


class ColumnLinear(WithoutWeights, ColumnParallelLinear):
    """fairscale's layer with its output left split, without the autograd wrappers of training. `num_out`: its own."""

    precision = torch.float32  # of the run, as `build` is told

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out * get_model_parallel_world_size(), bias=False, gather_output=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.precision)


class RowLinear(WithoutWeights, RowParallelLinear):
    """fairscale's layer on an input that is split already, `num_in` of it here; its output is yet to be summed over the
    ranks."""

    precision = torch.float32

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in * get_model_parallel_world_size(), num_out, bias=False, input_is_parallel=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.precision)

    def adds(self, x: torch.Tensor) -> bool:
        """Whether on a GPU one kernel makes the product and adds it to a residual: no other rank has a part of it, and
        it is cuBLAS's or, of one row, ours."""
        if get_model_parallel_world_size() > 1 or not cuda.steps_on(x.device):
            return False
        return x.dtype is self.weight.dtype or cuda.suits_one(x, self.weight)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual`, which may be overwritten, and what all ranks make of their x."""
        if not self.adds(x):
            return residual + reduce(self(x))
        if cuda.suits_one(x, self.weight):
            return cuda.product(x, self.weight, added_to=residual)
        return residual.addmm_(x, self.weight.t())


class Embedding(WithoutWeights, VocabParallelEmbedding):
    """fairscale's layer, its rows of other ranks masked without asking the device which they are."""

    def forward(self, tokens_N: torch.Tensor) -> torch.Tensor:
        if self.num_embeddings_per_partition == self.num_embeddings:
            return F.embedding(tokens_N, self.weight)
        local_N = tokens_N - self.vocab_start_index
        elsewhere_N = (local_N < 0) | (local_N >= self.num_embeddings_per_partition)
        x_NC = F.embedding(local_N.masked_fill(elsewhere_N, 0), self.weight)
        return reduce(x_NC.masked_fill(elsewhere_N.unsqueeze(-1), 0))
