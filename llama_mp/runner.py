"""One rank's steps, and how rank 0 makes all ranks take the same one at the same time.

N tokens, B rows, V vocabulary.
"""

import os
import zlib
from collections.abc import Sequence
from enum import IntEnum

import torch
import torch.distributed as dist

from llama_mp import liveness
from llama_mp.cache import KVCache
from llama_mp.chunks import PREFILL_CHUNK
from llama_mp.config import ModelConfig
from llama_mp.errors import RunError
from llama_mp.model import Step, Transformer
from llama_mp.parallel import gather_columns, share
from llama_mp.rope import rotation_table
from llama_mp.transfer import upload
from llama_mp.world import World


class Runner:
    """Runs the model over a cache. Every rank makes the same calls in the same order."""

    uses_graphs = False  # CUDA's, of which each is a whole step

    def __init__(self, config: ModelConfig, model: Transformer, cache: KVCache) -> None:
        self.config, self.model, self.cache = config, model, cache
        self.device = model.norm.weight.device
        self.rotations = rotation_table(config, cache.max_seq_len, self.device).unsqueeze(1)
        # By slot, on the device: the token chosen last, and where it stands.
        self.tokens_S = torch.zeros(cache.num_slots, dtype=torch.int64, device=self.device)
        self.positions_S = torch.zeros_like(self.tokens_S)
        self.held: list[int] = []  # rank 0: ids whose keys and values slot 0 has, as far as that is known

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], *, slot: int, start: int, all_logits: bool) -> torch.Tensor | None:
        """Append `tokens` to `slot`, whose first `start` positions are filled.

        Returns on rank 0 the logits after the last token, [1, V], or after each of them, [N, V]."""
        length = start + len(tokens)
        positions_N = torch.arange(start, length, device=self.device)
        is_causal, mask = len(tokens) > 1, None
        if is_causal and start > 0 and self.device.type == "cpu":
            is_causal, mask = False, torch.arange(length, device=self.device) <= positions_N.unsqueeze(1)
        step = Step(
            batch_size=1,
            slots_N=torch.full_like(positions_N, slot),
            positions_N=positions_N,
            rotations_N1d=self.rotations[start:length],
            attended_slots=slice(slot, slot + 1),
            length=length,
            mask=mask,
            is_causal=is_causal,
        )
        with liveness.step():
            x_NC = self.model(upload(tokens, self.device), step, self.cache)
            return self.logits(x_NC if all_logits else x_NC[-1:])

    @torch.inference_mode()
    def decode(self, positions: Sequence[int]) -> torch.Tensor | None:
        """A step of the slots 0 .. B - 1, whose last tokens stand at `positions`. Returns logits [B, V] on rank 0."""
        count, length = len(positions), max(positions) + 1
        self.positions_S[:count] = upload(positions, self.device)
        with liveness.step():
            return self.step(count, length, is_ragged=min(positions) + 1 < length)

    def step(self, num_rows: int, length: int, *, is_ragged: bool) -> torch.Tensor | None:
        """`decode` of what `tokens_S` and `positions_S` hold, over `length` positions of the cache. `is_ragged`: some
        rows may see fewer."""
        positions_N, mask = self.positions_S[:num_rows], None
        if is_ragged:
            mask = (torch.arange(length, device=self.device) <= positions_N.unsqueeze(1))[:, None, None]
        step = Step(
            batch_size=num_rows,
            slots_N=torch.arange(num_rows, device=self.device),
            positions_N=positions_N,
            rotations_N1d=self.rotations[positions_N],
            attended_slots=slice(0, num_rows),
            length=length,
            mask=mask,
        )
        return self.logits(self.model(share(self.tokens_S[:num_rows]), step, self.cache))

    def move(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold what slot `source` holds in its first `length` positions."""
        self.cache.move(source, target, length)
        self.tokens_S[target] = self.tokens_S[source]

    def close(self) -> None:
        """Give back what must not outlive the groups of ranks. No step may follow."""

    def logits(self, x_NC: torch.Tensor) -> torch.Tensor | None:
        logits_NV = gather_columns(self.model.logits(x_NC))
        return None if logits_NV is None else logits_NV[:, : self.config.vocab_size]  # padding is never sampled


class Op(IntEnum):
    STOP, PREFILL, DECODE, MOVE = range(4)


class Leader:
    """Rank 0's runner: each call is told to the followers, who make the same one.

    A message is int64 on the control channel: operation, count, three arguments, then what a step takes: positions, and
    on a CPU tokens; GPUs share these by themselves. The tokens of a prompt follow in a message of their own, for steps
    are told more often."""

    def __init__(self, runner: Runner, world: World) -> None:
        self.runner, self.world = runner, world
        self.cache, self.tokens_S, self.history = runner.cache, runner.tokens_S, History()
        self.prefill_chunk = PREFILL_CHUNK[runner.device.type]  # the most tokens that `prefill` takes
        self.passed: torch.cuda.Event | None = None  # the GPU has done the last pass of a prompt

    def prefill(self, tokens: Sequence[int], *, slot: int, start: int, all_logits: bool) -> torch.Tensor:
        self.tell(Op.PREFILL, len(tokens), (slot, start, all_logits), ())
        if self.world.size > 1:
            self.history.pass_on(torch.tensor(tokens))
        logits_NV = self.runner.prefill(tokens, slot=slot, start=start, all_logits=all_logits)
        self.keep_pace()
        return logits_NV

    def keep_pace(self) -> None:
        """Let several GPUs have two passes of a prompt before them: all of a long one would take more than the time in
        which the next token has to come."""
        if self.world.size > 1 and self.runner.device.type == "cuda":
            before, self.passed = self.passed, torch.cuda.Event()
            self.passed.record()
            if before:
                self.wait_for(before)

    def decode(self, positions: Sequence[int]) -> torch.Tensor:
        tokens = [] if self.tokens_S.device.type == "cuda" else self.tokens_S[: len(positions)].tolist()
        self.tell(Op.DECODE, len(positions), (len(tokens), 0, 0), [*positions, *tokens])
        return self.runner.decode(positions)

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Return when the GPU has come to `event`. Raises RunError where it does not."""
        self.world.wait_for_device(event)

    def move(self, source: int, target: int, length: int) -> None:
        self.tell(Op.MOVE, 0, (source, target, length), ())
        self.runner.move(source, target, length)

    def stop(self) -> None:
        """End the followers' loop."""
        self.tell(Op.STOP, 0, (0, 0, 0), ())

    def tell(self, op: Op, count: int, arguments: tuple[int, int, int], values: Sequence[int]) -> None:
        if self.world.size > 1:
            message = blank_message(self.cache)
            message[: 5 + len(values)] = torch.tensor([op, count, *arguments, *values])
            self.history.pass_on(message)


def follow(runner: Runner) -> None:
    """Take rank 0's steps until it says stop."""
    message, history = blank_message(runner.cache), History()
    while True:
        history.pass_on(message)
        op, count, *arguments = message[:5].tolist()
        values = message[5:]
        if op == Op.PREFILL:
            slot, start, all_logits = arguments
            history.pass_on(tokens := torch.zeros(count, dtype=torch.int64))
            runner.prefill(tokens.tolist(), slot=slot, start=start, all_logits=bool(all_logits))
        elif op == Op.DECODE:
            num_tokens = arguments[0]
            runner.tokens_S[:num_tokens] = values[count : count + num_tokens]
            runner.decode(values[:count].tolist())
        elif op == Op.MOVE:
            runner.move(*arguments)
        else:
            assert op == Op.STOP, f"operation {op}"
            return


class History:
    """What rank 0 has told the others. With LLAMA_MP_DEBUG=1 all compare what they heard, at each step."""

    def __init__(self) -> None:
        self.is_compared, self.digest = os.environ.get("LLAMA_MP_DEBUG") == "1", 0

    def pass_on(self, message: torch.Tensor) -> None:
        """Rank 0's `message` becomes every rank's. Raises RunError where a rank has heard another, now or before."""
        dist.broadcast(message, src=0)
        if not self.is_compared:
            return
        self.digest = zlib.crc32(message.numpy().tobytes(), self.digest)
        digests = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(digests, torch.tensor([self.digest]))
        odd = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise RunError(
                f"the ranks disagree on the tokens at step {liveness.here.step + 1}: rank {', '.join(odd)} has others "
                "than rank 0; please report it"
            )


def blank_message(cache: KVCache) -> torch.Tensor:
    """Room for any message but a prompt's tokens, so that one broadcast of a size known to all carries each."""
    return torch.zeros(5 + 2 * cache.num_slots, dtype=torch.int64)
