"""Requests in, tokens out. Rank 0 decides which rows run; it knows nothing of text.

A waiting request takes the first free slot and is prefilled; then all rows take one step at once, and a finished
row's slot goes to the next request. Rows always occupy the slots 0 .. B - 1, so that a step reads the cache in place.

A step needs no more of the one before than what that leaves on the device. So up to `depth` steps are in the air while
the host deals with the tokens that have landed; a row that turns out to have ended drops what it still gets.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama_mp.chunks import SCORED_CHUNK
from llama_mp.request import Request
from llama_mp.runner import Leader
from llama_mp.sampling import Row, check_finite, sample, token_logprobs, uniform
from llama_mp.seen import Seen
from llama_mp.transfer import Download, upload


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


@dataclass(kw_only=True, eq=False)
class Seat:
    """A request in its slot. Of the `num_chosen` tokens of its answer the last may still be in the air."""

    request: Request
    num_chosen: int = 0

    @property
    def position(self) -> int:
        """Where the last token stands."""
        return len(self.request.prompt) + self.num_chosen - 1

    def next_choice(self) -> Row:
        """How the token after the last one is chosen."""
        sampling = self.request.sampling
        draw = uniform(sampling.seed, self.request.id, self.position + 1) if sampling.temperature > 0 else 0.0
        return Row(sampling=sampling, uniform=draw)

    def is_full(self, max_seq_len: int) -> bool:
        """Whether the last token is the last that may be."""
        return is_full(self.request, self.num_chosen, max_seq_len)


@dataclass(kw_only=True, eq=False)
class Flight:
    """The tokens that a pass chooses, for some seats, on their way to the host."""

    seats: list[Seat]
    tokens: Download
    logprobs: Download | None
    num_prefilled: int  # tokens of a prompt that the pass computes; none in a step
    num_positions: int  # of the cache, that the pass reads
    launched_s: float


class Engine:
    """Runs the submitted requests to their end, one `step` after the other."""

    def __init__(
        self,
        runner: Leader,
        *,
        eos_ids: frozenset[int],
        depth: int = 0,
        stats: Stats | None = None,
        held: Sequence[int] = (),
    ) -> None:
        """`depth`: steps in the air while the host deals with tokens. `stats`: those to add to, where several engines
        share them. `held`: ids whose keys and values slot 0 has already; the first prompt need not compute them."""
        self.runner, self.eos_ids, self.depth, self.held = runner, eos_ids, depth, held
        self.waiting: deque[Request] = deque()
        self.running: list[Seat] = []  # by slot
        self.flights: deque[Flight] = deque()
        self.seen = Seen(runner.cache.num_slots)
        self.stats = stats or Stats()
        self.started_s = self.landed_s = time.perf_counter()

    def submit(self, request: Request) -> None:
        """Queue a request whose prompt leaves room in the cache for at least one token."""
        assert 0 < len(request.prompt) < self.runner.cache.max_seq_len, f"prompt of {len(request.prompt)} tokens"
        self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or any(seat.request.finish_reason is None for seat in self.running)

    def step(self) -> list[Request]:
        """Fill one free slot from the queue, or else give every row one more token. Returns what moved on."""
        if self.waiting and (slot := self.free_slot()) is not None:
            return self.land() if self.flights else self.admit(self.waiting.popleft(), slot)
        self.close_gaps()
        while len(self.flights) <= self.depth and self.can_launch():
            self.launch()
        return self.land() if self.flights else []

    # ---- slots -------------------------------------------------------------------------------------------------

    def free_slot(self) -> int | None:
        """The first slot of a finished row, or a new one; None when all are taken."""
        finished = [slot for slot, seat in enumerate(self.running) if seat.request.finish_reason]
        unused = range(len(self.running), self.runner.cache.num_slots)
        return next(iter([*finished, *unused]), None)

    def ids_in_slot_0(self) -> list[int]:
        """Those whose keys and values it has: of a token that was chosen last the next step would have made them."""
        if not self.running:
            return []
        seat = self.running[0]
        return (seat.request.prompt + seat.request.tokens)[: seat.position]

    def close_gaps(self) -> None:
        """Drop finished rows; the last row moves into each gap."""
        for slot in reversed(range(len(self.running))):
            if self.running[slot].request.finish_reason is None:
                continue
            last = self.running.pop()
            if slot < len(self.running):
                self.runner.move(len(self.running), slot, last.position)
                self.seen.move(len(self.running), slot)
                self.running[slot] = last

    # ---- passes ------------------------------------------------------------------------------------------------

    def admit(self, request: Request, slot: int) -> list[Request]:
        """Prefill the prompt into `slot` and wait for the first token: whoever asked does, too."""
        start, seat = time.perf_counter(), Seat(request=request)
        num_held, self.held = self.num_held(request, slot), ()
        self.running[slot : slot + 1] = [seat]
        logits_1V = self.prefill(request, slot=slot, num_held=num_held)
        self.seen.begin(slot, request, logits_1V)
        self.choose([seat], slot, logits_1V, start_s=start, num_prefilled=len(request.prompt) - num_held)
        return self.land()

    def num_held(self, request: Request, slot: int) -> int:
        """Tokens of the prompt that `slot` has already. One is always left to compute: its logits are wanted."""
        if slot != 0 or request.sampling.prompt_logprobs:
            return 0
        return min(num_common(self.held, request.prompt), len(request.prompt) - 1)

    def prefill(self, request: Request, *, slot: int, num_held: int) -> torch.Tensor:
        """Run the prompt after `num_held` tokens in chunks. Returns the logits [1, V] after its last token."""
        scored = request.sampling.prompt_logprobs
        size = SCORED_CHUNK if scored else self.runner.prefill_chunk
        prompt = request.prompt
        for start in range(num_held, len(prompt), size):
            chunk = prompt[start : start + size]
            logits_NV = self.runner.prefill(chunk, slot=slot, start=start, all_logits=scored)
            following = prompt[start + 1 : start + size + 1]
            if scored and following:
                ids = upload(following, logits_NV.device)
                request.prompt_logprobs += token_logprobs(logits_NV[: len(ids)], ids).tolist()
        return logits_NV[-1:]

    def can_launch(self) -> bool:
        """Whether every row has a next token, as far as the host knows."""
        max_seq_len = self.runner.cache.max_seq_len
        return bool(self.running) and not any(seat.is_full(max_seq_len) for seat in self.running)

    def launch(self) -> None:
        """Have every row's next token computed."""
        start, seats = time.perf_counter(), list(self.running)
        logits_BV = self.runner.decode([seat.position for seat in seats])
        self.choose(seats, 0, logits_BV, start_s=start)

    def choose(
        self, seats: list[Seat], first_slot: int, logits_BV: torch.Tensor, *, start_s: float, num_prefilled: int = 0
    ) -> None:
        """Choose the next token of neighbouring slots, and send it on its way. The host waits for nothing."""
        slots = slice(first_slot, first_slot + len(seats))
        num_positions = sum(seat.position for seat in seats)
        chosen = sample(logits_BV, [seat.next_choice() for seat in seats], self.seen.of(slots))
        tokens_B = chosen.tokens.clamp(min=0)  # logits that are not finite end the run when they land
        self.runner.tokens_S[slots] = tokens_B
        self.seen.add(slots, tokens_B)
        for seat in seats:
            seat.num_chosen += 1
        self.flights.append(
            Flight(
                seats=seats,
                tokens=Download(chosen.tokens),
                logprobs=None if chosen.logprobs is None else Download(chosen.logprobs),
                num_prefilled=num_prefilled,
                num_positions=num_positions,
                launched_s=start_s,
            )
        )

    # ---- landing -----------------------------------------------------------------------------------------------

    def land(self) -> list[Request]:
        """Wait for the tokens of the oldest flight. Returns the requests that they belong to."""
        flight = self.flights.popleft()
        tokens = flight.tokens.get(self.runner.wait_for).tolist()
        logprobs = flight.logprobs.get(self.runner.wait_for).tolist() if flight.logprobs else []
        self.count(flight)
        awaited = [(i, seat.request) for i, seat in enumerate(flight.seats) if seat.request.finish_reason is None]
        check_finite([tokens[index] for index, _ in awaited])
        for index, request in awaited:
            self.append(request, tokens[index], logprobs[index] if logprobs else 0.0)
        return [request for _, request in awaited]

    def append(self, request: Request, token: int, logprob: float) -> None:
        """One more token, or the request's end."""
        if token in self.eos_ids:
            request.finish_reason = "stop"
            return
        request.tokens.append(token)
        if request.sampling.logprobs:
            request.logprobs.append(logprob)
        if is_full(request, len(request.tokens), self.runner.cache.max_seq_len):
            request.finish_reason = "length"

    def count(self, flight: Flight) -> None:
        """Add `flight`, which has landed, with the time since the one before did, or it was launched: what the host
        takes between steps counts as far as it is more than the device takes for one."""
        stats, now = self.stats, time.perf_counter()
        seconds, self.landed_s = now - max(flight.launched_s, self.landed_s), now
        if flight.num_prefilled:
            stats.prefill_s += seconds
            stats.prefilled_tokens += flight.num_prefilled
            stats.first_token_s = stats.first_token_s or now - self.started_s
            return
        stats.decode_s += seconds
        stats.decode_steps += 1
        stats.decoded_tokens += len(flight.seats)
        stats.decode_positions += flight.num_positions


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def is_full(request: Request, num_tokens: int, max_seq_len: int) -> bool:
    """Whether an answer of so many tokens has to end."""
    return len(request.prompt) + num_tokens >= max_seq_len or num_tokens >= request.sampling.max_gen_len
