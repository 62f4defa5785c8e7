"""A model ready to answer, on one rank or many: the same object for scripts, notebooks and the launch files."""

import contextlib
import math
import os
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_mp import cuda
from llama_mp.answer import Answer, Codec, largest_shape, needed_shape
from llama_mp.budget import Fitting
from llama_mp.cache import KVCache
from llama_mp.checkpoint.load import open_source
from llama_mp.config import RunConfig, SamplingConfig, size_names
from llama_mp.deterministic import DETERMINISTIC, ORDINARY, go_any_way, keep_to_one_way
from llama_mp.dtypes import DTYPE_NAMES
from llama_mp.engine import Engine, Stats
from llama_mp.errors import RequestError, abandon
from llama_mp.flags import checked
from llama_mp.graphs import GraphRunner
from llama_mp.loading import Loaded, load_model, warn_of_not_finite
from llama_mp.locate import Checkpoint, locate
from llama_mp.machine import PeakMemory, choose_dtype, free_room, threads_per_rank
from llama_mp.memory import RankMemory, check_layout, has_graphs, rank_memory
from llama_mp.model import Transformer
from llama_mp.offload import Store, open_store, weight_bytes_of
from llama_mp.parallel import connect
from llama_mp.prompts import Messages, as_prompts
from llama_mp.request import Request
from llama_mp.runner import Leader, Runner, follow
from llama_mp.world import World


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
    def of_checkpoint(
        cls,
        run: RunConfig,
        checkpoint: Checkpoint,
        world: World,
        *,
        codec: Codec | None,
        answers: Sequence[Answer] = (),
    ) -> "LLM":
        """The model of a located checkpoint in a world that is connected. Rank 0 has the `codec`, and the `answers` to
        come, where they are known: what they need must fit too. Without a tokenizer the model can only `serve`."""
        llm = cls.__new__(cls)
        llm.open(run, checkpoint, world, codec, answers)
        return llm

    def open(
        self,
        run: RunConfig,
        checkpoint: Checkpoint,
        world: World,
        codec: Codec | None = None,
        answers: Sequence[Answer] = (),
    ) -> None:
        """Load this rank's weights. Fails on all ranks or on none."""
        self.run, self.checkpoint, self.world = run, checkpoint, world
        self.config, self.planned = checkpoint.config, RankMemory(0, 0, 0, 0)  # of the largest cache so far
        self.mode = DETERMINISTIC if run.deterministic else ORDINARY
        self.model: Transformer | None = None
        self.peak_memory, self.stats = PeakMemory(world.device), Stats()
        self.closed, self.shape = False, (0, 0)  # slots and positions of the largest cache
        self.store: Store | None = None  # of blocks that wait elsewhere
        self.runner: Runner | None = None  # of the last cache
        try:
            self.load(codec, answers)
        except BaseException:
            self.close_alone()
            raise

    def load(self, codec: Codec | None, answers: Sequence[Answer]) -> None:
        """Check everything on all ranks, and only then read weights."""
        start, world = time.perf_counter(), self.world
        with world.together():
            if self.run.deterministic:
                keep_to_one_way(world.device)
            check_layout(self.checkpoint.config, world.size, self.run.quant, self.run.deterministic)
            has_text = world.is_leader and self.checkpoint.tokenizer is not None
            self.codec = codec or Codec(self.checkpoint, self.run.chat_format) if has_text else None
            source = open_source(self.checkpoint, world.device)
            self.config = source.config
            if self.codec:
                self.codec.check_vocabulary(self.config.vocab_size)
            self.dtype = choose_dtype(self.run.dtype, source.precision, world.device)
        world.agree("precision", str(self.dtype), "give --dtype")
        dtype, kind = DTYPE_NAMES[self.dtype], world.device.type
        self.fitting = Fitting(self.run, self.config, world.size, dtype, kind, has_kernels=cuda.available(world.device))
        shape, largest = world.tell([of(answers, self.config, self.run) for of in (needed_shape, largest_shape)])
        with world.together():
            self.fitting.settle(largest, free_room(world.device, world.local_size))
            self.planned = self.check_fits(shape)
            workload = self.fitting.workload(shape)
            self.store = open_store(self.run, self.checkpoint.files, self.config, workload, world)
        has_blocks = all(world.gather(self.store is not None and self.store.has_blocks))
        with world.together():
            how = {"dtype": self.dtype, "world": world, "has_blocks": has_blocks}
            self.model, not_finite = load_model(self.run, self.config, source, self.mode, self.store, **how)
        read_and_held = world.gather([source.bytes_read, weight_bytes_of(self.model)])
        warn_of_not_finite(not_finite, self.checkpoint.path, self.run.quant, world)
        self.loaded = Loaded(
            seconds=time.perf_counter() - start,
            bytes_read=sum(read for read, _ in read_and_held),
            weight_bytes=sum(held for _, held in read_and_held),
        )

    # ---- generation --------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str | Messages], **sampling: Any) -> list[dict[str, Any]]:
        """One result per prompt, a text or a chat's messages, in order: the objects of infer's --output, on every rank.

        `sampling` are the flags of SamplingConfig. Raises RequestError for a wrong one. A prompt that cannot be served
        has finish_reason "error"."""
        if self.model is None:
            raise RequestError("this model is closed: open another one")
        with self.world.together():
            asked = as_prompts(prompts, SamplingConfig().override(sampling))
            answers = [self.codec.answer(prompt, self.run.max_seq_len) for prompt in asked] if self.codec else []
        if not self.world.is_leader:
            self.follow()
            return self.world.tell(None)
        for _ in self.stream(answers):
            pass
        return self.world.tell([answer.record() for answer in answers])

    def stream(self, answers: Sequence[Answer], *, reuse: bool = False) -> Iterator[tuple[Answer, str]]:
        """Rank 0: compute `answers` as `serve` does; each time one gains text or ends, it and the text gained."""
        waiting = {answer.request: answer for answer in answers if not answer.is_finished}
        shape, eos_ids = needed_shape(answers, self.config, self.run), self.codec.tokenizer.eos_ids
        with contextlib.closing(self.serve(list(waiting), shape, eos_ids, reuse=reuse)) as moved:
            for request in moved:
                yield waiting[request], waiting[request].advance()

    def serve(
        self, requests: Sequence[Request], shape: Sequence[int], eos_ids: frozenset[int], *, reuse: bool = False
    ) -> Generator[Request, None, None]:
        """Rank 0: run `requests` to their end in a cache of `shape`; each whenever it moved on. The others `follow`.

        `reuse`: the beginning of the first prompt that is in the cache already is not computed, unless each bit counts:
        passes over fewer tokens differ in the last ones."""
        reuse = reuse and not self.run.deterministic
        runner = self.prepare(*self.world.tell([list(shape), reuse]))
        held, runner.held = runner.held if reuse else [], []  # nothing is known until all went well
        leader = Leader(runner, self.world)
        engine = Engine(leader, eos_ids=eos_ids, depth=self.depth, stats=self.stats, held=held)
        for request in requests:
            engine.submit(request)
        try:
            while engine.has_work:
                with self.world.in_step():
                    moved = engine.step()
                yield from moved
        except GeneratorExit:  # the caller has had enough; after any other error the ranks are not in step
            leader.stop()
            raise
        except Exception:
            if self.world.size == 1:
                self.close_runner()  # what is in its cache may not be finite, and would spoil the next answers
            raise
        leader.stop()
        runner.held = engine.ids_in_slot_0()

    def follow(self) -> bool:
        """Every rank but 0: wait for rank 0's next `stream` and take part in it; False when it dismisses instead."""
        told = self.world.tell(None)
        if told is None:
            return False
        runner = self.prepare(*told)
        with self.world.in_step():
            follow(runner)
        return True

    def follow_to_end(self) -> None:
        """Every rank but 0: `follow` until rank 0 dismisses. It hears of what is refused too, and goes on."""
        goes_on = True
        while goes_on:
            with contextlib.suppress(RequestError):
                goes_on = self.follow()

    def dismiss(self) -> None:
        """Rank 0: there is nothing more to `follow`."""
        self.world.tell(None)

    def prepare(self, shape: Sequence[int], reuse: bool = False) -> Runner:
        """A runner over a cache of (slots, positions) `shape`, or of more positions: the one before, if it has as many,
        and with it the graphs that it recorded. `reuse`: one that has too few grows, and what it holds stays."""
        num_slots, max_seq_len = shape
        if self.runner and self.runner.cache.num_slots == num_slots:
            if self.runner.cache.max_seq_len >= max_seq_len:
                return self.runner
            if reuse:
                return self.grow(max_seq_len)
        self.close_runner()
        with self.world.together():
            self.check_fits(shape)
        with self.world.together():  # on no rank before each has room
            how = {"num_slots": num_slots, "max_seq_len": max_seq_len, "dtype": self.dtype, "device": self.world.device}
            self.open_runner(self.mode.allocate(self.config, self.world.size, **how))
        return self.runner

    def grow(self, max_seq_len: int) -> Runner:
        """A runner over the same cache, of `max_seq_len` positions or, where that fits, half as many again as it has:
        so that few turns of a conversation have to copy it, and to record graphs anew."""
        cache, held = self.runner.cache, self.runner.held
        self.close_runner()
        ample = max(max_seq_len, min(cache.max_seq_len * 3 // 2, self.config.context_length))
        freed_bytes = cache.num_bytes - cache.keys[0].nbytes  # the last tensor is there as long as it is copied
        with contextlib.suppress(RequestError):  # which all ranks raise if one does
            with self.world.together():
                self.check_fits([cache.num_slots, ample], freed_bytes)
            max_seq_len = ample
        with self.world.together():
            self.check_fits([cache.num_slots, max_seq_len], freed_bytes)
        with self.world.together():
            cache.grow(max_seq_len)
            self.open_runner(cache)
        self.runner.held = held
        return self.runner

    def open_runner(self, cache: KVCache) -> None:
        self.shape = max(self.shape, (cache.num_slots, cache.max_seq_len), key=math.prod)
        self.planned = rank_memory(self.config, self.world.size, self.fitting.workload(self.shape))
        make = GraphRunner if self.records_graphs else self.mode.runner
        self.runner = make(self.config, self.model, cache)

    def close_runner(self) -> None:
        if self.runner:
            self.runner.close()
        self.runner = None

    def check_fits(self, shape: Sequence[int], freed_bytes: int = 0) -> RankMemory:
        """The plan of a cache of `shape`. Raises RequestError when it, and the weights, if they are not here yet, have
        no room in what is free and the `freed_bytes` that will be before it is whole."""
        room = free_room(self.world.device, self.world.local_size)
        room = room._replace(free_bytes=room.free_bytes + freed_bytes)
        return self.fitting.check(shape, room, self.world.local_size, has_weights=self.model is not None)

    # ---- around it ---------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Steps that a GPU may be ahead of the host. On a CPU a step is done when it returns; one that waits for blocks
        is so long that a token should not wait for the next."""
        return 1 if self.world.device.type == "cuda" and not self.run.deterministic and self.store is None else 0

    @property
    def records_graphs(self) -> bool:
        """Whether decode steps become CUDA graphs, as the plan has it."""
        return has_graphs(self.config, self.fitting.workload(self.shape))

    def close(self) -> None:
        """Leave the other ranks, all of them together, and free the weights. Nothing happens the second time."""
        if self.closed:
            return
        self.closed = True
        self.free()
        self.world.close()

    def free(self) -> None:
        """Free the weights: the ranks are left for another model."""
        self.close_runner()
        if self.store:
            self.store.close()  # nothing comes to the model's slots any more
        self.model = self.store = None
        self.peak_memory.close()
        if self.run.deterministic:
            go_any_way(self.world.device, threads_per_rank(self.world.local_size))

    def close_alone(self) -> None:
        """After a failure: one rank alone can go on with another model; several may be out of step, and end."""
        if self.world.size == 1:
            self.close()
        elif self.world.device.type == "cuda":
            abandon()  # NCCL's groups would wait for the others, and for every graph

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.close_alone()
