"""The ranks of one run: what they tell each other while they set up, and how a failure of one becomes one of all.

Messages are JSON in torchrun's store, one after the other, and every rank counts alike. Tensors go elsewhere
(parallel.py).
"""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups

from llama_mp import errors
from llama_mp.errors import LostContact, RequestError, RunError
from llama_mp.liveness import Pulse
from llama_mp.pinning import unpin

# A rank waits this long for the others while they load: a checkpoint may come from a slow network disk.
SETUP_TIMEOUT = timedelta(hours=12)
LONGEST_POLL_S = 0.05
DEVICE_POLL_S = 2e-5  # of a step of a GPU that takes a millisecond or more
CONTACT = re.compile("gloo|NCCL|Connection (closed|reset)|Broken pipe|timed out", re.IGNORECASE)


@dataclass(kw_only=True)
class World:
    """The ranks of one run; this process is `rank` of `size` and computes on `device`."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    local_size: int = 1  # ranks on this machine
    pulse: Pulse | None = None  # where there are others, and nobody else looks after them
    num_messages: int = 0  # set-up messages so far; every rank counts alike
    read_keys: list[str] = field(default_factory=list)  # of messages that may be deleted at the next `gather`

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def tell(self, message: Any) -> Any:
        """Rank 0's JSON `message`, on every rank. Waits as long as rank 0 takes, and lives."""
        if self.size == 1:
            return message
        key = self.next_key()
        if self.is_leader:
            self.store.set(key, json.dumps(message))
            self.read_keys.append(key)
            return message
        self.wait_for([key])
        return json.loads(self.store.get(key))

    def wait_for(self, keys: list[str]) -> None:
        """Return when `keys` are set. Raises LostContact when a rank falls silent."""
        pause = 0.001
        while not self.store.check(keys):  # polled: torch would print a warning for each `wait` that times out
            if self.pulse:
                self.pulse.check()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_S)

    def gather(self, message: Any) -> list[Any]:
        """Every rank's JSON `message`, on every rank, in rank order. Waits for the slowest."""
        if self.size == 1:
            return [message]
        key = self.next_key()
        self.store.set(f"{key}/{self.rank}", json.dumps(message))
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        self.wait_for(keys)
        if self.is_leader:  # all have come here, so what was said before has been read
            for old in self.read_keys:
                self.store.delete_key(old)
            self.read_keys = keys
        return [json.loads(self.store.get(k)) for k in keys]

    def next_key(self) -> str:
        self.num_messages += 1
        return f"message/{self.num_messages}"

    def agree(self, name: str, value: Any, remedy: str) -> None:
        """Raise RequestError unless every rank has the same `value`."""
        values = self.gather(value)
        if len(set(values)) > 1:
            found = ", ".join(f"rank {rank} {v}" for rank, v in enumerate(values))
            raise RequestError(f"the ranks differ in {name} ({found}): {remedy}")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A step that either all ranks finish, or that fails on all with the first failing rank's error."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        try:
            self.fail_together(failure)
        finally:
            del failure  # which knows this frame: what the failed step held would stay until Python looks for cycles

    def fail_together(self, failure: Exception | None) -> None:
        """Raise on all ranks what the first that has a `failure` has to say of it."""
        kinds = [isinstance(failure, kind) for kind in (RequestError, LostContact)]
        told = None if failure is None else [errors.one_line(failure), *kinds]
        failed = [(rank, said) for rank, said in enumerate(self.gather(told)) if said]
        failed.sort(key=lambda one: one[1][2])  # who lost contact did so because of another
        if failed and self.size == 1:
            raise failure
        if failed:
            rank, (text, was_request, _) = failed[0]
            kind = RequestError if was_request else RunError
            raise kind(text if rank == 0 else f"rank {rank}: {text}") from failure

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Steps that the ranks take at once. What breaks because another rank is gone raises LostContact."""
        try:
            yield
        except RuntimeError as error:
            about_peers = isinstance(error, dist.DistError) or CONTACT.search(str(error))
            if self.size == 1 or not about_peers:
                raise
            raise self.pulse.lost() from error

    def wait_for_device(self, event: torch.cuda.Event) -> None:
        """Return when this rank's GPU has come to `event`. Raises RunError when it waits for a rank that hangs: nobody
        else watches the sums of a CUDA graph."""
        if self.pulse is None:
            event.synchronize()
            return
        waited_s, looked_s = 0.0, time.monotonic()
        while not event.query():
            self.pulse.check()
            if waited_s > self.pulse.step_timeout_s:
                raise self.pulse.lost(for_gpu=True)
            time.sleep(DEVICE_POLL_S)
            now = time.monotonic()
            waited_s += min(now - looked_s, LONGEST_POLL_S)  # more: this rank was suspended, and the others with it
            looked_s = now

    def close(self) -> None:
        """Leave the groups. A world that failed is not closed: its peers may be gone."""
        if self.pulse:
            self.pulse.stop()
        unpin()
        fairscale_groups.destroy_model_parallel()
        dist.destroy_process_group()


def is_first_to_speak(store: dist.Store, rank: int) -> bool:
    """Whether no other rank has reported an error yet. Without the store, whose host may be gone, rank 0 speaks."""
    try:
        return store.add("speaker", 1) == 1
    except dist.DistError:
        return rank == 0
