"""What the ranks of the pool run: a model loaded and asked, rank 0's findings as the result."""

import contextlib
import io
import os
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from llama_mp import shared_memory
from llama_mp.checkpoint.meta import MetaSource
from llama_mp.config import ModelConfig, RunConfig, SamplingConfig
from llama_mp.engine import Engine
from llama_mp.errors import RunError, one_line
from llama_mp.layout import Span, fuse, shards
from llama_mp.llm import LLM
from llama_mp.locate import locate, random_checkpoint
from llama_mp.model import build
from llama_mp.offload import weight_bytes_of
from llama_mp.parallel import connect, reduce
from llama_mp.request import Request
from llama_mp.runner import Leader, follow
from llama_mp.world import World


@dataclass
class Found:
    logits: np.ndarray  # fp32 [prompt tokens, vocabulary]
    tokens: list[int]  # greedy


def load(world: World, path: Path, tokenizer: Path, **flags: Any) -> LLM:
    run = RunConfig(ckpt_dir=path, tokenizer=tokenizer, **({"dtype": "fp32", "device": "cpu"} | flags))
    return LLM.of_checkpoint(run, locate(run), world, codec=None)


def ask(paths: list[Path], tokenizer: Path, prompt: list[int], num_tokens: int) -> list[Found] | None:
    """The prompt's logits and the greedy tokens after it, from each checkpoint in turn, over the same ranks."""
    world = connect(RunConfig(device="cpu"))
    found = [ask_one(load(world, path, tokenizer), prompt, num_tokens) for path in paths]
    world.close()
    return found if world.is_leader else None


def ask_one(llm: LLM, prompt: list[int], num_tokens: int) -> Found | None:
    runner = llm.prepare([1, len(prompt) + num_tokens])
    if not llm.world.is_leader:
        return follow(runner)
    leader = Leader(runner, llm.world)
    logits = leader.prefill(prompt, slot=0, start=0, all_logits=True).float().cpu().numpy()
    [request] = complete(leader, [prompt], [SamplingConfig(max_gen_len=num_tokens, temperature=0)])
    leader.stop()
    return Found(logits=logits, tokens=request.tokens)


def every_bit(
    paths: list[Path], tokenizer: Path, prompt: list[int], num_steps: int, **flags: Any
) -> list[np.ndarray] | None:
    """--deterministic: the logits [tokens, vocabulary] of the prompt and of greedy steps after it, from each path."""
    world, found = connect(RunConfig(device="cpu")), []
    for path in paths:
        llm = load(world, path, tokenizer, deterministic=True, **flags)
        found.append(logits_of_steps(llm, prompt, num_steps))
        llm.free()
    world.close()
    return found if world.is_leader else None


def every_bit_over_gloo(**asked: Any) -> list[np.ndarray] | None:
    """As between machines."""
    with patch.object(shared_memory, "prepare", lambda *_: "a test wants gloo"):
        return every_bit(**asked)


def logits_of_steps(llm: LLM, prompt: list[int], num_steps: int) -> np.ndarray | None:
    runner = llm.prepare([1, len(prompt) + num_steps])
    if not llm.world.is_leader:
        return follow(runner)
    leader = Leader(runner, llm.world)
    rows = [leader.prefill(prompt, slot=0, start=0, all_logits=True)]
    for position in range(len(prompt), len(prompt) + num_steps):
        leader.tokens_S[0] = rows[-1][-1].argmax()
        rows.append(leader.decode([position]))
    leader.stop()
    return torch.cat(rows).numpy()


def complete(
    leader: Leader, prompts: list[list[int]], samplings: list[SamplingConfig], depth: int = 0
) -> list[Request]:
    """The prompts run to their end by an engine that knows no end of sequence."""
    engine = Engine(leader, eos_ids=frozenset(), depth=depth)
    pairs = enumerate(zip(prompts, samplings, strict=True))
    requests = [Request(id=str(i), prompt=prompt, sampling=sampling) for i, (prompt, sampling) in pairs]
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        engine.step()
    return requests


def batch(
    path: Path,
    tokenizer: Path,
    prompts: list[list[int]],
    samplings: list[SamplingConfig],
    num_slots: int,
    **flags: Any,
) -> list[Request] | None:
    """The prompts together over `num_slots` slots, then each of them alone: requests of both, in this order."""
    world = connect(RunConfig(device="cpu"))
    llm = load(world, path, tokenizer, **flags)
    longest = max(len(p) + s.max_gen_len for p, s in zip(prompts, samplings, strict=True))
    done: list[Request] = []
    for chosen, slots in [(range(len(prompts)), num_slots), *(([i], 1) for i in range(len(prompts)))]:
        runner = llm.prepare([slots, longest])
        if not world.is_leader:
            follow(runner)
            continue
        leader = Leader(runner, world)
        requests = complete(leader, [prompts[i] for i in chosen], [samplings[i] for i in chosen])
        leader.stop()
        done += requests
    llm.free()
    world.close()
    return done if world.is_leader else None


def greedy_of_random_weights(size: str, num_layers: int) -> list[list[int]] | None:
    """The tokens after a prompt, computed twice through `LLM.serve`, as the bench does it."""
    run = RunConfig(size=size, dtype="fp32", device="cpu")
    checkpoint = random_checkpoint(run)
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, num_layers=num_layers))
    found = []
    with LLM.of_checkpoint(run, checkpoint, connect(run), codec=None) as llm:
        for _ in range(2):
            if not llm.world.is_leader:
                llm.follow()
                continue
            sampling = SamplingConfig(temperature=0, max_gen_len=8)
            request = Request(id="0", prompt=list(range(1000, 1016)), sampling=sampling)
            for _ in llm.serve([request], (1, 24), frozenset()):
                pass
            found.append(request.tokens)
        return found if llm.world.is_leader else None


def shapes_agree(config: ModelConfig) -> bool:
    """Whether the model without weights has exactly the parameters of the layout; nothing of it is allocated."""
    world = connect(RunConfig(device="cpu"))
    model = build(config, world.size)
    wanted = {name: shard.shape for name, shard in fuse(shards(config, world.rank, world.size)).items()}
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    all_meta = all(p.is_meta for p in model.parameters())
    world.close()
    return found == wanted and all_meta


def prints_of_connect() -> tuple[str, int]:
    """What joining the groups prints, and how many threads it leaves."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        world = connect(RunConfig(device="cpu"))
    threads = torch.get_num_threads()
    world.close()
    return printed.getvalue(), threads


def messages(values: list[Any]) -> tuple[Any, list[Any]]:
    """What `tell` and `gather` give on this rank."""
    world = connect(RunConfig(device="cpu"))
    told = world.tell(values if world.is_leader else None)
    gathered = world.gather(values[world.rank % len(values)])
    world.close()
    return told, gathered


def failing(rank_that_fails: int, error: Exception) -> str:
    """The error that each rank sees when one fails in a step that all take together."""
    world = connect(RunConfig(device="cpu"))
    try:
        with world.together():
            if world.rank == rank_that_fails:
                raise error
    except Exception as seen:
        return f"{type(seen).__name__}: {seen}"
    finally:
        world.close()
    return "no error"


@dataclass
class Quantized:
    parameters: dict[str, np.ndarray]  # as they are held
    weight_bytes: int
    found: Found | None  # on rank 0


def quantized(path: Path, tokenizer: Path, prompt: list[int], quants: list[str]) -> list[Quantized]:
    """The model under each of `quants`, and what it answers."""
    world, results = connect(RunConfig(device="cpu")), []
    for quant in quants:
        llm = load(world, path, tokenizer, quant=quant)
        held = {name: parameter.numpy() for name, parameter in llm.model.named_parameters()}
        found = ask_one(llm, prompt, num_tokens=4)
        results.append(Quantized(held, weight_bytes_of(llm.model), found))
    world.close()
    return results


def fails_at(tensor: str, ranks: list[int], path: Path, tokenizer: Path, quant: str) -> str:
    """What each rank sees when `ranks` cannot read `tensor`."""
    world = connect(RunConfig(device="cpu"))
    read = MetaSource.read

    def broken(source: MetaSource, name: str, *spans: Span) -> torch.Tensor:
        if name == tensor and world.rank in ranks:
            raise RunError(f"{name} is gone")
        return read(source, name, *spans)

    try:
        with patch.object(MetaSource, "read", broken):
            load(world, path, tokenizer, quant=quant)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        world.close()
    return "loaded"


def refusal(path: Path, tokenizer: Path) -> tuple[int, str]:
    """How loading a checkpoint fails on this rank: the exit code, and the text of the line."""
    world = connect(RunConfig(device="cpu"))
    try:
        load(world, path, tokenizer)
    except Exception as error:
        return getattr(error, "exit_code", 0), one_line(error)
    finally:
        world.close()
    return 0, "loaded"


def said_while_loading(path: Path, tokenizer: Path, **flags: Any) -> str:
    """What this rank writes to stderr when it loads a checkpoint."""
    world = connect(RunConfig(device="cpu"))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        load(world, path, tokenizer, **flags)
    world.close()
    return said.getvalue()


def two_worlds(value: str) -> list[Any]:
    """What is told in two worlds, one after the other, over the store that torchrun keeps for both."""
    told = []
    for attempt in range(2):
        world = connect(RunConfig(device="cpu"))
        told.append(world.tell(f"{value} {attempt}" if world.is_leader else None))
        world.gather(None)
        world.close()
    return told


def silent_rank(step_timeout: float, silence: float) -> str:
    """Rank 1 stays away from a reduction for `silence` seconds: what rank 0 then sees."""
    world = connect(RunConfig(device="cpu", step_timeout=step_timeout))
    try:
        with world.in_step():
            if world.rank == 1:
                time.sleep(silence)
            return str(reduce(torch.ones(1)).item())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        world.close()


def patient(limit: float, pause: float, heart_stops: bool) -> str:
    """Rank 0 pauses for longer than the others' patience before it speaks, its heart beating or not."""
    world = connect(RunConfig(device="cpu", step_timeout=limit))
    world.gather("all are heard")
    try:
        if world.is_leader:
            if heart_stops:
                world.pulse.is_over = True
            time.sleep(pause)
        return world.tell("hello" if world.is_leader else None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        world.close()


def suspended(limit: float, seconds: float) -> list[str]:
    """All ranks are stopped for a while, as SLURM or a container's host may have it, and go on."""
    world = connect(RunConfig(device="cpu", step_timeout=limit))
    world.gather("all are heard")
    subprocess.Popen(["sh", "-c", f"kill -STOP {os.getpid()}; sleep {seconds}; kill -CONT {os.getpid()}"])
    time.sleep(seconds + 1)
    told = [world.tell("hello" if world.is_leader else None)]
    world.gather("nobody needs the store any more")
    world.close()
    return told


def slow_leader(step_timeout: float, pause: float) -> list[Any]:
    """Rank 0 pauses before it says something: what the ranks are told. A person at the terminal takes longer."""
    world = connect(RunConfig(device="cpu", step_timeout=step_timeout))
    if world.is_leader:
        time.sleep(pause)
    told = [world.tell("hello" if world.is_leader else None)]
    message = torch.tensor([7 if world.is_leader else 0])
    if world.is_leader:
        time.sleep(pause)
    dist.broadcast(message, src=0)
    world.close()
    return [*told, message.item()]


def misheard(path: Path, tokenizer: Path) -> str:
    """LLAMA_MP_DEBUG=1: the last rank hears another token than rank 0 said, in the third step, which is told
    in the fifth message: a prompt takes two."""
    world, broadcast, count = connect(RunConfig(device="cpu")), dist.broadcast, 0

    def mishearing(message: torch.Tensor, src: int) -> None:
        nonlocal count
        broadcast(message, src=src)
        count += 1
        if count == 5 and world.rank == world.size - 1:
            message[5] += 1

    try:
        llm = load(world, path, tokenizer)
        with patch.dict(os.environ, LLAMA_MP_DEBUG="1"), patch.object(dist, "broadcast", mishearing):
            ask_one(llm, [1, 2, 3], num_tokens=6)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        world.close()
    return "not noticed"
