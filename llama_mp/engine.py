"""Requests in, tokens out. Rank 0 decides which rows run; it knows nothing of text.

A waiting request takes the first free slot and is prefilled; then all rows take one step at once, and a finished
row's slot goes to the next request. Rows always occupy the slots 0 .. B - 1, so that a step reads the cache in place.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama_mp.chunks import SCORED_CHUNK
from llama_mp.request import Request
from llama_mp.runner import Leader
from llama_mp.sampling import Row, sample, token_logprobs, uniform


@dataclass(kw_only=True)
class Stats:
    """What was computed, and in how many seconds."""

    prefilled_tokens: int = 0
    prefill_s: float = 0.0
    decoded_tokens: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0
    decode_positions: int = 0  # cache positions read in all decode steps
    first_token_s: float | None = None  # from the start to the first token of the first request


class Engine:
    """Runs the submitted requests to their end, one `step` after the other."""

    def __init__(self, runner: Leader, *, eos_ids: frozenset[int], stats: Stats | None = None) -> None:
        """`stats`: those to add to, where several engines share them."""
        self.runner, self.eos_ids = runner, eos_ids
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # by slot
        self.stats = stats or Stats()
        self.started = time.perf_counter()

    def submit(self, request: Request) -> None:
        """Queue a request whose prompt leaves room in the cache for at least one token."""
        assert 0 < len(request.prompt) < self.runner.cache.max_seq_len, f"prompt of {len(request.prompt)} tokens"
        self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or any(request.finish_reason is None for request in self.running)

    def step(self) -> list[Request]:
        """Fill one free slot from the queue, or else give every row one more token. Returns what moved on."""
        if self.waiting and (slot := self.free_slot()) is not None:
            return [self.admit(self.waiting.popleft(), slot)]
        self.close_gaps()
        return self.decode() if self.running else []

    def free_slot(self) -> int | None:
        """The first slot of a finished row, or a new one; None when all are taken."""
        finished = [slot for slot, request in enumerate(self.running) if request.finish_reason]
        unused = range(len(self.running), self.runner.cache.num_slots)
        return next(iter([*finished, *unused]), None)

    def admit(self, request: Request, slot: int) -> Request:
        """Prefill the prompt into `slot` and choose the first token."""
        start = time.perf_counter()
        self.running[slot : slot + 1] = [request]
        self.append_tokens([request], self.prefill(request, slot=slot))
        self.stats.prefill_s += time.perf_counter() - start
        self.stats.prefilled_tokens += len(request.prompt)
        if self.stats.first_token_s is None:
            self.stats.first_token_s = time.perf_counter() - self.started
        return request

    def close_gaps(self) -> None:
        """Drop finished rows; the last row moves into each gap."""
        for slot in reversed(range(len(self.running))):
            if self.running[slot].finish_reason is None:
                continue
            last = self.running.pop()
            if slot < len(self.running):
                self.runner.move(len(self.running), slot, last.position)
                self.running[slot] = last

    def prefill(self, request: Request, *, slot: int) -> torch.Tensor:
        """Run the prompt in chunks. Returns the logits [1, V] after its last token."""
        scored = request.sampling.prompt_logprobs
        size = SCORED_CHUNK if scored else self.runner.prefill_chunk
        prompt = request.prompt
        for start in range(0, len(prompt), size):
            chunk = prompt[start : start + size]
            logits_NV = self.runner.prefill(chunk, slot=slot, start=start, all_logits=scored)
            following = prompt[start + 1 : start + size + 1]
            if scored and following:
                ids = torch.tensor(following, device=logits_NV.device)
                request.prompt_logprobs += token_logprobs(logits_NV[: len(ids)], ids).tolist()
        return logits_NV[-1:]

    def decode(self) -> list[Request]:
        start = time.perf_counter()
        rows = list(self.running)
        logits_BV = self.runner.decode([row.tokens[-1] for row in rows], [row.position for row in rows])
        self.append_tokens(rows, logits_BV)
        self.stats.decode_s += time.perf_counter() - start
        self.stats.decode_steps += 1
        self.stats.decoded_tokens += len(rows)
        self.stats.decode_positions += sum(row.position for row in rows)
        return rows

    def append_tokens(self, rows: Sequence[Request], logits_BV: torch.Tensor) -> None:
        """Choose each row's next token, and end the rows that have come to their end."""
        tokens_B, logprobs_B = sample(logits_BV, [choice(request) for request in rows])
        for index, (request, token) in enumerate(zip(rows, tokens_B.tolist(), strict=True)):
            if token in self.eos_ids:
                request.finish_reason = "stop"
                continue
            request.tokens.append(token)
            if request.sampling.logprobs:
                request.logprobs.append(float(logprobs_B[index]))
            full = request.position + 1 >= self.runner.cache.max_seq_len
            if full or len(request.tokens) >= request.sampling.max_gen_len:
                request.finish_reason = "length"


def choice(request: Request) -> Row:
    """How the token after the last one of `request` is chosen."""
    sampling = request.sampling
    draw = uniform(sampling.seed, request.id, request.position + 1) if sampling.temperature > 0 else 0.0
    seen = torch.tensor(request.prompt + request.tokens) if sampling.repetition_penalty != 1 else None
    return Row(sampling=sampling, uniform=draw, seen=seen)
