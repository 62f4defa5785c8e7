"""How many bytes a rank holds: sums over the placements that loading uses, and the peak of what is made beside them.

All figures are bytes of tensors. Rank 0 holds most: it gathers the logits.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

from llama_mp.activations import (
    FP32,
    Sizes,
    captured_bytes,
    decode_bytes,
    prefill_bytes,
    rotation_bytes,
    sizes_of,
    static_bytes,
    sums_bytes,
)
from llama_mp.chunks import LOAD_ELEMENTS, PREFILL_CHUNK, QUANTIZE_ELEMENTS, SCORED_CHUNK
from llama_mp.config import ModelConfig
from llama_mp.errors import RequestError
from llama_mp.layout import Shard, check_degree, fuse, heads_per_rank, padded, shards
from llama_mp.runtime import CUDA_HOST_BYTES, runtime_bytes, workspace_bytes
from llama_mp.virtual import ALIGNMENT, check_virtual, degrees, layout_degree, slot_length, virtual_shards
from llama_mp.workload import BYTES_PER_ELEMENT, Workload

INT8_SCALE_BYTES = 4  # an fp32 scale for each row
INT4_GROUP = 32  # weights of a row that share a scale and an offset, in fp16 each
INT4_GROUP_BYTES = INT4_GROUP // 2 + 2 + 2
ROW_ALIGNMENT = 16  # of quantized weights: what a GPU's thread loads at once
QUANTIZING_BYTES = 16  # beside each element that is being packed or unpacked: fp32 thrice, and smaller things
BLOCK_SLOTS = 2  # offloading: one block computes while the next one comes


class RankMemory(NamedTuple):
    """Bytes on the device of one rank."""

    weights_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    runtime_bytes: int

    @property
    def allocated_bytes(self) -> int:
        """What is measured: torch's peak on a GPU, on a CPU private memory above that of the bare runtime."""
        return self.weights_bytes + self.kv_cache_bytes + self.activation_bytes

    @property
    def total_bytes(self) -> int:
        return self.allocated_bytes + self.runtime_bytes


def rank_memory(config: ModelConfig, mp: int, workload: Workload) -> RankMemory:
    """The memory of the rank that holds most, rank 0. Raises RequestError where no layout of degree `mp` exists.

    Loading and computing do not overlap: what one of them needs beside the weights, the other finds free again."""
    weights = device_weight_bytes(config, mp, workload)
    weights += waiting_bytes(config, mp, workload) if workload.device == "cpu" else 0  # in the same memory
    cache = cache_bytes(config, mp, workload)
    activations = max(pass_bytes(config, mp, workload), loading_bytes(config, mp, workload) - cache)
    runtime = runtime_bytes(mp, workload.device) + graphs_bytes(config, mp, workload)
    return RankMemory(weights, cache, activations, runtime)


def sizes_of_rank(config: ModelConfig, mp: int, workload: Workload) -> Sizes:
    return sizes_of(
        config,
        layout_degree(mp, workload.deterministic),
        workload.dtype,
        hidden_unit(workload.quant),
        on_cpu=workload.device == "cpu",
        has_kernels=workload.has_kernels and not workload.deterministic,
        quant=workload.quant,
    )._replace(mp=mp)


def pass_bytes(config: ModelConfig, mp: int, workload: Workload) -> int:
    """The table of rotations, and the larger of the last pass over a prompt as long as the row and of a step."""
    degree, sizes = layout_degree(mp, workload.deterministic), sizes_of_rank(config, mp, workload)
    length = workload.seq_len
    num_tokens = min(SCORED_CHUNK if workload.deterministic else PREFILL_CHUNK[workload.device], length - 1)
    sums = sums_bytes(sizes, num_tokens, degree // mp) if workload.deterministic else 0
    passes = (prefill_bytes(sizes, num_tokens, length - 1) + sums, decode_bytes(sizes, workload.batch_size, length))
    if workload.device == "cpu":
        beside = unpacked_bytes(workload)
    elif has_graphs(config, workload):  # steps are captured on a stream of their own
        beside = 2 * workspace_bytes(workload.has_kernels) + static_bytes(sizes, workload.batch_size)
    else:
        beside = workspace_bytes(workload.has_kernels)
    return rotation_bytes(config, length) + beside + max(passes)


def has_graphs(config: ModelConfig, workload: Workload) -> bool:
    """Whether steps are captured: not where blocks come and go, nor where rows are computed one at a time."""
    may_capture = workload.device == "cuda" and not workload.deterministic and not workload.eager
    return may_capture and num_streamed(config, workload) == 0


def graphs_bytes(config: ModelConfig, mp: int, workload: Workload) -> int:
    """What CUDA graphs keep outside of torch's peak."""
    if not has_graphs(config, workload):
        return 0
    return captured_bytes(sizes_of_rank(config, mp, workload), config.num_layers, workload.batch_size)


def unpacked_bytes(workload: Workload) -> int:
    """Of a matrix that is being quantized, or on a CPU multiplied with by torch's own operations: a chunk of it."""
    return 0 if workload.quant == "none" else QUANTIZING_BYTES * QUANTIZE_ELEMENTS[workload.device]


def loading_bytes(config: ModelConfig, mp: int, workload: Workload) -> int:
    """Beside the weights while they load: a chunk as it is read; or a parameter that is read, in the place of what it
    will be packed into, and then packed."""
    held = run_time_shards(replace(config, num_layers=1), 0, mp, workload.quant, workload.deterministic).values()
    elements = min(LOAD_ELEMENTS, max(shard.num_elements for shard in held))
    chunk = elements * (FP32 if workload.device == "cpu" else workload.element_bytes)
    unpacked = [shard for shard in held if is_quantized(shard, workload.quant)]
    if not unpacked:
        return chunk
    largest = max(unpacked, key=lambda shard: shard.num_elements)
    reading = chunk - shard_bytes(largest, workload.quant, workload.element_bytes)
    return largest.num_elements * workload.element_bytes + max(reading, unpacked_bytes(workload))


# ---- weights ---------------------------------------------------------------------------------------------------


def run_time_shards(
    config: ModelConfig, rank: int, mp: int, quant: str = "none", deterministic: bool = False
) -> dict[str, Shard]:
    """The parameters as a run holds them: fused; for int4 the hidden size filled up to whole groups on each rank; with
    `deterministic` those of each virtual rank that it plays."""
    if deterministic:
        return virtual_shards(config, rank, mp)
    return fuse(shards(config, rank, mp, hidden_unit=hidden_unit(quant)))


def hidden_unit(quant: str) -> int:
    """The hidden size is cut into whole ones of these, so that each group of int4 lies on one rank."""
    return INT4_GROUP if quant == "int4" else 1


def can_quantize(config: ModelConfig, mp: int, quant: str) -> bool:
    """Several ranks share wo's columns by heads: a group of int4 may not reach from one into the next."""
    return quant != "int4" or mp == 1 or config.head_dim % INT4_GROUP == 0


def can_run(config: ModelConfig, mp: int, workload: Workload) -> bool:
    """Whether the degree, which has a layout, suits the workload."""
    return can_quantize(config, mp, workload.quant) and mp in degrees(config, workload.deterministic)


def check_layout(config: ModelConfig, mp: int, quant: str, deterministic: bool = False) -> None:
    """Raise RequestError where no layout of degree `mp` exists, or none whose codes or bits are those of one rank."""
    check_degree(config, mp)
    if deterministic:
        check_virtual(config, mp)
    if not can_quantize(config, mp, quant):
        raise RequestError(
            f"--quant int4 over {mp} ranks: model {config.name} has heads of {config.head_dim}, which groups of "
            f"{INT4_GROUP} would reach across; use --quant int8, or one rank"
        )


def is_quantized(shard: Shard, quant: str) -> bool:
    """Matrices of the blocks and the output are; embeddings, which are read by row, stay, tied ones too, and norms."""
    return quant != "none" and len(shard.shape) == 2 and shard.name != "tok_embeddings.weight"


def shard_bytes(shard: Shard, quant: str, element_bytes: int) -> int:
    """Bytes of a parameter on its rank."""
    if not is_quantized(shard, quant):
        return shard.num_elements * element_bytes
    rows, cols = shard.shape
    return rows * packed_row_bytes(cols, quant)


def packed_row_bytes(cols: int, quant: str) -> int:
    """A quantized row of `cols` weights: what quant.py packs."""
    held = cols + INT8_SCALE_BYTES if quant == "int8" else -(-cols // INT4_GROUP) * INT4_GROUP_BYTES
    return padded(held, ROW_ALIGNMENT)


class WeightBytes(NamedTuple):
    """Bytes of one rank's parameters: of one block, which are all alike; of what is outside of the blocks; of the
    embeddings among these, of which a step reads a few rows, unless they are the output matrix too; and of the buffer
    that holds one block where some wait elsewhere."""

    block: int
    others: int
    lookup: int
    buffer: int


@functools.lru_cache(maxsize=1024)
def parameters(
    config: ModelConfig, rank: int, mp: int, quant: str, dtype: str, deterministic: bool = False
) -> WeightBytes:
    """Summed over one block, since the layout of each is the same."""
    held = run_time_shards(replace(config, num_layers=1), rank, mp, quant, deterministic)
    sizes = {name: shard_bytes(shard, quant, BYTES_PER_ELEMENT[dtype]) for name, shard in held.items()}
    block = [size for name, size in sizes.items() if name.startswith("layers.")]
    embeddings = sum(size for name, size in sizes.items() if name.startswith("tok_embeddings."))
    lookup = 0 if config.tied_embeddings else embeddings
    buffer = sum(padded(size, ALIGNMENT) for size in block)
    return WeightBytes(sum(block), sum(sizes.values()) - sum(block), lookup, buffer)


def weight_bytes(config: ModelConfig, rank: int, mp: int, dtype: str, quant: str = "none") -> int:
    """Bytes of the parameters of `rank`, zeros of the padding included; tied embeddings are held once."""
    held = parameters(config, rank, mp, quant, dtype)
    return config.num_layers * held.block + held.others


def parameters_of(config: ModelConfig, mp: int, workload: Workload) -> WeightBytes:
    """What rank 0 holds, the largest."""
    return parameters(config, 0, mp, workload.quant, workload.dtype, workload.deterministic)


def num_streamed(config: ModelConfig, workload: Workload) -> int:
    """Blocks that come and go: none where all that do not stay would find a slot each."""
    leaving = 0 if workload.offload == "none" else config.num_layers - workload.num_staying
    return leaving if leaving > BLOCK_SLOTS else 0


def device_weight_bytes(config: ModelConfig, mp: int, workload: Workload) -> int:
    """Weights on the device: all of them; with offloading what is outside of the blocks, those that stay, two slots."""
    held = parameters_of(config, mp, workload)
    streamed = num_streamed(config, workload)
    if streamed == 0:
        return config.num_layers * held.block + held.others
    return (config.num_layers - streamed + BLOCK_SLOTS) * held.buffer + held.others


def waiting_bytes(config: ModelConfig, mp: int, workload: Workload) -> int:
    """Buffers of a rank in main memory: of the blocks that wait there, or on their way from the disk to a GPU."""
    streamed = num_streamed(config, workload)
    by_way = BLOCK_SLOTS if streamed and workload.device == "cuda" else 0  # a CPU reads into the slots themselves
    num_buffers = streamed if workload.offload == "cpu" else by_way
    return num_buffers * parameters_of(config, mp, workload).buffer


def decode_read_bytes(config: ModelConfig, mp: int, workload: Workload) -> int:
    """Weights that one rank reads in a step; anew for each row where rows are computed one at a time."""
    held = parameters_of(config, mp, workload)
    num_reads = workload.batch_size if workload.deterministic else 1
    return num_reads * (config.num_layers * held.block + held.others - held.lookup)


def offloaded_bytes(config: ModelConfig, mp: int, workload: Workload) -> int:
    """What comes to the device of one rank in a step."""
    return num_streamed(config, workload) * parameters_of(config, mp, workload).block


def checkpoint_bytes(config: ModelConfig, dtype: str) -> int:
    """The model on disk: every global tensor once, in `dtype`."""
    whole = sum(shard.num_elements for shard in shards(config, 0, 1).values())
    return whole * BYTES_PER_ELEMENT[dtype]


def kv_cache_bytes(config: ModelConfig, mp: int, dtype: str, *, batch_size: int, seq_len: int) -> int:
    """Bytes of one rank's keys and values: 2 x layers x batch x length x local KV heads x head_dim x bytes."""
    num_kv, _ = heads_per_rank(config, mp)
    elements = 2 * config.num_layers * batch_size * seq_len * num_kv * config.head_dim
    return elements * BYTES_PER_ELEMENT[dtype]


def cache_bytes(config: ModelConfig, mp: int, workload: Workload) -> int:
    """One rank's keys and values, of all its parts."""
    degree, length = layout_degree(mp, workload.deterministic), workload.seq_len
    length = slot_length(config, length, workload.element_bytes) if workload.deterministic else length
    cache = kv_cache_bytes(config, degree, workload.dtype, batch_size=workload.batch_size, seq_len=length)
    return degree // mp * cache


def padding_share(config: ModelConfig, mp: int, quant: str = "none", deterministic: bool = False) -> float:
    """Zeros and repeated KV heads over all ranks, as a share of the model's own matrix elements (norms aside)."""
    ranks = [run_time_shards(config, rank, mp, quant, deterministic) for rank in range(mp)]
    held = [shard for rank in ranks for shard in rank.values()]
    matrices = [shard for shard in held if len(shard.shape) == 2]
    own = sum(shard.num_elements for shard in shards(config, 0, 1).values() if len(shard.shape) == 2)
    return sum(shard.num_elements for shard in matrices) / own - 1


# ---- main memory -----------------------------------------------------------------------------------------------------


def host_bytes(config: ModelConfig, mp: int, workload: Workload) -> int:
    """Main memory of all ranks of one machine at its most, without the page cache: beside a GPU while they load, a
    chunk in fp32 each and the blocks that wait there; on a CPU all that they hold."""
    if workload.device == "cpu":
        return mp * rank_memory(config, mp, workload).total_bytes
    return mp * (CUDA_HOST_BYTES + LOAD_ELEMENTS * FP32 + waiting_bytes(config, mp, workload))
