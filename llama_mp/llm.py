"""A model ready to answer, on one rank or many: the same object for scripts, notebooks and the launch files."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama_mp.answer import Answer, Codec, needed_length
from llama_mp.cache import KVCache
from llama_mp.checkpoint.load import load_shards, not_finite, open_source
from llama_mp.checkpoint.source import Source, listed
from llama_mp.config import RunConfig, SamplingConfig, size_names
from llama_mp.engine import Engine, Stats
from llama_mp.errors import RequestError
from llama_mp.flags import checked
from llama_mp.kernels import load_kernels
from llama_mp.layout import check_degree, fuse, shards
from llama_mp.locate import Checkpoint, locate
from llama_mp.machine import DTYPE_NAMES, PeakMemory, choose_dtype
from llama_mp.memory import kv_cache_bytes, padding_share
from llama_mp.model import Transformer, build, fill
from llama_mp.parallel import World, connect
from llama_mp.prompts import Prompt
from llama_mp.runner import Leader, Runner, follow

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What loading cost, on all ranks."""

    seconds: float
    bytes_read: int
    weight_bytes: int


class LLM:
    """`LLM("smollm2-135m").generate(["..."])`: one process is MP = 1; under torchrun every rank makes the same calls.

    `model` is a size of configs/ or a checkpoint's path; `flags` are those of RunConfig. Only one LLM at a time can be
    open in a process; `close` it, or use it as a context manager."""

    def __init__(self, model: str | Path | None = None, **flags: Any) -> None:
        if model is not None:
            is_path = isinstance(model, Path) or os.sep in model or Path(model).exists()
            flags |= {"ckpt_dir" if is_path and model not in size_names() else "size": model}
        run = RunConfig(**checked(RunConfig, flags))
        checkpoint = locate(run)
        self.open(run, checkpoint, connect(run))

    @classmethod
    def of_checkpoint(cls, run: RunConfig, checkpoint: Checkpoint, world: World, *, codec: Codec | None) -> "LLM":
        """The model of a located checkpoint in a world that is connected; `codec` on rank 0, None on the others."""
        llm = cls.__new__(cls)
        llm.open(run, checkpoint, world, codec)
        return llm

    def open(self, run: RunConfig, checkpoint: Checkpoint, world: World, codec: Codec | None = None) -> None:
        """Load this rank's weights. Fails on all ranks or on none."""
        self.run, self.checkpoint, self.world = run, checkpoint, world
        self.model, self.peak_memory, self.stats = None, PeakMemory(world.device), Stats()
        self.closed = False
        try:
            self.load(codec)
        except BaseException:
            self.close_alone()
            raise

    def load(self, codec: Codec | None) -> None:
        """Check everything on all ranks, and only then read weights."""
        start, world = time.perf_counter(), self.world
        with world.together():
            check_degree(self.checkpoint.config, world.size)
            self.codec = codec or Codec(self.checkpoint, self.run.chat_format) if world.is_leader else None
            source = open_source(self.checkpoint)
            self.config = source.config
            if self.codec:
                self.codec.check_vocabulary(self.config.vocab_size)
            self.dtype = choose_dtype(self.run.dtype, source.precision, world.device)
        world.agree("precision", str(self.dtype), "give --dtype")
        with world.together():
            self.model = self.load_model(source)
        held = sum(p.numel() * p.element_size() for p in unique_parameters(self.model))
        read_and_held = world.gather([source.bytes_read, held])
        self.warn_of_not_finite()
        self.loaded = Loaded(
            seconds=time.perf_counter() - start,
            bytes_read=sum(read for read, _ in read_and_held),
            weight_bytes=sum(held for _, held in read_and_held),
        )

    def load_model(self, source: Source) -> Transformer:
        """This rank's model."""
        world = self.world
        if world.device.type == "cpu" and self.dtype is torch.bfloat16:
            load_kernels()  # built now, if it must be, and not during the first step
        model = build(self.config, world.size)
        wanted = fuse(shards(self.config, world.rank, world.size))
        parameters = load_shards(wanted, source, dtype=self.dtype, device=world.device)
        shown = tqdm(parameters, "loading", len(wanted), leave=False, disable=not self.shows_progress, unit=" tensors")
        parameters = dict(shown)
        self.not_finite = [source for name, shard in wanted.items() for source in not_finite(shard, parameters[name])]
        fill(model, parameters)
        if world.is_leader and (padding := padding_share(self.config, world.size)):
            cost = f"padding and repeated KV heads add {padding:.1%} to the weights"
            self.say(f"{self.config.name} over {world.size} ranks: {cost}")
        return model

    def warn_of_not_finite(self) -> None:
        """Rank 0 names the tensors that hold NaN or infinity, once for all ranks. The run goes on."""
        names = list(dict.fromkeys(name for found in self.world.gather(self.not_finite) for name in found))
        if names and self.world.is_leader:
            self.say(
                f"warning: {self.checkpoint.path} holds NaN or infinity in {listed(names)}: its answers are worth "
                "nothing; download it again, or try --dtype fp32 if the file itself is whole"
            )

    # ---- generation --------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str | Messages], **sampling: Any) -> list[dict[str, Any]]:
        """One result per prompt, a text or a chat's messages, in order: the objects of infer's --output, on every rank.

        `sampling` are the flags of SamplingConfig. Raises RequestError for a wrong one. A prompt that cannot be served
        has finish_reason "error"."""
        if self.model is None:
            raise RequestError("this model is closed: open another one")
        with self.world.together():
            config = SamplingConfig().override(sampling)
            if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
                raise RequestError(f"prompts is a {type(prompts).__name__}, but must be a list of texts or of messages")
            asked = [as_prompt(i, prompt, config) for i, prompt in enumerate(prompts)]
            answers = [self.codec.answer(prompt, self.run.max_seq_len) for prompt in asked] if self.codec else []
        if not self.world.is_leader:
            self.follow()
            return self.world.tell(None)
        for _ in self.stream(answers):
            pass
        return self.world.tell([answer.record() for answer in answers])

    def stream(self, answers: Sequence[Answer]) -> Iterator[tuple[Answer, str]]:
        """Rank 0: compute `answers`; each time one gains text or ends, it and the text gained. The others `follow`."""
        max_seq_len = needed_length(answers, self.config, self.run.max_seq_len)
        waiting = {answer.request: answer for answer in answers if not answer.is_finished}
        num_slots = max(1, min(self.run.max_batch_size, len(waiting)))
        leader = Leader(self.prepare(self.world.tell([num_slots, max_seq_len])), self.world)
        engine = Engine(leader, eos_ids=self.codec.tokenizer.eos_ids, stats=self.stats)
        for request in waiting:
            engine.submit(request)
        try:
            while engine.has_work:
                with self.world.in_step():
                    moved = engine.step()
                for request in moved:
                    yield waiting[request], waiting[request].advance()
        except GeneratorExit:  # the caller has had enough; after any other error the ranks are not in step
            leader.stop()
            raise
        leader.stop()

    def follow(self) -> bool:
        """Every rank but 0: wait for rank 0's next `stream` and take part in it; False when it dismisses instead."""
        shape = self.world.tell(None)
        if shape is None:
            return False
        runner = self.prepare(shape)
        with self.world.in_step():
            follow(runner)
        return True

    def dismiss(self) -> None:
        """Rank 0: there is nothing more to `follow`."""
        self.world.tell(None)

    def prepare(self, shape: Sequence[int]) -> Runner:
        """A runner over a cache of (slots, positions) `shape`."""
        num_slots, max_seq_len = shape
        with self.world.together():
            cache = KVCache.allocate(
                self.config,
                self.world.size,
                num_slots=num_slots,
                max_seq_len=max_seq_len,
                dtype=self.dtype,
                device=self.world.device,
            )
            return Runner(self.config, self.model, cache)

    # ---- around it ---------------------------------------------------------------------------------------------

    @property
    def shows_progress(self) -> bool:
        return self.world.is_leader and sys.stderr.isatty()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the other ranks, all of them together, and free the weights. Nothing happens the second time."""
        if self.closed:
            return
        self.model, self.closed = None, True
        self.peak_memory.close()
        self.world.close()

    def close_alone(self) -> None:
        """After a failure: one rank alone can go on with another model; several may be out of step, and end."""
        if self.world.size == 1:
            self.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.close_alone()

    def summary(self) -> str:
        """The end line of a run. Every rank calls it; rates and bytes are sums over the ranks, memory the largest."""
        stats, loaded = self.stats, self.loaded
        peak = max(self.world.gather(self.peak_memory.read()))
        load_rate = loaded.bytes_read / loaded.seconds
        parts = [f"loaded {loaded.bytes_read / 1e9:.2f} GB in {loaded.seconds:.1f} s ({load_rate / 1e9:.2f} GB/s)"]
        if stats.first_token_s is not None:
            parts.append(f"TTFT {stats.first_token_s:.3f} s")
        if stats.decode_steps:
            read = self.decode_bytes()
            parts.append(f"{stats.decoded_tokens / stats.decode_s:.1f} tokens/s")
            parts.append(f"{read / stats.decode_s / 1e9:.1f} GB/s")
        return "; ".join([*parts, f"peak memory {peak / 1e9:.2f} GB per rank"])

    def decode_bytes(self) -> int:
        """Bytes that the decode steps had to read, over all ranks: the weights once a step, and the cache in use."""
        embedding = self.model.tok_embeddings.weight  # a lookup reads a row of it, tied embeddings the whole as output
        untied = 0 if self.config.tied_embeddings else embedding.numel() * embedding.element_size() * self.world.size
        mp, dtype = self.world.size, DTYPE_NAMES[self.dtype]
        position = mp * kv_cache_bytes(self.config, mp, dtype, batch_size=1, seq_len=1)
        return self.stats.decode_steps * (self.loaded.weight_bytes - untied) + self.stats.decode_positions * position


def as_prompt(index: int, prompt: str | Messages, sampling: SamplingConfig) -> Prompt:
    """`prompt` as infer would read it from a file; its id, which the randomness hangs on, is its index."""
    if isinstance(prompt, str):
        return Prompt(id=str(index), text=prompt, sampling=sampling)
    if not isinstance(prompt, Sequence):
        raise RequestError(f"prompts[{index}] is a {type(prompt).__name__}, but must be a text or a list of messages")
    return Prompt(id=str(index), messages=tuple(prompt), sampling=sampling)


def unique_parameters(model: Transformer) -> list[Any]:
    """The parameters by storage: tied embeddings once."""
    return list({p.data_ptr(): p for p in model.parameters()}.values())
