"""This rank's model with its weights, as a run asks for them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from llama_mp.checkpoint.load import load_shards
from llama_mp.checkpoint.source import Source, listed
from llama_mp.config import ModelConfig, RunConfig
from llama_mp.deterministic import Mode
from llama_mp.errors import counted, say, shows_progress
from llama_mp.fused import load_steps
from llama_mp.kernels import load_kernels, load_many_rows
from llama_mp.memory import padding_share, run_time_shards
from llama_mp.model import Transformer, fill
from llama_mp.offload import Store, block_of, fill_streamed
from llama_mp.quantizer import Quantizer
from llama_mp.world import World


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What loading cost, on all ranks."""

    seconds: float
    bytes_read: int
    weight_bytes: int


def load_model(
    run: RunConfig,
    config: ModelConfig,
    source: Source,
    mode: Mode,
    store: Store | None,
    *,
    dtype: torch.dtype,
    world: World,
    has_blocks: bool,
) -> tuple[Transformer, list[str]]:
    """The model, and the names of tensors with values that cannot be weights. `store`: of blocks that wait elsewhere.
    `has_blocks`: every rank's has its blocks from an earlier run."""
    if world.device.type == "cpu":
        load_kernels(), load_many_rows(), load_steps()  # built now, if they must be, and not while a prompt waits
    layout = world.size, run.quant, run.deterministic
    wanted = run_time_shards(config, world.rank, *layout)
    wanted = {name: shard for name, shard in wanted.items() if not (has_blocks and block_of(name))}
    with Quantizer(run.quant, wanted.values(), world) as finish:
        model = mode.build(config, world.size, run.quant, dtype)
        parameters = load_shards(wanted, source, dtype=dtype, device=world.device, transform=finish)
        is_shown = world.is_leader and shows_progress()
        parameters = tqdm(parameters, "loading", total=len(wanted), unit=" tensors", leave=False, disable=not is_shown)
        if store:
            fill_streamed(model, parameters, store, world.device)
        else:
            fill(model, dict(parameters))
    if store and finish.not_finite:
        store.forget()  # so that the next run warns as well
    if world.is_leader and (padding := padding_share(config, *layout)):
        cost = f"padding and repeated KV heads add {padding:.1%} to the weights"
        say(f"{config.name} over {counted(world.size, 'rank')}: {cost}")
    return model, finish.not_finite


def warn_of_not_finite(found: list[str], path: Path, quant: str, world: World) -> None:
    """Rank 0 names the tensors of the checkpoint at `path` that any rank has `found` to hold NaN or infinity, once for
    all ranks. The run goes on."""
    names = list(dict.fromkeys(name for of_rank in world.gather(found) for name in of_rank))
    unquantized = "" if quant == "none" else " --quant none"
    if names and world.is_leader:
        say(
            f"warning: {path} holds NaN or infinity in {listed(names)}: its answers are worth nothing; download it "
            f"again, or try --dtype fp32{unquantized} if the file itself is whole"
        )
