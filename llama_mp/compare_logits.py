"""Do two checkpoints make the same logits, to the last bit? That tells a fault in their files from rounding, which
other numbers of ranks bring about: what is computed here knows nothing of shards and formats.

In fp32, which holds all that checkpoints store; of each in turn the vocabulary and one block at a time.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from llama_mp.checkpoint.load import CPU, load_shards, open_source
from llama_mp.checkpoint.scan import bits
from llama_mp.checkpoint.source import Source
from llama_mp.checkpoint.verify import LogitsCheck
from llama_mp.config import ModelConfig, RunConfig
from llama_mp.deterministic import (
    DeterministicRunner,
    allocate_cache,
    build_deterministic,
    go_any_way,
    keep_to_one_way,
)
from llama_mp.errors import RequestError
from llama_mp.fit import free_host_bytes
from llama_mp.layout import Shard
from llama_mp.locate import checkpoint_at
from llama_mp.machine import return_holes
from llama_mp.memory import parameters
from llama_mp.model import fill
from llama_mp.parallel import connect
from llama_mp.progress import Progress
from llama_mp.virtual import VIRTUAL_RANKS, virtual_shards

NUM_TOKENS = 16
GB = 1e9


def compare_logits(path: Path, against: Path) -> LogitsCheck:
    """The logits after each of a few tokens, of both checkpoints."""
    try:
        sources = [open_source(checkpoint_at(one)) for one in (path, against)]
    except RequestError as error:
        return LogitsCheck(None, str(error))
    if obstacle := obstacle_to([source.config for source in sources]):
        return LogitsCheck(None, obstacle)
    world = connect(RunConfig(device="cpu"))
    num_threads = torch.get_num_threads()
    keep_to_one_way(CPU)
    try:
        ours, theirs = map(logits_of, sources)
    finally:
        go_any_way(CPU, num_threads)
        world.close()
    return check(ours, theirs)


def obstacle_to(configs: list[ModelConfig]) -> str | None:
    """Why the logits of these models cannot be compared here, if they cannot."""
    ours, theirs = (config.vocab_size for config in configs)
    if ours != theirs:
        return f"the vocabularies have {ours} and {theirs} tokens"
    for config in configs:
        if config.num_heads < VIRTUAL_RANKS:
            return f"{config.name} has {config.num_heads} attention heads, and this takes {VIRTUAL_RANKS}"
        held, free = parameters(config, 0, 1, "none", "fp32", deterministic=True), free_host_bytes()
        needed = held.block + held.others
        if needed > free:
            return (
                f"the vocabulary and a block of {config.name} take {needed / GB:.2f} GB in fp32, "
                f"and {free / GB:.2f} GB of main memory are free"
            )
    return None


def logits_of(source: Source) -> torch.Tensor:
    """[NUM_TOKENS, vocabulary], of tokens that are the same for every checkpoint of a vocabulary."""
    config, wanted = source.config, virtual_shards(source.config, 0, 1)
    model = build_deterministic(config, 1)
    blocks = list(model.layers)
    del model.layers  # for what follows is no module
    others = {name: shard for name, shard in wanted.items() if not name.startswith("layers.")}
    fill(model, dict(load_shards(others, source, dtype=torch.float32, device=CPU)))
    cache = allocate_cache(config, 1, num_slots=1, max_seq_len=NUM_TOKENS, dtype=torch.float32, device=CPU)
    tokens = [(7 * i * i + 3) % config.vocab_size for i in range(NUM_TOKENS)]
    with Progress(f"computing {config.name}") as progress:
        model.layers = arriving(blocks, wanted, source, progress)
        return DeterministicRunner(config, model, cache).prefill(tokens, slot=0, start=0, all_logits=True)


def arriving(
    blocks: list[nn.Module], wanted: Mapping[str, Shard], source: Source, progress: Progress
) -> Iterator[nn.Module]:
    """The blocks in turn, each with its weights as long as it is used."""
    for index, block in enumerate(blocks):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): shard for name, shard in wanted.items() if name.startswith(prefix)}
        parameters = dict(load_shards(own, source, dtype=torch.float32, device=CPU))
        num_bytes = sum(parameter.nbytes for parameter in parameters.values())
        block.load_state_dict(parameters, strict=True, assign=True)
        del parameters
        yield block
        block.to("meta")
        return_holes()
        progress((index + 1) * num_bytes, len(blocks) * num_bytes)


def check(ours: torch.Tensor, theirs: torch.Tensor) -> LogitsCheck:
    """Of logits [N, V]."""
    differ = bits(ours) != bits(theirs)
    if not differ.any():
        return LogitsCheck(True, f"equal to the last bit after each of {len(ours)} tokens")
    most, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    return LogitsCheck(
        False,
        f"{int(differ.sum())} of {differ.numel()} differ, by {most:.3g} at most, where the largest is {largest:.3g}",
    )
