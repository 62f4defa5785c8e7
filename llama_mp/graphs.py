"""Decode steps as CUDA graphs: recorded once, then launched by one call instead of hundreds."""

import functools
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from fairscale.nn.model_parallel.initialize import get_model_parallel_rank

from llama_mp import cuda, liveness
from llama_mp.cache import KVCache
from llama_mp.chunks import batch_sizes
from llama_mp.compiled import say_once
from llama_mp.config import ModelConfig
from llama_mp.kernels import activation_dtype
from llama_mp.model import Transformer
from llama_mp.runner import Runner
from llama_mp.transfer import upload

LEAST_LENGTH = 256
Launch = Callable[[], None]


def num_rows_for(count: int, num_slots: int) -> int:
    """The rows that a step for `count` of them computes."""
    return next(rows for rows in batch_sizes(num_slots) if rows >= count)


def length_for(length: int, max_seq_len: int) -> int:
    """The positions that a step attends to where `length` are needed: powers of two."""
    return min(max_seq_len, max(LEAST_LENGTH, 1 << (length - 1).bit_length()))


class Recorder:
    """Makes CUDA graphs of steps, which read and write tensors that stay where they are. All share one pool of memory,
    since only one runs at a time, and end together: another one's end would take cuBLAS's workspace from those left."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.pool = device, capture_stream(device), torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def warm_up(self, launch: Launch) -> None:
        """Run `launch` as it is, on the stream that it will be captured on: what it needs is loaded and compiled, and
        cuBLAS's workspace of that stream lies outside of the pool."""
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            launch()
        outside.wait_stream(self.stream)

    def record(self, launch: Launch) -> Launch:
        graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # Other threads (NCCL's watchdog) may go on with what a capture forbids.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                launch()
        finally:
            torch.cuda.set_stream(outside)  # after a failure torch does not
        self.graphs.append(graph)
        return graph.replay

    def close(self) -> None:
        """End all graphs: as long as there is one, NCCL's group cannot be left."""
        torch.cuda.synchronize(self.device)
        for graph in self.graphs:
            graph.reset()
        self.graphs = []


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs of a process: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


class Steps:
    """Steps by their key: the first of a key warms up, the second is recorded, and from then on launched."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder
        self.warm: set[Hashable] = set()
        self.recorded: dict[Hashable, Launch] = {}

    def run(self, key: Hashable, launch: Launch) -> None:
        if self.recorder and key in self.warm and key not in self.recorded:
            self.try_to_record(key, launch)
        if self.recorder and key not in self.warm:
            self.warm.add(key)
            self.recorder.warm_up(launch)
        else:
            self.recorded.get(key, launch)()

    def try_to_record(self, key: Hashable, launch: Launch) -> None:
        """Where this fails, all steps go on one kernel at a time: the ranks need not agree on it."""
        try:
            self.recorded[key] = self.recorder.record(launch)
        except RuntimeError as error:
            self.close()
            reason = str(error).strip().splitlines()[0]
            say_once(f"no CUDA graphs ({reason}): kernels are launched one by one, slower; --eager is silent about it")

    def close(self) -> None:
        if self.recorder:
            self.recorder.close()
        self.recorder, self.recorded = None, {}


class GraphRunner(Runner):
    """A runner whose decode steps are CUDA graphs: of `num_rows_for` rows each. Those beyond the rows asked for read
    and write position 0 of slots that nobody holds; whoever gets such a slot writes it first."""

    def __init__(
        self, config: ModelConfig, model: Transformer, cache: KVCache, recorder: Recorder | None = None
    ) -> None:
        super().__init__(config, model, cache)
        self.steps = Steps(recorder or Recorder(self.device))
        self.logits_SV: torch.Tensor | None = None  # where all steps leave them
        if get_model_parallel_rank() == 0:
            dtype = activation_dtype(model.tok_embeddings.weight)
            self.logits_SV = torch.zeros(cache.num_slots, config.vocab_size, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def decode(self, positions: Sequence[int]) -> torch.Tensor | None:
        count = len(positions)
        num_rows = num_rows_for(count, self.cache.num_slots)
        self.positions_S[:num_rows] = upload([*positions, *[0] * (num_rows - count)], self.device)
        # Our own kernels read of each row what it has; torch's read a length that a graph fixes, behind a mask.
        whole = cuda.steps_on(self.device)
        length = self.cache.max_seq_len if whole else length_for(max(positions) + 1, self.cache.max_seq_len)
        with liveness.step():
            self.steps.run((num_rows, length), partial(self.step_in_place, num_rows, length, is_ragged=not whole))
        return None if self.logits_SV is None else self.logits_SV[:count]

    @property
    def uses_graphs(self) -> bool:
        return self.steps.recorder is not None

    def step_in_place(self, num_rows: int, length: int, *, is_ragged: bool) -> None:
        logits_BV = self.step(num_rows, length, is_ragged=is_ragged)
        if self.logits_SV is not None:
            self.logits_SV[:num_rows] = logits_BV

    def close(self) -> None:
        self.steps.close()
